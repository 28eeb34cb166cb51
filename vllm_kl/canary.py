"""A fixed sequence whose log-probs prove that a version of the weights has not moved.

It is scored alone and without the prefix cache, so the same weights give the same bits; what other callers ask for in the
meantime cannot change them. Each version has its own numbers: a refresh on purpose is no false alarm.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vllm_kl.errors import FrozenError
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult

_LENGTH = 64
# By how much log-probs with and without the prefix cache may differ, in nats: rounding in 16-bit layers. KV of other
# weights is off by more.
_CACHE_TOLERANCE = 0.25


class Canary:
    """Remembers what each version of the weights answers.

    Args:
        score: scores one request alone, with the prefix cache or without.
        info: of the engine: the sequence fits it.
    """

    def __init__(self, score: Callable[[ScoreRequest, bool], ScoreResult], info: EngineInfo) -> None:
        self._score = score
        length = min(_LENGTH, info.max_sequence_len or _LENGTH)
        ids = np.random.default_rng(0).integers(0, info.vocab_size or 256, max(length, 2))
        self._request = ScoreRequest(token_ids=ids.astype(np.int32), start=1)
        self._known: dict[int | None, torch.Tensor] = {}

    def check(self, tolerance: float = 0.0) -> float:
        """Score the sequence; return by how much a log-prob moved since this version was first seen, in nats.

        Raises:
            FrozenError: by more than ``tolerance``.
        """
        result = self._score(self._request, False)
        version, now = result.weight_version, torch.from_numpy(result.values[:, 0].copy())
        before = self._known.setdefault(version, now)
        moved = (now - before).abs()
        # Equal infinities have not moved; NaN never compares as small.
        moved[now == before] = 0.0
        worst = int(moved.nan_to_num(torch.inf).argmax())
        if not float(moved[worst]) <= tolerance:
            raise FrozenError(
                f"the weights of version {version} moved: token {worst + 1} of the canary had log-prob {before[worst]:.6f}, now "
                f"{now[worst]:.6f}, {float(moved[worst]):.2e} nats apart (tolerance {tolerance:g}). Somebody changed the engine's "
                "weights without refresh() or push_weights(); KL against it is not what it was. Where kernels are not "
                "deterministic, pass a tolerance"
            )
        return float(moved[worst])

    def check_cache(self, tolerance: float = _CACHE_TOLERANCE) -> None:
        """Score the sequence with the prefix cache, twice: what it holds must be of the weights that serve.

        Raises:
            FrozenError: cached and uncached log-probs differ by more than ``tolerance`` nats.
        """
        uncached = self._score(self._request, False).values
        for _ in range(2):  # the first fills it
            cached = self._score(self._request, True).values
        difference = float(np.abs(np.where(cached == uncached, 0.0, cached - uncached)).max())
        if not difference <= tolerance:
            raise FrozenError(
                f"after new weights the prefix cache still holds KV of the old ones: log-probs with and without it are "
                f"{difference:.2e} nats apart"
            )
