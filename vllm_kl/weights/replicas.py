"""Reads and replaces the weights of all replicas of TorchRL's ``AsyncVLLM``, which are Ray actors.

    all replicas prepare the new weights        one that cannot: none serves them
        -> all replicas commit                  one that fails: the others put the old weights back

Each replica does it between its own requests (:mod:`vllm_kl.weights.replica`). While the replicas commit,
some serve the new weights already and others the old ones; vLLM tells the version of every row that they
generate.

The trainer's machine writes the checkpoint. Replicas on other machines get its files through Ray.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_kl.errors import EngineError, OptionError, WeightsError
from vllm_kl.weights import replica
from vllm_kl.weights.checkpoint import Checkpoint, InitialCheckpoint, Skeleton, skeleton_of
from vllm_kl.weights.live_weights import LiveWeights
from vllm_kl.weights.loading import NeedsNewEngineError

_BEAT_EVERY_S = 10.0


def is_replicated(engine: Any) -> bool:
    """Whether an engine is TorchRL's ``AsyncVLLM``."""
    return hasattr(engine, "actors") and hasattr(engine, "engine_args")


class ReplicaWeights:
    """The weights of an ``AsyncVLLM``. Use :func:`replica_weights`."""

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        self._skeleton: Skeleton | None = None
        self._start = InitialCheckpoint(engine.engine_args.model)
        self._served: Checkpoint | None = None  # the last push of this object; None: the engine's start
        self._node_of: dict[Any, str] = {}  # replica -> its machine; replicas that know the steps of a load
        self._lock = threading.Lock()

    @property
    def version(self) -> int | None:
        """The version that all replicas serve; ``None``: others loaded weights and gave them no version.

        During a push it is the lowest version that a replica serves.

        Raises:
            WeightsError: the replicas serve different versions.
        """
        told = self._all("version")
        versions = [version for version, _ in told]
        if len(set(versions)) == 1:
            return versions[0]
        if any(is_pushed for _, is_pushed in told) and None not in versions:
            return min(versions)  # the replicas are changing over
        raise WeightsError(
            f"the replicas serve different versions of the weights: {versions}. Push again: a push makes all "
            "of them serve one version"
        )

    @property
    def uncounted(self) -> str | None:
        """vLLM's label of weights whose version is not known, if a replica has such weights."""
        return next((label for label in self._all("uncounted") if label is not None), None)

    @property
    def skeleton(self) -> Skeleton:
        if self._skeleton is None:
            self._skeleton = skeleton_of(self._engine_or_raise().engine_args)
        return self._skeleton

    @property
    def source(self) -> str:
        return self._start.unchanged() if self._served is None else str(self._served.folder)

    def next_version(self, version: int | None = None) -> int:
        return max(self._all("next_version", version))

    def load(self, checkpoint: Checkpoint, *, version: int | None = None) -> int:
        """Load a checkpoint into all replicas, or into none; return the version.

        Raises:
            WeightsError: a replica could not load it. All replicas serve the old weights, unless the message
                says that one could not put them back.
            EngineError: a replica died.
        """
        return self._load(checkpoint, version, is_foreign=False)

    def _load(self, checkpoint: Checkpoint, version: int | None, *, is_foreign: bool) -> int:
        token = uuid.uuid4().hex
        with self._lock:
            folders = self._folders(checkpoint, token)
            with self._push_locks(token):
                version = self.next_version(version)
                prepared = self._run("prepare", *([token, folder, version, is_foreign] for folder in folders))
                if failed := _errors(prepared):
                    raise _refused(failed)
                with _deferring_interrupts():  # until the replicas are in step
                    self._commit(token, len(folders))
                    self._served = checkpoint
                return version

    def _commit(self, token: str, number: int) -> None:
        """Let all replicas serve the prepared weights; if one cannot, put the old weights back on all."""
        committed = self._run("commit", *([token] for _ in range(number)))
        if failed := _errors(committed):
            reason = f"another replica failed: {next(iter(failed.values()))}"
            put_back = _errors(self._run("put_back", *([token, reason] for _ in range(number))))
            raise _failed(failed, {i: error for i, error in put_back.items() if i not in failed})

    def take_over(self, *, version: int | None = None, check: bool = True) -> int:
        """Give a version to weights that others loaded into the replicas; return the version."""
        with self._lock:
            version = self.next_version(version)
            self._all("take_over", version, check)
            return version

    def load_folder(self, folder: Path, *, version: int | None = None) -> int:
        """Load the folder of a checkpoint that another program wrote; return the version."""
        if not folder.is_dir():
            raise WeightsError(f"{str(folder)!r} is no folder: nothing was touched")
        return self._load(Checkpoint(folder), version, is_foreign=True)

    def sleep(self) -> bool:
        raise OptionError("a scorer cannot let AsyncVLLM's replicas sleep: their actors have sleep()")

    def wake_up(self) -> None:
        """Do nothing: :meth:`sleep` is refused."""

    @contextlib.contextmanager
    def _push_locks(self, token: str) -> Iterator[None]:
        """Hold the push lock of all replicas. Trainers take them in one order, so none waits in a circle."""
        number, is_over = len(self._engine_or_raise().actors), threading.Event()
        heart = threading.Thread(target=self._beat, args=(token, is_over), name="vllm_kl-heart", daemon=True)
        heart.start()
        try:
            for i in range(number):
                if failed := _errors(self._run_on("begin", {i: [token]})):
                    raise _refused(failed)
            yield
        finally:
            is_over.set()
            self._run("end", *([token] for _ in range(number)))

    def _beat(self, token: str, is_over: threading.Event) -> None:
        """Give the replicas signs of life until the push is over."""
        while not is_over.wait(_BEAT_EVERY_S):
            for actor in self._engine_or_raise().actors:
                actor.collective_rpc_v1.remote(replica.STEP + "beat", None, (token,))

    def _folders(self, checkpoint: Checkpoint, token: str) -> list[str]:
        """Return the checkpoint's folder for each replica; copy it to other machines first."""
        import ray

        actors, here = self._engine_or_raise().actors, ray.get_runtime_context().get_node_id()
        nodes = self._nodes()
        files = [file for file in sorted(checkpoint.folder.iterdir()) if file.is_file()]
        files = files if set(nodes) != {here} else []
        names = [file.name for file in files]
        parts = [ray.put(file.read_bytes()) for file in files]
        return [
            str(checkpoint.folder)
            if node == here
            else ray.get(actor.__ray_call__.remote(replica.receive, token, names, *parts))
            for actor, node in zip(actors, nodes, strict=True)
        ]

    def _nodes(self) -> list[str]:
        """Return the machine of each replica; make the replicas know the steps of a load."""
        import ray
        from ray.exceptions import RayError

        actors = self._engine_or_raise().actors
        new = [actor for actor in actors if actor not in self._node_of]
        try:
            nodes = ray.get([actor.__ray_call__.remote(replica.install) for actor in new])
        except RayError as error:
            raise EngineError(f"a replica of the AsyncVLLM cannot be asked: {_cause(error)}") from error
        self._node_of |= dict(zip(new, nodes, strict=True))
        return [self._node_of[actor] for actor in actors]

    def _all(self, method: str, *args: Any) -> list[Any]:
        """Run a step on all replicas; return the results, or raise the first error."""
        outcomes = self._run(method, *([*args] for _ in self._nodes()))
        if failed := _errors(outcomes):
            raise next(iter(failed.values()))
        return [result for _, result in outcomes]

    def _run(self, method: str, *args: list[Any]) -> list[tuple[bool, Any]]:
        return self._run_on(method, dict(enumerate(args)))

    def _run_on(self, method: str, args: dict[int, list[Any]]) -> list[tuple[bool, Any]]:
        """Run a step on some replicas, by their indices; return ``(is_done, result or error)`` of each."""
        import ray
        from ray.exceptions import RayActorError, RayError

        actors = self._engine_or_raise().actors
        calls = {
            i: actors[i].collective_rpc_v1.remote(replica.STEP + method, None, tuple(given))
            for i, given in args.items()
        }
        found: list[tuple[bool, Any]] = []
        for i, call in calls.items():
            try:
                found.append((True, ray.get(call)))
            except RayActorError as error:
                found.append((False, EngineError(f"replica {i} died: {error}")))
            except RayError as error:
                found.append((False, _cause(error)))
        return found

    def _engine_or_raise(self) -> Any:
        engine = self._engine()
        if engine is None or not engine.actors:
            raise EngineError("the AsyncVLLM was shut down: it has no replicas")
        return engine


