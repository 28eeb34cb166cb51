"""Per-token log-probs of two models -> per-token KL estimates, in nats.

Tokens were sampled from the policy. With ``r = ref_log_probs - log_probs`` (the reference's log-prob minus the policy's):

| name | ``direction="reverse"``: KL(policy || reference) | |
|---|---|---|
| ``k1`` | ``-r`` | unbiased, may be negative; the one to subtract from a reward |
| ``k2`` | ``r**2 / 2`` | low variance, biased |
| ``k3`` | ``exp(r) - 1 - r`` | unbiased, never negative |
| ``abs`` | ``|r|`` | a distance, not a KL |
| ``topk`` | ``sum_k p_k (log p_k - log q_k)``, K tokens and the rest as one | no sampling noise; a lower bound [1]_ |

.. [1] As long as float32 resolves both tails: one below ``2**-23`` counts as that.

``direction="forward"`` is KL(reference || policy). Tokens of the policy stand for tokens of the reference by the importance
weight ``exp(r)``: each estimator with the two sides exchanged, times the weight. ``topk`` knows both distributions and needs
no weight.

Source: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html. ``topk``: the log-sum
inequality (Cover and Thomas, "Elements of Information Theory", 2.7): lumping outcomes never raises a divergence.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from vllm_kl.batch.alignment import check_finite, only_kept
from vllm_kl.errors import InputError, OptionError
from vllm_kl.types import widths_of

Estimator = Literal["k1", "k2", "k3", "abs", "topk"]
Direction = Literal["reverse", "forward"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
# Those that a sampled token's two log-probs are enough for.
TOKEN_ESTIMATORS: tuple[str, ...] = tuple(name for name in ESTIMATORS if name != "topk")
# float32's resolution below 1: what is left of a sum of probabilities that comes out as 1 or more.
_SMALLEST_TAIL = 2.0**-23


def check_estimator(
    estimator: str,
    direction: str = "reverse",
    clamp_log_ratio: float | None = None,
    clamp_output: float | None = None,
    *,
    known: Sequence[str] = ESTIMATORS,
) -> None:
    """Refuse an estimator or direction that does not exist, and a bound that is not positive."""
    if estimator not in known:
        raise OptionError(f"estimator={estimator!r} does not exist here; choose one of {', '.join(known)}")
    if direction not in get_args(Direction):
        raise OptionError(
            f"direction={direction!r} does not exist; choose one of {', '.join(get_args(Direction))}"
        )
    for name, bound in (("clamp_log_ratio", clamp_log_ratio), ("clamp_output", clamp_output)):
        if bound is not None and (not isinstance(bound, numbers.Real) or not bound > 0):
            raise OptionError(
                f"{name} must be a positive number of nats, or None for no bound; got {bound!r}"
            )


def kl_estimate(
    log_probs: torch.Tensor | Sequence[torch.Tensor],
    ref_log_probs: torch.Tensor | Sequence[torch.Tensor],
    mask: torch.Tensor | Sequence[torch.Tensor],
    *,
    estimator: Estimator = "k1",
    clamp_log_ratio: float | None = 20.0,
    clamp_output: float | None = None,
    direction: Direction = "reverse",
) -> torch.Tensor | list[torch.Tensor]:
    """Return the per-token KL estimate, float32, nats; exactly 0.0 outside the mask.

    Args:
        log_probs: log-probs of the policy that sampled the tokens, ``[B, T]`` or B tensors ``[T]``, nats. With
            ``estimator="topk"``: of the policy's K best tokens at each position (``VLLMScorer.score_topk``), ``[B, T, K]``
            or B tensors ``[T, K]``.
        ref_log_probs: log-probs of the reference on the same tokens (``VLLMScorer.score_ids``), same shapes.
        mask: tokens to keep, ``[B, T]`` or B tensors ``[T]``, bool. What lies outside it is never read.
        estimator: ``"k1"`` (the log-ratio: unbiased, may be negative), ``"k2"`` (half its square: low variance, biased), ``"k3"``
            (unbiased, never negative), ``"abs"`` (its absolute value: a distance, not a KL) or ``"topk"`` (of distributions:
            no sampling noise); formulas at the top of :mod:`vllm_kl.kl`.
        clamp_log_ratio: the log-ratio goes into an exponential (k3, and forward's weight) no further than this from 0,
            so one token that a model finds impossible cannot overflow the sum, nor its gradient. Estimators without
            an exponential are not clamped. ``None``: no bound.
        clamp_output: no estimate lies further than this from 0; ``None``: no bound.
        direction: ``"reverse"``, KL(policy || reference), or ``"forward"``, KL(reference || policy).

    Returns:
        ``[B, T]``, or a list of B tensors ``[T]`` where lists were given.

    Raises:
        InputError: shapes differ.
        MissingLogProbError: a value inside the mask is not finite, or the estimate overflows without a clamp.
        OptionError: the estimator or the direction does not exist; a bound is not positive.

    >>> policy, ref = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, float("nan")]])
    >>> kl_estimate(policy, ref, torch.tensor([[True, True, False]]))
    tensor([[ 0.5000, -1.0000,  0.0000]])
    >>> kl_estimate(policy, ref, torch.tensor([[True, True, False]]), estimator="k3")
    tensor([[0.1065, 0.7183, 0.0000]])
    >>> best, theirs = torch.tensor([[[0.6, 0.3]]]).log(), torch.tensor([[[0.5, 0.25]]]).log()
    >>> kl_estimate(best, theirs, torch.tensor([[True]]), estimator="topk")  # 0.6 log 1.2 + 0.3 log 1.2 + 0.1 log 0.4
    tensor([[0.0725]])
    """
    check_estimator(estimator, direction, clamp_log_ratio, clamp_output)
    sides = {"log_probs": log_probs, "ref_log_probs": ref_log_probs, "mask": mask}
    policy, ref, _, lengths = packed_sides(sides, estimator)
    bounds = {"clamp_log_ratio": clamp_log_ratio, "clamp_output": clamp_output}
    kl = estimate(policy, ref, lengths, estimator=estimator, direction=direction, **bounds)
    return (
        kl.reshape(mask.shape)
        if isinstance(mask, torch.Tensor)
        else [row.clone() for row in kl.split(lengths)]
    )


def estimate(
    policy_N: torch.Tensor,
    ref_N: torch.Tensor,
    lengths: Sequence[int],
    *,
    estimator: str,
    clamp_log_ratio: float | None,
    clamp_output: float | None,
    direction: str,
) -> torch.Tensor:
    """Return the estimates of log-probs that :func:`packed_sides` has checked, ``[N]`` float32.

    Where both sides are 0.0, as they are outside the mask, every estimate is exactly 0.0.

    Raises:
        MissingLogProbError: an estimate overflows.
    """
    policy, ref = policy_N.float(), ref_N.to(policy_N.device).float()
    if direction == "forward":
        policy, ref = ref, policy
    match estimator:
        case "k1":
            kl = policy - ref
        case "k2":
            kl = (policy - ref).square() / 2
        case "k3":
            exponent = _clamped(ref - policy, clamp_log_ratio)
            kl = torch.expm1(exponent) - exponent
        case "abs":
            kl = (policy - ref).abs()
        case _:
            kl = _lumped(policy, ref)
    if direction == "forward" and estimator != "topk":
        kl = torch.exp(_clamped(policy - ref, clamp_log_ratio)) * kl
    kl = _clamped(kl, clamp_output)
    check_finite(kl, lengths, what=f"KL {estimator}", are_log_probs=False)
    return kl


def sums_of(values_N: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the sum of each sample's values, ``[B]`` float32, added in float64."""
    counts = torch.tensor(lengths, device=values_N.device)
    return torch.segment_reduce(values_N.double(), "sum", lengths=counts, initial=0.0).float()


