"""Measures how far the log-probs of a sampler and a scorer with the same weights are apart.

The sampler generated the tokens and recorded their log-probs: the policy of a collector. The scorer scored
the same tokens later: the trainer, or the policy's engine. With the same weights and temperature the two
log-probs differ by rounding only. They differ more with stale weights, another temperature, a wrong chat
template or a misaligned token.

This module handles tensors only, no engines and no tensordicts. All sums are in float64.

Source of the names: ``token_mult_prob_error``, NeMo RL, "Adding new models"; effective sample size, Kish
(1965), as in verl's rollout correction.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_kl.errors import InputError, OptionError
from vllm_kl.kl import k3_of, packed_sides
from vllm_kl.types import sample_at

# Name of a metric -> its lowest and highest healthy value. 1.05 is NeMo RL's bound, 0.5 is verl's.
LIMITS: Mapping[str, tuple[float, float]] = {
    "token_mult_prob_error": (1.0, 1.05),
    "effective_sample_size_fraction": (0.5, 1.0),
}
# Bound of a log-ratio before an exponential, in nats: one impossible token must not make all metrics inf.
_MAX_LOG_RATIO = 20.0
_NUM_BEFORE, _NUM_AFTER = 8, 4


class MismatchWarning(UserWarning):
    """Log-probs that should agree do not, or are not known to.

    ``warnings.simplefilter("error", MismatchWarning)`` makes it an error.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstToken:
    """A token whose two log-probs are far apart."""

    sample: int
    position: int  # index in the sample's row
    log_prob: float  # of the sampler, nats
    scorer_log_prob: float  # nats
    token_id: int | None  # None without token_ids
    context_ids: tuple[int, ...]  # the token and the tokens around it; empty without token_ids
    context: str | None  # context_ids as text, with the token in guillemets; None without a tokenizer

    def __str__(self) -> str:
        where = f"sample {self.sample}, token {self.position}"
        what = "" if self.token_id is None else f" (id {self.token_id})"
        text = "" if self.context is None else f": {self.context!r}"
        return f"{where}{what}: {self.log_prob:.4f} sampled, {self.scorer_log_prob:.4f} scored{text}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """The result of :func:`mismatch`."""

    metrics: dict[str, float]  # for a logger; the last word of a name is the unit
    worst: list[WorstToken]  # largest difference first
    exceeded: dict[str, str]  # name of a metric outside its limits -> its value and the limits in words


def mismatch(
    log_probs: torch.Tensor | Sequence[torch.Tensor],
    scorer_log_probs: torch.Tensor | Sequence[torch.Tensor],
    mask: torch.Tensor | Sequence[torch.Tensor],
    *,
    token_ids: torch.Tensor | Sequence[torch.Tensor] | None = None,
    tokenizer: Any = None,
    num_worst: int = 10,
    limits: Mapping[str, tuple[float, float]] = LIMITS,
) -> Mismatch:
    """Return how far the log-probs of a sampler and a scorer are apart; warn if a metric exceeds its limits.

    Args:
        log_probs: the sampler's, ``[B, T]`` or B tensors ``[T]``, nats.
        scorer_log_probs: the scorer's, same shapes.
        mask: tokens that count, same shapes, bool. Values outside the mask are never read.
        token_ids: the ids, same shapes. With them the worst tokens have a context.
        tokenizer: turns the context into text.
        num_worst: how many of the worst tokens to return.
        limits: name of a metric -> its lowest and highest healthy value. ``{}`` never warns.

    Returns:
        A :class:`Mismatch`. With ``r = scorer_log_probs - log_probs`` of the n tokens in the mask, its
        metrics are

        ========================================  ============================================================
        ``num_tokens``                            n
        ``kl_sampler_scorer_nats``                mean of ``exp(r) - 1 - r``: KL(sampler || scorer), k3
        ``kl_scorer_sampler_nats``                mean of ``exp(r) r - exp(r) + 1``: KL(scorer || sampler), k3
        ``kl_k1_nats``                            mean of ``-r``: KL(sampler || scorer), k1
        ``log_prob_diff_mean_nats``, ``_max_``    mean and largest ``|r|``
        ``token_mult_prob_error``                 mean of ``exp(|r|)``; 1 is no error
        ``ratio_min``, ``_mean``, ``_max``        of ``exp(r)``
        ``ratio_p99``                             99th percentile of ``exp(r)``
        ``outside_0.9_1.1_fraction``              fraction of tokens with ``exp(r)`` outside [0.9, 1.1]
        ``effective_sample_size_fraction``        ``(sum of exp(r))^2 / (n * sum of exp(r)^2)``
        ``log_perplexity_diff_nats``              mean over samples of the mean ``-r``
        ========================================  ============================================================

        Exponentials stay numbers: in both k3 an r above 20 nats counts as 20. In the ratios, the sample size
        and ``token_mult_prob_error`` an r below -20 counts as -20, too.

    Raises:
        InputError: the shapes differ or have other dimensions than these, or the mask keeps no token.
        MissingLogProbError: a value inside the mask is not finite.
        OptionError: ``limits`` names a metric that does not exist.

    >>> sampled, scored = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.0, -1.9, 0.0]])
    >>> mask, limits = torch.tensor([[True, True, False]]), {"token_mult_prob_error": (1.0, 1.06)}
    >>> found = mismatch(sampled, scored, mask, limits=limits)
    >>> [round(found.metrics[name], 3) for name in ("log_prob_diff_max_nats", "token_mult_prob_error")]
    [0.1, 1.053]
    >>> found.exceeded
    {}
    >>> print(found.worst[0])
    sample 0, token 1: -2.0000 sampled, -1.9000 scored
    """
    sides = {"log_probs": list(log_probs), "scorer_log_probs": list(scorer_log_probs), "mask": list(mask)}
    sampled_N, scored_N, keep_N, lengths = packed_sides(sides)
    sampled_N, scored_N, keep_N = (side.detach().cpu() for side in (sampled_N, scored_N, keep_N))
    if token_ids is not None and [len(row) for row in token_ids] != lengths:
        raise InputError(
            f"token_ids have lengths {[len(row) for row in token_ids]}, the mask has {lengths}: give the id "
            "of every position"
        )
    if not keep_N.any():
        raise InputError("the mask keeps no token: there is nothing to compare")
    r_N = scored_N.double() - sampled_N.double()
    metrics = _metrics(r_N, keep_N, lengths)
    if unknown := sorted(limits.keys() - metrics.keys()):
        raise OptionError(f"limits on {', '.join(unknown)}, but the metrics are {', '.join(metrics)}")
    exceeded = {
        name: f"{metrics[name]:.4g}, healthy is {low} to {high}"
        for name, (low, high) in limits.items()
        if not low <= metrics[name] <= high
    }
    worst = []
    for n in r_N.abs().where(keep_N, -1.0).topk(min(num_worst, int(keep_N.sum()))).indices.tolist():
        sample, position = sample_at(n, lengths)
        token = WorstToken(
            sample=sample,
            position=position,
            log_prob=float(sampled_N[n]),
            scorer_log_prob=float(scored_N[n]),
            **_context(token_ids, tokenizer, sample=sample, position=position),
        )
        worst.append(token)
    if exceeded:
        figures = "; ".join(f"{name} {text}" for name, text in exceeded.items())
        example = f" Worst: {worst[0]}." if worst else ""
        warnings.warn(
            f"the log-probs of the sampler and the scorer differ over {int(metrics['num_tokens'])} tokens: "
            f"{figures}.{example}\nCheck that both have the same weights, temperature, ids and precision.",
            MismatchWarning,
            stacklevel=2,
        )
    return Mismatch(metrics=metrics, worst=worst, exceeded=exceeded)


def _metrics(r_N: torch.Tensor, keep_N: torch.Tensor, lengths: list[int]) -> dict[str, float]:
    per_sample = [row[kept] for row, kept in zip(r_N.split(lengths), keep_N.split(lengths), strict=True)]
    r = r_N[keep_N]
    ratio = r.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    at_most = r.clamp(max=_MAX_LOG_RATIO)
    values = {
        "num_tokens": torch.tensor(float(len(r))),
        "kl_sampler_scorer_nats": k3_of(r, _MAX_LOG_RATIO).mean(),
        "kl_scorer_sampler_nats": (at_most.exp() * at_most - torch.expm1(at_most)).mean(),
        "kl_k1_nats": -r.mean(),
        "log_prob_diff_mean_nats": r.abs().mean(),
        "log_prob_diff_max_nats": r.abs().max(),
        "token_mult_prob_error": r.abs().clamp(max=_MAX_LOG_RATIO).exp().mean(),
        "ratio_min": ratio.min(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        # torch.quantile refuses 2 ** 24 values.
        "ratio_p99": ratio.sort().values[max(0, -(-99 * len(r) // 100) - 1)],
        "outside_0.9_1.1_fraction": ((ratio < 0.9) | (ratio > 1.1)).double().mean(),
        "effective_sample_size_fraction": (ratio.sum().square() / (len(r) * ratio.square().sum())).clamp(
            max=1
        ),
        "log_perplexity_diff_nats": torch.stack([-row.mean() for row in per_sample if len(row)]).mean(),
    }
    return {name: float(value) for name, value in values.items()}


def _context(token_ids: Any, tokenizer: Any, sample: int, position: int) -> dict[str, Any]:
    """Return the fields of a :class:`WorstToken` that show the tokens around it."""
    if token_ids is None:
        return {"token_id": None, "context_ids": (), "context": None}
    ids = [int(t) for t in token_ids[sample]]
    before, after = (
        ids[max(0, position - _NUM_BEFORE) : position],
        ids[position + 1 : position + 1 + _NUM_AFTER],
    )
    parts = (before, [ids[position]], after)
    text = None if tokenizer is None else "{}«{}»{}".format(*map(tokenizer.decode, parts))
    return {"token_id": ids[position], "context_ids": tuple(itertools.chain(*parts)), "context": text}
