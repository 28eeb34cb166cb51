"""Tells which names in shared memory belong to the processes of an engine."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_kl.lifetime import SHARED_MEMORY


def names_of(group):
    """The names of the semaphores and the memory that a process group has mapped, if they are there."""
    inodes = set()
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.getpgid(int(process.name)) == group:
                lines = (process / "maps").read_text().splitlines()
                # A semaphore is made under another name.
                inodes |= {line.split()[4] for line in lines if f" {SHARED_MEMORY}/" in line}
        except OSError:
            continue
    return {path.name for path in SHARED_MEMORY.iterdir() if str(path.stat().st_ino) in inodes}


def left(names):
    """Those of the names that are still there."""
    return {name for name in names if (SHARED_MEMORY / name).exists()}
