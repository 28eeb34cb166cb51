"""The environment variables of our commands and engines: they keep libraries quiet, and small on a CPU.

Libraries read them when first imported. Variables that the user has set stay as they are.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

_DRIVER = Path("/dev/nvidiactl")  # there with the driver of an NVIDIA GPU
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
_DEMO = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "RL_LOGGING_LEVEL": "ERROR",
}
_BENCH = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "RL_LOGGING_LEVEL": "ERROR",
}
_KEPT_BYTES = 1 << 30


def _keeps_memory() -> dict[str, str]:
    """Return the variables with which glibc keeps freed blocks of less than 1 GiB for the next tensors.

    Each operation of a layer makes a tensor of some megabytes and frees the last. By itself glibc gives such
    memory back to the system and gets it again, page by page. glibc before 2.35 takes no threshold above 32
    MiB, and would give back even more with the other variable alone.
    """
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except ValueError:  # another C library
        return {}
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return {}
    return dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(_KEPT_BYTES))


KEEPS_MEMORY = _keeps_memory()  # glibc reads them when a process starts
# Of a process with an engine, on a CPU. PyTorch and oneDNN read theirs when they are imported.
ON_A_CPU = {
    **KEEPS_MEMORY,
    "THP_MEM_ALLOC_ENABLE": "1",  # huge pages for large tensors
    # oneDNN compiles products for each number of tokens in a step, and keeps 1,024: 400 MiB of a tiny model.
    # The layers of a step share a few; another step seldom has as many tokens.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}
_BENCH_ON_GPU = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # NVML's, which tells memory and energy
_BENCH_ON_CPU = {
    "TORCH_COMPILE_DISABLE": "1",  # vLLM's rank count, which peers need, compiles for 20 s
    **ON_A_CPU,
}


def on_a_gpu() -> bool:
    """Return whether torch can use an NVIDIA GPU here, without importing torch or initialising CUDA.

    It is for what must be known before torch is imported; ``engines/devices.py`` asks torch itself. A CPU
    build of torch uses no GPU, nor does a process that is shown none.
    """
    try:
        is_cpu_build = (metadata.version("torch") or "").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False
    # The first entry that names no device ends torch's list (``torch.cuda._parse_visible_devices``, 2.13).
    shows_one = re.match(r"\s*\+?\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0")) is not None
    return _DRIVER.exists() and shows_one and not is_cpu_build


def quiet_ray() -> None:
    """Keep Ray from printing into a command's progress; keep Ray and vLLM from sending statistics."""
    _set(_RAY)


def quiet_demo() -> None:
    """Keep vLLM, torch and TorchRL from printing into the demo's output. The engine runs in this process."""
    _set(_DEMO)


def quiet_bench() -> None:
    """Keep libraries from printing, in this process and those of the providers."""
    quiet_ray()
    _set(_BENCH)
    _set(_BENCH_ON_GPU if on_a_gpu() else _BENCH_ON_CPU)


def give_back_memory() -> None:
    """Give freed memory back to the system, which glibc keeps by :data:`KEEPS_MEMORY`."""
    ctypes.CDLL(None).malloc_trim(0)


def _set(defaults: Mapping[str, str]) -> None:
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
