"""Defines the steps of a load of new weights into an engine, and records which weights the engine serves.

    check that nothing prevents the load
        -> every worker loads the new weights into other memory, and checks them (plugin/load_weights.py)
        -> every worker adopts the new weights -> empty the prefix cache -> set the version

An error before the workers adopt the weights leaves the engine as it was. After an error or an interrupt
during or after that step, the workers load the old weights again, and the version stays as it was.

The steps are coroutines, so that the same code works for an ``AsyncLLM`` and, with :func:`run_sync`, for an
``LLMEngine``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kl.errors import EngineError, WeightsError
from vllm_kl.plugin.allowed import KNOWN_VLLM
from vllm_kl.plugin.load_weights import ADOPT, DISCARD, LAST_LOAD, OBSTACLE, PREPARE, PUT_BACK, SERVES
from vllm_kl.weights.checkpoint import (
    Checkpoint,
    InitialCheckpoint,
    Skeleton,
    next_version,
    refuse_another_model,
    skeleton_of,
)
from vllm_kl.weights.nccl import SentWeights

# vLLM's weight_version of an engine that has the weights of its start (v1/engine/core.py, 0.32).
INITIAL = "default"
_UNKNOWN = "unknown"

_NAME_THE_SOURCE = (
    "pass finish_update(source=...), the folder or the state dict that was sent; or pass check=False to "
    "skip the check"
)

# Calls a method of an engine by the method's name.
Call = Callable[..., Awaitable[Any]]


class NeedsNewEngineError(WeightsError):
    """Only an engine that starts with these weights can serve them. Nothing was touched."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"the running engine cannot take these weights: {self.reason}. Nothing was touched: the engine "
            "keeps the old weights. Make a new engine with the checkpoint"
        )


@dataclass(frozen=True)
class Prepared:
    """A new version that is ready to serve, and what serves until then."""

    version: int
    # The last weights of ours when it serves, with their weight_version.
    serves: tuple[str, Checkpoint | SentWeights | None]
    before: str  # vLLM's weight_version until then
    served: tuple[str, Checkpoint | SentWeights | None]  # the last weights of ours until then
    is_ours: bool  # the serving weights are those
    is_held: bool = True  # every worker holds the weights beside the serving ones; False: they serve already

    @property
    def is_kept(self) -> bool:
        """Whether every worker keeps the old weights until the end, because a push by NCCL has no files."""
        return any(isinstance(weights, SentWeights) for _, weights in (self.serves, self.served))


