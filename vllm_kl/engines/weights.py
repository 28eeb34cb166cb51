"""The weights of a live engine: which version serves, and how another takes its place.

    checkpoint (checked, in shared memory) -> nothing stands in the way -> every worker loads it (plugin/weights.py)
        -> prefix cache emptied -> version stamped (vLLM's own ``weight_version``)

A load that fails, or is interrupted, is taken back: the workers load what served before, and the version stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterator
from typing import Any, Protocol

from vllm_kl.checkpoint import Checkpoint, Skeleton, Start, next_version
from vllm_kl.errors import EngineError, WeightsError

# vLLM's name for the weights that an engine was started with (v1/engine/core.py, 0.32).
_INITIAL = "default"
_UNKNOWN = "unknown"
_LOOK_EVERY_S = 0.5

# What to do with an engine, one call at a time, and what the calls returned.
Steps = Generator[tuple[Any, ...], Any, Any]


class Weights(Protocol):
    """What can be asked of an engine's weights."""

    @property
    def version(self) -> int:
        """The version that serves; 0: those that the engine was started with."""
        ...

    @property
    def skeleton(self) -> Skeleton:
        """What a state dict for this engine must hold."""
        ...

    @property
    def source(self) -> str:
        """The checkpoint that serves: a folder, or the model's path or name.

        Raises:
            WeightsError: the model's files are not those any more that the engine was started with.
        """
        ...

    def next_version(self, version: int | None = None) -> int:
        """Return the version that a load would give now: ``version``, or the next.

        Raises:
            WeightsError: ``version`` is not above the one that serves.
        """
        ...

    def load(self, checkpoint: Checkpoint, *, version: int | None = None) -> int:
        """Serve a checkpoint instead, when what is being computed is done; return its version.

        Raises:
            WeightsError: it could not be loaded, or ``version`` is not above the one that serves by then; the old weights and
                their version go on serving.
        """
        ...

    def sleep(self) -> bool:
        """Give the engine's GPU memory back until :meth:`wake_up`; return whether there was anything to give."""
        ...

    def wake_up(self) -> None:
        """Take the memory again."""
        ...


