"""Engines that one of our entry points was given, or made: from then on their processes do what is not vLLM's own.

    cpu        what the CPU backend computes wrong is mended
    reload     on a CPU, ``reload_weights`` of a folder leaves nothing behind (:mod:`.weights`)
    owner      an engine's processes end when whoever made it is killed: vLLM's own go on, and hold their memory

All else that the plugin installs waits for requests, or calls, of this package.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from typing import Any

from vllm_kl.lifetime import end_with_owner, parent_of
from vllm_kl.plugin import cpu

logger = logging.getLogger("vllm.vllm_kl")  # below vLLM's root logger: its level and handlers apply

# The name of the method of workers, for ``collective_rpc``.
TAKE = "vllm_kl_take"
_IS_TAKEN = "_vllm_kl_is_taken"


def install() -> None:
    """Give every worker of this process the method. Idempotent."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, TAKE, take)


def take(worker: Any, owner_pid: int) -> bool:
    """Take a worker's engine, once; return whether KV in its cache may be of numbers that were wrong until now.

    Args:
        owner_pid: of the process that has the engine.
    """
    if getattr(worker, _IS_TAKEN, False):
        return False
    setattr(worker, _IS_TAKEN, True)
    _end_with(owner_pid)
    return cpu.mend(worker)


def is_taken(worker: Any) -> bool:
    """Whether a worker's engine is one of ours: it was taken, or a program that uses this package runs it in its own process."""
    return getattr(worker, _IS_TAKEN, False) or not sys.modules.keys().isdisjoint(
        ("vllm_kl.scorer", "vllm_kl.weights.push")
    )


def _end_with(owner_pid: int) -> None:
    """End the engine's process when its owner is gone. vLLM's workers end with it; an engine in its owner's process has none."""
    if os.getpid() == owner_pid:
        return
    name = multiprocessing.current_process().name
    if name.startswith("EngineCore"):
        core_pid = os.getpid()
    elif name.startswith("VllmWorker"):
        core_pid = os.getppid()
    else:
        logger.warning(
            "vllm_kl: %s is no process of vLLM's that is known: it goes on when its owner is killed", name
        )
        return
    if parent_of(core_pid) == owner_pid:  # not of a fork server, or seen from another pid namespace
        end_with_owner(owner_pid, lambda: os.kill(core_pid, signal.SIGKILL), owned_pid=core_pid)
