"""A fixed sequence whose log-probs prove that weights have not moved.

It is scored alone and without the prefix cache, so the same weights give the same bits; what other callers ask for in the
meantime cannot change them. Versions that a refresh made are accepted on purpose; others, of a push, are not those of a
reference that is frozen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from vllm_kl.errors import FrozenError
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult

_LENGTH = 64


class Canary:
    """Remembers what each version of the weights answers.

    Args:
        score: scores one request alone, without the prefix cache.
        info: of the engine: the sequence fits it.
    """

    def __init__(self, score: Callable[[ScoreRequest], ScoreResult], info: EngineInfo) -> None:
        self._score = score
        length = min(_LENGTH, info.max_sequence_len or _LENGTH)
        ids = np.random.default_rng(0).integers(0, info.vocab_size or 256, max(length, 2)).astype(np.int32)
        self._request = ScoreRequest(token_ids=ids, start=1)
        self._known: dict[int | None, torch.Tensor] = {}
        self._turn = threading.Lock()

    def remember(self) -> None:
        """Accept the weights that serve now.

        Raises:
            FrozenError: they give NaN, which proves nothing.
        """
        with self._turn:
            self._accept(*self._look())

    def check(self, tolerance: float = 0.0) -> float:
        """Score the sequence; return by how much a log-prob moved since this version was accepted, in nats.

        Args:
            tolerance: nats that it may.

        Raises:
            FrozenError: it moved by more; the version is not one that was accepted; or nothing was ever remembered.
        """
        with self._turn:
            if not self._known:
                raise FrozenError(
                    "nothing can be proved: what the engine answered at its start was not remembered. Make the scorer with "
                    "canary=True"
                )
            version, now = self._look()
            if version not in self._known:
                raise FrozenError(
                    f"version {version} of the weights serves, which no refresh() made: somebody pushed it, and KL against it is "
                    f"not what it was (accepted: {', '.join(map(str, self._known))}). Replace a reference with refresh(); give it "
                    "an engine of its own if a policy is pushed into this one"
                )
            return self._compare(version, now, tolerance)

    @contextmanager
    def replacing(self, tolerance: float = 0.0) -> Iterator[None]:
        """Prove the old weights, if they were accepted; let the block load new ones; accept those. Two threads take turns.

        Raises:
            FrozenError: the old weights had moved, and nothing was loaded; or the new ones give NaN.
        """
        with self._turn:
            version, now = self._look()
            if version in self._known:
                self._compare(version, now, tolerance)
            yield
            self._accept(*self._look())

    def _look(self) -> tuple[int | None, torch.Tensor]:
        result = self._score(self._request)
        return result.weight_version, torch.from_numpy(result.values[:, 0].copy())

    def _accept(self, version: int | None, log_probs: torch.Tensor) -> None:
        if (bad := log_probs.isnan()).any():  # NaN is no other NaN
            raise FrozenError(
                f"the model gives NaN for {int(bad.sum())} of the {len(bad)} tokens of the canary, token "
                f"{int(bad.nonzero()[0]) + 1} first: nothing can be proved of its weights, and its log-probs are no numbers. Its "
                "activations overflow in the engine's dtype (float16 where it was trained in bfloat16: pass dtype='bfloat16' or "
                "'float32'), or its checkpoint has NaN"
            )
        self._known[version] = log_probs

    def _compare(self, version: int | None, now: torch.Tensor, tolerance: float) -> float:
        before = self._known[version]
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
