"""Per-token log-probs of two models -> per-token KL estimates, in nats.

All estimators are of ``KL(policy || reference)`` for tokens sampled from the policy. With
``r = ref_log_probs - log_probs``:

| name | value | |
|---|---|---|
| ``k1`` | ``-r`` | unbiased, may be negative; the one to subtract from a reward |
| ``k2`` | ``r**2 / 2`` | low variance, biased |
| ``k3`` | ``exp(r) - 1 - r`` | unbiased, never negative |
| ``abs`` | ``|r|`` | a distance, not a KL |

Source: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from vllm_kl.alignment import check_finite
from vllm_kl.errors import InputError, OptionError

Estimator = Literal["k1", "k2", "k3", "abs"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)


def check_estimator(estimator: str) -> None:
    """Refuse an estimator that does not exist."""
    if estimator not in ESTIMATORS:
        raise OptionError(f"estimator={estimator!r} does not exist; choose one of {', '.join(ESTIMATORS)}")


def kl_estimate(
    log_probs: torch.Tensor | Sequence[torch.Tensor],
    ref_log_probs: torch.Tensor | Sequence[torch.Tensor],
    mask: torch.Tensor | Sequence[torch.Tensor],
    *,
    estimator: Estimator = "k1",
) -> torch.Tensor | list[torch.Tensor]:
    """Return the per-token KL estimate, float32, nats; exactly 0.0 outside the mask.

    Args:
        log_probs: log-probs of the policy that sampled the tokens, ``[B, T]`` or B tensors ``[T]``, nats.
        ref_log_probs: log-probs of the reference on the same tokens, same shapes.
        mask: tokens to keep, same shapes, bool. What lies outside it is never read.
        estimator: ``"k1"``, ``"k2"``, ``"k3"`` or ``"abs"``.

    Returns:
        ``[B, T]``, or a list of B tensors ``[T]`` where lists were given.

    Raises:
        InputError: shapes differ.
        MissingLogProbError: a value inside the mask is not finite, k3's own overflow (a log-ratio above 88) included.
        OptionError: the estimator does not exist.

    >>> policy, ref = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, float("nan")]])
    >>> kl_estimate(policy, ref, torch.tensor([[True, True, False]]))
    tensor([[ 0.5000, -1.0000,  0.0000]])
    >>> kl_estimate(policy, ref, torch.tensor([[True, True, False]]), estimator="k3")
    tensor([[0.1065, 0.7183, 0.0000]])
    """
    check_estimator(estimator)
    if not isinstance(log_probs, torch.Tensor):
        rows = list(log_probs), list(ref_log_probs), [row.bool().cpu() for row in mask]
        if len({len(side) for side in rows}) != 1:
            raise InputError(
                f"log_probs, ref_log_probs and mask have {len(rows[0])}, {len(rows[1])} and {len(rows[2])} samples"
            )
        for i, shapes in enumerate(zip(*([tuple(t.shape) for t in side] for side in rows), strict=True)):
            _check_same_shape(f"sample {i}: ", *shapes)
        check_finite(rows[0], rows[2], what="log_probs")
        check_finite(rows[1], rows[2], what="ref_log_probs")
        kl = [_estimate(*row, estimator) for row in zip(*rows, strict=True)]
        check_finite(kl, rows[2], what=f"KL {estimator}")
        return kl
    _check_same_shape("", tuple(log_probs.shape), tuple(ref_log_probs.shape), tuple(mask.shape))
    flat_mask = mask.bool().cpu().reshape(-1, mask.shape[-1])
    check_finite(log_probs.reshape(flat_mask.shape), flat_mask, what="log_probs")
    check_finite(ref_log_probs.reshape(flat_mask.shape), flat_mask, what="ref_log_probs")
    dense = _estimate(log_probs, ref_log_probs, mask, estimator)
    check_finite(dense.reshape(flat_mask.shape), flat_mask, what=f"KL {estimator}")
    return dense


def _check_same_shape(where: str, policy: tuple, ref: tuple, mask: tuple) -> None:
    if not policy == ref == mask:
        raise InputError(
            f"{where}log_probs {list(policy)}, ref_log_probs {list(ref)} and mask {list(mask)} must have the same "
            "shape. Both sides of a KL share one pad_output."
        )


def _estimate(policy: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor, estimator: str) -> torch.Tensor:
    mask = mask.bool().to(policy.device)
    # Zeros outside the mask go in before any arithmetic: a NaN there must not reach the gradient.
    log_ratio = torch.where(mask, ref.to(policy.device).float(), 0.0) - torch.where(mask, policy.float(), 0.0)
    match estimator:
        case "k1":
            kl = -log_ratio
        case "k2":
            kl = log_ratio.square() / 2
        case "k3":
            kl = torch.expm1(log_ratio) - log_ratio
        case _:
            kl = log_ratio.abs()
    return torch.where(mask, kl, 0.0)
