"""The transform's own work: a few operations on a batch, few for each sample."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.modules.llm.policies import LogProbs

from tests.batches import dense_batch, ids_batch
from tests.instant_engine import InstantEngine
from vllm_kl import RetrieveKL, VLLMReference, VLLMScorer


class Count(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    num_ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_ops += 1
        return func(*args, **(kwargs or {}))


def collected(num_samples, is_dense):
    """A batch as a collector yields it, with recorded log-probs and a reward."""
    sequences = [[i, 150, 151, *range(152, 160 + i % 7)] for i in range(num_samples)]
    reward = TensorDict(reward=torch.zeros(num_samples, 1, 1), batch_size=num_samples)
    if not is_dense:
        masks = [[False, False] + [True] * (len(ids) - 2) for ids in sequences]
        td = ids_batch(sequences, assistant=masks)
        for sample, ids in zip(td.unbind(0), sequences, strict=True):
            sample["log_probs"] = LogProbs(full=torch.full((len(ids),), -1.0))
        return lazy_stack([s.set("next", r) for s, r in zip(td.unbind(0), reward.unbind(0), strict=True)])
    td = dense_batch(sequences, [2] * num_samples, 0)
    td["log_probs"] = LogProbs(full=torch.full(td["tokens", "full"].shape, -1.0), batch_size=num_samples)
    return td.set("next", reward)


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("extra", [(), ("k2", "k3")])
def test_a_sample_more_costs_a_few_operations(is_dense, extra):
    """Checks and estimates run on all samples at once; only rows to send and write are per sample."""
    reference = VLLMReference(VLLMScorer(InstantEngine(), canary=False), pad_output=is_dense)
    transform = RetrieveKL("from_collector", reference, gen_log_probs="reuse", extra_estimators=extra)
    counts = {}
    for num_samples in (10, 50):
        td = collected(num_samples, is_dense)
        with Count() as count:
            td = transform(td)
        counts[num_samples] = count.num_ops
        kl = td["next"].get("kl_penalty", as_list=True)
        assert [row[row != 0].tolist() for row in kl] == [[0.5] * (9 + i % 7) for i in range(num_samples)]
    per_sample = (counts[50] - counts[10]) / 40
    assert per_sample <= (7 if is_dense else 15 + len(extra)), per_sample
