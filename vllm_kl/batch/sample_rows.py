"""Results of a scored batch -> rows of its real tokens: what :func:`vllm_kl.view.samples.samples_from_batch` reads.

Ids that are ragged may have results that were padded to one width, on a side that the batch does not tell: the caller says it. A
row read from the wrong side is shifted, so whatever shows that is refused: a value in the padding or at token 0, a mask that is
not the batch's, values outside the mask that fit it from the other side.

It knows tensordicts and layouts; nothing of files.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDictBase

from vllm_kl.batch.alignment import PaddingSide, from_layout
from vllm_kl.batch.inputs import rows_of
from vllm_kl.errors import InputError
from vllm_kl.types import TokenBatch

_CURE = "pass the padding_side of the transform that wrote it"


def result_rows(data: TensorDictBase, key: str | tuple[str, ...]) -> list[torch.Tensor] | None:
    """Return an entry's rows, found under ``"next"`` or at the root, or ``None``."""
    under_next = ("next", key) if isinstance(key, str) else ("next", *key)
    rows = rows_of(data, under_next) if "next" in data.keys() else None
    return rows_of(data, key) if rows is None else rows


def aligned(
    rows: list[torch.Tensor],
    batch: TokenBatch,
    padding_side: PaddingSide,
    what: str,
    *,
    keep: list[torch.Tensor] | None = None,
    is_zero_outside: bool = True,
) -> list[torch.Tensor]:
    """Return ``[L]`` values of the real tokens; without the padding of results that are dense while their ids are ragged.

    Args:
        rows: one per sample, as they are stored.
        keep: the mask of the values, where it is known.
        is_zero_outside: the padding holds zeros, and so does token 0.

    Raises:
        InputError: a row was padded on the other side, or does not fit the ids.
    """
    rows = [row.detach().cpu() for row in rows]
    for i, num_padding in enumerate(_num_padding(rows, batch)):
        if not num_padding:
            continue
        row, width, columns = rows[i], batch.widths[i], batch.columns[i]
        values, other, padding = row[num_padding:], row[:width], row[:num_padding]
        if padding_side == "right":
            values, other, padding = other, values, row[width:]
        rows[i] = values
        if not is_zero_outside:
            continue
        if padding.any():
            raise InputError(
                f"{what}: sample {i} has values where padding was expected, on the {padding_side}: {_CURE}"
            )
        if values[: int(columns[0]) + 1].any():
            raise InputError(
                f"{what}: sample {i}, read as padded on the {padding_side}, has a value at token 0, expected 0: {_CURE}"
            )
        if keep is not None:
            outside = torch.ones(width, dtype=torch.bool).index_fill(0, columns[keep[i]], False)
            wrong = outside & (values != 0)
            if wrong.any() and not other[outside].any():
                raise InputError(
                    f"{what}: sample {i}, token {int((columns == wrong.nonzero()[0]).nonzero()[0])}, read as padded on the "
                    f"{padding_side}, has a value that the mask leaves out, expected 0, as read from the other side: {_CURE}"
                )
    return list(from_layout(rows, batch, what=what).split(batch.lengths))


def read_mask(
    rows: list[torch.Tensor], batch: TokenBatch, padding_side: PaddingSide, what: str
) -> list[torch.Tensor]:
    """Return the stored masks of the real tokens, ``[L]`` bool.

    Where padding was cut off, so that a wrong side would shift it, a mask must be the batch's own (``("masks",
    "all_assistant_mask")``, or else what follows ``("tokens", "prompt")``) or all tokens but token 0.

    Raises:
        InputError: a mask keeps token 0, was padded on the other side, or does not fit the ids.
    """
    keep = [row.bool() for row in aligned(rows, batch, padding_side, what)]
    for i, (mask, num_padding) in enumerate(zip(keep, _num_padding(rows, batch), strict=True)):
        if mask[0]:
            raise InputError(
                f"{what}: sample {i} keeps token 0, which has no log-prob because nothing comes before it; expected false there. "
                f"Clear it; or, if it was padded, {_CURE}"
            )
        after_first = torch.arange(len(mask)) > 0
        if not num_padding or batch.assistant is None or torch.equal(mask, after_first):
            continue
        differs = mask != (batch.assistant[i] & after_first)
        if differs.any():
            t = int(differs.nonzero()[0])
            raise InputError(
                f"{what}: sample {i}, token {t}, read as padded on the {padding_side}, is {bool(mask[t])}, expected "
                f"{not bool(mask[t])}, as in ('masks', 'all_assistant_mask') or after ('tokens', 'prompt'): {_CURE}"
            )
    return keep


def read_rewards(
    data: TensorDictBase, batch: TokenBatch, keep: list[torch.Tensor], padding_side: PaddingSide
) -> list[float | None]:
    """Return one reward per sample: the stored one, or the mean over the mask of one per token."""
    rows = result_rows(data, "reward")
    if rows is None:
        return [None] * len(keep)
    if all(row.numel() == 1 for row in rows):
        return [float(row) for row in rows]
    per_token = aligned(
        [row.reshape(-1) for row in rows], batch, padding_side, "reward", is_zero_outside=False
    )
    return [
        float(row[kept].double().mean()) if kept.any() else None
        for row, kept in zip(per_token, keep, strict=True)
    ]


def entry_of(sample: TensorDictBase, key: str | tuple[str, ...]) -> Any:
    """Return one sample's text or version, found under ``"next"`` or at the root, or ``None``."""
    path = (key,) if isinstance(key, str) else key
    for place in (("next", *path), path):
        value = sample.get(place, default=None)
        if value is not None:
            return _plain(value.data if isinstance(value, NonTensorData) else value)
    return None


def entries_of(td: TensorDictBase, key: str | tuple[str, ...]) -> list[Any]:
    """Return :func:`entry_of` of each row of a one-dimensional batch."""
    next_td = td.get("next", default=None)
    if any(isinstance(part, LazyStackedTensorDict) for part in (td, next_td)):
        return [entry_of(row, key) for row in td.unbind(0)]
    value = None if next_td is None else next_td.get(key, default=None)
    value = td.get(key, default=None) if value is None else value
    if isinstance(value, torch.Tensor):
        return value.reshape(len(td), -1)[:, 0].tolist()
    return [None] * len(td) if value is None else [_plain(entry) for entry in value.tolist()]


def _plain(value: Any) -> Any:
    return value.reshape(-1)[0].item() if hasattr(value, "reshape") else value


def _num_padding(rows: list[torch.Tensor], batch: TokenBatch) -> list[int]:
    """Return how much of each row is padding that its ids do not have."""
    width = max(batch.widths)
    is_dense = all(len(row) == width for row in rows)
    return [width - own if is_dense else 0 for own in batch.widths]
