"""Places log-probs at the tokens of a batch. Only this module shifts, masks and pads log-probs.

One packed tensor ``[N]`` holds the values of all samples end to end, and a list holds the number of tokens of
each sample. So a check or an estimate is one operation on the whole batch. The code looks for the wrong
sample only after a check has failed.

Conventions:

- A log-prob belongs to the token whose probability it is: entry t of an aligned row is
  ``log p(token t | tokens < t)``. Only engines know that hidden row t - 1 gives this value.
- Token 0 has no log-prob.
- Outside the mask, values are exactly 0.0. Inside the mask, values are finite, or
  :class:`MissingLogProbError` is raised.
- Masks decide which tokens count, never token values: a pad or EOS id inside a sequence is an ordinary token.

The module knows tensors and lengths, but no tensordicts, engines or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from vllm_kl.errors import InputError, MissingLogProbError
from vllm_kl.types import Rows, TokenBatch, pack, place_of, widths_of

PaddingSide = Literal["left", "right"]

# Causes of a log-prob that is not finite, for messages.
_COMES_OF = {
    "nan": "NaN: no log-prob was recorded for this token, or the model overflows in its dtype.",
    "-inf": (
        "-inf is a probability of 0: the sampler ruled the token out (logprobs_mode='processed_logprobs' "
        "with top_k, top_p, bad words or another mask), or the model masks the token itself."
    ),
    "inf": "No log-prob is above 0: the model overflows in its dtype, or the values are logits.",
}


def scored_spans(keep_N: torch.Tensor, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return ``(start, stop)`` of each sample: first kept token and one past the last, ``(L, L)`` if none.

    Args:
        keep_N: the packed mask of all samples. It must not keep a token 0.
        lengths: number of tokens of each sample.

    >>> scored_spans(torch.tensor([False, False, True, True, False, False]), [4, 2])
    [(2, 4), (2, 2)]
    """
    borders = torch.tensor([0, *lengths]).cumsum(0)
    edges = keep_N.diff(prepend=keep_N.new_zeros(1), append=keep_N.new_zeros(1)).nonzero()[:, 0]
    begun, ended = edges.view(-1, 2).T.contiguous()  # first token and end of each run of kept tokens
    run_of = torch.searchsorted(begun, borders).tolist()
    begun, ended = begun.tolist(), ended.tolist()
    return [
        (begun[first] - border, ended[last - 1] - border) if first < last else (length, length)
        for border, length, first, last in zip(borders.tolist(), lengths, run_of, run_of[1:], strict=False)
    ]


def spread(
    scored: Sequence[torch.Tensor], spans: Sequence[tuple[int, int]], batch: TokenBatch, *, what: str
) -> torch.Tensor:
    """Return ``[N]`` float32: the log-probs of the spans at their tokens, and exactly 0.0 outside the mask.

    Args:
        scored: log-probs of the tokens of each span, B tensors ``[stop - start]``, nats.
        spans: one per sample, see :func:`scored_spans`.
        what: name of the values in messages.

    Raises:
        MissingLogProbError: a span has a wrong number of log-probs, or a kept value is not finite.
    """
    rows = []
    for i, (row, (start, stop), length) in enumerate(zip(scored, spans, batch.lengths, strict=True)):
        if len(row) != stop - start:
            raise MissingLogProbError(
                f"sample {i}: expected {stop - start} log-probs for tokens {start} to {stop - 1}, got "
                f"{len(row)}"
            )
        rows.append(torch.constant_pad_nd(row.float(), (start, length - stop)))  # F.pad is slower
    return only_kept(torch.cat(rows), batch.packed_keep, batch.lengths, what=what)


def check_rows(rows: Rows, *, what: str) -> None:
    """Refuse rows that are not one value for each token, such as ``[T, 1]``.

    Raises:
        InputError: a row has another number of dimensions than 1; the message names the sample.

    >>> check_rows([torch.zeros(3), torch.zeros(2, 1)], what="log_probs")
    Traceback (most recent call last):
        ...
    vllm_kl.errors.InputError: log_probs: sample 1 has the shape [2, 1], expected [T]. Take the last ...
    """
    for i, row in enumerate(rows):
        check_dims(row, (1,), what=f"{what}: sample {i}", expected="[T]")


