"""Reads the energy that a call takes, and the memory that a process and a GPU use at most.

Energy: Linux's RAPL counters of the CPU packages and of the memory, where they may be read, and NVML's
counters of the GPUs. They count whole devices, so other work on the machine counts, too.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_kl.environment import on_a_gpu

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Returns the joules since the last call; ``None`` where the machine does not tell.

    Args:
        num_gpus: GPUs that the work is on, the first that this process sees; ``None``: not known which. On a
            machine with GPUs no energy is told then, nor where they do not tell theirs.
        powercap: the folder of RAPL's counters.
    """

    def __init__(self, num_gpus: int | None = 1, powercap: Path = _POWERCAP) -> None:
        zones = [
            (_reader(zone), _largest(zone)) for zone in sorted(powercap.glob("intel-rapl:*")) if _counts(zone)
        ]
        self._counters = [(read, largest) for read, largest in zones if read is not None]
        if (nvml := _nvml()) is not None:
            gpus = [functools.partial(_microjoules, nvml, handle) for handle in _handles(nvml, num_gpus)]
            try:
                gpus[0]()
            except (nvml.NVMLError, IndexError):  # an old GPU has no such counter
                self._counters = []
            else:
                self._counters += [(read, 0) for read in gpus]
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


def _nvml() -> Any:
    """Return NVML; ``None`` without a GPU."""
    if not on_a_gpu():
        return None
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    return pynvml


def _handles(nvml: Any, num_gpus: int | None) -> list[Any]:
    """Return NVML's handles of the first GPUs that this process sees; none: it is not known which they are.

    NVML counts by the PCI bus, and so does CUDA where a benchmark runs (``environment.py``), unless the user
    has set ``CUDA_DEVICE_ORDER`` otherwise.
    """
    import torch

    is_same_order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID") == "PCI_BUS_ID"
    if not is_same_order and nvml.nvmlDeviceGetCount() > 1:
        return []
    try:
        return [
            nvml.nvmlDeviceGetHandleByIndex(gpu)
            if isinstance(gpu, int)
            else nvml.nvmlDeviceGetHandleByUUID(gpu)
            for gpu in torch.cuda._parse_visible_devices()[: num_gpus or 0]
        ]
    except nvml.NVMLError:
        return []


def _microjoules(nvml: Any, handle: Any) -> int:
    return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1000


def peak_bytes(pid: int) -> int:
    """Return the peak resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) << 10


class GpuPeak:
    """Measures the peak of the GPU memory in use above the use before, every 10 ms; 0 without a GPU.

    Args:
        num_gpus: as :class:`EnergyMeter` takes it. The peak is that of their sum.
    """

    def __init__(self, num_gpus: int | None = 1) -> None:
        self.size_bytes, self._num_gpus, self._ended = 0, num_gpus, threading.Event()

    def __enter__(self) -> GpuPeak:
        if (nvml := _nvml()) is not None and (handles := _handles(nvml, self._num_gpus)):
            used = lambda: sum(nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles)  # noqa: E731
            threading.Thread(target=self._watch, args=(used, used()), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def _watch(self, used: Callable[[], int], before: int) -> None:
        while not self._ended.wait(0.01):
            self.size_bytes = max(self.size_bytes, used() - before)
