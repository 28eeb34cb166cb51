"""``Replica`` is what runs in the process of a replica: an engine in a child process, and calls from Serve.

A replica whose engine died ends itself, so that Serve starts another one. A replica that starts loads the
weights that serve: Serve calls :meth:`Replica.reconfigure` with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray import serve

from vllm_kl import errors
from vllm_kl.engines.process import ProcessEngine
from vllm_kl.engines.wire_format import Packed, pack, unpack
from vllm_kl.errors import EngineError, VLLMKLError, WeightsError
from vllm_kl.types import EngineInfo, ScoreRequest
from vllm_kl.weights.checkpoint import Checkpoint, Identity, InitialCheckpoint

# Requests that a replica takes at a time; they share the batches of its engine. Serve lets those beyond this
# number wait and asks again after pauses of up to half a second, so it is larger than callers need.
MAX_ONGOING = 64
USERS = "vllm_kl-users"  # the namespace of the actors that live as long as a deployment has its user
_CALLS = MAX_ONGOING + 4  # and calls to all replicas
_MARK = "vllm_kl's error: "
_LOOK_EVERY_S = 2.0


class _CancelledError(Exception):
    """Nobody waits for the results any more."""


class DyingError(EngineError):
    """The engine of a replica died, so the replica ends. The message has the engine's log."""


class Replica:
    """One replica.

    Args:
        model: the path or name of the model.
        start: arguments of :class:`~vllm_kl.engines.process.ProcessEngine`.
        files: what the model's files must be; ``None``: no local files.
        user: the name of the actor that lives as long as the deployment's user; ``None``: Ray ends with it.
    """

    def __init__(self, model: str, start: dict[str, Any], files: Identity | None, user: str | None) -> None:
        self._is_as_written = files is None or files.is_of(InitialCheckpoint(model).identity)
        self._model = model
        with _as_text():
            self._engine = ProcessEngine(model, **start)
        self._threads = ThreadPoolExecutor(_CALLS, thread_name_prefix="vllm_kl-replica")
        self._is_prepared, self._kept = False, 0
        if user is not None:
            threading.Thread(target=_end_with, args=(user,), name="vllm_kl-user-watch", daemon=True).start()

    async def describe(self) -> tuple[EngineInfo, dict[str, Any], int]:
        """Return what the caller must know of the engine, its settings, and this process's id."""
        return self._engine.info, self._engine.settings, os.getpid()

    async def score(self, key: bytes, packed: Packed, share_prefix: bool) -> tuple[Packed, float]:
        """Score one shard; return its results, and how many seconds that took.

        Cancelling this frees the engine. ``key`` is for the router.
        """
        return await self._score(packed, share_prefix=share_prefix)

    async def score_alone(self, packed: Packed) -> Packed:
        """Score requests without the prefix cache, and without requests of other callers.

        Cancelling this frees the engine.
        """
        results, _ = await self._score(packed, share_prefix=False, alone=True)
        return results

    async def _score(self, packed: Packed, **options: Any) -> tuple[Packed, float]:
        is_cancelled = threading.Event()

        def go_on(_: int) -> None:
            if is_cancelled.is_set():
                raise _CancelledError  # so the engine drops the requests that are left

        def score() -> tuple[Packed, float]:
            began = time.monotonic()
            results = self._engine.score(unpack(ScoreRequest, packed), on_done=go_on, **options)
            return pack(results), time.monotonic() - began

        try:
            return await self._in_thread(score)
        except asyncio.CancelledError:
            is_cancelled.set()
            raise

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve a version of the weights. Serve calls this when a replica starts, and after a refresh."""
        with _as_text():
            await self._in_thread(self._serve, config["version"], Path(config["folder"]))

    def _serve(self, version: int, folder: Path) -> None:
        if self._engine.weights.version < version:
            self._engine.weights.load(_checkpoint(folder), version=version)
        self._is_as_written, self._kept = True, version

    async def kept(self) -> int:
        """Return the version that Serve has told this replica to serve; 0: none."""
        return self._kept

    async def prepare(self, folder: str, version: int) -> None:
        await self._in_thread(self._engine.weights.prepare, _checkpoint(Path(folder)), version)
        self._is_prepared = True

    async def commit(self) -> bool:
        """Serve what was prepared; return False if nothing was, because this replica has just started."""
        if self._is_prepared:
            await self._in_thread(self._engine.weights.commit)
        return self._is_prepared

    async def put_back(self, reason: str) -> None:
        """Serve what served before the commit; if that fails, start anew with it."""
        try:
            if self._is_prepared:
                await self._in_thread(self._engine.weights.put_back, reason)
        except WeightsError:
            _exit()

    async def end_push(self) -> None:
        """Drop what was prepared and does not serve."""
        if self._is_prepared:
            self._is_prepared = False
            await self._in_thread(self._engine.weights.drop_prepared)

    async def _in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)
        except EngineError as error:
            if self._engine.is_open:
                raise
            _exit()
            raise DyingError(str(error)) from error

    def check_health(self) -> None:
        """Serve calls this again and again; an error lets it replace the replica."""
        with _as_text():
            if not self._engine.is_open:
                raise EngineError("the engine of this replica died")
            if not self._is_as_written:
                raise EngineError(
                    f"the weight files in {self._model!r} have changed since the scorer was made, so a "
                    "replica that starts now would score with others.\n"
                    "Let the trainer save to another folder, and make the scorer again"
                )

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def _checkpoint(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise WeightsError(
            f"this replica's machine has no folder {str(folder)!r}, where the new weights are.\nIf replicas "
            'run on several machines, name a folder that all of them share: replicas={"weights_folder": ...}'
        )
    return Checkpoint(folder)


def _exit() -> None:
    """End this process in a moment: the answer, with the engine's log, leaves first."""
    threading.Timer(0.3, os._exit, [1]).start()


def _end_with(user: str) -> None:
    """End the deployment when its user is gone."""
    while True:
        time.sleep(_LOOK_EVERY_S)
        try:
            ray.get_actor(user, namespace=USERS)
        except ValueError:
            serve.delete(user, _blocking=False)
            return
        except Exception:  # Ray's own store starts anew
            continue


@contextlib.contextmanager
def _as_text() -> Iterator[None]:
    """Raise errors of ours in the block as text: of an error at the start Serve keeps nothing else."""
    try:
        yield
    except VLLMKLError as error:
        raise RuntimeError(_MARK + json.dumps([type(error).__name__, str(error)])) from None


def from_text(text: str) -> VLLMKLError | None:
    """Return the error in a message of Serve; ``None``: there is none of ours."""
    if (found := re.search(re.escape(_MARK) + r"(\[.*\])", text)) is None:
        return None
    name, message = json.loads(found[1])
    return getattr(errors, name, EngineError)(message)  # DyingError is of this module
