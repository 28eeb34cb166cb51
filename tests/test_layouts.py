"""The whole way from a stored batch to aligned log-probs, with an engine whose numbers depend on every token before them.

A value that lands one token off, in another sample or in another layout is another number. Hypothesis picks the sequences.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.modules.llm.policies import Masks, Tokens

from tests.batches import dense_batch, ids_batch
from vllm_kl.alignment import to_layout
from vllm_kl.errors import InputError
from vllm_kl.inputs import InputKeys, read_batch
from vllm_kl.resolver import score_batch

KEYS = InputKeys(input_mode="history", key=("history", "full"))
PAD = EOS = 0  # the same id, and an ordinary token of the sequences too


def log_prob(ids, t):
    """A made-up log-prob of token t: never 0, and another number for other tokens before it."""
    return -1.0 - sum((i + 1) * (token + 1) for i, token in enumerate(ids[: t + 1])) % 997 / 100


class PrefixScorer:
    """Values that depend on the whole prefix; refuses what a real engine refuses."""

    def score(self, token_ids, start):
        for ids, first in zip(token_ids, start, strict=True):
            assert 1 <= first < len(ids)
        return [
            torch.tensor([log_prob(ids.tolist(), t) for t in range(first, len(ids))])
            for ids, first in zip(token_ids, start, strict=True)
        ]


# Prompts may be cut on the left to nothing but a token, responses empty; pad ids may be anywhere.
SAMPLES = st.lists(
    st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=7), st.lists(st.integers(0, 5), max_size=7)),
    min_size=1,
    max_size=5,
)


def padded(rows, side, value):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side, padding_value=value)


def one_sided_batch(sequences, prompt_lengths, side):
    """Whole sequences padded on one side, with masks."""
    rows = [torch.tensor(s) for s in sequences]
    assistant = [torch.arange(len(s)) >= p for s, p in zip(sequences, prompt_lengths, strict=True)]
    size = (len(rows),)
    return TensorDict(
        tokens=Tokens(full=padded(rows, side, PAD), batch_size=size),
        masks=Masks(
            all_attention_mask=padded([torch.ones(len(r), dtype=torch.bool) for r in rows], side, False),
            all_assistant_mask=padded(assistant, side, False),
            batch_size=size,
        ),
        batch_size=size,
    )


def layouts(sequences, prompt_lengths):
    yield "ragged", ids_batch(sequences, prompt_lengths)
    assistant = [[t >= p for t in range(len(s))] for s, p in zip(sequences, prompt_lengths, strict=True)]
    yield "ragged with masks", ids_batch(sequences, assistant=assistant)
    yield "prompts left, responses right", dense_batch(sequences, prompt_lengths, PAD)
    for side in ("left", "right"):
        yield side, one_sided_batch(sequences, prompt_lengths, side)


@settings(max_examples=500, deadline=None)
@given(SAMPLES, st.booleans())
def test_every_token_has_the_same_value_in_every_layout(samples, assistant_only):
    sequences = [prompt + response for prompt, response in samples]
    prompt_lengths = [len(prompt) for prompt, _ in samples]
    for name, td in layouts(sequences, prompt_lengths):
        batch = read_batch(td, KEYS, assistant_only=assistant_only)
        values = score_batch(PrefixScorer(), batch)
        stored = td.get(("tokens", "full"), as_list=True)
        for pad_output in (False, True):
            for side in ("left", "right"):
                rows = to_layout(values, batch, pad_output=pad_output, padding_side=side)
                assert len(rows) == len(sequences), name
                if pad_output:
                    width = max(len(row) for row in stored)
                    assert rows.shape == (len(sequences), width), name
                for i, (ids, row) in enumerate(zip(sequences, rows, strict=True)):
                    first = prompt_lengths[i] if assistant_only else 1
                    want = [log_prob(ids, t) if t >= first else 0.0 for t in range(len(ids))]
                    if pad_output and not name.startswith("ragged"):  # in the columns of the stored row
                        real = td["masks", "all_attention_mask"][i]
                        assert row[real].tolist() == pytest.approx(want), name
                        assert (row[~real] == 0).all(), name
                    else:
                        padding = [0.0] * (len(row) - len(want))
                        want = padding + want if side == "left" else want + padding
                        assert row.tolist() == pytest.approx(want), name
                        assert pad_output or not padding, name


@settings(max_examples=500, deadline=None)
@given(SAMPLES, st.data())
def test_any_mask_keeps_its_tokens_and_no_others(samples, data):
    sequences = [prompt + response for prompt, response in samples]
    masks = [[False, *data.draw(st.lists(st.booleans(), min_size=len(s) - 1, max_size=len(s) - 1))] for s in sequences]
    batch = read_batch(ids_batch(sequences, assistant=masks), KEYS, assistant_only=True)
    for row, ids, mask in zip(score_batch(PrefixScorer(), batch), sequences, masks, strict=True):
        assert row.tolist() == pytest.approx([log_prob(ids, t) if kept else 0.0 for t, kept in enumerate(mask)])


def test_a_mask_that_keeps_the_first_token_is_refused():
    with pytest.raises(InputError, match="sample 1: the assistant mask keeps token 0"):
        read_batch(ids_batch([[1, 2], [3]], assistant=[[False, True], [True]]), KEYS, assistant_only=True)
