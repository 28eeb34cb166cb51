"""Chooses the GPUs that an engine's process sees.

Nothing here initialises CUDA in the caller's process. vLLM forks to start the processes of a ``vllm.LLM``
where it can, and a fork of a process that has initialised CUDA cannot use CUDA. So torch asks NVML, the
driver's own library.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from vllm_kl.errors import OptionError

Devices = int | str | Sequence[int | str]

_ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"  # read by torch
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def has_gpu() -> bool:
    """Whether torch can use a GPU here."""
    before = os.environ.get(_ASK_NVML)
    os.environ[_ASK_NVML] = "1"
    try:
        return torch.cuda.is_initialized() or torch.cuda.is_available()
    finally:
        if before is None:
            del os.environ[_ASK_NVML]
        else:
            os.environ[_ASK_NVML] = before


def device_environment(devices: Devices | None, options: dict[str, Any]) -> dict[str, str]:
    """Return the environment variables of a process that sees these devices and no others.

    Args:
        devices: indices among the devices that this process sees (Ray sets ``CUDA_VISIBLE_DEVICES``), or
            UUIDs; ``None``: all.
        options: the engine's options, which say how many devices it uses.

    Raises:
        OptionError: a device does not exist, or the engine uses another number of devices.

    >>> device_environment(None, {})
    {}
    """
    if devices is None:
        return {}
    named = [devices] if isinstance(devices, (int, str)) else list(devices)
    if not has_gpu():
        raise OptionError(f"devices={devices!r} has no effect: torch sees no GPU here. Leave it out")
    num_used = int(options.get("tensor_parallel_size") or 1) * int(options.get("pipeline_parallel_size") or 1)
    if len(set(named)) != len(named) or len(named) != num_used:
        raise OptionError(
            f"devices={devices!r} must name {num_used} different devices, as many as the engine uses: "
            "tensor_parallel_size times pipeline_parallel_size"
        )
    ours = os.environ.get(_VISIBLE)
    mine = list(map(str, range(torch.cuda.device_count()))) if ours is None else ours.split(",")
    return {_VISIBLE: ",".join(_name(device, mine) for device in named)}


def _name(device: int | str, mine: list[str]) -> str:
    if isinstance(device, str) and not device.isdigit():
        return device
    if not 0 <= int(device) < len(mine):
        raise OptionError(
            f"devices names device {device}, but this process sees {len(mine)} "
            f"({_VISIBLE}={','.join(mine)}), counted from 0"
        )
    return mine[int(device)]
