"""Checks spans, masks and layouts: the same values in every layout, and 0.0 outside the mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kl.batch.alignment import from_layout, only_kept, scored_spans, spread, to_layout
from vllm_kl.errors import InputError, MissingLogProbError
from vllm_kl.types import TokenBatch


def bools(text):
    return torch.tensor([c == "x" for c in text])


def batch_of(rows):
    """Return a batch of rows given as strings: ``.`` is padding, ``o`` a token, ``x`` a kept token."""
    columns = [torch.tensor([i for i, c in enumerate(row) if c != "."], dtype=torch.long) for row in rows]
    keep = [bools(row.replace(".", "")) for row in rows]
    return TokenBatch.of(
        token_ids=[torch.arange(len(c)) for c in columns],
        keep=keep,
        assistant=None,
        columns=columns,
        widths=[len(row) for row in rows],
        stored=True,
    )


@pytest.mark.parametrize(
    ("keep", "span"), [("oooxx", (3, 5)), ("oxoxo", (1, 4)), ("ooo", (3, 3)), ("ox", (1, 2)), ("o", (1, 1))]
)
def test_span_goes_from_the_first_kept_token_to_the_last(keep, span):
    rows = ["oxx", keep, "o", keep, "oxo"]
    spans = scored_spans(bools("".join(rows)), [len(row) for row in rows])
    assert spans == [(1, 3), span, (1, 1), span, (1, 2)]


def test_a_log_prob_lands_on_the_token_it_is_the_probability_of():
    batch = batch_of(["oxoxo", "o", "ox"])
    scored = [torch.tensor([-1.0, -2.0, -3.0]), torch.empty(0), torch.tensor([-4.0])]
    spans = scored_spans(batch.packed_keep, batch.lengths)
    assert spread(scored, spans, batch, what="here").tolist() == [0.0, -1.0, 0.0, -3.0, 0.0, 0.0, 0.0, -4.0]


def test_a_span_with_too_few_log_probs_is_refused():
    with pytest.raises(MissingLogProbError, match="sample 1: expected 2 log-probs for tokens 1 to 2, got 1"):
        spread([torch.tensor([-1.0])] * 2, [(1, 2), (1, 3)], batch_of(["ox", "oxx"]), what="here")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_missing_log_prob_is_refused_not_zero(value):
    values = torch.tensor([0.0, 0.0, 0.0, -1.0, value, 0.0, value])
    with pytest.raises(
        MissingLogProbError,
        match=r"sample 1, token 2 of 3 is kept by the mask but its value is .*\(1 such tokens",
    ):
        only_kept(values, bools("oxoxxox"), [2, 3, 2], what="here")


def test_what_lies_outside_the_mask_may_be_anything():
    assert only_kept(torch.tensor([float("nan"), -1.0]), bools("ox"), [2], what="here").tolist() == [
        0.0,
        -1.0,
    ]


def test_numbers_whose_sum_overflows_are_numbers():
    only_kept(torch.tensor([0.0, -3e38, -3e38]), bools("oxx"), [3], what="here")


class TestLayouts:
    def test_ragged_is_one_row_per_sequence_without_padding(self):
        batch = batch_of(["..oxx.", "ox...."])
        rows = to_layout(torch.ones(5), batch, pad_output=False, padding_side="left")
        assert [len(row) for row in rows] == [3, 2]

    def test_a_ragged_row_has_memory_of_its_own(self):
        """A view would carry the memory of the whole batch when it is sent or stored."""
        for text, pad_output in ((["oxx", "ox"], False), (["..oxx.", "ox.."], True)):
            batch = batch_of(text)
            rows = to_layout(torch.ones(5), batch, pad_output=pad_output, padding_side="left")
            assert [row.untyped_storage().nbytes() for row in rows] == [4 * len(row) for row in rows]

    def test_dense_keeps_the_columns_of_rows_that_are_stored_dense(self):
        batch = batch_of(["..oxx.", "oox..."])
        dense = to_layout(
            torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0, 3.0]), batch, pad_output=True, padding_side="left"
        )
        assert dense.tolist() == [[0, 0, 0, 1, 2, 0], [0, 0, 3, 0, 0, 0]]

    @pytest.mark.parametrize(
        ("side", "want"), [("left", [[0, 1, 2], [0, 0, 3]]), ("right", [[0, 1, 2], [0, 3, 0]])]
    )
    def test_ragged_rows_are_padded_on_padding_side(self, side, want):
        values = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0])
        assert to_layout(values, batch_of(["oxx", "ox"]), pad_output=True, padding_side=side).tolist() == want

    def test_values_of_another_step_are_refused(self):
        with pytest.raises(InputError, match="sample 1 has 4 values, expected 6"):
            from_layout([torch.zeros(3), torch.zeros(4)], batch_of(["..oxx.", "..oxx."]), what="log_probs")

    @pytest.mark.parametrize("stored", [torch.zeros(2, 6, 1), [torch.zeros(6, 1), torch.zeros(6, 1)]])
    def test_a_last_dimension_of_one_is_refused(self, stored):
        with pytest.raises(InputError, match=r"log_probs: sample 0 has the shape \[6, 1\], .*squeeze"):
            from_layout(stored, batch_of(["..oxx.", "..oxx."]), what="log_probs")

    def test_rows_of_the_sequences_length_are_read_beside_rows_with_padding(self):
        stored = [torch.arange(6.0), torch.arange(3.0)]
        values = from_layout(stored, batch_of(["..oxx.", "..oxx."]), what="log_probs")
        assert values.tolist() == [2, 3, 4, 0, 1, 2]

    def test_rows_stored_padded_to_different_widths_stay_as_wide_as_they_are(self):
        rows = to_layout(torch.ones(5), batch_of(["..oxx.", "ox.."]), pad_output=True, padding_side="left")
        assert [row.tolist() for row in rows] == [[0, 0, 1, 1, 1, 0], [1, 1, 0, 0]]


ROWS = st.lists(
    st.tuples(st.integers(0, 4), st.text("ox", min_size=0, max_size=9), st.integers(0, 4)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=500, deadline=None)
@given(ROWS, st.sampled_from(["left", "right"]))
def test_values_are_the_same_in_every_layout(rows, side):
    rows = ["." * left + "o" + tokens + "." * right for left, tokens, right in rows]
    if any("." in row for row in rows):  # one dense tensor: rows of one width
        rows = [row.ljust(max(map(len, rows)), ".") for row in rows]
    batch = batch_of(rows)
    spans = scored_spans(batch.packed_keep, batch.lengths)
    packed = spread(
        [-torch.arange(1.0, stop - start + 1) for start, stop in spans], spans, batch, what="here"
    )
    values = packed.split(batch.lengths)

    ragged = to_layout(packed, batch, pad_output=False, padding_side=side)
    dense = to_layout(packed, batch, pad_output=True, padding_side=side)
    assert dense.shape == (len(rows), max(map(len, rows)))
    for i, row in enumerate(rows):
        stored = dense[i, -len(row) :] if side == "left" else dense[i, : len(row)]
        back = from_layout([stored], batch_of([row]), what="back")
        assert torch.equal(back, values[i])
        assert torch.equal(ragged[i], values[i])
        assert (values[i][~batch.keep[i]] == 0).all()
        assert torch.count_nonzero(dense[i]) == torch.count_nonzero(values[i])  # nothing leaks into padding