def check_dims(values: torch.Tensor, dims: tuple[int, ...], *, what: str, expected: str) -> None:
    """Refuse values with another number of dimensions than one of ``dims``; ``expected`` is their shape."""
    if values.dim() not in dims:
        is_column = values.dim() == dims[-1] + 1 and values.shape[-1] == 1
        cure = ". Take the last dimension away: .squeeze(-1)" if is_column else ""
        raise InputError(f"{what} has the shape {list(values.shape)}, expected {expected}{cure}")


def only_kept(
    values_N: torch.Tensor, keep_N: torch.Tensor, lengths: Sequence[int], *, what: str
) -> torch.Tensor:
    """Return the values inside the mask, and exactly 0.0 outside, where the values may be anything.

    Args:
        values_N: packed values, or ``[N, K]`` with K log-probs per token.
        keep_N: packed mask.
        lengths: number of tokens of each sample, for messages.
        what: name of the values in messages.

    Raises:
        MissingLogProbError: a kept value is not finite; the message names the sample, the token and the
            value.
    """
    keep = keep_N.to(values_N.device)
    kept = torch.where(keep if values_N.dim() == 1 else keep[:, None], values_N, 0.0)
    # With K log-probs per token, the sum is not finite if one of them is not; float64 sums do not overflow.
    check_finite(kept if kept.dim() == 1 else kept.sum(-1, dtype=torch.float64), lengths, what=what)
    return kept


def check_finite(
    values_N: torch.Tensor, lengths: Sequence[int], *, what: str, are_log_probs: bool = True
) -> None:
    """Raise if a value is not finite. Most arguments are those of :func:`only_kept`.

    Args:
        are_log_probs: whether the message explains where such a log-prob can come from.

    Raises:
        MissingLogProbError: a value is not finite.
    """
    if values_N.detach().sum().isfinite():  # a sum is finite only if all values are
        return
    bad = ~values_N.detach().isfinite().cpu()
    if not bad.any():
        return
    i, t = place_of(bad, lengths)
    number = float(values_N.split(list(lengths))[i][t])
    raise MissingLogProbError(
        f"{what}: sample {i}, token {t} of {lengths[i]} is kept by the mask but its value is {number} "
        f"({int(bad.split(list(lengths))[i].sum())} such tokens in this sample)."
        f"{' ' + _COMES_OF[str(number)] if are_log_probs else ''}\n"
        "Score this batch again, or leave the token out of the mask. The value never counts as 0.0."
    )


def to_layout(
    values_N: torch.Tensor,
    batch: TokenBatch,
    *,
    pad_output: bool,
    padding_side: PaddingSide,
    padding_value: float = 0.0,
) -> Rows:
    """Split packed values into the rows of the batch.

    ``pad_output=False`` returns a list of B tensors ``[L]``. ``pad_output=True`` returns a dense ``[B, W]``
    tensor with the columns of the stored rows, so that it lines up with ``("tokens", "full")`` and the masks.
    If the stored rows have no padding, ``padding_side`` says where padding goes. If the stored rows are
    padded to different widths (several steps in one batch), the result is a list of rows of these widths.
    """
    if not pad_output:
        # Copies: a view of the packed tensor would carry all rows with it when it is sent or stored.
        return [row.clone() for row in values_N.split(batch.lengths)]
    if batch.places is None:
        rows = values_N.split(batch.lengths)
        return pad_sequence(rows, batch_first=True, padding_value=padding_value, padding_side=padding_side)
    flat = values_N.new_full((sum(batch.widths),), padding_value)
    flat.index_copy_(0, batch.places.to(values_N.device), values_N)
    if len(set(batch.widths)) > 1:
        return [row.clone() for row in flat.split(batch.widths)]
    return flat.view(len(batch), -1)


def from_layout(stored: Rows, batch: TokenBatch, *, what: str) -> torch.Tensor:
    """Pack values that have the layout of the batch's stored rows, ``[N]``: the inverse of :func:`to_layout`.

    Raises:
        InputError: a row has more than one dimension, or its width is neither that of the stored ids nor the
            length of the sequence.
    """
    check_rows(stored, what=what)
    found = widths_of(stored)
    if found == batch.widths:
        return pack(stored, batch.places)
    rows = list(stored)
    for i, (length, width, row_width) in enumerate(zip(batch.lengths, batch.widths, found, strict=True)):
        if row_width == width:
            rows[i] = rows[i][batch.columns[i].to(rows[i].device)]
        elif row_width != length:
            raise InputError(
                f"{what}: sample {i} has {row_width} values, expected {width}, the width of its tokens. "
                "The values must come from the same step as the tokens."
            )
    return pack(rows)
