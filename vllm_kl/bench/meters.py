"""Reads the energy that a call takes, and the memory that a process and a GPU use at most.

Energy: Linux's RAPL counters of the CPU packages and of the memory, where they may be read, and NVML's
counters of the GPUs. They count whole devices, so other work on the machine counts, too.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from vllm_kl.quiet import on_a_gpu

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Returns the joules since the last call; ``None`` where the machine does not tell."""

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        zones = [
            (_reader(zone), _largest(zone)) for zone in sorted(powercap.glob("intel-rapl:*")) if _counts(zone)
        ]
        self._counters = [(read, largest) for read, largest in zones if read is not None]
        if (handle := _gpu()) is not None:
            nvml, of = handle
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlDeviceGetTotalEnergyConsumption(of)
                self._counters.append((lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(of) * 1000, 0))
        self._last = [read() for read, _ in self._counters]

    def __call__(self) -> float | None:
        if not self._counters:
            return None
        now = [read() for read, _ in self._counters]
        spent = 0
        for before, after, (_, largest) in zip(self._last, now, self._counters, strict=True):
            spent += after - before if after >= before else after - before + largest  # the counter ran over
        self._last = now
        return spent / 1e6


def _counts(zone: Path) -> bool:
    """Return whether a zone counts what no other one counts.

    A package holds its cores and its graphics, and psys, which some machines have, holds the packages. A
    package does not hold the memory (Documentation/power/powercap in Linux).
    """
    name = zone / "name"
    return os.access(name, os.R_OK) and name.read_text().startswith(("package-", "dram"))


def _reader(zone: Path) -> Callable[[], int] | None:
    """Return the function that reads a zone's microjoules; ``None``: this user may not."""
    file = zone / "energy_uj"
    if not os.access(file, os.R_OK):
        return None
    return lambda: int(file.read_text())


def _largest(zone: Path) -> int:
    file = zone / "max_energy_range_uj"
    return int(file.read_text()) if os.access(file, os.R_OK) else 0


def _gpu() -> tuple[object, object] | None:
    """Return NVML, and its handle of the first GPU that this process uses; ``None`` without a GPU."""
    if not on_a_gpu():
        return None
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    of = (
        pynvml.nvmlDeviceGetHandleByIndex(int(first))
        if first.isdigit()
        else pynvml.nvmlDeviceGetHandleByUUID(first)
    )
    return pynvml, of


def peak_bytes(pid: int) -> int:
    """Return the peak resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) << 10


class GpuPeak:
    """Measures the peak of the GPU memory in use above the use before, every 10 ms; 0 without a GPU."""

    def __init__(self) -> None:
        self.size_bytes, self._ended = 0, threading.Event()

    def __enter__(self) -> GpuPeak:
        if (handle := _gpu()) is not None:
            nvml, of = handle
            used = lambda: nvml.nvmlDeviceGetMemoryInfo(of).used  # noqa: E731
            threading.Thread(target=self._watch, args=(used, used()), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def _watch(self, used: Callable[[], int], before: int) -> None:
        while not self._ended.wait(0.01):
            self.size_bytes = max(self.size_bytes, used() - before)
