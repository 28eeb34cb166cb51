"""Measures what a device does at most: the bound of everything that runs on it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

_TIMES = 4
# Rows, features and columns of the products. A CPU may multiply many rows with a narrow matrix, as an LM head
# does, faster than it multiplies squares.
_ON_A_CPU = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 512, 2048), (4096, 512, 4096))
_ON_A_GPU = ((8192, 8192, 8192),)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one device does at most, measured; and which GPU it is, whose data sheet says more."""

    flop_per_s: float
    bytes_per_s: float
    gpu: str | None  # None: it is the CPUs


def machine_limits(dtype: Any, device: str) -> Limits:
    """Measure products of several shapes, of which the fastest counts, and a copy.

    Other work on the machine makes both look slower. A CPU may multiply faster in float32 than in 16 bits, so
    there both are measured.
    """
    import torch

    is_cuda = device == "cuda"
    shapes, num_bytes = (_ON_A_GPU, 1 << 29) if is_cuda else (_ON_A_CPU, 1 << 26)
    dtypes = (dtype,) if is_cuda else dict.fromkeys((dtype, torch.float32))
    flop_per_s = max(
        2 * math.prod(shape) / _best(_product(one, shape, device)) for one in dtypes for shape in shapes
    )
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source))
    gpu = torch.cuda.get_device_name() if is_cuda else None
    return Limits(flop_per_s, 2 * num_bytes / copied, gpu)


def seconds_of(work: Callable[[], Any]) -> float:
    """Return how long a call takes, with what it has queued on a GPU."""
    import torch

    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else (lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def _product(dtype: Any, shape: tuple[int, int, int], device: str) -> Callable[[], Any]:
    """Return the product of rows with a matrix as a layer has it, into memory that is there already."""
    import torch

    num_rows, num_features, num_columns = shape
    rows = torch.randn(num_rows, num_features, device=device).to(dtype)  # of equal numbers a GPU is faster
    matrix = torch.randn(num_columns, num_features, device=device).to(dtype)
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=device)
    return lambda: torch.mm(rows, matrix.T, out=out)


def _best(work: Callable[[], Any]) -> float:
    return min(seconds_of(work) for _ in range(_TIMES))
