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
import threading
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_kl.errors import EngineError, OptionError, WeightsError
from vllm_kl.weights import replica
from vllm_kl.weights.checkpoint import Checkpoint, InitialCheckpoint, Skeleton
from vllm_kl.weights.live_weights import LiveWeights
from vllm_kl.weights.loading import NeedsNewEngineError


def is_replicated(engine: Any) -> bool:
    """Whether an engine is TorchRL's ``AsyncVLLM``."""
    return hasattr(engine, "actors") and hasattr(engine, "engine_args")


class ReplicaWeights:
    """The weights of an ``AsyncVLLM``. Use :func:`replica_weights`."""

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        self._skeleton: Skeleton | None = None
        self._start = InitialCheckpoint(engine.engine_args.model)
        self._served: Checkpoint | None = None  # kept, so that its folder is there if it must be put back
        self._lock = threading.Lock()

    @property
    def version(self) -> int | None:
        """The version that all replicas serve; ``None``: others loaded weights and gave them no version.

        Raises:
            WeightsError: the replicas serve different versions.
        """
        versions = self._all("version")
        if len(set(versions)) > 1:
            raise WeightsError(
                f"the replicas serve different versions of the weights: {versions}. Push again: a push makes "
                "all of them serve one version"
            )
        return versions[0]

    @property
    def uncounted(self) -> str | None:
        """vLLM's label of weights whose version is not known, if a replica has such weights."""
        return next((label for label in self._all("uncounted") if label is not None), None)

    @property
    def skeleton(self) -> Skeleton:
        if self._skeleton is None:
            args = self._engine_or_raise().engine_args
            self._skeleton = Skeleton(
                args.model,
                revision=args.revision,
                trust_remote_code=args.trust_remote_code,
                hf_overrides=args.hf_overrides,
            )
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
        with self._lock, self._push_locks() as token:
            version = self.next_version(version)
            folders = self._folders(checkpoint)
            prepared = self._run("prepare", *([token, folder, version] for folder in folders))
            if failed := _errors(prepared):
                raise _refused(failed)
            committed = self._run("commit", *([token] for _ in folders))
            if failed := _errors(committed):
                reason = f"another replica failed: {next(iter(failed.values()))}"
                back = {i: [token, reason] for i, (is_done, _) in enumerate(committed) if is_done}
                lost = _errors(self._run_on("put_back", back))
                raise _failed(failed, lost)
            self._served = checkpoint
            return version

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
        return self.load(Checkpoint(folder), version=version)

    def sleep(self) -> bool:
        raise OptionError("AsyncVLLM's replicas sleep by their own way: AsyncVLLM has sleep() and wake_up()")

    def wake_up(self) -> None:
        """Do nothing: :meth:`sleep` is refused."""

    @contextlib.contextmanager
    def _push_locks(self) -> Iterator[str]:
        """Hold the push lock of all replicas. Trainers take them in one order, so none waits in a circle."""
        token = uuid.uuid4().hex
        self._nodes()
        number = len(self._engine_or_raise().actors)
        try:
            for i in range(number):
                if failed := _errors(self._run_on("begin", {i: [token]})):
                    raise _refused(failed)
            yield token
        finally:
            self._run_on("end", {i: [token] for i in range(number)})

    def _folders(self, checkpoint: Checkpoint) -> list[str]:
        """Return the checkpoint's folder for each replica; copy it to other machines first."""
        import ray

        actors, here = self._engine_or_raise().actors, ray.get_runtime_context().get_node_id()
        nodes = self._nodes()
        files = sorted(checkpoint.folder.iterdir()) if set(nodes) != {here} else []
        names = [file.name for file in files]
        parts = [ray.put(file.read_bytes()) for file in files]
        return [
            str(checkpoint.folder)
            if node == here
            else ray.get(actor.__ray_call__.remote(replica.receive, names, *parts))
            for actor, node in zip(actors, nodes, strict=True)
        ]

    def _nodes(self) -> list[str]:
        """Return the machine of each replica; make the replicas know the steps of a load."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(
                [actor.__ray_call__.remote(replica.install) for actor in self._engine_or_raise().actors]
            )
        except RayError as error:
            raise EngineError(f"a replica of the AsyncVLLM cannot be asked: {_cause(error)}") from error

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
