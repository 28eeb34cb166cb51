"""Decides whether log-probs are those of the model, before anything is timed.

The truth is the model's own log-probs by transformers, in float64 where the memory is enough for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_kl.errors import MissingLogProbError

# Largest mean error in nats. Rounding to 16 bits gives 0.12 with 24 layers of random weights. float32 gives
# 1e-5; matrix products in TF32, which are not float32, 1.5e-3.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.3}
# Largest error of a single log-prob, as a multiple of the above: 3 nats in 16 bits, where six layers of
# random weights gave 0.16 at most.
_MOST_OF_ONE = 10
# The mean, as a share of the mean difference between neighbours, which is the error of log-probs that stand
# one place beside their own.
_SHARE_OF_STEP = 0.25


def check(scored: Sequence[np.ndarray], truth: Sequence[np.ndarray], dtype: str) -> float:
    """Return the largest |log-prob - truth|, nats.

    Args:
        scored: for each sequence the log-probs of its scored tokens, ``[len - start]``.
        truth: the same from the model, float64.
        dtype: the data type that the model was scored in.

    Raises:
        MissingLogProbError: a number is missing, or is not finite, or the log-probs are not the model's: a
            wrong sign, other rows, other weights.

    >>> truth = [np.array([-1.0, -5.0, -2.0])]
    >>> check([np.array([-1.1, -5.0, -2.0])], truth, "bfloat16")
    0.10000000000000009
    """
    shapes, expected = [row.shape for row in scored], [row.shape for row in truth]
    if shapes != expected:
        raise MissingLogProbError(f"log-probs of the shapes {shapes}, expected {expected}")
    found, right = np.concatenate(list(scored)).astype(np.float64), np.concatenate(list(truth))
    if not np.isfinite(found).all():
        raise MissingLogProbError(f"{(~np.isfinite(found)).sum()} of {len(found)} log-probs are not finite")
    errors = np.abs(found - right)
    steps = np.concatenate([np.abs(np.diff(row)) for row in truth])
    # A response of one token has no neighbours.
    most = min(TOLERANCES[dtype], _SHARE_OF_STEP * steps.mean() if len(steps) else np.inf)
    if not errors.mean() <= most:
        raise MissingLogProbError(
            f"the log-probs differ from the model's by {errors.mean():.2g} nats on average, expected at most "
            f"{most:.2g} in {dtype}; not timed"
        )
    if not errors.max() <= _MOST_OF_ONE * TOLERANCES[dtype]:
        raise MissingLogProbError(
            f"a log-prob differs from the model's by {errors.max():.2g} nats, expected at most "
            f"{_MOST_OF_ONE * TOLERANCES[dtype]:.2g} in {dtype}; not timed"
        )
    return float(errors.max())
