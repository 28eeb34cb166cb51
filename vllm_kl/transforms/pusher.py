"""``Pusher`` pushes weights for TorchRL's two ways to update them, and tells collectors the new version."""

from __future__ import annotations

import weakref
from typing import Any

from torchrl.envs.llm.transforms import PolicyVersion

from vllm_kl.transforms.engine_policy_version import EnginePolicyVersion
from vllm_kl.transforms.from_collector import policy_of
from vllm_kl.transforms.watched_policy import watch
from vllm_kl.weights.push import check_pushable, push_weights, weights_of


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

    def register(self, collector: Any) -> None:
        """Set the version counter of a collector now and after each push."""
        self._collectors.append(weakref.ref(collector))
        watch(policy_of(collector))
        version = weights_of(self._engine).version
        for tracker in self._counting() if version is not None else ():
            tracker.version = version

    def push(self, weights: Any, *, collector_counts: bool = False) -> int:
        """Push weights; return the version that serves now.

        Args:
            weights: as in :func:`push_weights`.
            collector_counts: the collector adds 1 to its version after this call.
        """
        version = push_weights(self._engine, weights, transport=self._transport)
        for tracker in self._counting():
            tracker.version = version - collector_counts
        return version

    def _counting(self) -> list[PolicyVersion]:
        """Return the version counters that do not read the engine."""
        trackers = [getattr(reference(), "policy_version_tracker", None) for reference in self._collectors]
        return [
            t
            for t in trackers
            if isinstance(getattr(t, "version", None), int) and not isinstance(t, EnginePolicyVersion)
        ]
