"""Receives a trainer's weights in a worker, from the trainer's GPU by NCCL instead of from files.

The trainer and the workers of all replicas are one group, in which the trainer has rank 0. In each push the
trainer broadcasts one tensor after another, as vLLM's ``NCCLTrainerWeightTransferEngine`` does with
``packed=False``. :func:`receive` gives them to the loader of :mod:`.second_model`.

No rank waits for ever: a worker whose load fails takes the rest of the tensors, and a worker that gets no
tensor for two minutes aborts its communicator and raises an error. A group that failed is not used again.

Source: ``distributed/weight_transfer/nccl_engine.py`` and ``nccl_common.py``, vLLM 0.28 to 0.33.
"""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

# Names of the methods, for ``collective_rpc``.
JOIN = "vllm_kl_join_trainer"
JOINED = "vllm_kl_joined_trainer"
GPU = "vllm_kl_gpu"

_SILENT_AT_MOST_S = 120.0
_LOOK_EVERY_S = 0.0002
# Attribute of a worker: (name of the group, communicator).
_GROUP = "_vllm_kl_trainers_group"


def install() -> None:
    """Add the methods to the workers of this process. Idempotent."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, JOIN, join)
    setattr(WorkerBase, JOINED, lambda worker: getattr(worker, _GROUP, (None, None))[0])
    setattr(WorkerBase, GPU, gpu)


def gpu(worker: Any) -> str | None:
    """Return the UUID of a worker's GPU; ``None``: it has none."""
    return uuid_of(worker.device)


def uuid_of(device: torch.device) -> str | None:
    """Return the UUID of a CUDA device, which is the same in all processes; ``None`` for other devices."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def join(worker: Any, name: str, info: dict[str, Any], opener: str) -> None:
    """Join a trainer's group; leave the one before.

    Args:
        worker: vLLM's worker.
        name: of the group.
        info: the fields of vLLM's ``NCCLWeightTransferInitInfo``.
        opener: ``"module:function"``, called with the worker and ``info``, returns the communicator.
    """
    _leave(worker)
    setattr(worker, _GROUP, (name, pkgutil.resolve_name(opener)(worker, info)))


def open_nccl(worker: Any, info: dict[str, Any]) -> Any:
    """Return this worker's NCCL communicator. The trainer must open its own at the same time."""
    from vllm.distributed.weight_transfer.nccl_common import (
        NCCLWeightTransferInitInfo,
        worker_init_process_group,
    )

    init_info = NCCLWeightTransferInitInfo(**info)
    return refuse_disabled(worker_init_process_group(init_info, worker.vllm_config.parallel_config))


def refuse_disabled(communicator: Any) -> Any:
    """Return a communicator; refuse one that sends nothing.

    Without an NCCL library, or with ``VLLM_DISABLE_PYNCCL=1``, vLLM's ``broadcast`` returns without a word
    (``PyNcclCommunicator``, 0.32).
    """
    if communicator.disabled:
        raise RuntimeError("vLLM has found no NCCL library, or VLLM_DISABLE_PYNCCL is set")
    return communicator


def receive(worker: Any, sent: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors that the trainer sends.

    Args:
        worker: vLLM's worker. It has joined the trainer's group.
        sent: the fields of vLLM's ``NCCLWeightTransferUpdateInfo``: ``names``, ``dtype_names``, ``shapes``.

    Raises:
        RuntimeError: the worker is in no group, or the trainer fell silent.
    """
    _, communicator = getattr(worker, _GROUP, (None, None))
    if communicator is None:
        raise RuntimeError("this worker has not joined the trainer's group: push again")
    try:
        for name, dtype, shape in zip(sent["names"], sent["dtype_names"], sent["shapes"], strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=worker.device)
            communicator.broadcast(tensor, src=0, stream=stream_of(worker.device))
            _wait(worker.device, name)
            yield name, tensor
    except Exception:
        _leave(worker)
        raise


def stream_of(device: torch.device) -> Any:
    """Return the stream that a broadcast on this device must run on; ``None`` on a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def is_done(device: torch.device) -> Any:
    """Return a function that tells whether what was put on the current stream until now is done."""
    if device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()
    event.record(stream_of(device))
    return event.query


def _wait(device: torch.device, name: str) -> None:
    done, end = is_done(device), time.monotonic() + _SILENT_AT_MOST_S
    while not done():
        if time.monotonic() > end:
            raise RuntimeError(
                f"{name} did not come for {_SILENT_AT_MOST_S:g} s: the trainer or a worker died"
            )
        time.sleep(_LOOK_EVERY_S)


def _leave(worker: Any) -> None:
    """Leave the group. An unfinished broadcast is aborted."""
    _, communicator = getattr(worker, _GROUP, (None, None))
    setattr(worker, _GROUP, (None, None))
    if communicator is not None:
        communicator.destroy()
