"""Loads weights into one replica of TorchRL's ``AsyncVLLM``, in steps that a trainer orders.

The code runs in the replica's Ray actor, which keeps the replica's ``AsyncLLM`` as ``actor.engine``
(``torchrl/modules/llm/backends/vllm/vllm_async.py``, 0.14). :func:`install` adds the steps to the engine's
``collective_rpc``, because this is what the actor awaits for callers (``collective_rpc_v1``).

    begin -> prepare -> commit -> end        or, if another replica failed:  -> put_back -> end

Only one trainer at a time has the push lock. A trainer that gives no sign of life for a minute loses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from vllm_kl import lifetime
from vllm_kl.errors import WeightsError
from vllm_kl.weights import adapters
from vllm_kl.weights.checkpoint import Checkpoint, new_folder
from vllm_kl.weights.live_weights import AsyncWeights
from vllm_kl.weights.loading import Prepared, as_version
from vllm_kl.weights.nccl import SentWeights

STEP = "vllm_kl_step:"  # what the name of a step begins with
_SILENT_AT_MOST_S = 60.0


def install(actor: Any) -> str:
    """Add the steps to an actor's engine. Idempotent. Return the id of the machine that the actor is on."""
    import ray

    if not hasattr(actor, "_vllm_kl_replica"):
        actor._vllm_kl_replica = replica = Replica(actor.engine)
        actor.engine.collective_rpc = _with_steps(actor.engine.collective_rpc, replica)
    return ray.get_runtime_context().get_node_id()


def receive(actor: Any, token: str, names: list[str], *parts: bytes) -> str:
    """Write the files of a checkpoint on this machine; return the folder."""
    folder = new_folder(sum(map(len, parts)))
    checkpoint = Checkpoint(folder, is_ours=True)
    for name, part in zip(names, parts, strict=True):
        (folder / name).write_bytes(part)
    actor._vllm_kl_replica.received[token] = checkpoint
    return str(folder)


def _with_steps(collective_rpc: Any, replica: Replica) -> Any:
    @functools.wraps(collective_rpc)
    async def call(method: Any, timeout: float | None = None, args: tuple = (), kwargs: Any = None) -> Any:
        if isinstance(method, str) and method.startswith(STEP):
            return await getattr(replica, method.removeprefix(STEP))(*args)
        return await collective_rpc(method, timeout, args, kwargs)

    return call


class State(NamedTuple):
    """Which weights a replica serves."""

    stamp: str  # vLLM's weight_version
    uncounted: str | None  # the weight_version that stands for no known version, if there is one
    is_pushed: bool  # a push is going on
    num_changes: int  # how often a push or its undoing changed the weights

    @property
    def version(self) -> int | None:
        """The version of the weights; ``None``: others loaded weights and gave them no version."""
        return None if self.stamp == self.uncounted else as_version(self.stamp)


