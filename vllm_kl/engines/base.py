"""The seam between :class:`~vllm_kl.VLLMScorer` and whatever computes the log-probs.

An engine gets requests that were already checked, and returns one result per request, in their order. It knows
nothing of batches, masks or tensordicts. A new read-out is a new class here, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult


class Engine(Protocol):
    """What the scorer asks of an engine."""

    info: EngineInfo

    def score(self, requests: Sequence[ScoreRequest], *, share_prefix: bool) -> list[ScoreResult]:
        """Return one result per request, in their order.

        ``share_prefix`` allows reading the prefix cache; results must not depend on it beyond rounding.
        A row the engine has no number for is NaN.
        """
        ...

    def close(self) -> None:
        """Give everything back; safe to call twice. An engine that somebody else owns is left running."""
        ...
