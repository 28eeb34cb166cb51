"""The steps by which an engine comes to serve other weights, and the record of what it serves.

    nothing stands in the way -> every worker loads beside what serves, and compares (plugin/weights.py)
        -> every worker takes over -> prefix cache emptied -> version stamped

Steps await their calls, so that one description serves an engine that is awaited and, with :func:`run_sync`, one that is called.
What fails before the workers take over has touched nothing. What fails, or is interrupted, after it is taken back: the workers load
what served before, and the version stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from vllm_kl.errors import EngineError, WeightsError
from vllm_kl.plugin.allowed import KNOWN_VLLM
from vllm_kl.plugin.weights import ADOPT, DISCARD, LAST_LOAD, PREPARE, READY, SERVES
from vllm_kl.weights.checkpoint import Checkpoint, Skeleton, Start, next_version, refuse_another_model

# vLLM's name for the weights that an engine was started with (v1/engine/core.py, 0.32).
INITIAL = "default"
_UNKNOWN = "unknown"

_NAME_THE_SOURCE = (
    "pass finish_update(source=...), a folder or a state dict of what was sent. check=False believes the load"
)

# Calls a method of an engine by its name.
Call = Callable[..., Awaitable[Any]]


class NeedsNewEngineError(WeightsError):
    """The weights can only be served by an engine that starts with them. Nothing was touched."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"the running engine cannot take these weights over: {self.reason}. Nothing was touched, the old weights go on "
            "serving. Make a new engine on the checkpoint"
        )


class Record:
    """What was loaded into one engine: enough to load it again, and whose version that is."""

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config
        self._start = Start(model_config.model)
        self._skeleton: Skeleton | None = None
        self._served: tuple[str, Checkpoint | None] = (INITIAL, None)
        self.last: int | None = 0  # the last version that is known to have served; None: none is
        self.is_taken: bool | None = None  # its workers have loaded the plugin; None: they were not asked

    def next_version(self, stamp: str, version: int | None) -> int:
        """Return the version after the engine's own or, where that is not known, after the last that was."""
        is_number = stamp == INITIAL or stamp.isdigit()
        return next_version(as_version(stamp) if is_number else self.last or 0, version)

    async def version(self, call: Call) -> int | None:
        """Return what the engine says as a number, and remember it; ``None``: it serves what others loaded and nobody counted."""
        stamp = await call("get_weight_version")
        self.last = None if stamp == await self.uncounted(call) else as_version(stamp)
        return self.last

    async def uncounted(self, call: Call) -> str | None:
        """Return the stamp that says nothing: others have loaded weights since it was given, and gave none. ``None``: none is."""
        is_known = self.is_taken and not any(await call("collective_rpc", LAST_LOAD))
        return None if is_known else self._served[0]

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

    def refuse_another_model(self, folder: Path) -> None:
        """Refuse a folder whose configuration, if it has one, computes otherwise than the engine's."""
        engine = self._model_config
        if engine.hf_overrides or not (folder / "config.json").exists():
            return
        read = type(engine.hf_config).from_pretrained
        ours = read(
            self._start.model, revision=engine.revision or "main"
        )  # engine.model is what vLLM reloaded last
        refuse_another_model(ours, read(folder), str(folder))

    async def load(self, call: Call, checkpoint: Checkpoint, version: int | None) -> int:
        """Make an engine serve a checkpoint, or go on serving what it did; return the new version."""
        before = await call("get_weight_version")
        version = self.next_version(before, version)
        await _ask_for_the_plugin(call)
        is_ours = before == self._served[0] and await self.uncounted(call) is None
        await _empty_the_cache(call)
        try:
            await _prepare(call, str(checkpoint.folder))
        except NeedsNewEngineError:
            raise
        except Exception as error:
            raise WeightsError(
                f"the weights could not be loaded ({error}). Nothing was touched: version {_name(before)} goes on serving"
            ) from error
        try:
            await self._adopt(call, checkpoint, version)
        except BaseException as error:
            await self._take_back(call, before, is_ours, error)
            if not isinstance(error, Exception):  # Ctrl-C, an event loop that ends
                raise
            raise WeightsError(
                f"the weights could not be loaded ({error}). Version {_name(before)} was put back and goes on serving"
            ) from error
        return version

    async def take_over(self, call: Call, version: int | None) -> int:
        """Make the engine serve what others loaded, whole, and under a version; return it.

        Workers note the folder that vLLM's ``reload_weights`` was told: it is loaded again, our way. Where nobody loaded anything,
        the engine is compared with what was pushed last, as far as a load leaves weights as it reads them, and left alone.
        """
        version = self.next_version(await call("get_weight_version"), version)
        await _ask_for_the_plugin(call)
        await call("set_weight_version", _UNKNOWN)  # until all of it is done
        loads = [load for worker in await call("collective_rpc", LAST_LOAD) for load in worker]
        if None in loads or len(set(loads)) > 1:
            raise WeightsError(
                f"weights were loaded into the engine, and nothing says which: {_NAME_THE_SOURCE}"
            )
        if loads:
            checkpoint = Checkpoint(Path(loads[0]))
            self.refuse_another_model(checkpoint.folder)
            try:
                await _prepare(call, loads[0])
            except NeedsNewEngineError:
                raise
            except Exception as error:
                raise WeightsError(
                    f"{loads[0]!r}, which reload_weights was told, could not be loaded again ({error}): {_NAME_THE_SOURCE}"
                ) from error
            await self._adopt(call, checkpoint, version)
            return version
        await _prepare(call, self.folder)
        is_same = all(await call("collective_rpc", SERVES))
        await call("collective_rpc", DISCARD)
        if not is_same:
            raise WeightsError(
                f"the weights in the engine are neither those that were pushed last nor its own: {_NAME_THE_SOURCE}"
            )
        await _empty_the_cache(call)
        await call("set_weight_version", str(version))
        self._served, self.last = (str(version), self._served[1]), version
        return version

    async def believe(self, call: Call, version: int | None) -> int:
        """Serve what others loaded, as it is; return its version."""
        version = self.next_version(await call("get_weight_version"), version)
        await call("set_weight_version", _UNKNOWN)
        await _empty_the_cache(call)
        await call("set_weight_version", str(version))
        self.last = version
        return version

    async def started_with(self, call: Call, checkpoint: Checkpoint, version: int) -> None:
        """Give the weights that an engine was started with the version that they have elsewhere."""
        await call("set_weight_version", str(version))
        self._served, self.last = (str(version), checkpoint), version

    async def _adopt(self, call: Call, checkpoint: Checkpoint, version: int) -> None:
        await call("collective_rpc", ADOPT)
        await _empty_the_cache(call)
        await call("set_weight_version", str(version))
        self._served, self.last = (str(version), checkpoint), version

    async def _take_back(self, call: Call, before: str, is_ours: bool, error: BaseException) -> None:
        try:
            if not is_ours:
                raise WeightsError("others loaded it, and from where is not known")
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
                f"the weights could not be loaded ({error}), and version {before} could not be put back ({second}): which "
                "weights serve is not known. Push again, or make a new engine"
            ) from error