def packed_sides(
    sides: dict[str, torch.Tensor | Sequence[torch.Tensor]], estimator: str = "k1"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Return two sides' log-probs with 0.0 outside the mask, and the mask, laid end to end; and the samples' lengths.

    Args:
        sides: two sides' log-probs and the masks, all dense or all B rows, by the names that errors call them.

    Raises:
        InputError: they do not fit each other.
        MissingLogProbError: a kept value is not finite.
    """
    *names, last = sides
    mask = sides[last]
    is_dense = isinstance(mask, torch.Tensor)
    if any(isinstance(side, torch.Tensor) != is_dense for side in sides.values()):
        raise InputError(f"{', '.join(names)} and {last} must all be tensors, or all be lists of tensors")
    if is_dense:
        check_same_shape("", *(tuple(side.shape) for side in sides.values()), estimator)
        packed = [side.reshape(mask.numel(), *side.shape[mask.dim() :]) for side in sides.values()]
        lengths = [mask.shape[-1]] * math.prod(mask.shape[:-1])
    else:
        counts = [len(rows) for rows in sides.values()]
        if len(set(counts)) != 1:
            raise InputError(
                f"{', '.join(names)} and {last} have {', '.join(map(str, counts[:-1]))} and {counts[-1]} samples"
            )
        for i, rows in enumerate(zip(*sides.values(), strict=True)):
            check_same_shape(f"sample {i}: ", *(tuple(row.shape) for row in rows), estimator)
        packed = [torch.cat(list(rows)) if len(rows) else torch.empty(0) for rows in sides.values()]
        lengths = widths_of(list(mask))
    keep = packed[2].bool()
    policy, ref = (
        only_kept(side, keep, lengths, what=name) for name, side in zip(names, packed[:2], strict=True)
    )
    return policy, ref, keep, lengths


def check_same_shape(where: str, policy: tuple, ref: tuple, mask: tuple, estimator: str = "k1") -> None:
    """Refuse sides and a mask of different shapes."""
    tokens = policy[:-1] if estimator == "topk" else policy
    if policy != ref or tokens != mask:
        hint = (
            "The first two must be [..., T, K] and the mask [..., T]"
            if estimator == "topk"
            else "They must have the same shape"
        )
        raise InputError(
            f"{where}log_probs {list(policy)}, ref_log_probs {list(ref)} and mask {list(mask)} do not fit. {hint}; both sides "
            "of a KL share one pad_output."
        )


def _clamped(values: torch.Tensor, bound: float | None) -> torch.Tensor:
    return values if bound is None else values.clamp(-bound, bound)


def _lumped(policy: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Return ``KL(policy || ref)`` of K tokens and one outcome for all others."""
    tails = [_log_tail(side) for side in (policy, ref)]
    log_p, log_q = (torch.cat([side, tail], -1) for side, tail in zip((policy, ref), tails, strict=True))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_tail(log_probs: torch.Tensor) -> torch.Tensor:
    """Return ``log(1 - sum of exp(log_probs))`` over the last dimension, which is kept."""
    mass = log_probs.logsumexp(-1, keepdim=True).clamp(max=-_SMALLEST_TAIL)
    return torch.log(-torch.expm1(mass))