class Record:
    """Records which checkpoint one engine serves, and under which version, so that it can be loaded again."""

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config
        self._start = InitialCheckpoint(model_config.model)
        self._skeleton: Skeleton | None = None
        self._served: tuple[str, Checkpoint | SentWeights | None] = (INITIAL, None)
        self.last: int | None = 0  # the last known version of the engine; None: not known
        # True: the workers have loaded the plugin; None: they were not asked
        self.is_taken: bool | None = None
        self.is_shared = True  # False: no other program can load weights into the engine

    def next_version(self, stamp: str, version: int | None) -> int:
        """Return the version of a load: ``version``, or the number after the last known version."""
        is_number = stamp == INITIAL or stamp.isdigit()
        return next_version(as_version(stamp) if is_number else self.last or 0, version)

    async def version(self, call: Call) -> int | None:
        """Return and remember the engine's version.

        ``None``: another program loaded the weights and gave them no version.
        """
        stamp = await call("get_weight_version")
        self.last = None if stamp == await self.uncounted(call) else as_version(stamp)
        return self.last

    async def uncounted(self, call: Call) -> str | None:
        """Return vLLM's ``weight_version`` if another program loaded weights after it was set; else ``None``.

        Such a ``weight_version`` does not belong to the present weights.
        """
        if not self.is_shared:
            return None
        is_known = self.is_taken and not any(await call("collective_rpc", LAST_LOAD))
        return None if is_known else self._served[0]

    @contextlib.contextmanager
    def telling_of_death(self) -> Iterator[None]:
        """Raise an error with the engine's last version when vLLM reports that its engine died."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise EngineError(
                f"the engine died. No engine serves any more; version {self.last} was the last. Its log "
                "says why"
            ) from error

    @property
    def skeleton(self) -> Skeleton:
        if self._skeleton is None:
            self._skeleton = skeleton_of(self._model_config)
        return self._skeleton

    @property
    def folder(self) -> str | None:
        _, checkpoint = self._served
        return None if checkpoint is None else str(checkpoint.folder)

    @property
    def source(self) -> str:
        return self.folder or self._start.unchanged()

    def refuse_another_model(self, folder: Path) -> None:
        """Refuse a folder if its configuration computes other log-probs from the same weights."""
        engine = self._model_config
        if engine.hf_overrides or not (folder / "config.json").exists():
            return
        read = type(engine.hf_config).from_pretrained
        # Not engine.model: reload_weights changes it (vLLM 0.32).
        ours = read(self._start.model, revision=engine.revision or "main")
        refuse_another_model(ours, read(folder), str(folder))

    async def load(self, call: Call, checkpoint: Checkpoint, version: int | None) -> int:
        """Load a checkpoint into the engine, completely or not at all; return the new version."""
        prepared = await self.prepare(call, checkpoint, version, is_idle=True)
        await self.commit(call, prepared)
        return prepared.version

    async def prepare(
        self, call: Call, checkpoint: Checkpoint | SentWeights, version: int | None, *, is_idle: bool
    ) -> Prepared:
        """Let every worker load a checkpoint beside the serving weights, which go on serving.

        Args:
            call: calls a method of the engine.
            checkpoint: the new weights.
            version: as in ``push_weights``.
            is_idle: no request may run: a busy engine is refused before anything is loaded.

        Raises:
            WeightsError: a worker could not load it. No worker holds it then.
        """
        before = await call("get_weight_version")
        version = self.next_version(before, version)
        await _check_can_load(call)
        is_ours = before == self._served[0] and await self.uncounted(call) is None
        if is_idle:
            await _empty_the_cache(call)
        try:
            await _prepare(call, checkpoint.for_workers)
        except NeedsNewEngineError:
            raise
        except Exception as error:
            raise WeightsError(
                f"the weights could not be loaded ({error}). Nothing was touched: the engine keeps version "
                f"{_name(before)}"
            ) from error
        return Prepared(version, (str(version), checkpoint), before, self._served, is_ours)

    async def commit(self, call: Call, prepared: Prepared) -> None:
        """Let every worker adopt prepared weights; if that fails, put the old weights back."""
        try:
            if prepared.is_held:
                await call("collective_rpc", ADOPT, None, (prepared.is_kept,))
            await _empty_the_cache(call)
            await self._stamp(call, prepared.version, prepared.serves)
        except BaseException as error:
            await self._take_back(call, prepared, error)
            if not isinstance(error, Exception):  # Ctrl-C, or the end of the event loop
                raise
            raise WeightsError(
                f"the weights could not be loaded ({error}). Version {_name(prepared.before)} was put back"
            ) from error

    async def put_back(self, call: Call, prepared: Prepared, reason: Exception) -> None:
        """Serve again what served before a commit, because another replica failed."""
        self._served = prepared.served
        if prepared.is_held:
            await self._take_back(call, prepared, reason)
        else:
            await call("set_weight_version", prepared.before)
        is_number = prepared.before == INITIAL or prepared.before.isdigit()
        self.last = as_version(prepared.before) if is_number else None

    async def take_over(self, call: Call, version: int | None, *, check: bool) -> int:
        """Give weights that another program loaded a version; return the version."""
        prepared = await self.prepare_take_over(call, version, check=check)
        await self.commit(call, prepared)
        return prepared.version

    async def prepare_take_over(self, call: Call, version: int | None, *, check: bool) -> Prepared:
        """Check weights that another program loaded, before they get a version.

        The workers remember the folder that vLLM's ``reload_weights`` loaded. This method loads the folder
        again, because vLLM's own load may be incomplete. If no program loaded anything, the method compares
        the engine's weights with the last push. Weights that the engine stores in another layout are not
        compared.

        Args:
            call: calls a method of the engine.
            version: as in ``push_weights``.
            check: ``False`` checks and loads nothing.

        Raises:
            WeightsError: the weights are not known, or are not those that they should be. The engine has no
                version then.
        """
        before = await call("get_weight_version")
        version = self.next_version(before, version)
        if not check:
            return Prepared(version, self._served, before, self._served, is_ours=False, is_held=False)
        await _check_can_load(call)
        serves: tuple[str, Checkpoint | SentWeights | None]
        try:
            loads = [load for worker in await call("collective_rpc", LAST_LOAD) for load in worker]
            if loads:
                checkpoint = await self._prepare_again(call, loads)
                serves, is_ours = (str(version), checkpoint), False
            else:
                await self._compare(call)
                serves, is_ours = (str(version), self._served[1]), before == self._served[0]
        except BaseException:
            await call("set_weight_version", _UNKNOWN)
            raise
        return Prepared(version, serves, before, self._served, is_ours, is_held=bool(loads))

    async def _prepare_again(self, call: Call, loads: list[str | None]) -> Checkpoint:
        """Let every worker load the folder beside the serving weights that ``reload_weights`` loaded."""
        folder = loads[0]
        if folder is None or set(loads) != {folder}:
            raise WeightsError(
                f"weights were loaded into the engine, and the engine does not know which: {_NAME_THE_SOURCE}"
            )
        checkpoint = Checkpoint(Path(folder))
        self.refuse_another_model(checkpoint.folder)
        try:
            await _prepare(call, folder)
        except NeedsNewEngineError:
            raise
        except Exception as error:
            raise WeightsError(
                f"{loads[0]!r}, the folder that reload_weights loaded, could not be loaded again ({error}).\n"
                f"Put the folder back; or {_NAME_THE_SOURCE}"
            ) from error
        return checkpoint

    async def _compare(self, call: Call) -> None:
        """Refuse serving weights that are not those of the last push."""
        await _prepare(call, self.folder)
        is_same = all(await call("collective_rpc", SERVES))
        await drop_prepared(call)
        if not is_same:
            raise WeightsError(
                "the engine's weights are neither those of the last push nor those of the engine's start: "
                f"{_NAME_THE_SOURCE}"
            )

    async def started_with(self, call: Call, checkpoint: Checkpoint, version: int) -> None:
        """Give a version to the weights that the engine started with, because it replaces another engine."""
        await self._stamp(call, version, (str(version), checkpoint))

    async def _stamp(
        self, call: Call, version: int, serves: tuple[str, Checkpoint | SentWeights | None]
    ) -> None:
        """Give the engine's weights a version, and remember the last weights of ours."""
        await call("set_weight_version", str(version))
        self._served, self.last = serves, version

    async def _take_back(self, call: Call, prepared: Prepared, error: BaseException) -> None:
        before = prepared.before
        try:
            if not prepared.is_ours:
                raise WeightsError("another program loaded it, and its source is not known")
            if prepared.is_kept:
                await call("collective_rpc", PUT_BACK)
            else:
                if self.folder is None:
                    self._start.unchanged()
                await _prepare(call, self.folder)
                await call("collective_rpc", ADOPT)
            await _empty_the_cache(call)
            await call("set_weight_version", before)
        except BaseException as second:
            await call("set_weight_version", _UNKNOWN)
            for interrupt in (second, error):
                if not isinstance(interrupt, Exception):
                    raise interrupt from None
            raise WeightsError(
                f"the weights could not be loaded ({error}), and version {_name(before)} could not be put "
                f"back ({second}), so the version of the engine's weights is not known.\n"
                "Push again, or make a new engine"
            ) from error


