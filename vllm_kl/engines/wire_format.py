"""Packs requests and results, to send them to another process.

All arrays are joined to one, because pickle takes microseconds for each array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np

from vllm_kl.types import ScoreRequest, ScoreResult

Carrier = TypeVar("Carrier", ScoreRequest, ScoreResult)
# The arrays joined end to end; the shape of each; the other fields of each carrier, in the order of its
# fields.
Packed = tuple[np.ndarray, list[tuple[int, ...]], list[tuple[Any, ...]]]

_ARRAY = {ScoreRequest: "token_ids", ScoreResult: "values"}


def pack(carriers: Sequence[Carrier]) -> Packed:
    """Return the packed form of at least one carrier, for :func:`unpack`."""
    name, others = _fields(type(carriers[0]))
    arrays = [getattr(carrier, name) for carrier in carriers]
    end_to_end = np.concatenate([array.ravel() for array in arrays])
    return end_to_end, [array.shape for array in arrays], list(map(attrgetter(*others), carriers))


def unpack(kind: type[Carrier], packed: Packed) -> list[Carrier]:
    name, others = _fields(kind)
    end_to_end, shapes, rows = packed
    carriers, end = [], 0
    for shape, row in zip(shapes, rows, strict=True):
        begin, end = end, end + math.prod(shape)
        carriers.append(
            kind(**{name: end_to_end[begin:end].reshape(shape)}, **dict(zip(others, row, strict=True)))
        )
    return carriers


def _fields(kind: type[Carrier]) -> tuple[str, list[str]]:
    """Return the name of a carrier's array field, and the names of its other fields."""
    return _ARRAY[kind], [field.name for field in dataclasses.fields(kind) if field.name != _ARRAY[kind]]
