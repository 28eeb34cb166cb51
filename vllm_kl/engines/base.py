"""Defines the two interfaces between :class:`~vllm_kl.VLLMScorer` and the engines that compute log-probs.

The scorer checks the requests. An engine returns one result per request, in the order of the requests. An
engine knows nothing of batches, masks or tensordicts: a new read-out needs one new class with one of these
interfaces.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, runtime_checkable

import torch

from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult
from vllm_kl.weights.live_weights import Weights


class Engine(Protocol):
    """An engine as the scorer sees it."""

    info: EngineInfo
    weights: Weights | None  # None: the engine's weights can be neither asked for nor changed

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: Callable[[int], None] | None = None,
        alone: bool = False,
    ) -> list[ScoreResult]:
        """Return one result per request, in the order of the requests. A row without a log-prob is NaN.

        Args:
            share_prefix: the engine may read its prefix cache. This changes log-probs by rounding only.
            on_done: called with the number of requests that finished since its last call.
            alone: no batch holds requests of other callers, so equal calls give equal bits.
        """
        ...

    def close(self) -> None:
        """End an engine that the scorer owns; leave any other engine running. Safe to call twice."""
        ...


@runtime_checkable
class OfReplicas(Protocol):
    """An engine that is made of replicas, which can be asked one by one."""

    def score_on_each(self, requests: Sequence[ScoreRequest]) -> list[list[ScoreResult]]:
        """Return the results of each replica that runs. No batch holds requests of other callers."""
        ...


@runtime_checkable
class GivesHead(Protocol):
    """An engine whose LM head can be copied."""

    def read_head(self) -> tuple[torch.Tensor, float, int]:
        """Return the head's matrix ``[V, H]``, the factor of its logits, and the version of the weights.

        Raises:
            ReadoutUnavailableError: the read-out is another one than ``"pooling"``; or the model's logits are
                no product with a matrix.
            EngineError: a worker could not write its part, or wrote it on another machine.
        """
        ...


class Driver(Protocol):
    """An engine as its own process sees it: a loop submits requests and runs steps. Callers share batches."""

    info: EngineInfo
    weights: Weights

    def submit(self, key: Hashable, request: ScoreRequest, *, share_prefix: bool) -> None:
        """Queue a request. Nothing is computed yet."""
        ...

    def step(self) -> list[tuple[Hashable, ScoreResult | Exception]]:
        """Compute one batch; return its finished requests, each with a result or an error.

        An exception that this raises means that the whole engine failed.
        """
        ...

    def cancel(self, keys: Sequence[Hashable]) -> None:
        """Drop requests. Requests that are already finished are ignored."""
        ...

    def leave(self) -> None:
        """Let the workers leave their groups, which removes files. Nothing works after that."""
        ...


def drive(driver: Driver, requests: Sequence[ScoreRequest], *, share_prefix: bool) -> list[ScoreResult]:
    """Return one result per request, in order, from a driver that nothing else uses."""
    for n, request in enumerate(requests):
        driver.submit(n, request, share_prefix=share_prefix)
    results: dict[Hashable, ScoreResult] = {}
    while len(results) < len(requests):
        for key, result in driver.step():
            if isinstance(result, Exception):
                raise result
            results[key] = result
    return [results[n] for n in range(len(requests))]
