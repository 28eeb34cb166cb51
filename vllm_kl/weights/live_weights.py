"""Reads and replaces the weights of a live engine: a ``vllm.LLM`` or an ``AsyncLLM``.

The version of the weights is vLLM's own ``weight_version``. :mod:`vllm_kl.weights.loading` has the steps of a
load; the classes here run the steps for one caller at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

from vllm_kl.errors import WeightsError
from vllm_kl.plugin.allowed import SWITCH
from vllm_kl.plugin.load_weights import GIVE_BACK
from vllm_kl.plugin.taken_engines import TAKE
from vllm_kl.weights.checkpoint import Checkpoint, Skeleton
from vllm_kl.weights.engine_lock import EngineLock
from vllm_kl.weights.loading import Prepared, Record, drop_prepared, run_sync
from vllm_kl.weights.nccl import SentWeights

logger = logging.getLogger("vllm_kl")

_LOOK_EVERY_S = 0.5


class Weights(Protocol):
    """Reads and replaces the weights of one engine."""

    @property
    def version(self) -> int | None:
        """The version of the weights. 0: those that the engine started with.

        ``None``: another program loaded the weights and gave them no version.
        """
        ...

    @property
    def skeleton(self) -> Skeleton:
        """The names and shapes that a state dict for this engine must have."""
        ...

    @property
    def source(self) -> str:
        """The checkpoint of the engine's weights: a folder, or the model's path or name.

        Raises:
            WeightsError: the engine has the weights of its start, and the model's files have changed since
                then.
        """
        ...

    def next_version(self, version: int | None = None) -> int:
        """Return the version that a load would give now: ``version``, or the next number.

        Raises:
            WeightsError: ``version`` is not above the present version.
        """
        ...

    def load(self, checkpoint: Checkpoint, *, version: int | None = None) -> int:
        """Wait for the engine's requests, then load a checkpoint; return the version of the new weights.

        Raises:
            WeightsError: the checkpoint could not be loaded, or ``version`` is not above the present version.
                The engine keeps the old weights and their version.
        """
        ...

    def sleep(self) -> bool:
        """Free the engine's GPU memory until this thread calls :meth:`wake_up`; return False on a CPU.

        On a CPU there is nothing to free. If Ctrl-C interrupts the call, the engine may be asleep.
        """
        ...

    def wake_up(self) -> None:
        """Take the GPU memory again and load the weights back into it; do nothing if the engine is awake."""
        ...


def _record_of(engine: Any) -> Record:
    return _RECORDS.get(engine) or _RECORDS.setdefault(engine, Record(engine.model_config))


def _take(llm_engine: Any) -> None:
    """Take an engine (:mod:`vllm_kl.plugin.taken_engines`), once."""
    record = _record_of(llm_engine)
    if record.is_taken is not None:
        return

    async def call(method: str, *args: Any) -> Any:
        return getattr(llm_engine, method)(*args)

    try:
        with lock_of(llm_engine):
            answers = llm_engine.collective_rpc(TAKE, None, (os.getpid(),))
            if any(answers):
                llm_engine.reset_prefix_cache()
            record.is_taken = True
            with contextlib.suppress(WeightsError):  # the engine's version is not a number
                run_sync(record.version(call))
    except Exception as error:
        record.is_taken = False
        logger.warning(
            "vllm_kl: this engine's processes have not loaded the plugin vllm_kl (%s). They go on running "
            "if the process that made them is killed, and errors of vLLM's CPU backend are not corrected.\n"
            "Make the engine where VLLM_PLUGINS is not set, or names vllm_kl, and %s is not 0",
            error,
            SWITCH,
        )


_RECORDS: weakref.WeakKeyDictionary[Any, Record] = weakref.WeakKeyDictionary()
_LOCKS: weakref.WeakKeyDictionary[Any, EngineLock] = weakref.WeakKeyDictionary()
# AsyncLLM -> a lock of its event loop: one load at a time.
_TURNS: weakref.WeakKeyDictionary[Any, asyncio.Lock] = weakref.WeakKeyDictionary()
_TAKES: weakref.WeakKeyDictionary[Any, asyncio.Task[None]] = weakref.WeakKeyDictionary()
_TASKS: set[asyncio.Task[int]] = set()


def lock_of(engine: Any) -> EngineLock:
    """Return the lock of an engine: one thread at a time uses the engine or replaces its weights."""
    return _LOCKS.setdefault(engine, EngineLock())


class LiveWeights:
    """The weights of an ``LLMEngine``, which may be inside a ``vllm.LLM``.

    Args:
        llm_engine: the engine. One engine may have several ``LiveWeights``.
        is_shared: whether other programs can load weights into the engine. If so, its workers are asked for
            such loads whenever the version is read.
    """

    def __init__(self, llm_engine: Any, *, is_shared: bool = True) -> None:
        self._engine = llm_engine
        self._record = _record_of(llm_engine)
        self._record.is_shared &= is_shared
        _take(llm_engine)
        self._asleep = contextlib.ExitStack()
        self._prepared: Prepared | None = None

    @property
    def version(self) -> int | None:
        with lock_of(self._engine).if_free() as is_free:
            # Another thread generates, scores or pushes: the weights are still those of before.
            if not is_free:
                return self._record.last
            return run_sync(self._record.version(self._call))

    @property
    def uncounted(self) -> str | None:
        """vLLM's ``weight_version``, if another program loaded weights after it was set; else ``None``."""
        return run_sync(self._record.uncounted(self._call))

    @property
    def skeleton(self) -> Skeleton:
        return self._record.skeleton

    @property
    def folder(self) -> str | None:
        """The folder of the engine's weights; ``None``: the checkpoint of the engine's start."""
        return self._record.folder

    @property
    def source(self) -> str:
        return self._record.source

    def next_version(self, version: int | None = None) -> int:
        with lock_of(self._engine):
            return self._record.next_version(run_sync(self._call("get_weight_version")), version)

    def load(self, checkpoint: Checkpoint, *, version: int | None = None) -> int:
        with lock_of(self._engine).replacing():
            if self._engine.has_unfinished_requests():
                raise WeightsError(
                    "the engine has unfinished requests, with KV of the old weights: push between two calls "
                    "of generate"
                )
            return run_sync(self._record.load(self._call, checkpoint, version))

    def prepare(self, checkpoint: Checkpoint, *, version: int | None = None) -> int:
        """Let the workers load a checkpoint beside the serving weights; return the version that it would get.

        :meth:`commit` lets the weights serve, and :meth:`put_back` undoes that. :meth:`drop_prepared` ends
        both.
        """
        with lock_of(self._engine):
            steps = self._record.prepare(self._call, checkpoint, version, is_idle=False)
            self._prepared = run_sync(steps)
            return self._prepared.version

    def give_back_memory(self) -> None:
        """Let the workers give freed memory, that of old weights, back to the system."""
        with lock_of(self._engine):
            run_sync(self._call("collective_rpc", GIVE_BACK))

    def commit(self) -> None:
        """Let the workers adopt the prepared weights. No request may run."""
        assert self._prepared is not None, "prepare() comes first"
        with lock_of(self._engine).replacing():
            run_sync(self._record.commit(self._call, self._prepared))

    def put_back(self, reason: str) -> None:
        """Serve again what served before :meth:`commit`."""
        assert self._prepared is not None, "prepare() comes first"
        with lock_of(self._engine).replacing():
            run_sync(self._record.put_back(self._call, self._prepared, WeightsError(reason)))

    def drop_prepared(self) -> None:
        """Drop the prepared weights, unless they serve."""
        with lock_of(self._engine):
            self._prepared = None
            run_sync(drop_prepared(self._call))

    def load_folder(self, folder: Path, *, version: int | None = None) -> int:
        """Load the folder of a checkpoint that another program wrote; return the version of the new weights.

        Raises:
            WeightsError: as in :meth:`load`; or the folder is of another model.
        """
        if not folder.is_dir():
            raise WeightsError(
                f"{str(folder)!r} is no folder: nothing was touched. Pass the folder of a checkpoint on the "
                "engine's machine"
            )
        self.next_version(version)
        self._record.refuse_another_model(folder)
        return self.load(Checkpoint(folder), version=version)

    def take_over(self, *, version: int | None = None, check: bool = True) -> int:
        """Give a version to weights that another program loaded; return the version.

        With ``check`` the weights are first compared with the checkpoint that they came from.
        """
        with lock_of(self._engine).replacing():
            return run_sync(self._record.take_over(self._call, version, check=check))

    def started_with(self, checkpoint: Checkpoint, version: int) -> None:
        """Give a version to the weights that this engine started with, because it replaces another engine."""
        run_sync(self._record.started_with(self._call, checkpoint, version))

    async def _call(self, method: str, *args: Any) -> Any:
        with self._record.telling_of_death(), _not_waiting_for_the_dead(self._engine.engine_core):
            return getattr(self._engine, method)(*args)

    def sleep(self) -> bool:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            return False
        if not self._engine.model_config.enable_sleep_mode:
            raise WeightsError("the engine cannot sleep: make it with enable_sleep_mode=True")
        # Hold the lock until wake_up(): a sleeping engine takes requests and never answers them.
        self._asleep.enter_context(lock_of(self._engine).replacing())
        try:
            self._engine.sleep(level=1)
        except Exception:
            self._asleep.close()
            raise
        return True

    def wake_up(self) -> None:
        with self._asleep:
            if self._engine.is_sleeping():
                self._engine.wake_up()