async def _prepare(call: Call, folder: str | None) -> None:
    """Let every worker load a folder beside what it serves; nothing that serves is touched.

    Raises:
        NeedsNewEngineError: the serving model cannot take the weights over.
    """
    try:
        answers = await call("collective_rpc", PREPARE, None, (folder,))
        if obstacles := [obstacle for answer in answers for obstacle in answer]:
            more = f"; and {len(obstacles) - 3} more" if len(obstacles) > 3 else ""
            raise NeedsNewEngineError("; ".join(obstacles[:3]) + more)
    except BaseException:
        await call("collective_rpc", DISCARD)
        raise


def _name(stamp: str) -> int | str:
    return 0 if stamp == INITIAL else stamp


async def _ask_for_the_plugin(call: Call) -> None:
    try:
        await call("collective_rpc", READY)
    except EngineError:
        raise
    except Exception as error:
        raise WeightsError(
            "the engine's processes have not loaded the plugin vllm_kl, which loads weights there; nothing was touched. Make the "
            f"engine where VLLM_PLUGINS is not set, or names vllm_kl; with vLLM{KNOWN_VLLM} ({error})"
        ) from error


async def _empty_the_cache(call: Call) -> None:
    """KV of other weights must not be read, nor that which a KV connector keeps (``kv_offloading_size``), which vLLM leaves alone
    unless it is asked. It returns False and keeps it while a block is in use."""
    is_running_too, is_connector_too = False, True
    if not await call("reset_prefix_cache", is_running_too, is_connector_too):
        raise WeightsError(
            "the prefix cache could not be emptied: blocks are in use. Push when every request is finished"
        )


def run_sync(steps: Coroutine[Any, Any, Any]) -> Any:
    """Return what steps do whose calls never wait: an interrupt comes up inside of them, as everywhere else."""
    try:
        steps.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a call waited, and there is no event loop")


def as_version(weight_version: str) -> int:
    """Return vLLM's ``weight_version`` as a number.

    Raises:
        WeightsError: it is none, or not known since a push failed.
    """
    if weight_version == INITIAL:
        return 0
    if weight_version == _UNKNOWN:
        raise WeightsError(
            "which weights serve is not known since a push failed: push again, or make a new engine"
        )
    if not weight_version.isdigit():
        raise WeightsError(
            f"the engine's weight version is {weight_version!r}, expected a number: versions are compared. Give one to "
            "finish_update(), or to vLLM's finish_weight_update(weight_version=...)"
        )
    return int(weight_version)
