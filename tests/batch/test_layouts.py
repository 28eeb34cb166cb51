"""Checks the way from a stored batch to aligned log-probs, on sequences that Hypothesis picks.

The engine's log-probs depend on every token before them, so a value at a wrong token or sample is detected.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Masks, Tokens

from tests.batches import dense_batch, ids_batch
from vllm_kl.batch.alignment import to_layout
from vllm_kl.batch.read_tokens import InputKeys, read_batch
from vllm_kl.errors import InputError
from vllm_kl.transforms.score_batch import score_batch

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
        values = score_batch(PrefixScorer(), batch).values
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
    masks = [
        [False, *data.draw(st.lists(st.booleans(), min_size=len(s) - 1, max_size=len(s) - 1))]
        for s in sequences
    ]
    batch = read_batch(ids_batch(sequences, assistant=masks), KEYS, assistant_only=True)
    for row, ids, mask in zip(
        score_batch(PrefixScorer(), batch).values.split(batch.lengths), sequences, masks, strict=True
    ):
        assert row.tolist() == pytest.approx(
            [log_prob(ids, t) if kept else 0.0 for t, kept in enumerate(mask)]
        )


def test_a_mask_that_keeps_the_first_token_is_refused():
    with pytest.raises(InputError, match="sample 1: the assistant mask keeps token 0"):
        read_batch(ids_batch([[1, 2], [3]], assistant=[[False, True], [True]]), KEYS, assistant_only=True)


def apart(prompts, full, attention=None):
    """Prompts that are no columns of the full rows, without assistant mask. Rows of one width are dense."""
    samples = [
        TensorDict(tokens=Tokens(prompt=torch.tensor(p, dtype=torch.long), full=torch.tensor(f)))
        for p, f in zip(prompts, full, strict=True)
    ]
    for sample, mask in zip(samples, attention or [], strict=attention is not None):
        sample["masks"] = Masks(all_attention_mask=torch.tensor(mask).bool())
    widths = {len(p) for p in prompts}, {len(f) for f in full}
    return torch.stack(samples) if max(map(len, widths)) == 1 else lazy_stack(samples)


def kept(td, tokenizer_pad=None):
    keys = replace(KEYS, tokenizer=SimpleNamespace(pad_token_id=tokenizer_pad))
    return [keep.tolist() for keep in read_batch(td, keys, assistant_only=True).keep]


FIRST, SECOND = [False, False, True, True], [False, False, False, True, True, True]


class TestPromptsWithoutAnAssistantMask:
    """Prompts must be columns of the full rows, or ids without padding: no mask shows their padding."""

    def test_prompts_that_are_columns_of_the_full_rows(self):
        mask = [[0, 1, 1, 1, 1, 0], [1] * 6]
        assert kept(apart([[0, 5, 6], [9, 8, 7]], [[0, 5, 6, 7, 8, 0], [9, 8, 7, 5, 4, 3]], mask)) == [
            FIRST,
            SECOND,
        ]

    def test_prompts_without_padding_beside_padded_sequences(self):
        mask = [[0, 0, 1, 1, 1, 1], [1] * 6]
        assert kept(apart([[5, 6], [9, 8, 7]], [[0, 0, 5, 6, 7, 8], [9, 8, 7, 5, 4, 3]], mask)) == [
            FIRST,
            SECOND,
        ]

    def test_a_pad_id_that_begins_or_ends_a_prompt_without_padding_is_a_token_of_it(self):
        mask = [[0, 0, 1, 1, 1, 1], [1] * 6]
        td = apart([[0, 6], [9, 8, 0]], [[0, 0, 0, 6, 7, 8], [9, 8, 0, 0, 0, 0]], mask)
        assert kept(td, tokenizer_pad=0) == [FIRST, SECOND]

    def test_prompts_cut_on_the_left_as_the_sequences_are(self):
        assert kept(apart([[6], [8, 7]], [[6, 7, 8], [8, 7, 5, 4]])) == [
            [False, True, True],
            [False, False, True, True],
        ]

    @pytest.mark.parametrize(
        ("prompts", "full", "mask", "message"),
        [
            ([[0, 5, 6], [9, 8, 7]], [[0, 0, 5, 6, 7, 8], [9, 8, 7, 5, 4, 3]], [[0, 0, 1, 1, 1, 1], [1] * 6],
             "sample 0: .* its token 1 is 5, expected 0"),
            ([[5, 6, 0], [9, 8, 7]], [[5, 6, 7, 8, 0, 0], [9, 8, 7, 5, 4, 3]], [[1, 1, 1, 1, 0, 0], [1] * 6],
             "sample 0: .* its token 2 is 0, expected 7"),
            ([[0, 5, 6], [9, 8, 7]], [[5, 6, 7, 8], [9, 8, 7, 5, 4, 3]], None,
             "sample 0: .* its token 0 is 0, expected 5"),
            ([[0, 5, 6], [9, 8, 0]], [[0, 5, 6, 7], [9, 8, 7, 5]], [[0, 1, 1, 1], [1] * 4],
             "sample 1: .* its token 2 is 0, expected 7"),
        ],
        ids=["left", "right", "beside sequences without padding", "both sides"],
    )  # fmt: skip
    def test_prompts_padded_apart_from_the_full_rows_are_refused(self, prompts, full, mask, message):
        cure = "first columns of the full rows, padding included, or the first ids .*all_assistant_mask"
        with pytest.raises(InputError, match=f"{message}.*{cure}"):
            kept(apart(prompts, full, mask), tokenizer_pad=0)

    def test_ids_that_do_not_begin_the_sequence_are_refused(self):
        with pytest.raises(
            InputError, match=r"sample 1: .*'prompt'.* token 1 is 4, expected 8.*all_assistant_mask"
        ):
            kept(apart([[5, 6], [9, 4]], [[5, 6, 7], [9, 8, 7]]))

    def test_a_prompt_that_is_longer_than_its_sequence_is_refused(self):
        with pytest.raises(InputError, match="sample 0: .* its token 3 is 8, expected the end of the row"):
            kept(apart([[5, 6, 7, 8]], [[5, 6, 7]]))

    def test_a_pad_id_that_may_be_the_prompts_end_or_a_response_is_refused(self):
        td = apart([[5, 6, 0], [9, 8, 7]], [[5, 6, 0, 0], [9, 8, 7, 5]], [[1, 1, 1, 0], [1] * 4])
        with pytest.raises(
            InputError, match=r"sample 0: .* with 2 tokens or with 3: .*Remove the padding.*all_assista"
        ):
            kept(td)

    def test_a_prompt_that_reads_as_columns_and_without_padding_is_refused(self):
        td = apart([[0, 0], [0, 9, 8]], [[0, 0, 0, 6], [0, 9, 8, 7]], [[0, 1, 1, 1], [1] * 4])
        with pytest.raises(InputError, match="sample 0: .* with 1 tokens or with 2: "):
            kept(td)

    def test_a_prompt_does_not_matter_where_a_mask_is_stored_or_all_tokens_count(self):
        td = apart([[1, 1, 1]], [[5, 6, 7]], [[1, 1, 1]])
        batch = read_batch(td, KEYS, assistant_only=False)
        assert batch.keep[0].tolist() == [False, True, True]
        assert batch.assistant is None
        td["masks", "all_assistant_mask"] = torch.tensor([[False, False, True]])
        assert kept(td) == [[False, False, True]]


@settings(max_examples=500, deadline=None)
@given(SAMPLES, st.sampled_from(["left", "right", None]), st.sampled_from(["left", "right", None]))
def test_prompts_padded_in_any_way_end_where_they_end_or_are_refused(samples, prompt_side, full_side):
    sequences = [prompt + response for prompt, response in samples]
    prompts = [torch.tensor(prompt) for prompt, _ in samples]
    td = (
        ids_batch(sequences)
        if full_side is None
        else one_sided_batch(sequences, [1] * len(samples), full_side)
    )
    td = td.exclude(("masks", "all_assistant_mask")).to_lazystack(0)
    rows = prompts if prompt_side is None else padded(prompts, prompt_side, PAD).unbind(0)
    for sample, row in zip(td.unbind(0), rows, strict=True):
        sample["tokens", "prompt"] = row
    want = [[t >= len(prompt) for t in range(len(prompt + response))] for prompt, response in samples]
    try:
        got = kept(td, tokenizer_pad=PAD)
    except InputError as error:
        got = str(error)
    if got != want:
        is_padded = prompt_side is not None and len({len(prompt) for prompt, _ in samples}) > 1
        assert isinstance(got, str)
        assert is_padded or any(PAD in (prompt[0], prompt[-1]) for prompt, _ in samples)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (torch.tensor([[1.7, 2.0]]), "dtype torch.float32"),
        (torch.tensor([[True, False]]), "dtype torch.bool"),
        (torch.tensor([[[1], [2]]]), r"shape \[2, 1\]"),
        (torch.tensor([3]), r"shape \[\]"),
    ],
)
@pytest.mark.parametrize("is_ragged", [False, True])
def test_ids_that_are_no_rows_of_ints_are_refused(ids, found, is_ragged):
    td = TensorDict(tokens=Tokens(full=ids, batch_size=(1,)), batch_size=(1,))
    with pytest.raises(InputError, match=rf"sample 0: \('tokens', 'full'\) has .*{found}.*, expected a row"):
        read_batch(lazy_stack(list(td.unbind(0))) if is_ragged else td, KEYS, assistant_only=False)