class AsyncWeights:
    """The weights of an ``AsyncLLM``. Running requests finish with the old weights; new requests wait.

    Args:
        engine: a ``vllm.v1.engine.async_llm.AsyncLLM``.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._record = _record_of(engine)

    @property
    def skeleton(self) -> Skeleton:
        return self._record.skeleton

    async def version(self) -> int | None:
        await self._take()
        return await self._record.version(self.call)

    async def next_version(self, version: int | None = None) -> int:
        return self._record.next_version(await self.call("get_weight_version"), version)

    async def load(self, checkpoint: Checkpoint, *, version: int | None = None) -> int:
        """Load as :meth:`Weights.load` does. A load that has begun goes on if the caller is cancelled."""
        task = asyncio.create_task(self._load(checkpoint, version))
        _TASKS.add(task)  # the event loop keeps only a weak reference
        task.add_done_callback(_TASKS.discard)
        return await asyncio.shield(task)

    async def _load(self, checkpoint: Checkpoint, version: int | None) -> int:
        async with _TURNS.setdefault(self._engine, asyncio.Lock()), self._paused():
            await self._take()
            return await self._record.load(self.call, checkpoint, version)

    async def uncounted(self) -> str | None:
        """As :attr:`LiveWeights.uncounted`."""
        await self._take()
        return await self._record.uncounted(self.call)

    async def prepare(
        self, checkpoint: Checkpoint | SentWeights, version: int | None, *, is_foreign: bool
    ) -> Prepared:
        """Let the workers load a checkpoint beside the serving weights. Requests go on meanwhile.

        Args:
            checkpoint: the checkpoint.
            version: as in ``push_weights``.
            is_foreign: another program wrote it: it is refused if it is of another model.
        """
        await self._take()
        await self.refuse_if_asleep()
        if is_foreign:
            await asyncio.to_thread(self._record.refuse_another_model, checkpoint.folder)
        return await self._record.prepare(self.call, checkpoint, version, is_idle=False)

    async def commit(self, prepared: Prepared) -> None:
        """Let the workers adopt prepared weights when the running requests have finished."""
        async with self._paused():
            await self._record.commit(self.call, prepared)

    async def put_back(self, prepared: Prepared, reason: Exception) -> None:
        """Load the weights again that served before a commit."""
        async with self._paused():
            await self._record.put_back(self.call, prepared, reason)

    async def drop_prepared(self) -> None:
        """Drop prepared weights."""
        await drop_prepared(self.call)

    async def prepare_take_over(self, version: int | None, *, check: bool) -> Prepared:
        """Check weights that another program loaded. :meth:`commit` gives them the version."""
        await self._take()
        await self.refuse_if_asleep()
        return await self._record.prepare_take_over(self.call, version, check=check)

    async def refuse_if_asleep(self) -> None:
        """Refuse an engine that sleeps: on a GPU its weights are in no memory that a load can write to.

        Raises:
            WeightsError: the engine sleeps, or somebody paused it.
        """
        if await self.call("is_sleeping"):
            raise WeightsError(
                "the engine sleeps, or somebody paused it; nothing was touched. Call wake_up() or "
                "resume_generation() first"
            )

    @contextlib.asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Let running requests finish, and new requests wait until the end of the block."""
        await self.refuse_if_asleep()
        try:
            await self.call("pause_generation", mode="wait")
            yield
        finally:
            await self.call("resume_generation")

    async def _take(self) -> None:
        """Take the engine (:mod:`vllm_kl.plugin.taken_engines`), once. All callers wait for the first one."""
        if self._engine not in _TAKES:
            _TAKES[self._engine] = asyncio.create_task(self._take_once())
        await asyncio.shield(_TAKES[self._engine])

    async def _take_once(self) -> None:
        if self._record.is_taken is not None:
            return
        try:
            answers = await self.call("collective_rpc", TAKE, None, (os.getpid(),))
            if any(answers):
                await self.call("reset_prefix_cache")
            self._record.is_taken = True
        except Exception:  # load() raises an error if the plugin is missing
            self._record.is_taken = False

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the engine by name. A dead engine raises an error, and is not waited for."""
        name = {"set_weight_version": "update_weight_version"}.get(method, method)
        with self._record.telling_of_death():
            call = asyncio.ensure_future(getattr(self._engine, name)(*args, **kwargs))
            while not (await asyncio.wait({call}, timeout=_LOOK_EVERY_S))[0]:
                if self._engine.errored:  # vLLM 0.32 waits for ever for the answer of a dead engine
                    call.cancel()
                    raise self._engine.dead_error
            return call.result()


@contextlib.contextmanager
def _not_waiting_for_the_dead(core: Any) -> Iterator[None]:
    """End a call in the block when the engine's process dies.

    vLLM 0.32 would wait for its answer for ever (``SyncMPClient.call_utility``).
    """
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(core, InprocClient):
        yield
        return
    resources, asked = core.resources, core.utility_results

    def watch() -> None:
        while not is_over.wait(_LOOK_EVERY_S):
            if resources.engine_dead:
                for future in list(asked.values()):
                    if not future.done():
                        future.set_exception(EngineDeadError())

    is_over = threading.Event()
    threading.Thread(target=watch, name="vllm_kl-engine-watch", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
