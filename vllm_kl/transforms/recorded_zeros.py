"""Finds recorded zeros that are no log-probs, and refuses recorded values that cannot be log-probs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from vllm_kl.diagnostics import MismatchWarning
from vllm_kl.errors import MissingLogProbError, OptionError
from vllm_kl.types import place_of

OnZero = Literal["raise", "warn", "allow"]

# A recorded zero is believed if the reference gives the token at least this log-prob, nats: a probability of
# 0.9. A zero that is wrong then costs at most this much KL. Tokens are checked one by one: the sum over a
# long answer of a deterministic policy is far below this bound, and the mean would hide an end token that was
# not sampled.
SURE = -0.1

# The largest log-prob that rounding explains: bfloat16 numbers below 64 are at most 0.25 apart, so a
# log-sum-exp rounded to bfloat16 is at most half of that below the largest logit.
ROUNDING = 0.125


def check_on_zero(on_zero: str) -> None:
    """Refuse an ``on_zero`` that does not exist."""
    if on_zero not in get_args(OnZero):
        raise OptionError(f"on_zero={on_zero!r} does not exist; choose one of {', '.join(get_args(OnZero))}")


def check_recorded(values_N: torch.Tensor, lengths: Sequence[int], *, what: str) -> None:
    """Refuse recorded values above 0, beyond rounding: no probability is above 1.

    Args:
        values_N: recorded values of all samples laid end to end, 0.0 outside the mask.
        lengths: of the samples.
        what: the name of the values in the message.

    Raises:
        MissingLogProbError: names the sample, the token and the value.
    """
    if len(values_N) and values_N.max() > ROUNDING:
        bad = values_N > ROUNDING
        i, t = place_of(bad, lengths)
        raise MissingLogProbError(
            f"{what}: sample {i}, token {t} of {lengths[i]} is {float(values_N[bad][0])}, which is no "
            "log-prob: a probability is at most 1. Are they logits (logprobs_mode='raw_logits' or "
            "'processed_logits')?"
        )


def has_zeros(values_N: torch.Tensor, keep_N: torch.Tensor) -> bool:
    """Tell whether a kept value is exactly 0.0. All values outside the mask are 0.0."""
    return int(values_N.count_nonzero()) < int(keep_N.sum())


def doubtful_zeros(
    values_N: torch.Tensor, other_N: torch.Tensor | None, keep_N: torch.Tensor, lengths: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Return the tokens, by sample, whose recorded log-prob of exactly 0.0 is doubtful.

    A recorded 0.0 is doubtful if the other side is not sure of the token. Many programs write 0.0 where a
    log-prob is missing: TorchRL 0.14 and SGLang's wrapper for prompts, trainers for a synthetic end token or
    a padded row. A policy that is sure of a token records 0.0 too (float32 has no room for a probability
    above 1 - 6e-8), but then a similar reference is also sure, see :data:`SURE`.

    Args:
        values_N: recorded log-probs of all samples laid end to end, on the CPU, 0.0 outside the mask.
        other_N: the other side's log-probs; ``None``: not known, so every zero is doubtful.
        keep_N: the mask, bool.
        lengths: of the samples.
    """
    if not has_zeros(values_N, keep_N):
        return {}
    doubtful = keep_N & (values_N == 0)
    if other_N is not None:
        doubtful &= other_N.detach().cpu() < SURE
    rows = enumerate(doubtful.split(list(lengths)))
    return {i: row.nonzero()[:, 0] for i, row in rows if row.any()}


def check_zeros(
    values_N: torch.Tensor,
    other_N: torch.Tensor,
    keep_N: torch.Tensor,
    lengths: Sequence[int],
    *,
    on_zero: OnZero,
    what: str,
    who: str,
    cure: str,
) -> None:
    """Refuse doubtful zeros, or warn of them, where no policy can be asked.

    Args:
        values_N, other_N, keep_N, lengths: as in :func:`doubtful_zeros`.
        on_zero: what to do.
        what, who: the names of the two sides in messages.
        cure: what the user can do.

    Raises:
        MissingLogProbError: there is a doubtful zero, and ``on_zero="raise"``.
    """
    if on_zero == "allow" or not (doubtful := doubtful_zeros(values_N, other_N, keep_N, lengths)):
        return
    i, at = next(iter(doubtful.items()))
    t = int(at[0])
    value = float(other_N.split(list(lengths))[i][t])
    complain(zero_text(what, i, t, f"{who} gives it {value:.4f}", doubtful) + f".\n{cure}", on_zero)


def zero_text(what: str, sample: int, token: int, but: str, found: dict[int, torch.Tensor]) -> str:
    """Return the first sentence of a message about recorded zeros that are no log-probs."""
    return (
        f"{what}: sample {sample}, token {token} is exactly 0.0, a probability of 1, but {but}. The 0.0 "
        "stands for a missing log-prob, a padded row or an end token that was not sampled "
        f"({sum(map(len, found.values()))} such tokens in {len(found)} samples)"
    )


def complain(message: str, on_zero: OnZero) -> None:
    """Raise or warn, as ``on_zero`` says."""
    if on_zero == "raise":
        raise MissingLogProbError(message)
    warnings.warn(message, MismatchWarning, stacklevel=3)
