"""Computes log-probs and KL in float64 with plain loops: no batching, no cache, no padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

# Largest error of a log-prob computed in float32, in nats.
LOG_PROB_TOLERANCE = 5e-6
# Largest error of an entropy computed in float32, in nats. The error of a logit counts with its probability
# times its distance from the mean logit, which is a few nats.
ENTROPY_TOLERANCE = 1e-5
# A KL is the difference of two log-probs, and decoding uses other kernels than prefill.
KL_TOLERANCE = 2e-5


class Oracle:
    """Computes log-probs of a checkpoint in float64."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the logits, ``[L, V]`` float64."""
        return self._model(torch.tensor([list(map(int, token_ids))])).logits[0]

    def log_probs(self, token_ids: Sequence[int]) -> list[float]:
        """Return L log-probs, nats: entry t is log p(token t | tokens before it), entry 0 is NaN."""
        logits = self.logits(token_ids)
        result = [math.nan]
        for t in range(1, len(token_ids)):
            row = logits[t - 1].tolist()  # the row before a token predicts it
            top = max(row)
            normalizer = top + math.log(sum(math.exp(x - top) for x in row))
            result.append(row[int(token_ids[t])] - normalizer)
        return result

    def entropies(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """Return L entropies, nats: entry t is that of p(. | tokens before token t), entry 0 is NaN."""
        rows = self.logits(token_ids)[:-1] / temperature
        return [math.nan, *(entropy(row.tolist()) for row in rows)]

    def masked(self, token_ids: Sequence[int], keep: Sequence[bool]) -> torch.Tensor:
        """Return ``[L]`` float64: log-probs of kept tokens, 0.0 elsewhere."""
        values = self.log_probs(token_ids)
        return torch.tensor([v if k else 0.0 for v, k in zip(values, keep, strict=True)], dtype=torch.float64)


def entropy(logits: Sequence[float]) -> float:
    """Return the entropy of softmax(logits), nats, exact also where it is 1e-20.

    Relative to the largest logit, log Z and the mean logit are sums over the other tokens.
    """
    top = max(logits)
    others = [x - top for x in logits]
    others.remove(0.0)
    rest = math.fsum(math.exp(x) for x in others)
    return math.log1p(rest) - math.fsum(math.exp(x) * x for x in others if x > -math.inf) / (1 + rest)


def exact_kl_of(a: Sequence[float], b: Sequence[float]) -> float:
    """Return KL(softmax(a) || softmax(b)) in nats, of two rows of logits."""
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    return math.fsum(math.exp(x) * (x - y) for x, y in zip(log_p, log_q, strict=True))


def _log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    normalizer = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - normalizer for x in logits]


def kl(policy: Oracle, reference: Oracle, token_ids: Sequence[int], keep: Sequence[bool]) -> torch.Tensor:
    """Return ``[L]`` float64: log p(policy) - log p(reference) of kept tokens, nats; 0.0 elsewhere."""
    return policy.masked(token_ids, keep) - reference.masked(token_ids, keep)
