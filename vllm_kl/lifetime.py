"""Cleans up after killed processes: their folders of weights in shared memory, and their engines.

A folder belongs to the process that holds its lock (``flock`` on the folder itself). The operating system
releases the lock when the process ends, for any reason. The lock also works between containers that share
``/dev/shm`` but have separate process ids. A folder is locked before it gets the name by which
:func:`remove_orphans` finds it. A process of an engine watches its owner (:func:`end_with_owner`).

This module imports nothing heavy, because every process of every vLLM engine loads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "vllm_kl_weights"
_WATCH = "vllm_kl-owner-watch"
_LOOK_EVERY_S = 0.5
_LOOK_AGAIN_S = 5.0
_KILL_S, _KILL_EVERY_S = 2.0, 0.005
_PROCESSES = Path("/proc")

_HELD: dict[Path, int] = {}  # folder -> the file descriptor that holds its lock


def _let_go() -> None:
    """Give up all locks in a fork: it owns no folder, and must not hold locks longer than the owner lives."""
    for lock in _HELD.values():
        os.close(lock)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


def new_folder(parent: Path) -> Path:
    """Make an empty folder that belongs to this process until :func:`remove`; return it."""
    unlocked = Path(tempfile.mkdtemp(prefix=".", dir=parent))
    folder = parent / f"{_prefix(parent)}_{os.getpid()}_{unlocked.name[1:]}"
    lock = os.open(unlocked, os.O_RDONLY)
    # A file system without locks raises: then no other process can lock the folder either.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
    _HELD[folder] = lock
    return unlocked.rename(folder)


def remove(folder: Path) -> None:
    """Remove a folder of this process; do nothing with a folder of another."""
    if (lock := _HELD.pop(folder, None)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _prefix(parent: Path) -> str:
    """Return how the names of this machine's folders begin: a shared disk may keep locks for each machine."""
    return PREFIX if parent == SHARED_MEMORY else f"{PREFIX}_{socket.gethostname()}"


def remove_orphans(parent: Path | None = None) -> None:
    """Remove the folders of this machine's killed processes.

    Args:
        parent: where; ``None``: in the shared memory, which they would fill.
    """
    parent = parent or SHARED_MEMORY
    for folder in parent.glob(f"{_prefix(parent)}_*"):
        with contextlib.suppress(OSError):  # a living process holds the lock, or the folder is gone by now
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def kill_group(group: int) -> None:
    """Kill the processes of a group; the caller last, if it is one of them.

    Python's resource tracker is left alone: when the others have ended, it removes their semaphores and their
    shared memory, and ends. It is killed if it does not.
    """
    if not _PROCESSES.exists():  # no Linux
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        return
    # A process that waits for a disk ends later.
    _until_none(lambda: [pid for pid in _alive(group) if not _is_tracker(pid)], signal.SIGKILL)
    if os.getpgrp() == group:
        os.kill(os.getpid(), signal.SIGKILL)
    # Somebody may have stopped the whole group.
    if not _until_none(lambda: _alive(group), signal.SIGCONT):
        _until_none(lambda: _alive(group), signal.SIGKILL)


def _until_none(find: Callable[[], list[int]], number: signal.Signals) -> bool:
    """Send a signal to the processes that are found, until none is; return ``False`` after two seconds."""
    until = time.monotonic() + _KILL_S
    while pids := find():
        if time.monotonic() > until:
            return False
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        time.sleep(_KILL_EVERY_S)
    return True


def _alive(group: int) -> list[int]:
    """Return the ids of a group's processes that have not ended, without the caller's."""
    pids = (int(path.name) for path in _PROCESSES.iterdir() if path.name.isdigit())
    states = ((pid, _stat(pid)) for pid in pids if pid != os.getpid())
    return [pid for pid, stat in states if stat and int(stat[2]) == group and stat[0] not in "ZX"]


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in (_PROCESSES / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    """Return a process's state, parent, group, and what else Linux tells of it; empty if there is none."""
    try:
        return (_PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def parent_of(pid: int) -> int:
    """Return the id of a process's parent; 0 if there is no such process."""
    return int(stat[1]) if (stat := _stat(pid)) else 0


def end_with_owner(owner_pid: int, kill: Callable[[], None], *, owned_pid: int | None = None) -> None:
    """Start a thread that waits for the end of the owner, removes the owner's folders, and calls ``kill``.

    The thread polls the id of a process's parent. This needs no file descriptor, which a fork of the owner
    could keep open. ``PR_SET_PDEATHSIG`` would also fire when only the owner's starting thread ends.

    Args:
        owner_pid: the process to watch.
        kill: ends the process or processes that the owner has left.
        owned_pid: the process whose parent the owner is; ``None`` is this process.
    """

    def watch() -> None:
        while (os.getppid() if owned_pid is None else parent_of(owned_pid)) == owner_pid:
            time.sleep(_LOOK_EVERY_S)
        until = time.monotonic() + _LOOK_AGAIN_S
        with contextlib.suppress(Exception):
            remove_orphans()
            # A killed process ends thread by thread; its locks are released with the last thread.
            while any(SHARED_MEMORY.glob(f"{PREFIX}_{owner_pid}_*")) and time.monotonic() < until:
                time.sleep(_LOOK_EVERY_S / 10)
                remove_orphans()
        kill()

    if all(thread.name != _WATCH for thread in threading.enumerate()):
        threading.Thread(target=watch, name=_WATCH, daemon=True).start()
