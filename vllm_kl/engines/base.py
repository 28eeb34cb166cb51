"""The seams between :class:`~vllm_kl.VLLMScorer` and whatever computes the log-probs.

An engine gets requests that were already checked, and returns one result per request, in their order. It knows
nothing of batches, masks or tensordicts. A new read-out is a new class here, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult
from vllm_kl.weights.live import Weights

OnDone = Callable[[int], None]  # told how many more requests are done


class Engine(Protocol):
    """What the scorer asks of an engine."""

    info: EngineInfo
    weights: Weights | None  # None: nothing is known of them, and they cannot be changed from here

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: OnDone | None = None,
        alone: bool = False,
    ) -> list[ScoreResult]:
        """Return one result per request, in their order.

        ``share_prefix`` allows reading the prefix cache; results must not depend on it beyond rounding. ``alone`` keeps
        other callers' requests out of the batches: the same requests then give the same bits.
        A row the engine has no number for is NaN.
        """
        ...

    def close(self) -> None:
        """Give everything back; safe to call twice. An engine that somebody else owns is left running."""
        ...


class Driver(Protocol):
    """An engine that is fed and stepped: what runs in an owned engine's process. Callers share its batches."""

    info: EngineInfo
    weights: Weights

    def submit(self, key: Hashable, request: ScoreRequest, *, share_prefix: bool) -> None:
        """Take a request. Nothing is computed yet."""
        ...

    def step(self) -> list[tuple[Hashable, ScoreResult | Exception]]:
        """Compute one batch; return what it finished, and what failed alone. What raises leaves no engine to use."""
        ...

    def cancel(self, keys: Sequence[Hashable]) -> None:
        """Drop requests that nobody waits for; those already finished are ignored."""
        ...


def drive(driver: Driver, requests: Sequence[ScoreRequest], *, share_prefix: bool) -> list[ScoreResult]:
    """Score with a driver that nobody else feeds: one result per request, in their order."""
    for n, request in enumerate(requests):
        driver.submit(n, request, share_prefix=share_prefix)
    results: dict[Hashable, ScoreResult] = {}
    while len(results) < len(requests):
        for key, result in driver.step():
            if isinstance(result, Exception):
                raise result
            results[key] = result
    return [results[n] for n in range(len(requests))]
