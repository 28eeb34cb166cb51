"""Reads and replaces the weights of all replicas of TorchRL's ``AsyncVLLM``, which are Ray actors.

All replicas serve a push, or none does (:mod:`vllm_kl.weights.all_or_none`).
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_kl.errors import EngineError, OptionError, VLLMKLError, WeightsError
from vllm_kl.weights import replica
from vllm_kl.weights.adapters import check_adapter
from vllm_kl.weights.all_or_none import Outcome, commit, deferring_interrupts, errors_of, get_ready, refused
from vllm_kl.weights.checkpoint import Checkpoint, InitialCheckpoint, Skeleton, skeleton_of
from vllm_kl.weights.live_weights import LiveWeights
from vllm_kl.weights.nccl import SentWeights, Transfer

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
        self._transfer: Transfer | None = None
        self._served: Checkpoint | SentWeights | None = (
            None  # the last push of this object; None: the engine's start
        )
        self._node_of: dict[Any, str] = {}  # replica -> its machine; replicas that know the steps of a load
        self._lock = threading.Lock()
        self._config: Any = None

    @property
    def version(self) -> int | None:
        """The version that all replicas serve; ``None``: others loaded weights and gave them no version.

        During a push it is the lowest version that a replica serves.

        Raises:
            WeightsError: the replicas serve different versions.
        """
        states = self.states()
        versions = [state.version for state in states]
        if len(set(versions)) == 1:
            return versions[0]
        if any(state.is_pushed for state in states) and None not in versions:
            return min(versions)  # the replicas are changing over
        raise WeightsError(
            f"the replicas serve different versions of the weights: {versions}. Push again: a push makes all "
            "of them serve one version"
        )

    @property
    def uncounted(self) -> str | None:
        """vLLM's label of weights whose version is not known, if a replica has such weights."""
        return uncounted_in(self.states())

    @property
    def config(self) -> Any:
        """The ``VllmConfig`` of the first replica: all have the same."""
        if self._config is None:
            self._nodes()  # the replica knows the step from here on
            self._config = self._result(0, self._run("config", {0: []})[0])
        return self._config

    def states(self) -> list[replica.State]:
        """Return which weights each replica serves.

        Raises:
            EngineError: a replica died, or cannot be reached.
        """
        return self._all("state")

    def check_adapter(self, lora_request: Any) -> None:
        """Let all replicas load an adapter; refuse one that a replica would serve wrongly.

        Raises:
            ReadoutUnavailableError, WeightsError: as in :func:`vllm_kl.weights.adapters.check`. The message
                names the replica.
        """
        self._all("check_adapter", lora_request)

    @contextlib.contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Raise errors of ours for Ray's errors in the block, which sends requests to the replicas.

        Raises:
            EngineError: a replica died, or cannot be reached. The message names the replica, if it is not
                back yet.
        """
        from ray.exceptions import RayError, RayTaskError

        try:
            yield
        except RayError as error:
            self.states()  # names a replica that died
            if isinstance(error, RayTaskError):  # of vLLM: it refused a request
                raise
            raise EngineError(f"a replica of the AsyncVLLM failed: {_told(error)}") from error

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
            self._nodes()
            with self._push_locks(token):
                version = self.next_version(version)
                folders = self._folders(checkpoint, token)
                self._ready("prepare", [[token, folder, version, is_foreign] for folder in folders])
                with deferring_interrupts():  # until the replicas are in step
                    self._commit(token)
                    self._served = checkpoint
                return version

    def send(self, state: Mapping[str, torch.Tensor], *, version: int | None = None) -> int:
        """Send tensors by NCCL to all replicas, and load them as :meth:`load` does; return the version.

        Args:
            state: checked tensors, with the names of a checkpoint.
            version: as in ``push_weights``.

        Raises:
            WeightsError, EngineError: as in :meth:`load`; or NCCL cannot be used here.
        """
        import ray

        token = uuid.uuid4().hex
        with self._lock:
            number = len(self._nodes())
            self._transfer = self._transfer or Transfer(
                self._on_workers, number, ray.util.get_node_ip_address()
            )
            with self._push_locks(token):
                version = self.next_version(version)
                sent = self._transfer.send(
                    state,
                    lambda described: self._ready("prepare", [[token, described, version, False]] * number),
                )
                with deferring_interrupts():
                    self._commit(token)
                    self._served = sent
                return version

    def _on_workers(self, method: str, args: list[list[Any]]) -> list[list[Any]]:
        """Run a method of the plugin on the workers of all replicas; return each worker's answer."""
        outcomes = self._run("on_workers", {i: [method, *given] for i, given in enumerate(args)})
        return [self._result(i, outcome) for i, outcome in outcomes.items()]

    def _run_all(self, step: str, args: Sequence[list[Any]]) -> dict[int, Outcome]:
        """Run a step on all replicas, each with its own arguments."""
        return self._run(step, dict(enumerate(args)))

    def _ready(self, step: str, args: list[list[Any]]) -> None:
        """Let all replicas get ready to commit. None commits if one cannot."""
        get_ready(self._run_all, step, args)

    def _commit(self, token: str) -> None:
        """Let all replicas serve what they prepared; if one cannot, put the old weights back on all."""
        commit(self._run_all, [token], len(self._engine_or_raise().actors))

    def take_over(self, *, version: int | None = None, check: bool = True) -> int:
        """Give a version to weights that others loaded into the replicas; return the version.

        All replicas check their weights first. If one refuses, no replica gets the version.
        """
        token = uuid.uuid4().hex
        with self._lock:
            self._nodes()
            with self._push_locks(token):
                version = self.next_version(version)
                args = self._to_all(token, version, check)
                self._ready("prepare_take_over", list(args.values()))
                with deferring_interrupts():
                    self._commit(token)
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
        is_over = threading.Event()
        heart = threading.Thread(target=self._beat, args=(token, is_over), name="vllm_kl-heart", daemon=True)
        heart.start()
        try:
            for i, args in self._to_all(token).items():
                if failed := errors_of(self._run("begin", {i: args})):
                    raise refused(failed)
            yield
        finally:
            is_over.set()
            self._run("end", self._to_all(token))

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
        calls = {
            i: actors[i].__ray_call__.remote(replica.receive, token, names, *parts)
            for i, node in enumerate(nodes)
            if node != here
        }
        received = {i: self._result(i, outcome) for i, outcome in _outcomes(calls).items()}
        return [received.get(i, str(checkpoint.folder)) for i in range(len(nodes))]

    def _nodes(self) -> list[str]:
        """Return the machine of each replica; make the replicas know the steps of a load."""

        actors = self._engine_or_raise().actors
        new = [i for i, actor in enumerate(actors) if actor not in self._node_of]
        calls = {i: actors[i].__ray_call__.remote(replica.install) for i in new}
        for i, outcome in _outcomes(calls).items():
            self._node_of[actors[i]] = self._result(i, outcome)
        return [self._node_of[actor] for actor in actors]

    def _all(self, method: str, *args: Any) -> list[Any]:
        """Run a step on all replicas; return the results, or raise the first error."""
        self._nodes()
        outcomes = self._run(method, self._to_all(*args))
        return [self._result(i, outcome) for i, outcome in outcomes.items()]

    def _to_all(self, *args: Any) -> dict[int, list[Any]]:
        """Return the same arguments for each replica."""
        return {i: [*args] for i in range(len(self._engine_or_raise().actors))}

    def _run(self, method: str, args: dict[int, list[Any]]) -> dict[int, Outcome]:
        """Run a step on some replicas, by their indices."""
        actors = self._engine_or_raise().actors
        return _outcomes(
            {
                i: actors[i].collective_rpc_v1.remote(replica.STEP + method, None, tuple(given))
                for i, given in args.items()
            }
        )

    @staticmethod
    def _result(i: int, outcome: Outcome) -> Any:
        """Return the result of a replica's step; raise its error with the replica's index."""
        is_done, result = outcome
        if is_done:
            return result
        if isinstance(result, VLLMKLError):
            raise type(result)(f"replica {i} of the AsyncVLLM: {result}") from result
        raise result

    def _engine_or_raise(self) -> Any:
        engine = self._engine()
        if engine is None or not engine.actors:
            raise EngineError("the AsyncVLLM was shut down: it has no replicas")
        return engine