class Replica:
    """The weights of one replica."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._weights = engine, AsyncWeights(engine)
        self._push_lock, self._step_lock = asyncio.Lock(), asyncio.Lock()
        self._holder: str | None = None  # the token of the trainer that has the push lock
        self._given_up: set[str] = set()  # tokens of trainers that no longer wait for it
        self._heard_s = 0.0  # when the trainer gave its last sign of life
        self._watch: asyncio.Task[None] | None = None
        self._prepared: Prepared | None = None
        self._has_committed = False
        self._num_changes = 0
        self._adapter_lock = asyncio.Lock()
        self.received: dict[str, Checkpoint] = {}  # by token; until the trainer's next step

    async def config(self) -> Any:
        """Return the engine's ``VllmConfig``."""
        return self._engine.vllm_config

    async def state(self) -> State:
        uncounted, stamp = await self._weights.uncounted(), await self._weights.call("get_weight_version")
        return State(stamp, uncounted, self._holder is not None, self._num_changes)

    async def next_version(self, version: int | None) -> int:
        return await self._weights.next_version(version)

    async def check_adapter(self, lora_request: Any) -> None:
        """Load an adapter, or refuse it, as :func:`vllm_kl.weights.adapters.check` does."""
        async with self._adapter_lock:
            await adapters.check(self._engine, self._weights.call, lora_request)

    async def begin(self, token: str) -> None:
        """Wait for the push lock."""
        await self._push_lock.acquire()
        if token in self._given_up:
            self._given_up.discard(token)
            self._push_lock.release()
            return
        self._holder = token
        self.hear()
        self._watch = asyncio.get_running_loop().create_task(self._end_if_silent(token))

    async def beat(self, token: str) -> None:
        """Take a sign of life of the trainer."""
        if self._holder == token:
            self.hear()

    async def on_workers(self, method: str, *args: Any) -> list[Any]:
        """Run a method of the plugin on all workers; return their answers."""
        await self._weights.refuse_if_asleep()
        return await self._weights.call("collective_rpc", method, None, args)

    async def prepare(
        self, token: str, folder: str | dict[str, Any], version: int | None, is_foreign: bool
    ) -> int:
        """Load a folder beside the serving weights; return the version that it would get.

        Args:
            token: of the trainer.
            folder: of the checkpoint. Files of this package are linked, because the trainer may delete them.
                A dict describes what the trainer sends by NCCL.
            version: as in ``push_weights``.
            is_foreign: another program wrote the folder.
        """
        async with self._holding(token):
            checkpoint: Checkpoint | SentWeights | None = self.received.pop(token, None)
            if isinstance(folder, dict):
                checkpoint = SentWeights(folder)
            elif checkpoint is None:
                checkpoint = Checkpoint(Path(folder)) if is_foreign else _linked(Path(folder))
            self._prepared = await self._weights.prepare(checkpoint, version, is_foreign=is_foreign)
            return self._prepared.version

    async def prepare_take_over(self, token: str, version: int | None, check: bool) -> int:
        """Check weights that another program loaded; return the version that they would get."""
        async with self._holding(token):
            self._prepared = await self._weights.prepare_take_over(version, check=check)
            return self._prepared.version

    async def commit(self, token: str) -> None:
        """Serve the prepared weights."""
        async with self._holding(token):
            assert self._prepared is not None
            self._num_changes += 1
            await self._weights.commit(self._prepared)
            self._has_committed = True

    async def put_back(self, token: str, reason: str) -> None:
        """Serve the weights of before the commit, if there was one."""
        async with self._holding(token):
            if self._has_committed:
                assert self._prepared is not None
                self._num_changes += 1
                await self._weights.put_back(self._prepared, WeightsError(reason))
                self._has_committed = False

    async def end(self, token: str) -> None:
        """Release the push lock, if this trainer has it or waits for it. A step that runs ends first."""
        async with self._step_lock:
            self.received.pop(token, None)
            if self._holder == token:
                await self._release()
            else:
                self._given_up.add(token)

    async def _release(self) -> None:
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()
        prepared = self._prepared
        is_pending = prepared is not None and (prepared.is_kept or not self._has_committed)
        self._watch = self._holder = self._prepared = None
        self._has_committed = False
        try:
            if is_pending:
                await self._weights.drop_prepared()
        finally:
            self._push_lock.release()

    def hear(self) -> None:
        self._heard_s = asyncio.get_running_loop().time()

    async def _end_if_silent(self, token: str) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SILENT_AT_MOST_S / 4)
            async with self._step_lock:
                if self._holder != token:
                    return
                if loop.time() - self._heard_s > _SILENT_AT_MOST_S:
                    await self._release()
                    return

    @contextlib.asynccontextmanager
    async def _holding(self, token: str) -> AsyncIterator[None]:
        async with self._step_lock:
            if self._holder != token:
                raise WeightsError(
                    f"the trainer gave this replica no sign of life for {_SILENT_AT_MOST_S:g} s, and lost "
                    "the push lock: push again"
                )
            try:
                yield
            finally:
                self.hear()


def _linked(folder: Path) -> Checkpoint:
    """Return a checkpoint of this process's own, whose files are links to those of a folder."""
    own = Checkpoint(lifetime.new_folder(folder.parent), is_ours=True)
    for file in folder.iterdir():
        os.link(file, own.folder / file.name)
    return own
