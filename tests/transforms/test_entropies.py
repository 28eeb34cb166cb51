"""``RetrieveLogProb`` and ``RetrieveKL`` write the entropies of a model where they write its log-probs."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import Composite

from tests.batches import history_batch, ids_batch
from tests.oracle import ENTROPY_TOLERANCE, KL_TOLERANCE, LOG_PROB_TOLERANCE
from tests.transforms.helpers import KEEP, PROMPTS, SEQUENCES, assert_rows, recorded_batch, rows
from vllm_kl import RetrieveKL, RetrieveLogProb
from vllm_kl.errors import OptionError

KEY = ("ref_entropy", "full")
LOG_PROBS = ("ref_log_probs", "full")


def truths(oracle, sequences=SEQUENCES, masks=KEEP):
    """The oracle's entropies of kept tokens, ``[L]`` float64, nats; 0.0 elsewhere."""
    return [
        torch.tensor(oracle.entropies(ids), dtype=torch.float64).where(torch.tensor(keep), 0.0)
        for ids, keep in zip(sequences, masks, strict=True)
    ]


def check(td, oracle, padding_side="left"):
    """Every entropy stands where the log-prob of its token stands, and all others are exactly 0.0."""
    found = rows(td, KEY)
    for row, log_probs, mask in zip(found, rows(td, LOG_PROBS), rows(td, "kl_mask"), strict=True):
        assert row.shape == log_probs.shape
        assert torch.equal(row != 0, mask)
        assert not row.requires_grad
    end = (lambda row, n: row[-n:]) if padding_side == "left" else (lambda row, n: row[:n])
    cut = [end(row, len(ids)) for row, ids in zip(found, SEQUENCES, strict=True)]
    assert_rows(cut, truths(oracle), ENTROPY_TOLERANCE)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
def test_entropies_agree_with_float64_at_the_tokens_of_the_log_probs(
    make_reference, ref_oracle, pad_output, padding_side
):
    transform = RetrieveLogProb(
        make_reference(pad_output=pad_output), padding_side=padding_side, entropy_key=KEY
    )
    td = transform(ids_batch(SEQUENCES, PROMPTS))
    check(td, ref_oracle, padding_side)
    without = RetrieveLogProb(make_reference(pad_output=pad_output), padding_side=padding_side)
    same = rows(without(ids_batch(SEQUENCES, PROMPTS)), LOG_PROBS)
    assert_rows(rows(td, LOG_PROBS), [row.double() for row in same], LOG_PROB_TOLERANCE)


def test_every_token_but_the_first_has_an_entropy_without_assistant_only(make_reference, ref_oracle):
    transform = RetrieveLogProb(
        make_reference(input_mode="tokens"), assistant_only=False, entropy_key="ref_entropy"
    )
    found = rows(transform(ids_batch(SEQUENCES)), "ref_entropy")
    keep = [[t > 0 for t in range(len(ids))] for ids in SEQUENCES]
    assert_rows(found, truths(ref_oracle, masks=keep), ENTROPY_TOLERANCE)


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
def test_a_kl_with_entropies_is_the_same_kl(make_reference, policy_oracle, ref_oracle, pad_output):
    written = [
        RetrieveKL("from_collector", make_reference(pad_output=pad_output), ref_entropy_key=key)(
            recorded_batch(policy_oracle)
        )["next"]
        for key in (KEY, None)
    ]
    check(written[0], ref_oracle)
    assert KEY not in written[1].keys(True)
    got, want = (rows(td, "kl_penalty") for td in written)
    assert_rows(got, [row.double() for row in want], KL_TOLERANCE)


def test_a_history_has_entropies_of_the_assistants_tokens(make_reference):
    td = RetrieveLogProb(make_reference(), entropy_key=KEY)(history_batch())
    for row, mask in zip(rows(td, KEY), rows(td, "kl_mask"), strict=True):
        assert torch.equal(row > 0, mask)


def test_a_batch_without_a_kept_token_has_entropies_of_zero(make_reference):
    td = RetrieveLogProb(make_reference(), entropy_key=KEY)(ids_batch([[5, 6], [7, 8, 9]], [2, 3]))
    assert [row.tolist() for row in rows(td, KEY)] == [[0.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_specs_declare_the_entropies(make_reference):
    for transform in (
        RetrieveLogProb(make_reference(), entropy_key=KEY),
        RetrieveKL("from_collector", make_reference(), ref_entropy_key=KEY, add_to_reward=False),
    ):
        assert KEY in transform.out_keys
        spec = transform.transform_observation_spec(Composite(shape=(2,)))
        assert spec[KEY].shape == (2, -1)
        assert spec[KEY].dtype == torch.float32


def test_a_model_that_returns_no_entropy_is_refused_when_the_transform_is_built(make_gen, make_reference):
    with pytest.raises(OptionError, match="a TransformersScorer returns no entropy"):
        RetrieveLogProb(make_gen("transformers"), entropy_key=KEY)
    with pytest.raises(OptionError, match="the read-out 'flat' returns no entropy"):
        RetrieveLogProb(make_gen("vllm"), entropy_key=KEY)
    with pytest.raises(OptionError, match="a TransformersScorer returns no entropy"):
        RetrieveKL(make_gen("transformers"), make_gen("transformers"), ref_entropy_key=KEY)


def test_two_results_under_one_key_are_refused(make_reference):
    with pytest.raises(OptionError, match="two results would be written to one key"):
        RetrieveLogProb(make_reference(), entropy_key=("ref_log_probs", "full"))
    with pytest.raises(OptionError, match="two results would be written to one key"):
        RetrieveKL("from_collector", make_reference(), ref_entropy_key="kl_penalty")
