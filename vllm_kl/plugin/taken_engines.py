"""Marks an engine that this package made or was given as taken, which allows the plugin more in it.

In the processes of a taken engine

- the errors of vLLM's CPU backend are corrected (:mod:`.cpu_corrections`);
- on a CPU, ``reload_weights`` of a folder loads all weights right (:mod:`.load_weights`);
- the processes end when their owner is killed. Without this hook they would go on, and hold their memory;
- the memory that workers on a CPU share loses its names in /dev/shm, so that it ends with them.

``reload_weights`` is also corrected in every other engine that runs in a process which imported
``vllm_kl.scorer`` or ``vllm_kl.weights.push``. All other hooks of the plugin act on requests or calls of this
package only.
"""

from __future__ import annotations

import gc
import glob
import logging
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from vllm_kl.lifetime import SHARED_MEMORY, end_with_owner, parent_of
from vllm_kl.plugin import cpu_corrections

logger = logging.getLogger("vllm.vllm_kl")  # below vLLM's root logger: its level and handlers apply

# Names of the methods of workers, for ``collective_rpc``.
TAKE = "vllm_kl_take"
LEAVE = "vllm_kl_leave"
_IS_TAKEN = "_vllm_kl_is_taken"


def install() -> None:
    """Add the methods :func:`take` and :func:`leave` to the workers of this process. Idempotent."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, TAKE, take)
    setattr(WorkerBase, LEAVE, leave)


def take(worker: Any, owner_pid: int) -> bool:
    """Take a worker's engine, once; return whether its cache may hold wrong KV, computed by vLLM's errors.

    Args:
        worker: vLLM's worker.
        owner_pid: the process id of the engine's owner.
    """
    if getattr(worker, _IS_TAKEN, False):
        return False
    setattr(worker, _IS_TAKEN, True)
    _end_with(owner_pid)
    _unlink_shared_memory()
    return cpu_corrections.correct(worker)


def leave(worker: Any) -> None:
    """Leave the groups of workers, before the process is killed: the last one removes their store's file.

    vLLM keeps it in the temporary folder, one for each engine.
    """
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()
    gc.collect()  # a cycle may hold the store


def _unlink_shared_memory() -> None:
    """Take the names from the memory that workers on a CPU share: it then ends with them, however they end.

    All of them have opened it. Source: ``_CPUSHMDistributed``, ``cpu_communicator.py``, vLLM 0.32.
    """
    if engine := os.environ.get("VLLM_DIST_IDENT"):
        for path in SHARED_MEMORY.glob(f"{glob.escape(Path(engine).name)}-*-cpushm_*"):
            path.unlink(missing_ok=True)  # another worker may do the same


def is_taken(worker: Any) -> bool:
    """Whether a worker's engine was taken, or runs in a process that imported a scorer or a push."""
    return getattr(worker, _IS_TAKEN, False) or not sys.modules.keys().isdisjoint(
        ("vllm_kl.scorer", "vllm_kl.weights.push")
    )


def _end_with(owner_pid: int) -> None:
    """End the engine's core process when its owner dies. vLLM's workers end with the core process."""
    if os.getpid() == owner_pid:
        return
    name = multiprocessing.current_process().name
    if name.startswith("EngineCore"):
        core_pid = os.getpid()
    elif name.startswith("VllmWorker"):
        core_pid = os.getppid()
    else:
        logger.warning(
            "vllm_kl: the process %s of vLLM is not known: it goes on when its owner is killed", name
        )
        return
    if parent_of(core_pid) == owner_pid:  # False with a fork server, or in another pid namespace
        end_with_owner(owner_pid, lambda: os.kill(core_pid, signal.SIGKILL), owned_pid=core_pid)
