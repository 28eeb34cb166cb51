"""Stages that die while they score, for the tests of what happens then."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa

from vllm_kl.offline.score_rows import ScoreRows


class EngineDies(ScoreRows):
    """Its engine is killed before each block, after it wrote a line into its log."""

    def __call__(self, table: pa.Table) -> pa.Table:
        pid = self._scorer._engine.pid
        with contextlib.suppress(FileNotFoundError):  # the last one is dead
            with Path(f"/proc/{pid}/fd/2").resolve(strict=True).open("a") as log:
                log.write("what the engine wrote last\n")
            os.kill(pid, signal.SIGKILL)
        return super().__call__(table)


class ActorDies(ScoreRows):
    """Its actor is killed at its fourth block."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_blocks = 0

    def __call__(self, table: pa.Table) -> pa.Table:
        self._num_blocks += 1
        if self._num_blocks == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(table)
