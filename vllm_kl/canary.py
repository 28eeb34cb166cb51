"""A fixed sequence whose log-probs prove that weights have not moved, and that new ones left no KV of the old.

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
# Longer than a block, on any device: a hit is of whole blocks.
_CACHED_LENGTH = 512


class Canary:
    """Remembers what each version of the weights answers.

    Args:
        score: scores one request alone, with the prefix cache or without.
        info: of the engine: the sequence fits it.
    """

    def __init__(self, score: Callable[[ScoreRequest, bool], ScoreResult], info: EngineInfo) -> None:
        self._score = score
        length = min(_CACHED_LENGTH, info.max_sequence_len or _CACHED_LENGTH)
        ids = np.random.default_rng(0).integers(0, info.vocab_size or 256, max(length, 2)).astype(np.int32)
        # The second is read from the cache but for its last token, and the KV of the first is no prefix of it.
        self._request = ScoreRequest(token_ids=ids[::-1][:_LENGTH].copy(), start=1)
        self._cached_request = ScoreRequest(token_ids=ids, start=len(ids) - 1)
        self._known: dict[int | None, torch.Tensor] = {}
        self._turn = threading.Lock()
        self._is_proved = threading.Event()
        self._is_proved.set()
        self._doubt: FrozenError | None = None

    def check(self, tolerance: float = 0.0) -> float:
        """Score the sequence; return by how much a log-prob moved since this version was accepted, in nats.

        Args:
            tolerance: nats that it may.

        Raises:
            FrozenError: it moved by more; or the version is not one that was accepted. The first is, unless it gives NaN.
        """
        with self._turn:
            return self._check(tolerance)

    def _check(self, tolerance: float, *, accept: bool = False) -> float:
        result = self._score(self._request, False)
        version, now = result.weight_version, torch.from_numpy(result.values[:, 0].copy())
        if (accept or not self._known) and version not in self._known:
            _check_numbers(now)
            self._known[version] = now
        if version not in self._known:
            raise FrozenError(
                f"version {version} of the weights serves, which no refresh() made: somebody pushed it, and KL against it is not "
                f"what it was (accepted: {', '.join(map(str, self._known))}). Replace a reference with refresh(); give it an "
                "engine of its own if a policy is pushed into this one"
            )
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

    @contextmanager
    def replacing(self, tolerance: float = 0.0) -> Iterator[None]:
        """Prove the old weights, let the block load new ones, prove that the prefix cache is empty, accept the new ones.

        Until all that is done no log-prob of the new weights leaves the scorer (:meth:`wait`).

        Raises:
            FrozenError: the old weights had moved; or KV of theirs is still in the cache.
        """
        with self._turn:
            if self._doubt is None:  # else they were never accepted
                self._check(tolerance, accept=True)
            for _ in range(2):  # the first fills the cache
                self._num_cached()
            self._is_proved.clear()
            try:
                yield
                self._doubt = FrozenError("the proof of new weights was interrupted: refresh again")
                if num := self._num_cached():
                    self._doubt = FrozenError(
                        f"after new weights the prefix cache still holds KV of the old ones ({num} tokens of the canary), though "
                        "the engine said that it was emptied: log-probs would be of both. Refresh again, or make a new scorer"
                    )
                    raise self._doubt
                self._check(tolerance, accept=True)
                self._doubt = None
            except FrozenError as found:
                self._doubt = found
                raise
            finally:
                self._is_proved.set()

    def wait(self) -> None:
        """Wait until weights that are being replaced are proved.

        Raises:
            FrozenError: they could not be.
        """
        self._is_proved.wait()
        if self._doubt is not None:
            raise self._doubt

    def _num_cached(self) -> int:
        """Return how many tokens of the canary are read from the prefix cache; afterwards they are in it."""
        return self._score(self._cached_request, True).num_cached_tokens


def _check_numbers(log_probs: torch.Tensor) -> None:
    """Refuse log-probs that can prove nothing: NaN is no other NaN."""
    if (bad := log_probs.isnan()).any():
        raise FrozenError(
            f"the model gives NaN for {int(bad.sum())} of the {len(bad)} tokens of the canary, token {int(bad.nonzero()[0]) + 1} "
            "first: nothing can be proved of its weights, and its log-probs are no numbers. Its activations overflow in the "
            "engine's dtype (float16 where it was trained in bfloat16: pass dtype='bfloat16' or 'float32'), or its checkpoint has "
            "NaN"
        )
