"""Estimates the KL per token from the log-probs of two models, in nats.

The policy sampled the tokens. With ``r = ref_log_probs - log_probs`` (the reference's log-prob minus the
policy's):

| name | ``direction="reverse"``: KL(policy || reference) | |
|---|---|---|
| ``k1`` | ``-r`` | unbiased, may be negative; the one to subtract from a reward |
| ``k2`` | ``r**2 / 2`` | low variance, biased |
| ``k3`` | ``exp(r) - 1 - r`` | unbiased, never negative |
| ``abs`` | ``|r|`` | a distance, not a KL |
| ``topk`` | ``sum_k p_k (log p_k - log q_k)``, K tokens and one rest | no sampling noise; lower bound [1]_ |

.. [1] If float32 resolves both tails: a tail below ``2**-23`` counts as ``2**-23``.

``direction="forward"`` is KL(reference || policy). The tokens still come from the policy, so each estimator
exchanges the two models and is multiplied by the importance weight ``exp(r)``. ``topk`` needs no weight,
because it has both distributions.

Source: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html. For ``topk``
the log-sum inequality (Cover and Thomas, "Elements of Information Theory", 2.7): to count several outcomes as
one never raises a divergence.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from vllm_kl import mkl
from vllm_kl.batch.alignment import check_dims, check_finite, only_kept
from vllm_kl.errors import InputError, OptionError
from vllm_kl.types import widths_of

mkl.choose_code()

Estimator = Literal["k1", "k2", "k3", "abs", "topk"]
Direction = Literal["reverse", "forward"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
# The estimators that need only the two log-probs of the sampled token.
TOKEN_ESTIMATORS: tuple[str, ...] = tuple(name for name in ESTIMATORS if name != "topk")
# The smallest tail that float32 resolves. Also the tail where rounding makes the sum of the K probabilities 1
# or more.
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
        if bound is not None and not is_bound(bound):
            raise OptionError(
                f"{name} must be a positive number of nats, or None for no bound; got {str(bound)[:60]}"
            )


def is_bound(value: Any) -> bool:
    """Whether a value is a positive number that can be a float: an int, or a fraction, can be too large."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return float(value) > 0
    except OverflowError:
        return False


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
        log_probs: log-probs of the policy that sampled the tokens, ``[B, T]`` or B tensors ``[T]``, nats. For
            ``estimator="topk"``: log-probs of the policy's K most likely tokens at each position
            (``VLLMScorer.score_topk``), ``[B, T, K]`` or B tensors ``[T, K]``.
        ref_log_probs: log-probs of the reference on the same tokens (``VLLMScorer.score_ids``), same shapes.
        mask: tokens to keep, ``[B, T]`` or B tensors ``[T]``, bool. Values outside the mask are never read.
        estimator: ``"k1"`` (the log-ratio: unbiased, may be negative), ``"k2"`` (half its square: low
            variance, biased), ``"k3"`` (unbiased, never negative), ``"abs"`` (its absolute value: a distance,
            not a KL) or ``"topk"`` (from distributions: no sampling noise). The formulas are at the top of
            :mod:`vllm_kl.kl`.
        clamp_log_ratio: the largest log-ratio, in nats, that goes into an exponential: r in ``"k3"``, and
            the absolute r in the weight of ``"forward"``. Without it one very unlikely token can make the
            sum or its gradient overflow. What has no exponential to overflow is not clamped: the other
            estimators, and a negative r in ``"k3"``. ``None``: no bound.
        clamp_output: the largest absolute value of an estimate, in nats; ``None``: no bound.
        direction: ``"reverse"``, KL(policy || reference), or ``"forward"``, KL(reference || policy).

    Returns:
        ``[B, T]``; or a list of B tensors ``[T]`` if the inputs are lists.

    Raises:
        InputError: the shapes differ, or have other dimensions than these.
        MissingLogProbError: a value inside the mask is not finite, or an estimate overflows without a clamp.
        OptionError: the estimator or the direction does not exist, or a bound is not positive.

    >>> policy, ref = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, float("nan")]])
    >>> kl_estimate(policy, ref, torch.tensor([[True, True, False]]))
    tensor([[ 0.5000, -1.0000,  0.0000]])
    >>> kl_estimate(policy, ref, torch.tensor([[True, True, False]]), estimator="k3")
    tensor([[0.1065, 0.7183, 0.0000]])
    >>> best, theirs = torch.tensor([[[0.6, 0.3]]]).log(), torch.tensor([[[0.5, 0.25]]]).log()
    >>> # 0.6 log 1.2 + 0.3 log 1.2 + 0.1 log 0.4
    >>> kl_estimate(best, theirs, torch.tensor([[True]]), estimator="topk")
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
    """Return the estimate of every token, ``[N]`` float32; :func:`packed_sides` has checked the log-probs.

    Outside the mask both log-probs are 0.0, so every estimate there is exactly 0.0.

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
            kl = k3_of(ref - policy, clamp_log_ratio)
        case "abs":
            kl = (policy - ref).abs()
        case _:
            kl = _lumped(policy, ref)
    if direction == "forward" and estimator != "topk":
        kl = torch.exp(_clamped(policy - ref, clamp_log_ratio)) * kl
    kl = _clamped(kl, clamp_output)
    check_finite(kl, lengths, what=f"KL {estimator}", are_log_probs=False)
    return kl


def k3_of(log_ratio: torch.Tensor, most: float | None) -> torch.Tensor:
    """Return ``exp(r) - 1 - r`` of log-ratios r, nats, with every r above ``most`` set to ``most``.

    Only a large r overflows an exponential: a small one gives -1 - r. Above the bound both terms stand still,
    so that the estimate is never negative and its gradient never has the wrong sign.

    >>> k3_of(torch.tensor([-35.0, 0.0, 35.0]), 2.0)
    tensor([34.0000,  0.0000,  4.3891])
    """
    if most is not None:
        log_ratio = log_ratio.clamp(max=float(most))
    return torch.expm1(log_ratio) - log_ratio


def sums_of(values_N: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the sum of each sample's values, ``[B]`` float32. The sum is computed in float64."""
    counts = torch.tensor(lengths, device=values_N.device)
    return torch.segment_reduce(values_N.double(), "sum", lengths=counts, initial=0.0).float()


