"""Log-probs per request <-> positions of a batch: the one place that shifts, masks and pads.

Values of all samples lie end to end in one packed tensor ``[N]``, beside the number of tokens of each sample: a check or an
estimate is one operation on a batch. Which sample is wrong is looked for only where something is.

Conventions, all of them here:

- A log-prob belongs to the token it is the probability *of*: entry t of an aligned row is
  ``log p(token t | tokens < t)``. The hidden row that made it, t - 1, is the engine's business.
- Token 0 has no log-prob.
- Outside the mask values are exactly 0.0; inside they are finite, or :class:`MissingLogProbError`.
- Masks decide, never token values: a pad or EOS id inside a sequence is an ordinary token.

It knows tensors and lengths; nothing of tensordicts, engines or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from vllm_kl.errors import InputError, MissingLogProbError
from vllm_kl.types import Rows, TokenBatch, pack, place_of, widths_of

PaddingSide = Literal["left", "right"]

# What a log-prob that is not finite can come of.
_COMES_OF = {
    "nan": "NaN: none was recorded there, or the model's own numbers overflow in its dtype. ",
    "-inf": (
        "-inf is a probability of 0: processed log-probs (logprobs_mode='processed_logprobs' with top_k, top_p, bad words or "
        "another mask) have it for what the sampler ruled out, and a model for tokens that it masks itself. "
    ),
    "inf": "No log-prob is above 0: the model's own numbers overflow in its dtype, or these are logits. ",
}


def scored_spans(keep_N: torch.Tensor, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return ``(start, stop)`` of every sample: its first kept token and one past its last; ``(L, L)`` if none is kept.

    Args:
        keep_N: the mask of all samples laid end to end; it keeps no sample's token 0.
        lengths: tokens of each sample.

    >>> scored_spans(torch.tensor([False, False, True, True, False, False]), [4, 2])
    [(2, 4), (2, 2)]
    """
    borders = torch.tensor([0, *lengths]).cumsum(0)
    edges = keep_N.diff(prepend=keep_N.new_zeros(1), append=keep_N.new_zeros(1)).nonzero()[:, 0]
    begun, ended = edges.view(-1, 2).T.contiguous()  # of each run of kept tokens
    run_of = torch.searchsorted(begun, borders).tolist()
    begun, ended = begun.tolist(), ended.tolist()
    return [
        (begun[first] - border, ended[last - 1] - border) if first < last else (length, length)
        for border, length, first, last in zip(borders.tolist(), lengths, run_of, run_of[1:], strict=False)
    ]


def spread(
    scored: Sequence[torch.Tensor], spans: Sequence[tuple[int, int]], batch: TokenBatch, *, what: str
) -> torch.Tensor:
    """Return ``[N]`` float32: the spans' log-probs at their tokens, exactly 0.0 outside the mask.

    Args:
        scored: log-probs of the tokens of each span, B tensors ``[stop - start]``, nats.
        spans: of the samples, see :func:`scored_spans`.

    Raises:
        MissingLogProbError: a span has too few; or as :func:`only_kept`.
    """
    rows = []
    for i, (row, (start, stop), length) in enumerate(zip(scored, spans, batch.lengths, strict=True)):
        if len(row) != stop - start:
            raise MissingLogProbError(
                f"sample {i}: expected {stop - start} log-probs for tokens {start} to {stop - 1}, got {len(row)}"
            )
        rows.append(torch.constant_pad_nd(row.float(), (start, length - stop)))  # F.pad does the same, slower
    return only_kept(torch.cat(rows), batch.packed_keep, batch.lengths, what=what)


def only_kept(
    values_N: torch.Tensor, keep_N: torch.Tensor, lengths: Sequence[int], *, what: str
) -> torch.Tensor:
    """Return the values where the mask keeps them, exactly 0.0 elsewhere; what lies there may be anything.

    Args:
        values_N, keep_N: of all samples laid end to end; ``[N, K]`` with several log-probs a token.
        lengths: of the samples, for the message.
        what: what the message calls the values.

    Raises:
        MissingLogProbError: a kept value is not finite; with the sample, the token and the value.
    """
    keep = keep_N.to(values_N.device)
    kept = torch.where(keep if values_N.dim() == 1 else keep[:, None], values_N, 0.0)
    # Of several log-probs a token, one that is not finite stands for all.
    check_finite(kept if kept.dim() == 1 else kept.sum(-1), lengths, what=what)
    return kept


def check_finite(
    values_N: torch.Tensor, lengths: Sequence[int], *, what: str, are_log_probs: bool = True
) -> None:
    """Refuse a value that is not finite; the arguments are those of :func:`only_kept`.

    Args:
        are_log_probs: the message says what such a log-prob can come of.
    """
    if values_N.detach().sum().isfinite():  # the sum of values is finite only if all are
        return
    bad = ~values_N.detach().isfinite().cpu()
    if not bad.any():
        return
    i, t = place_of(bad, lengths)
    number = float(values_N.split(list(lengths))[i][t])
    raise MissingLogProbError(
        f"{what}: sample {i}, token {t} of {lengths[i]} is kept by the mask but its value is {number} "
        f"({int(bad.split(list(lengths))[i].sum())} such tokens in this sample). "
        f"{_COMES_OF[str(number)] if are_log_probs else ''}It is never "
        "taken as 0.0: score this batch again, or leave the token out of the mask."
    )


def to_layout(
    values_N: torch.Tensor,
    batch: TokenBatch,
    *,
    pad_output: bool,
    padding_side: PaddingSide,
    padding_value: float = 0.0,
) -> Rows:
    """Give per-token values the layout of the contract.

    ``pad_output=False``: a list of B tensors ``[L]``. ``pad_output=True``: a dense ``[B, W]`` tensor whose
    columns are those of the stored rows, so it lines up with ``("tokens", "full")`` and the masks beside it. Rows
    without padding of their own are padded on ``padding_side``. Rows that are stored padded, but to different widths
    (several steps in one batch), stay as wide as they are stored: a list.
    """
    if not pad_output:
        # Copies: a row that shared the memory of all would take all with it wherever it is sent or stored.
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
    """Read values that lie in the layout of the batch's stored rows, ``[N]``: the inverse of :func:`to_layout`.

    Raises:
        InputError: a row has neither the width of the stored row nor the length of the sequence.
    """
    found = widths_of(stored)
    if found == batch.widths:
        return pack(stored, batch.places)
    rows = list(stored)
    for i, (length, width, row_width) in enumerate(zip(batch.lengths, batch.widths, found, strict=True)):
        if row_width == width:
            rows[i] = rows[i][batch.columns[i].to(rows[i].device)]
        elif row_width != length:
            raise InputError(
                f"{what}: sample {i} has {row_width} values, expected {width}, the width of its tokens. They must come "
                "from the same step as the tokens."
            )
    return pack(rows)
