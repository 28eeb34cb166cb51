"""Proves that an engine's weights have not changed, by the log-probs of a fixed sequence: the canary.

The engine scores the sequence alone and without the prefix cache, so the same weights give the same bits,
whatever other threads score meanwhile. A refresh accepts the version of the weights that it loads. A push
does not: its version is not that of a frozen reference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from vllm_kl.errors import FrozenError
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult

_LENGTH = 64
_MOST_VERSIONS = 16  # that are remembered; an engine serves the last one, a replica that lags one of a few


class Canary:
    """Remembers the log-probs of the sequence for the last accepted versions of the weights.

    Args:
        score: scores one request alone, without the prefix cache; returns the result of each engine. Several
            replicas are several engines.
        info: the engine's properties; the sequence is made to fit them.
    """

    def __init__(self, score: Callable[[ScoreRequest], Sequence[ScoreResult]], info: EngineInfo) -> None:
        self._score = score
        length = min(_LENGTH, info.max_sequence_len or _LENGTH)
        ids = np.random.default_rng(0).integers(0, info.vocab_size or 256, max(length, 2)).astype(np.int32)
        self._request = ScoreRequest(token_ids=ids, start=1)
        self._known: dict[int | None, torch.Tensor] = {}
        self._turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_turn": threading.Lock()}

    def remember(self) -> None:
        """Accept the engine's weights.

        Raises:
            FrozenError: the weights give NaN, which proves nothing.
        """
        with self._turn:
            self._accept()

    def remembered(self, version: int | None) -> torch.Tensor | None:
        """Return the log-probs of an accepted version; ``None``: the version was not accepted."""
        with self._turn:
            return self._known.get(version)

    def check(self, tolerance: float = 0.0) -> float:
        """Score the sequence; return how far a log-prob moved since this version was accepted, in nats.

        Args:
            tolerance: how far a log-prob may move, in nats.

        Raises:
            FrozenError: a log-prob moved further; the version was not accepted; or no version was ever
                accepted.
        """
        with self._turn:
            if not self._known:
                raise FrozenError(
                    "nothing can be proved: the scorer does not remember log-probs of the engine's start. "
                    "Make the scorer with canary=True"
                )
            return max(self._check(version, now, tolerance) for version, now in self._look())

    def _check(self, version: int | None, now: torch.Tensor, tolerance: float) -> float:
        if version not in self._known:
            raise FrozenError(
                f"the engine serves version {version} of the weights, which no refresh() made, so the KL "
                "is against another reference than before (accepted versions, the last ones: "
                f"{', '.join(map(str, self._known))}).\n"
                "Replace a reference with refresh(). Give the reference its own engine if a policy is "
                "pushed into this one"
            )
        return self._compare(version, now, tolerance)

    @contextmanager
    def accepting_new_weights(self, tolerance: float = 0.0) -> Iterator[None]:
        """Prove the old weights, if they were accepted; let the block load new weights; accept these.

        Two threads take turns.

        Raises:
            FrozenError: the old weights have changed, and the block did not run; or the new weights give NaN.
        """
        with self._turn:
            for version, now in self._look():
                if version in self._known:
                    self._compare(version, now, tolerance)
            yield
            self._accept()

    def _look(self) -> list[tuple[int | None, torch.Tensor]]:
        """Return the version of each engine's weights, and their log-probs."""
        return [
            (result.weight_version, torch.from_numpy(result.values[:, 0].copy()))
            for result in self._score(self._request)
        ]

    def _accept(self) -> None:
        version, log_probs = max(self._look(), key=lambda found: found[0] or 0)
        if (bad := log_probs.isnan()).any():  # NaN is not equal to NaN
            raise FrozenError(
                f"the model gives NaN for {int(bad.sum())} of the {len(bad)} tokens of the canary, token "
                f"{int(bad.nonzero()[0]) + 1} first: its activations overflow in the engine's dtype, or its "
                "checkpoint has NaN.\n"
                "For a model that was trained in bfloat16 and runs in float16, pass dtype='bfloat16' or "
                "'float32'."
            )
        self._known[version] = log_probs
        if len(self._known) > _MOST_VERSIONS:
            del self._known[next(iter(self._known))]

    def _compare(self, version: int | None, now: torch.Tensor, tolerance: float) -> float:
        before = self._known[version]
        moved = (now - before).abs()
        # Equal infinities have not moved. NaN counts as infinitely far.
        moved[now == before] = 0.0
        worst = int(moved.nan_to_num(torch.inf).argmax())
        if not float(moved[worst]) <= tolerance:
            raise FrozenError(
                f"the weights of version {version} moved: token {worst + 1} of the canary had log-prob "
                f"{before[worst]:.6f}, now {now[worst]:.6f}, {float(moved[worst]):.2e} nats apart (tolerance "
                f"{tolerance:g}). The engine's weights were changed without refresh() or push_weights(), so "
                "the KL is against another reference than before.\n"
                "Load the reference's weights with refresh(). If the engine's kernels are not "
                "deterministic, pass a tolerance"
            )
        return float(moved[worst])
