"""Reads ids and starts as callers give them: lists, numpy arrays, tensors of torch. It imports no torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_kl.errors import InputError, shown


def listed(name: str, given: Any) -> list[Any]:
    """Return the entries of a sequence of sequences.

    Raises:
        InputError: it is a number, or a tensor without dimensions.
    """
    try:
        return list(given)
    except TypeError as error:
        raise InputError(f"{name} is {shown(given)}, expected ints for each of the sequences") from error


def as_array(name: str, given: Any) -> np.ndarray:
    """Return an array of any shape and dtype.

    Raises:
        InputError: rows of different lengths, or a tensor that numpy cannot hold.
    """
    try:
        return given.detach().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
    # A tensor may be of a dtype that numpy has not, or have no values.
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{name} must be an array of ints: {error}") from error


def sequence_of(i: int, ids: Any) -> np.ndarray:
    """Return the ids of sequence i: ``[L]`` int64.

    Raises:
        InputError: they are no ints, or not flat.
    """
    array = as_array(f"sequence {i}", ids)
    if array.ndim == 1 and not len(array):
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"sequence {i} must be a flat sequence of ints, got shape {list(array.shape)} and dtype "
            f"{array.dtype}"
        )
    if array.max() > np.iinfo(np.int64).max:
        raise InputError(f"sequence {i} has the id {array.max()}, which is outside any vocabulary")
    return array.astype(np.int64, copy=False)


def starts_of(start: int | Sequence[int] | None, num_sequences: int) -> list[int]:
    """Return the start of each sequence; without any, 1.

    Raises:
        InputError: they are no ints, or not as many as the sequences.
    """
    if start is None:
        start = 1
    if isinstance(start, (int, np.integer)):
        return [int(start)] * num_sequences
    try:
        starts = [operator.index(one) for one in start]
    except TypeError as error:
        raise InputError(f"start must be an int, or one int per sequence: {error}") from error
    if len(starts) != num_sequences:
        raise InputError(
            f"start has {len(starts)} entries for {num_sequences} sequences; give one int, or one per "
            "sequence"
        )
    return starts


def chosen_of(ids: Any, num_rows: Sequence[int]) -> list[np.ndarray]:
    """Return the chosen ids of each sequence: ``[rows, K]`` ints, K the same for all.

    Args:
        ids: as they were given.
        num_rows: of each sequence: its scored tokens.

    Raises:
        InputError: they are no ints, or of other shapes.
    """
    each = listed("ids", ids)
    if len(each) != len(num_rows):
        raise InputError(f"ids has {len(each)} entries for {len(num_rows)} sequences; give one per sequence")
    arrays = [as_array(f"ids of sequence {i}", entry) for i, entry in enumerate(each)]
    num_ids = next((a.shape[1] for a in arrays if a.ndim == 2 and a.size), 1)
    chosen = []
    for i, (array, rows) in enumerate(zip(arrays, num_rows, strict=True)):
        if not rows and not array.size:
            array = np.empty((0, num_ids), np.int64)
        if array.shape != (rows, num_ids) or array.dtype.kind not in "iu":
            raise InputError(
                f"ids of sequence {i} must be ints of shape [{rows}, {num_ids}] (one row per scored token, "
                f"as many ids per row as in the other sequences), got shape {list(array.shape)} and dtype "
                f"{array.dtype}"
            )
        chosen.append(array)
    return chosen
