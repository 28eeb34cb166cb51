"""Reads the results of a scored batch as rows of its real tokens, for ``samples_from_batch``.

Ragged ids may have results that were padded to one width. The batch does not tell on which side, so the
caller passes the side. A row that is read from the wrong side is shifted. The module raises an error at every
sign of such a shift: a value in the padding or at token 0, a mask that differs from the batch's mask, or
values outside the mask that would fit the mask when read from the other side.

The module knows tensordicts and layouts, but no files.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDictBase

from vllm_kl.batch.alignment import PaddingSide, from_layout
from vllm_kl.batch.read_tokens import rows_of
from vllm_kl.errors import InputError
from vllm_kl.types import TokenBatch

_CURE = "pass the padding_side of the transform that wrote it"


def result_rows(data: TensorDictBase, key: str | tuple[str, ...]) -> list[torch.Tensor] | None:
    """Return the rows of an entry under ``"next"``, or else at the root, or ``None``."""
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
    """Return ``[L]`` values of each sample's real tokens, without the padding of dense results of ragged ids.

    Args:
        rows: stored rows, one per sample.
        padding_side: side of the padding to remove.
        what: name of the values in messages.
        keep: the mask of the values, if it is known.
        is_zero_outside: whether padding and token 0 must hold zeros.

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
                f"{what}: sample {i}, read as padded on the {padding_side}, has a value at token 0, "
                f"expected 0: {_CURE}"
            )
        if keep is not None:
            outside = torch.ones(width, dtype=torch.bool).index_fill(0, columns[keep[i]], False)
            wrong = outside & (values != 0)
            if wrong.any() and not other[outside].any():
                raise InputError(
                    f"{what}: sample {i}, token {int((columns == wrong.nonzero()[0]).nonzero()[0])}, read "
                    f"as padded on the {padding_side}, has a value outside the mask, expected 0. Read from "
                    f"the other side, it is 0: {_CURE}"
                )
    return list(from_layout(rows, batch, what=what).split(batch.lengths))


def read_mask(
    rows: list[torch.Tensor], batch: TokenBatch, padding_side: PaddingSide, what: str
) -> list[torch.Tensor]:
    """Return the stored masks of the real tokens, ``[L]`` bool.

    A mask whose padding was removed is checked against a wrong side: it must equal the batch's mask
    (``("masks", "all_assistant_mask")``, or else all tokens after ``("tokens", "prompt")``), or keep all
    tokens but token 0.

    Raises:
        InputError: a mask keeps token 0, was padded on the other side, or does not fit the ids.
    """
    keep = [row.bool() for row in aligned(rows, batch, padding_side, what)]
    for i, (mask, num_padding) in enumerate(zip(keep, _num_padding(rows, batch), strict=True)):
        if mask[0]:
            raise InputError(
                f"{what}: sample {i} keeps token 0, which has no log-prob because nothing comes before it; "
                f"expected false there. Set it to false; or, if the mask was padded, {_CURE}"
            )
        after_first = torch.arange(len(mask)) > 0
        if not num_padding or batch.assistant is None or torch.equal(mask, after_first):
            continue
        differs = mask != (batch.assistant[i] & after_first)
        if differs.any():
            t = int(differs.nonzero()[0])
            raise InputError(
                f"{what}: sample {i}, token {t}, read as padded on the {padding_side}, is {bool(mask[t])}, "
                f"expected {not bool(mask[t])}, as in ('masks', 'all_assistant_mask') or after ('tokens', "
                f"'prompt'): {_CURE}"
            )
    return keep


def read_rewards(
    data: TensorDictBase, batch: TokenBatch, keep: list[torch.Tensor], padding_side: PaddingSide
) -> list[float | None]:
    """Return one reward per sample: the stored reward, or the mean of the rewards per token over the mask."""
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
    """Return the text or version of one sample, under ``"next"`` or else at the root, or ``None``."""
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
    """Return the width of each row's padding that its ids do not have."""
    width = max(batch.widths)
    is_dense = all(len(row) == width for row in rows)
    return [width - own if is_dense else 0 for own in batch.widths]