def replica_weights(engine: Any) -> ReplicaWeights:
    """Return the weights of an ``AsyncVLLM``, one object per ``AsyncVLLM``."""
    return _WEIGHTS.get(engine) or _WEIGHTS.setdefault(engine, ReplicaWeights(engine))


def reachable_weights(engine: Any) -> LiveWeights | ReplicaWeights | None:
    """Return the weights of a ``vllm.LLM`` or an ``AsyncVLLM``; ``None``: an engine of another kind."""
    if is_replicated(engine):
        return replica_weights(engine)
    llm_engine = getattr(engine, "llm_engine", None)
    return None if llm_engine is None else LiveWeights(llm_engine)


_WEIGHTS: weakref.WeakKeyDictionary[Any, ReplicaWeights] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _deferring_interrupts() -> Iterator[None]:
    """Let an interrupt (Ctrl-C) come at the end of the block. Only the main thread gets interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came and callable(handler):
            handler(signal.SIGINT, None)


def _cause(error: Any) -> Exception:
    """Return the error that was raised in an actor."""
    return getattr(error, "cause", None) or error


def _errors(outcomes: list[tuple[bool, Any]]) -> dict[int, Exception]:
    return {i: error for i, (is_done, error) in enumerate(outcomes) if not is_done}


def _refused(failed: dict[int, Exception]) -> Exception:
    index, error = next(iter(failed.items()))
    if isinstance(error, NeedsNewEngineError):
        return error
    kind = type(error) if isinstance(error, (WeightsError, EngineError)) else WeightsError
    return kind(f"replica {index} refused the weights: {error}.\nAll replicas keep the old weights")


def _failed(failed: dict[int, Exception], lost: dict[int, Exception]) -> Exception:
    index, error = next(iter(failed.items()))
    message = f"replica {index} could not serve the weights: {error}. The others serve the old weights again"
    if lost:
        other, second = next(iter(lost.items()))
        message = (
            f"replica {index} could not serve the weights ({error}), and replica {other} could not put the "
            f"old weights back ({second}).\nPush again, or make a new AsyncVLLM"
        )
    return (EngineError if isinstance(error, EngineError) else WeightsError)(message)