class _Record:
    """What was loaded into one engine: enough to load it again, and whose version that is."""

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config
        self._start = Start(model_config.model)
        self._skeleton: Skeleton | None = None
        self._served: tuple[str, Checkpoint | None] = (_INITIAL, None)
        self.last = 0  # the last version that is known to have served

    def next_version(self, stamp: str, version: int | None) -> int:
        """Return the version after the engine's own or, where that is not known, after the last that was."""
        return next_version(self.last if stamp == _UNKNOWN else self.version(stamp), version)

    def version(self, stamp: str) -> int:
        """Return what the engine says as a number, and remember it."""
        self.last = as_version(stamp)
        return self.last

    @contextlib.contextmanager
    def telling_of_death(self) -> Iterator[None]:
        """Say which version served last, where vLLM says that its engine died."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise EngineError(
                f"the engine died. Nothing serves any more; the last that did was version {self.last}. Its log says why"
            ) from error

    @property
    def skeleton(self) -> Skeleton:
        if self._skeleton is None:
            config = self._model_config
            self._skeleton = Skeleton(
                config.model,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                hf_overrides=config.hf_overrides,
            )
        return self._skeleton

    @property
    def folder(self) -> str | None:
        _, checkpoint = self._served
        return None if checkpoint is None else str(checkpoint.folder)

    @property
    def source(self) -> str:
        return self.folder or self._start.unchanged()

    def loading(self, checkpoint: Checkpoint, version: int | None) -> Steps:
        """Yield the calls that make an engine serve a checkpoint, or serve again what it did; return the new version."""
        from vllm_kl.plugin.weights import LOAD

        before = yield ("get_weight_version",)
        version = self.next_version(before, version)
        yield from _asking_for_the_plugin()
        yield from _emptying_the_cache()
        try:
            yield ("collective_rpc", LOAD, None, (str(checkpoint.folder),))
            yield from _emptying_the_cache()
            yield ("set_weight_version", str(version))
        except BaseException as error:
            yield from self._taking_back(before, error)
            if not isinstance(error, Exception):  # Ctrl-C, an event loop that ends
                raise
            name = 0 if before == _INITIAL else before
            raise WeightsError(
                f"the weights could not be loaded ({error}). Version {name} was put back and goes on serving"
            ) from error
        self._served, self.last = (str(version), checkpoint), version
        return version

    def _taking_back(self, before: str, error: BaseException) -> Steps:
        from vllm_kl.plugin.weights import LOAD

        served, checkpoint = self._served
        try:
            if served != before:
                raise WeightsError("others loaded it, and from where is not known")
            if checkpoint is None:
                self._start.unchanged()
            yield ("collective_rpc", LOAD, None, (self.folder,))
            yield from _emptying_the_cache()
            yield ("set_weight_version", before)
        except BaseException as second:
            yield ("set_weight_version", _UNKNOWN)
            for interrupt in (second, error):
                if not isinstance(interrupt, Exception):
                    raise interrupt from None
            raise WeightsError(
                f"the weights could not be loaded ({error}), and version {before} could not be put back ({second}): which "
                "weights serve is not known. Push again, or make a new engine"
            ) from error


def _asking_for_the_plugin() -> Steps:
    from vllm_kl.plugin import KNOWN_VLLM
    from vllm_kl.plugin.weights import READY

    try:
        yield ("collective_rpc", READY)
    except EngineError:
        raise
    except Exception as error:
        raise WeightsError(
            "the engine's processes have not loaded the plugin vllm_kl, which loads weights there; nothing was touched. Make the "
            f"engine where VLLM_PLUGINS is not set, or names vllm_kl; with vLLM{KNOWN_VLLM} ({error})"
        ) from error


def _emptying_the_cache() -> Steps:
    """KV of other weights must not be read: vLLM returns False and keeps it while a block is in use."""
    if not (yield ("reset_prefix_cache",)):
        raise WeightsError(
            "the prefix cache could not be emptied: blocks are in use. Push when every request is finished"
        )


def _record_of(engine: Any) -> _Record:
    return _RECORDS.get(engine) or _RECORDS.setdefault(engine, _Record(engine.model_config))


_RECORDS: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()
_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_TURNS: weakref.WeakKeyDictionary[Any, asyncio.Lock] = weakref.WeakKeyDictionary()  # of an AsyncLLM, in its loop
_TASKS: set[asyncio.Task[int]] = set()


def lock_of(engine: Any) -> threading.RLock:
    """Return the lock of an engine: one thread at a time uses it, or changes its weights."""
    return _LOCKS.setdefault(engine, threading.RLock())


class LiveWeights:
    """The weights of an ``LLMEngine``, on its own or inside a ``vllm.LLM``.

    Args:
        llm_engine: the engine. Several of these may look at one engine.
    """

    def __init__(self, llm_engine: Any) -> None:
        self._engine = llm_engine
        self._record = _record_of(llm_engine)

    @property
    def version(self) -> int:
        with lock_of(self._engine):
            return self._record.version(self._call("get_weight_version"))

    @property
    def skeleton(self) -> Skeleton:
        return self._record.skeleton

    @property
    def folder(self) -> str | None:
        """The folder that serves; ``None``: the model's own."""
        return self._record.folder

    @property
    def source(self) -> str:
        return self._record.source

    def next_version(self, version: int | None = None) -> int:
        with lock_of(self._engine):
            return self._record.next_version(self._call("get_weight_version"), version)

    def load(self, checkpoint: Checkpoint, *, version: int | None = None) -> int:
        with lock_of(self._engine):
            if self._engine.has_unfinished_requests():
                raise WeightsError(
                    "the engine has unfinished requests: their KV is of the old weights. Push between two calls of generate"
                )
            return drive(self._record.loading(checkpoint, version), self._call)

    def _call(self, method: str, *args: Any) -> Any:
        with self._record.telling_of_death(), _not_waiting_for_the_dead(self._engine.engine_core):
            return getattr(self._engine, method)(*args)

    def sleep(self) -> bool:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            return False
        if not self._engine.model_config.enable_sleep_mode:
            raise WeightsError("the engine cannot sleep: make it with enable_sleep_mode=True")
        with lock_of(self._engine):
            self._engine.sleep(level=1)
        return True

    def wake_up(self) -> None:
        with lock_of(self._engine):
            self._engine.wake_up()


