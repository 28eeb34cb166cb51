"""Tells the distribution of a policy's recorded log-probs, and finds recorded zeros that are no log-probs.

"Recorded" log-probs are those that the policy returned while it sampled. These facts were read in vLLM 0.32
(``v1/sample/sampler.py``, ``v1/worker/gpu/sample/sampler.py``, ``v1/worker/gpu_model_runner.py``) and tried:

| the engine's ``logprobs_mode`` | sampled with | recorded |
|---|---|---|
| ``raw_logprobs``, the default | anything but structured outputs | ``log softmax(logits)``, for any T |
| ``processed_logprobs`` | default parameters, or ``temperature=0`` | ``log softmax(logits)`` |
| ``processed_logprobs`` | ``temperature=T`` | ``log softmax(logits / T)``; prompt tokens as for T = 1 |
| ``processed_logprobs`` | ``top_p``, penalties, biases, ... | of the changed logits: no reference has them |
| either | structured outputs | of the masked logits: vLLM applies the grammar's mask first |
| ``raw_logits``, ``processed_logits`` | | no log-probs |

TorchRL 0.14's ``TransformersWrapper`` records ``log softmax(logits)``. The mode of an engine in another
process, or of another kind, is not known. Then only log-probs that were sampled with ``temperature=1`` (or 0)
and default parameters are known to be ``log softmax(logits)``.

The functions read tensors and the attributes of wrappers and engines; they send no requests.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, Literal, NamedTuple, get_args

import torch
from torchrl.modules.llm import TransformersWrapper

from vllm_kl.diagnostics import MismatchWarning
from vllm_kl.engines.generate import config_of
from vllm_kl.errors import MissingLogProbError, OptionError
from vllm_kl.types import place_of

OnZero = Literal["raise", "warn", "allow"]

# Sampling parameters that change no logits (vLLM 0.32). Any other parameter may change them if it is not at
# its default.
NEUTRAL = frozenset(
    {
        "n",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "max_tokens",
        "max_new_tokens",  # SGLang's name
        "logprobs",
        "prompt_logprobs",
        "prompt_logprob_token_ids",
        "prompt_logprob_start",
        "logprob_token_ids",
        "flat_logprobs",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "output_text_buffer_length",
        "skip_reading_prefix_cache",
        "repetition_detection",
        "routed_experts_prompt_start",
        "trace_decode_token_ids",
    }
)

# A recorded zero is believed if the reference gives the token at least this log-prob, nats: a probability of
# 0.9. A zero that is wrong then costs at most this much KL. Tokens are checked one by one: the sum over a
# long answer of a deterministic policy is far below this bound, and the mean would hide an end token that was
# not sampled.
SURE = -0.1

# The largest log-prob that rounding explains: bfloat16 numbers below 64 are at most 0.25 apart, so a
# log-sum-exp rounded to bfloat16 is at most half of that below the largest logit.
ROUNDING = 0.125


class Recorded(NamedTuple):
    """The distribution of recorded log-probs."""

    temperature: float | None  # of softmax(logits / temperature); None: no temperature gives it
    why: str  # the reason, for messages


def recorded_by(policy: Any, params: Any = None) -> Recorded | None:
    """Return the distribution that a policy records; ``None``: its sampling parameters are not known.

    Args:
        policy: a TorchRL wrapper.
        params: the sampling parameters of its last call; ``None``: the parameters that it has.
    """
    if isinstance(policy, TransformersWrapper):
        return Recorded(1.0, "TorchRL's TransformersWrapper records the model's own logits")
    params = params or getattr(policy, "sampling_params", None) or getattr(policy, "generate_kwargs", None)
    if params is None:
        return None
    changes = _changes(params)
    temperature = float(changes.pop("temperature", 1.0))
    model = getattr(policy, "model", None)
    mode = getattr(config_of(model), "logprobs_mode", None)
    sampled_with = ", ".join([f"temperature={temperature:g}", *map(_shown, changes.items())])
    why = f"the policy samples with {sampled_with}, and its engine has logprobs_mode={mode!r}"
    if mode in ("raw_logits", "processed_logits"):
        return Recorded(
            None, f"they are logits, not log-probs: the policy's engine has logprobs_mode={mode!r}"
        )
    if "structured_outputs" in changes:
        return Recorded(
            None,
            f"structured_outputs masked the logits before they were recorded, in any logprobs_mode: {why}",
        )
    if mode == "raw_logprobs" or (not changes and temperature in (0.0, 1.0) and mode != "processed_logprobs"):
        return Recorded(1.0, why)
    if mode != "processed_logprobs":
        why = (
            f"the policy samples with {sampled_with}, and its engine does not tell whether it records raw or "
            "processed log-probs"
        )
        return Recorded(None, why)
    changes |= dict.fromkeys(_processors(model))
    if changes:
        return Recorded(None, f"{', '.join(changes)} changed the logits before they were recorded: {why}")
    return Recorded(temperature or 1.0, why)  # greedy sampling does not divide the logits by 0


def _shown(parameter: tuple[str, Any]) -> str:
    name, value = parameter
    return f"{name}={value!r}" if isinstance(value, (int, float, str)) else name


def _processors(engine: Any) -> list[str]:
    """Return the names of an engine's own logits processors, including those of installed plugins."""
    given = getattr(config_of(engine), "logits_processors", None) or []
    return [f"logits_processors={name}" for name in (*map(str, given), *_plugins())]


@functools.cache
def _plugins() -> tuple[str, ...]:
    return tuple(plugin.name for plugin in entry_points(group="vllm.logits_processors"))


def _changes(params: Any) -> dict[str, Any]:
    """Return the sampling parameters that may change logits.

    Args:
        params: vLLM's ``SamplingParams``, or a mapping with the same names.
    """
    from vllm import SamplingParams

    default = SamplingParams()
    if not isinstance(params, dict):
        params = {
            name: getattr(params, name, None) for name in SamplingParams.__struct_fields__ if name[0] != "_"
        }
    if (params.get("top_k") or 0) <= 0:  # 0 and -1 both mean all tokens
        params = {**params, "top_k": default.top_k}
    return {
        k: v
        for k, v in params.items()
        if k not in NEUTRAL and v not in (None, {}, [], getattr(default, k, None))
    }


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
