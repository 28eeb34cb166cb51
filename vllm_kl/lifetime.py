"""What a killed process leaves behind, and how it goes: folders of weights in shared memory, and engines.

A folder belongs to the process that holds its lock (``flock`` on the folder itself). The lock ends with the process, however
that ends, and holds across containers that share ``/dev/shm`` and not their process ids. A folder gets the name by which
orphans are found when it is locked, not before. An engine's process watches its owner (:func:`end_with_owner`).

Imports nothing heavy: it is loaded in every process of every vLLM engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
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

_HELD: dict[Path, int] = {}  # folder -> the descriptor that holds its lock


def _let_go() -> None:
    """A fork owns nothing, and must not keep locks beyond the life of the owner."""
    for lock in _HELD.values():
        os.close(lock)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


def new_folder(parent: Path) -> Path:
    """Return an empty folder that is this process's until :func:`remove`."""
    unlocked = Path(tempfile.mkdtemp(prefix=".", dir=parent))
    folder = parent / f"{PREFIX}_{os.getpid()}_{unlocked.name[1:]}"
    lock = os.open(unlocked, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks: nobody can take it either
        fcntl.flock(lock, fcntl.LOCK_EX)
    _HELD[folder] = lock
    return unlocked.rename(folder)


def remove(folder: Path) -> None:
    """Remove a folder that is this process's."""
    if (lock := _HELD.pop(folder, None)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_orphans() -> None:
    """Remove the folders of processes that were killed: they hold memory until somebody does."""
    for folder in SHARED_MEMORY.glob(f"{PREFIX}_*"):
        with contextlib.suppress(OSError):  # another's, or gone by now
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def parent_of(pid: int) -> int:
    """Return the parent of a process; 0: there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def end_with_owner(owner_pid: int, kill: Callable[[], None], *, owned_pid: int | None = None) -> None:
    """Start a thread that kills as soon as the owner is gone, however it went, and removes what it left.

    Polls the parent's id: it needs no file descriptor that a fork of the owner could keep open, and unlike
    ``PR_SET_PDEATHSIG`` it does not fire when only the owner's starting thread ends.

    Args:
        owned_pid: the process whose parent the owner is; ``None``: this one.
    """

    def watch() -> None:
        while (os.getppid() if owned_pid is None else parent_of(owned_pid)) == owner_pid:
            time.sleep(_LOOK_EVERY_S)
        until = time.monotonic() + _LOOK_AGAIN_S
        with contextlib.suppress(Exception):
            remove_orphans()
            # A process that is killed ends thread by thread; its locks go with the last.
            while any(SHARED_MEMORY.glob(f"{PREFIX}_{owner_pid}_*")) and time.monotonic() < until:
                time.sleep(_LOOK_EVERY_S / 10)
                remove_orphans()
        kill()

    if all(thread.name != _WATCH for thread in threading.enumerate()):
        threading.Thread(target=watch, name=_WATCH, daemon=True).start()
