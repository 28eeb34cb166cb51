"""Transforms on a replay buffer of this process: what they write at ``extend()`` and at ``sample()``."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import (
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    SamplerWithoutReplacement,
)
from torchrl.modules.llm.policies import LogProbs

from tests import batches
from tests.transforms.helpers import KEEP, PAD, PROMPTS, SEQUENCES, assert_rows, recorded_batch, rows
from vllm_kl import FromCollector, KLComputation, RetrieveKL, RetrieveLogProb

NAMES = "RetrieveKL", "RetrieveKL that asks", "RetrieveLogProb and KLComputation"
STORAGES = {"lazy stack": LazyStackStorage, "list": ListStorage, "padded": LazyTensorStorage}


@pytest.fixture(params=STORAGES)
def storage(request):
    """The name of a storage."""
    return request.param


@pytest.fixture
def buffer(storage):
    """A buffer that samples its four samples in order, each once."""
    return ReplayBuffer(
        storage=STORAGES[storage](8), batch_size=4, sampler=SamplerWithoutReplacement(shuffle=False)
    )


@pytest.fixture
def batch(storage, policy_oracle):
    """Recorded samples with a reward of 0: ragged, or dense for the storage that needs one shape."""
    if storage != "padded":
        return recorded_batch(policy_oracle)
    td = batches.dense_batch(SEQUENCES, PROMPTS, PAD)
    mask = td["masks", "all_assistant_mask"]
    values = torch.full(mask.shape, torch.nan)
    values[mask] = torch.cat(
        [torch.tensor(policy_oracle.log_probs(s))[k] for s, k in zip(SEQUENCES, KEEP, strict=True)]
    )
    td["log_probs"] = LogProbs(full=values, batch_size=td.batch_size)
    td["next"] = td.empty().set("reward", torch.zeros(len(td), 1, 1))
    return td


@pytest.fixture
def chain(storage, make_reference, make_gen):
    """Make the transforms that write a KL: one, or two that share the work."""
    pad_output = storage == "padded"

    def make(name):
        reference = make_reference(pad_output=pad_output)
        if name == "RetrieveKL that asks":
            policy = make_gen("vllm", pad_output=pad_output)
            return [RetrieveKL(FromCollector("rescore", policy=policy), reference)]
        if name == "RetrieveKL":
            return [RetrieveKL("from_collector", reference)]
        return [RetrieveLogProb(reference), KLComputation()]

    return make


def check(written, truth):
    """Compare KL and reward with float64: right at kept tokens, 0.0 at all others."""
    masks = rows(written, "kl_mask")
    for key, sign in (("kl_penalty", 1), ("reward", -1)):
        found = [row.reshape(-1) for row in rows(written, key)]
        assert all((row[~mask] == 0).all() for row, mask in zip(found, masks, strict=True))
        found = [sign * row[mask] for row, mask in zip(found, masks, strict=True)]
        assert_rows(found, [row[torch.tensor(keep)] for row, keep in zip(truth, KEEP, strict=True)])


def as_flat(batch):
    """Move the reward beside the log-probs: ``KLComputation`` reads both from one tensordict."""
    reward = batch["next", "reward"]
    return batch.exclude("next").set("reward", reward)


@pytest.mark.parametrize("name", NAMES)
def test_a_kl_is_subtracted_once_however_often_its_sample_is_sampled(buffer, batch, chain, truth, name):
    for transform in chain(name):
        buffer.append_transform(transform)
    buffer.extend(as_flat(batch))
    for _ in range(3):
        check(buffer.sample(), truth)
    stored = buffer._storage[0]
    assert "kl_penalty" not in stored.keys()
    assert stored["reward"].tolist() == [[0.0]]


def test_in_next_it_is_subtracted_once_too(buffer, batch, chain, truth):
    buffer.append_transform(*chain("RetrieveKL"))
    buffer.extend(batch)
    for _ in range(2):
        check(buffer.sample()["next"], truth)
    assert set(buffer._storage[0]["next"].keys()) == {"reward"}


@pytest.mark.parametrize("name", NAMES)
def test_with_invert_results_are_stored_and_the_callers_batch_stays(buffer, batch, chain, truth, name):
    for transform in reversed(chain(name)):  # torchrl 0.14 calls the last one first
        buffer.append_transform(transform, invert=True)
    batch = as_flat(batch)
    buffer.extend(batch)
    assert "kl_penalty" not in batch.keys()
    for _ in range(2):
        check(buffer.sample(), truth)
    assert "kl_penalty" in buffer._storage[0].keys()