def replica_weights(engine: Any) -> ReplicaWeights:
    """Return the weights of an ``AsyncVLLM``, one object per ``AsyncVLLM``."""
    return _WEIGHTS.get(engine) or _WEIGHTS.setdefault(engine, ReplicaWeights(engine))


def uncounted_in(states: Sequence[replica.State]) -> str | None:
    """Return vLLM's label of weights whose version is not known, if a replica has such weights."""
    return next((state.uncounted for state in states if state.uncounted is not None), None)


def served_throughout(before: Sequence[replica.State], after: Sequence[replica.State]) -> int | None:
    """Return the version that all replicas served from one reading of their states to another.

    ``None``: they served several versions, or the version is not known.
    """
    told = [[(s.stamp, s.uncounted, s.num_changes) for s in states] for states in (before, after)]
    with contextlib.suppress(WeightsError):  # a push failed: the version is not known
        versions = {state.version for state in after}
        return versions.pop() if told[0] == told[1] and len(versions) == 1 else None
    return None


def reachable_weights(engine: Any) -> LiveWeights | ReplicaWeights | None:
    """Return the weights of a ``vllm.LLM`` or an ``AsyncVLLM``; ``None``: an engine of another kind."""
    if is_replicated(engine):
        return replica_weights(engine)
    llm_engine = getattr(engine, "llm_engine", None)
    return None if llm_engine is None else LiveWeights(llm_engine)


def check_adapter_on(engine: Any, lora_request: Any) -> None:
    """Load an adapter into an engine, or refuse it, as :func:`vllm_kl.weights.adapters.check` does.

    Nothing is checked on an engine that cannot be asked: neither a ``vllm.LLM`` nor an ``AsyncVLLM``.
    """
    if is_replicated(engine):
        replica_weights(engine).check_adapter(lora_request)
    elif hasattr(engine, "llm_engine"):
        check_adapter(engine.llm_engine, lora_request)


_WEIGHTS: weakref.WeakKeyDictionary[Any, ReplicaWeights] = weakref.WeakKeyDictionary()


def _told(error: Exception) -> Exception:
    """Return an error of Ray as the error that was raised in the actor, or as one of ours."""
    from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause or error
    text = " ".join(str(error).split())
    if isinstance(error, ActorUnavailableError):
        return EngineError(f"its actor cannot be reached now, and has not died: try again. Ray says: {text}")
    if isinstance(error, RayActorError):
        return EngineError(f"its actor died. Make a new AsyncVLLM. Ray says: {text}")
    return error


def _outcomes(calls: dict[int, Any]) -> dict[int, Outcome]:
    """Wait for calls of replicas; return ``(is_done, result or error)`` of each."""
    import ray
    from ray.exceptions import RayError

    found: dict[int, Outcome] = {}
    for i, call in calls.items():
        try:
            found[i] = True, ray.get(call)
        except RayError as error:
            found[i] = False, _told(error)
    return found