def packed_sides(
    sides: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], estimator: str = "k1"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Check the log-probs of two sides; return both and the mask laid end to end, and the samples' lengths.

    The returned log-probs are 0.0 outside the mask.

    Args:
        sides: the name that errors use -> values, for the two sides' log-probs and for the mask, in this
            order. All are dense tensors, or all are lists of B rows.

    Raises:
        InputError: the shapes differ or have other dimensions, or only some of the three are dense.
        MissingLogProbError: a value inside the mask is not finite.
    """
    *names, last = sides
    log_probs, ref_log_probs, mask = sides.values()
    for name, side in sides.items():
        _check_side(name, side, dims=2 if estimator == "topk" and name != last else 1)
    dense = [side for side in sides.values() if isinstance(side, torch.Tensor)]
    if len(dense) not in (0, len(sides)):
        raise InputError(f"{', '.join(names)} and {last} must all be tensors, or all be lists of tensors")
    if isinstance(mask, torch.Tensor):
        shapes = {name: tuple(side.shape) for name, side in zip(sides, dense, strict=True)}
        check_same_shape("", shapes, estimator)
        packed = [side.reshape(mask.numel(), *side.shape[mask.dim() :]) for side in dense]
        lengths = [mask.shape[-1]] * math.prod(mask.shape[:-1])
    else:
        counts = [len(rows) for rows in sides.values()]
        if len(set(counts)) != 1:
            raise InputError(
                f"{', '.join(names)} and {last} have {', '.join(map(str, counts[:-1]))} and {counts[-1]} "
                "samples"
            )
        for i, rows in enumerate(zip(log_probs, ref_log_probs, mask, strict=True)):
            shapes = {name: tuple(row.shape) for name, row in zip(sides, rows, strict=True)}
            check_same_shape(f"sample {i}: ", shapes, estimator)
        packed = [torch.cat(list(rows)) if len(rows) else torch.empty(0) for rows in sides.values()]
        if estimator == "topk" and not counts[0]:
            packed[:2] = [torch.empty(0, 1)] * 2
        lengths = widths_of(list(mask))
    keep = packed[2].bool()
    policy, ref = (
        only_kept(side, keep, lengths, what=name) for name, side in zip(names, packed[:2], strict=True)
    )
    return policy, ref, keep, lengths


def _check_side(name: str, side: Any, dims: int) -> None:
    """Refuse what is neither a tensor of rows nor a list of rows, each with ``dims`` dimensions."""
    row_shape = "[T]" if dims == 1 else "[T, K]"
    batch_shape = row_shape.replace("[", "[B, ")
    if isinstance(side, torch.Tensor):
        _check_tensor(name, side, (dims, dims + 1), batch_shape)
    elif isinstance(side, (list, tuple)):
        for i, row in enumerate(side):
            _check_tensor(f"{name}: sample {i}", row, (dims,), row_shape)
    else:
        raise InputError(
            f"{name} is {type(side).__name__}, expected a tensor {batch_shape}, or a list of B tensors "
            f"{row_shape}"
        )


def _check_tensor(name: str, values: Any, dims: tuple[int, ...], shape: str) -> None:
    """Refuse what is no plain tensor, or has another number of dimensions; ``shape`` is for the message."""
    if not isinstance(values, torch.Tensor):
        raise InputError(f"{name} is {type(values).__name__}, expected a tensor {shape}: torch.tensor(...)")
    if values.is_meta:
        raise InputError(f"{name} is on the meta device, where tensors have a shape and no numbers")
    if values.is_nested or values.layout is not torch.strided:
        raise InputError(
            f"{name} is a nested or sparse tensor ({values.layout}), expected a plain one: .to_dense() of a "
            "sparse one, list(values.unbind()) of a nested one"
        )
    check_dims(values, dims, what=name, expected=shape)


def check_same_shape(where: str, shapes: dict[str, tuple[int, ...]], estimator: str = "k1") -> None:
    """Refuse log-probs and a mask of different shapes.

    Args:
        where: the beginning of the message.
        shapes: the name that the message uses -> shape, of the two sides' log-probs and of the mask, in this
            order.
        estimator: ``"topk"`` has K log-probs per token.

    Raises:
        InputError: the shapes differ.
    """
    one, other, mask = shapes.values()
    tokens = one[:-1] if estimator == "topk" else one
    if one != other or tokens != mask:
        hint = (
            "The first two must be [..., T, K] and the mask [..., T]"
            if estimator == "topk"
            else "They must have the same shape"
        )
        *sides, last = (f"{name} {list(shape)}" for name, shape in shapes.items())
        raise InputError(
            f"{where}{', '.join(sides)} and {last} do not fit. {hint}; both sides share one pad_output."
        )


def _clamped(values: torch.Tensor, bound: float | None) -> torch.Tensor:
    return values if bound is None else values.clamp(-float(bound), float(bound))


def _lumped(policy: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Return ``KL(policy || ref)`` of K tokens and of one outcome that stands for all other tokens."""
    tails = [_log_tail(side) for side in (policy, ref)]
    log_p, log_q = (torch.cat([side, tail], -1) for side, tail in zip((policy, ref), tails, strict=True))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_tail(log_probs: torch.Tensor) -> torch.Tensor:
    """Return ``log(1 - sum(exp(log_probs)))`` over the last dimension, which keeps size 1."""
    mass = log_probs.logsumexp(-1, keepdim=True).clamp(max=-_SMALLEST_TAIL)
    return torch.log(-torch.expm1(mass))
