"""Measures what a device does at most: the bound of everything that runs on it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

_TIMES = 4


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one device does at most, measured; and which GPU it is, whose data sheet says more."""

    flop_per_s: float
    bytes_per_s: float
    gpu: str | None  # None: it is the CPUs


def machine_limits(dtype: Any, device: str) -> Limits:
    """Measure products of square matrices and a copy. Other work on the machine makes both look slower.

    A CPU may multiply faster in float32 than in 16 bits, so there the faster of both counts.
    """
    import torch

    side, num = (8192, 1 << 29) if device == "cuda" else (1024, 1 << 26)
    dtypes = (dtype,) if device == "cuda" else dict.fromkeys((dtype, torch.float32))
    seconds = min(_best(_square(one, side, device)) for one in dtypes)
    source = torch.zeros(num, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source))
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return Limits(2 * side**3 / seconds, 2 * num / copied, gpu)


def seconds_of(work: Callable[[], Any]) -> float:
    """Return how long a call takes, with what it has queued on a GPU."""
    import torch

    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else (lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def _square(dtype: Any, side: int, device: str) -> Callable[[], Any]:
    import torch

    matrix = torch.randn(side, side, device=device).to(dtype)  # of equal numbers a GPU is faster
    return lambda: matrix @ matrix


def _best(work: Callable[[], Any]) -> float:
    return min(seconds_of(work) for _ in range(_TIMES))
