"""Log-probs per request <-> positions of a batch: the one place that shifts, masks and pads.

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
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from vllm_kl.errors import InputError, MissingLogProbError
from vllm_kl.types import TokenBatch

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


def scored_span(keep: torch.Tensor) -> tuple[int, int]:
    """Return ``(start, stop)``: the first kept token and one past the last; ``(L, L)`` if none is kept.

    >>> scored_span(torch.tensor([False, False, True, False, True, False]))
    (2, 5)
    """
    kept = keep.nonzero()
    if not len(kept):
        return len(keep), len(keep)
    return int(kept[0]), int(kept[-1]) + 1


def spread(scored: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return ``[L]`` float32: the span's log-probs at their tokens, exactly 0.0 outside ``keep``.

    Args:
        scored: log-probs of the tokens of ``scored_span(keep)``, ``[stop - start]``, nats.
        keep: tokens whose log-prob is wanted, ``[L]`` bool.
    """
    start, stop = scored_span(keep)
    if len(scored) != stop - start:
        raise MissingLogProbError(
            f"expected {stop - start} log-probs for tokens {start} to {stop - 1}, got {len(scored)}"
        )
    full = F.pad(scored.float(), (start, len(keep) - stop))
    return torch.where(keep.to(full.device), full, torch.zeros((), device=full.device))


def check_finite(
    values: Sequence[torch.Tensor], keep: Sequence[torch.Tensor], *, what: str, are_log_probs: bool = True
) -> None:
    """Refuse a value that is not finite where the mask keeps it.

    Args:
        values, keep: rows of one shape.
        what: what the message calls the values.
        are_log_probs: the message says what such a log-prob can come of.

    Raises:
        MissingLogProbError: with the sample, the position and the value.
    """
    for i, (value, kept) in enumerate(zip(values, keep, strict=True)):
        bad = kept & ~torch.isfinite(value.detach()).cpu()
        if bad.any():
            t = int(bad.nonzero()[0])
            number = float(value[t])
            raise MissingLogProbError(
                f"{what}: sample {i}, token {t} of {len(kept)} is kept by the mask but its value is {number} "
                f"({int(bad.sum())} such tokens in this sample). {_COMES_OF[str(number)] if are_log_probs else ''}It is never "
                "taken as 0.0: score this batch again, or leave the token out of the mask."
            )


def to_layout(
    values: Sequence[torch.Tensor],
    batch: TokenBatch,
    *,
    pad_output: bool,
    padding_side: PaddingSide,
    padding_value: float = 0.0,
) -> torch.Tensor | list[torch.Tensor]:
    """Give per-token values the layout of the contract.

    ``pad_output=False``: a list of B tensors ``[L]``. ``pad_output=True``: a dense ``[B, W]`` tensor whose
    columns are those of the stored rows, so it lines up with ``("tokens", "full")`` and the masks beside it. Rows
    without padding of their own are padded on ``padding_side``. Rows that are stored padded, but to different widths
    (several steps in one batch), stay as wide as they are stored: a list.
    """
    if not pad_output:
        return list(values)
    rows = []
    for value, columns, width in zip(values, batch.columns, batch.widths, strict=True):
        if len(columns) == width:
            rows.append(value)
        else:
            row = torch.full((width,), padding_value, dtype=value.dtype, device=value.device)
            rows.append(row.index_copy(0, columns.to(value.device), value))
    padded = any(len(columns) < width for columns, width in zip(batch.columns, batch.widths, strict=True))
    if padded and len(set(batch.widths)) > 1:
        return rows
    return pad_sequence(rows, batch_first=True, padding_value=padding_value, padding_side=padding_side)


def from_layout(stored: Sequence[torch.Tensor], batch: TokenBatch, *, what: str) -> list[torch.Tensor]:
    """Read values that lie in the layout of the batch's stored rows: the inverse of :func:`to_layout`.

    Raises:
        InputError: a row has neither the width of the stored row nor the length of the sequence.
    """
    out = []
    for i, (row, columns, width) in enumerate(zip(stored, batch.columns, batch.widths, strict=True)):
        if len(row) == width:
            out.append(row[columns.to(row.device)])
        elif len(row) == len(columns):
            out.append(row)
        else:
            raise InputError(
                f"{what}: sample {i} has {len(row)} values, expected {width}, the width of its tokens. They must come "
                "from the same step as the tokens."
            )
    return out
