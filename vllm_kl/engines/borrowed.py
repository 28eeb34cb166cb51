"""``lending`` lets scorers that are made inside its block use an engine that runs, instead of starting one.

So a service that has a reference finds out what another reference would be, for the price of a call: it lets
the other's factory make it, on the service's own engine. Only the settings of such a scorer mean anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm_kl.engines.base import Engine
from vllm_kl.engines.process import engine_settings
from vllm_kl.types import ScoreRequest, ScoreResult
from vllm_kl.weights.checkpoint import InitialCheckpoint

_LENT: ContextVar[Engine | None] = ContextVar("lent", default=None)


class BorrowedEngine:
    """Another scorer's engine, with the settings that this scorer asked for."""

    weights = None

    def __init__(
        self, owned: Engine, model: str, readout: str, options: dict[str, Any], lora_request: Any
    ) -> None:
        self._owned = owned
        self.info = owned.info
        readout = owned.info.readout if readout == "auto" else readout
        self.settings = engine_settings(InitialCheckpoint(model), readout, options, lora_request)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: Callable[[int], None] | None = None,
        alone: bool = False,
    ) -> list[ScoreResult]:
        return self._owned.score(requests, share_prefix=share_prefix, on_done=on_done, alone=alone)

    def close(self) -> None:
        """Leave the engine running."""


@contextmanager
def lending(engine: Engine) -> Iterator[None]:
    """Let each scorer that this thread makes inside the block, of any path, borrow the engine."""
    token = _LENT.set(engine)
    try:
        yield
    finally:
        _LENT.reset(token)


def lent() -> Engine | None:
    """Return the engine that a scorer must borrow; ``None``: it starts its own."""
    return _LENT.get()
