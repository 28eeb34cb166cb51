"""Pushes for TorchRL's two ways to update weights, which tell collectors the version that then serves."""

from __future__ import annotations

import weakref
from typing import Any

from torchrl.envs.llm.transforms import PolicyVersion

from vllm_kl.transforms.engine_policy_version import EnginePolicyVersion
from vllm_kl.transforms.from_collector import policy_of
from vllm_kl.transforms.watched_policy import watch
from vllm_kl.weights.push import push_weights, weights_of


class Pusher:
    """Pushes to one engine, and keeps the versions of collectors that count for themselves in step with it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._collectors: list[weakref.ref[Any]] = []

    def register(self, collector: Any) -> None:
        self._collectors.append(weakref.ref(collector))
        watch(policy_of(collector))
        version = weights_of(self._engine).version
        for tracker in self._counting() if version is not None else ():
            tracker.version = version

    def push(self, weights: Any, *, collector_counts: bool = False) -> int:
        version = push_weights(self._engine, weights)
        for tracker in self._counting():
            tracker.version = version - collector_counts
        return version

    def _counting(self) -> list[PolicyVersion]:
        trackers = [getattr(reference(), "policy_version_tracker", None) for reference in self._collectors]
        return [
            t
            for t in trackers
            if isinstance(getattr(t, "version", None), int) and not isinstance(t, EnginePolicyVersion)
        ]
