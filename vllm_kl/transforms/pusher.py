"""``Pusher`` pushes weights for TorchRL's two ways to update them, and tells collectors the new version."""

from __future__ import annotations

import weakref
from typing import Any

from vllm_kl.errors import OptionError
from vllm_kl.transforms.engine_policy_version import EnginePolicyVersion
from vllm_kl.transforms.from_collector import policy_of
from vllm_kl.transforms.watched_policy import watch
from vllm_kl.weights.push import check_pushable, push_weights, weights_of
from vllm_kl.weights.ray_collectors import actor_of, call_in_actor
from vllm_kl.weights.replicas import is_replicated


class Pusher:
    """Pushes weights to one engine, and sets the version counters of registered collectors.

    A collector with an :class:`~vllm_kl.EnginePolicyVersion` needs no setting: it reads the version from the
    engine.

    Args:
        engine, transport: as in :func:`push_weights`.

    Raises:
        WeightsError: nothing can be pushed to this engine in this way.
    """

    def __init__(self, engine: Any, transport: str = "files") -> None:
        check_pushable(engine, transport)
        self._engine, self._transport = engine, transport
        self._collectors: list[weakref.ref[Any]] = []

    def __reduce__(self) -> Any:
        if is_replicated(getattr(self._engine, "model", self._engine)):  # goes to other processes, too
            return Pusher, (self._engine, self._transport)
        raise OptionError(
            f"a {type(self._engine).__name__} of this process cannot go to another process: there, pass "
            "VLLMWeightUpdater(), which takes the engine of the collector's policy"
        )

    def register(self, collector: Any) -> None:
        """Set the version counter of a collector now and after each push."""
        self._collectors.append(weakref.ref(collector))
        watch(policy_of(collector))
        version = weights_of(self._engine).version
        if version is not None:
            _count(collector, version)

    def push(self, weights: Any, *, collector_counts: bool = False) -> int:
        """Push weights; return the version that serves now.

        Args:
            weights: as in :func:`push_weights`.
            collector_counts: the collector adds 1 to its version after this call.
        """
        version = push_weights(self._engine, weights, transport=self._transport)
        for reference in self._collectors:
            if (collector := reference()) is not None:
                _count(collector, version - collector_counts)
        return version


def _count(collector: Any, version: int) -> None:
    """Set the version counter of a collector, unless it reads the engine."""
    if (actor := actor_of(collector)) is not None:
        call_in_actor(actor, _count, version)
        return
    tracker: Any = getattr(collector, "policy_version_tracker", None)
    if not isinstance(tracker, EnginePolicyVersion) and isinstance(getattr(tracker, "version", None), int):
        tracker.version = version
