"""``Replica`` is what runs in the process of a replica: an engine in a child process, and calls from Serve.

A replica whose engine died ends itself, so that Serve starts another one.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_kl import errors
from vllm_kl.engines.process import ProcessEngine
from vllm_kl.engines.wire_format import Packed, pack, unpack
from vllm_kl.errors import EngineError, VLLMKLError
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult

MAX_ONGOING = 4  # requests that a replica runs at a time; they share the batches of its engine
_CALLS = MAX_ONGOING + 4  # and calls to all replicas
_MARK = "vllm_kl's error: "


class Replica:
    """One replica.

    Args:
        model: the path or name of the model.
        start: arguments of :class:`~vllm_kl.engines.process.ProcessEngine`.
    """

    def __init__(self, model: str, start: dict[str, Any]) -> None:
        try:
            self._engine = ProcessEngine(model, **start)
        except VLLMKLError as error:
            raise RuntimeError(as_text(error)) from None  # Serve keeps the text of an error alone
        self._threads = ThreadPoolExecutor(_CALLS, thread_name_prefix="vllm_kl-replica")

    async def describe(self) -> tuple[EngineInfo, dict[str, Any], int]:
        """Return what the caller must know of the engine, its settings, and this process's id."""
        return self._engine.info, self._engine.settings, os.getpid()

    async def score(self, key: bytes, packed: Packed, share_prefix: bool) -> Packed:
        """Score one shard. ``key`` is for the router."""
        return await self._in_thread(self._score, packed, share_prefix, False)

    async def score_alone(self, packed: Packed) -> Packed:
        """Score requests without the prefix cache, and without requests of other callers."""
        return await self._in_thread(self._score, packed, False, True)

    def _score(self, packed: Packed, share_prefix: bool, alone: bool) -> Packed:
        requests = unpack(ScoreRequest, packed)
        results: list[ScoreResult] = self._engine.score(requests, share_prefix=share_prefix, alone=alone)
        return pack(results)

    async def _in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)
        except EngineError:
            if not self._engine.is_open:
                # The answer, with the engine's log, leaves before this process ends.
                threading.Timer(0.5, os._exit, [1]).start()
            raise

    def check_health(self) -> None:
        """Serve calls this again and again; an error lets it replace the replica."""
        if not self._engine.is_open:
            raise EngineError("the engine of this replica died")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def as_text(error: VLLMKLError) -> str:
    """Return a line that :func:`from_text` makes the same error of."""
    return _MARK + json.dumps([type(error).__name__, str(error)])


def from_text(text: str) -> VLLMKLError | None:
    """Return the error in a message of Serve; ``None``: there is none of ours."""
    if (found := re.search(re.escape(_MARK) + r"(\[.*\])", text)) is None:
        return None
    name, message = json.loads(found[1])
    return getattr(errors, name)(message)