async def drop_prepared(call: Call) -> None:
    """Let every worker drop the weights that it holds beside the serving ones."""
    await call("collective_rpc", DISCARD)


async def _prepare(call: Call, source: str | dict[str, Any] | None) -> None:
    """Let every worker load a folder, or what a trainer sends, into other memory than the present weights.

    Raises:
        NeedsNewEngineError: the running model cannot adopt the weights.
    """
    try:
        answers = await call("collective_rpc", PREPARE, None, (source,))
        if obstacles := [obstacle for answer in answers for obstacle in answer]:
            more = f"; and {len(obstacles) - 3} more" if len(obstacles) > 3 else ""
            raise NeedsNewEngineError("; ".join(obstacles[:3]) + more)
    except BaseException:
        await drop_prepared(call)
        raise


def _name(stamp: str) -> int | str:
    return 0 if stamp == INITIAL else stamp


async def _check_can_load(call: Call) -> None:
    """Refuse an engine whose workers cannot load weights.

    Raises:
        WeightsError: the workers have not loaded the plugin, or a KV connector keeps KV of the old weights.
    """
    try:
        obstacles = await call("collective_rpc", OBSTACLE)
    except EngineError:
        raise
    except Exception as error:
        raise WeightsError(
            f"the engine's processes have not loaded the plugin vllm_kl, which loads the weights ({error}); "
            "nothing was touched.\n"
            f"Make the engine with vLLM{KNOWN_VLLM}, and where VLLM_PLUGINS is not set or names vllm_kl"
        ) from error
    if any(obstacles):
        raise WeightsError(f"this engine can take no new weights: {next(filter(None, obstacles))}")


async def _empty_the_cache(call: Call) -> None:
    """Drop all KV of the old weights, also that of a KV connector (``kv_offloading_size``).

    vLLM drops a connector's KV only on request. It drops nothing, and returns False, while a block is in use.
    """
    is_running_too, is_connector_too = False, True
    if not await call("reset_prefix_cache", is_running_too, is_connector_too):
        raise WeightsError(
            "the prefix cache could not be emptied, because blocks are in use. Push when every request is "
            "finished"
        )


def run_sync(steps: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never waits; return its result. It gets a KeyboardInterrupt like any function."""
    try:
        steps.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a call waited, and there is no event loop")


def as_version(weight_version: str) -> int:
    """Return vLLM's ``weight_version`` as a number.

    Raises:
        WeightsError: it is not a number; or the version is not known, because a push failed.
    """
    if weight_version == INITIAL:
        return 0
    if weight_version == _UNKNOWN:
        raise WeightsError(
            "the version of the engine's weights is not known, because a push failed: push again, or make a "
            "new engine"
        )
    if not weight_version.isdigit():
        raise WeightsError(
            f"the engine's weight version is {weight_version!r}, expected a number, because versions are "
            "compared. Pass a number to finish_update(), or to vLLM's "
            "finish_weight_update(weight_version=...)"
        )
    return int(weight_version)