class AsyncWeights:
    """The weights of an ``AsyncLLM``. Requests in flight finish with the old weights; new ones wait.

    Args:
        engine: a ``vllm.v1.engine.async_llm.AsyncLLM``.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._record = _record_of(engine)

    @property
    def skeleton(self) -> Skeleton:
        return self._record.skeleton

    async def version(self) -> int:
        return self._record.version(await self._call("get_weight_version"))

    async def next_version(self, version: int | None = None) -> int:
        return self._record.next_version(await self._call("get_weight_version"), version)

    async def load(self, checkpoint: Checkpoint, *, version: int | None = None) -> int:
        """As :meth:`Weights.load`. A caller that is cancelled leaves a load that goes on to its end."""
        task = asyncio.create_task(self._load(checkpoint, version))
        _TASKS.add(task)  # the event loop itself would drop it
        task.add_done_callback(_TASKS.discard)
        return await asyncio.shield(task)

    async def _load(self, checkpoint: Checkpoint, version: int | None) -> int:
        async with _TURNS.setdefault(self._engine, asyncio.Lock()):
            try:
                await self._call("pause_generation", mode="wait")
                return await drive_async(self._record.loading(checkpoint, version), self._call)
            finally:
                await self._call("resume_generation")

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        name = {"set_weight_version": "update_weight_version"}.get(method, method)
        with self._record.telling_of_death():
            call = asyncio.ensure_future(getattr(self._engine, name)(*args, **kwargs))
            while not (await asyncio.wait({call}, timeout=_LOOK_EVERY_S))[0]:
                if self._engine.errored:  # vLLM 0.32 waits for ever for what a dead engine was asked
                    call.cancel()
                    raise self._engine.dead_error
            return call.result()


@contextlib.contextmanager
def _not_waiting_for_the_dead(core: Any) -> Iterator[None]:
    """End a call to an engine's process when that dies: vLLM waits for ever (``SyncMPClient.call_utility``, 0.32)."""
    if not hasattr(core, "utility_results"):  # in this process
        yield
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    def watch() -> None:
        while not is_over.wait(_LOOK_EVERY_S):
            if core.resources.engine_dead:
                for future in list(core.utility_results.values()):
                    if not future.done():
                        future.set_exception(EngineDeadError())

    is_over = threading.Event()
    threading.Thread(target=watch, name="vllm_kl-engine-watch", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def drive(steps: Steps, call: Callable[..., Any]) -> Any:
    """Do the steps with calls that return; return what the steps do. What interrupts them is theirs to handle."""
    send, value = steps.send, None
    while True:
        try:
            send, value = steps.send, call(*send(value))
        except StopIteration as end:
            return end.value
        except BaseException as error:
            if steps.gi_frame is None:  # the steps' own error
                raise
            send, value = steps.throw, error


async def drive_async(steps: Steps, call: Callable[..., Awaitable[Any]]) -> Any:
    """Do the steps with calls that are awaited; return what the steps do. What interrupts them is theirs to handle."""
    send, value = steps.send, None
    while True:
        try:
            send, value = steps.send, await call(*send(value))
        except StopIteration as end:
            return end.value
        except BaseException as error:
            if steps.gi_frame is None:
                raise
            send, value = steps.throw, error


def as_version(weight_version: str) -> int:
    """Return vLLM's ``weight_version`` as a number.

    Raises:
        WeightsError: it is none, or not known since a push failed.
    """
    if weight_version == _INITIAL:
        return 0
    if weight_version == _UNKNOWN:
        raise WeightsError("which weights serve is not known since a push failed: push again, or make a new engine")
    if not weight_version.isdigit():
        raise WeightsError(
            f"the engine's weight version is {weight_version!r}, expected a number: versions are compared. Give one to "
            "finish_weight_update(weight_version=...)"
        )
    return int(weight_version)
