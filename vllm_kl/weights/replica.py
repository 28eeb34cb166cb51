"""Loads weights into one replica of TorchRL's ``AsyncVLLM``, in steps that a trainer orders.

The code runs in the replica's Ray actor, which keeps the replica's ``AsyncLLM`` as ``actor.engine``
(``torchrl/modules/llm/backends/vllm/vllm_async.py``, 0.14). :func:`install` adds the steps to the engine's
``collective_rpc``, because this is what the actor awaits for callers (``collective_rpc_v1``).

    begin -> prepare -> commit -> end        or, if another replica failed:  -> put_back -> end

Only one trainer at a time has the push lock. A trainer that is silent for a minute between two steps loses
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from vllm_kl.errors import WeightsError
from vllm_kl.weights.checkpoint import Checkpoint, new_folder
from vllm_kl.weights.live_weights import AsyncWeights
from vllm_kl.weights.loading import Prepared

STEP = "vllm_kl_step:"  # what the name of a step begins with
_SILENT_AT_MOST_S = 60.0


def install(actor: Any) -> str:
    """Add the steps to an actor's engine. Idempotent. Return the id of the machine that the actor is on."""
    import ray

    if not hasattr(actor, "_vllm_kl_replica"):
        actor._vllm_kl_replica = replica = Replica(actor.engine)
        actor.engine.collective_rpc = _with_steps(actor.engine.collective_rpc, replica)
    return ray.get_runtime_context().get_node_id()


def receive(actor: Any, names: list[str], *parts: bytes) -> str:
    """Write the files of a checkpoint on this machine; return the folder."""
    folder = new_folder(sum(map(len, parts)))
    for name, part in zip(names, parts, strict=True):
        (folder / name).write_bytes(part)
    actor._vllm_kl_replica.received = {str(folder): Checkpoint(folder, is_ours=True)}
    return str(folder)


def _with_steps(collective_rpc: Any, replica: Replica) -> Any:
    @functools.wraps(collective_rpc)
    async def call(method: Any, timeout: float | None = None, args: tuple = (), kwargs: Any = None) -> Any:
        if isinstance(method, str) and method.startswith(STEP):
            return await getattr(replica, method.removeprefix(STEP))(*args)
        return await collective_rpc(method, timeout, args, kwargs)

    return call


class Replica:
    """The weights of one replica."""

    def __init__(self, engine: Any) -> None:
        self._weights = AsyncWeights(engine)
        self._push_lock, self._step_lock = asyncio.Lock(), asyncio.Lock()
        self._holder: str | None = None  # the trainer's token
        self._prepared: Prepared | None = None
        self.received: dict[str, Checkpoint] = {}  # by folder; until a step takes it
        self._expiry: asyncio.TimerHandle | None = None

    async def version(self) -> int | None:
        return await self._weights.version()

    async def next_version(self, version: int | None) -> int:
        return await self._weights.next_version(version)

    async def uncounted(self) -> str | None:
        return await self._weights.uncounted()

    async def take_over(self, version: int | None, check: bool) -> int:
        async with self._push_lock:
            return await self._weights.take_over(version, check=check)

    async def begin(self, token: str) -> None:
        """Wait for the push lock."""
        await self._push_lock.acquire()
        self._holder = token
        self._expect_a_step()

    async def prepare(self, token: str, folder: str, version: int | None) -> int:
        """Load a folder beside the serving weights; return the version that it would get."""
        async with self._holding(token):
            checkpoint = self.received.pop(folder, None) or Checkpoint(Path(folder))
            self._prepared = await self._weights.prepare(checkpoint, version)
            return self._prepared.version

    async def commit(self, token: str) -> None:
        """Serve the prepared weights."""
        async with self._holding(token):
            assert self._prepared is not None
            await self._weights.commit(self._prepared)

    async def put_back(self, token: str, reason: str) -> None:
        """Serve the weights of before the commit."""
        async with self._holding(token):
            assert self._prepared is not None
            await self._weights.put_back(self._prepared, WeightsError(reason))

    async def end(self, token: str) -> None:
        """Release the push lock, if this trainer still has it. A step that goes on ends first."""
        async with self._step_lock:
            if self._holder != token:
                return
            self._stop_waiting()
            self._holder, prepared, self._prepared = None, self._prepared, None
            try:
                if prepared is not None:
                    await self._weights.drop_prepared()
            finally:
                self._push_lock.release()

    @contextlib.asynccontextmanager
    async def _holding(self, token: str) -> AsyncIterator[None]:
        async with self._step_lock:
            self._stop_waiting()
            if self._holder != token:
                raise WeightsError(
                    f"the trainer gave this replica no order for {_SILENT_AT_MOST_S:g} s, and lost the push "
                    "lock: push again"
                )
            try:
                yield
            finally:
                self._expect_a_step()

    def _expect_a_step(self) -> None:
        loop, token = asyncio.get_running_loop(), self._holder
        self._expiry = loop.call_later(_SILENT_AT_MOST_S, lambda: loop.create_task(self.end(token or "")))

    def _stop_waiting(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
