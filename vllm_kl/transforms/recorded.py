"""What a policy recorded while it sampled: log-probs of which distribution, and whether an exact 0.0 is one of them.

Read in vLLM 0.32 (``v1/sample/sampler.py``, ``v1/worker/gpu/sample/sampler.py``, ``v1/worker/gpu_model_runner.py``) and run:

| the engine's ``logprobs_mode`` | sampled with | what is recorded |
|---|---|---|
| ``raw_logprobs``, the default | anything but structured outputs | ``log softmax(logits)``, whatever the temperature |
| ``processed_logprobs`` | nothing else, or ``temperature=0`` | ``log softmax(logits)`` |
| ``processed_logprobs`` | ``temperature=T`` | ``log softmax(logits / T)``; of prompt tokens ``log softmax(logits)`` |
| ``processed_logprobs`` | ``top_p``, penalties, biases, ... | of the logits that these left: no reference has them |
| either | structured outputs | of the logits that the grammar left: vLLM masks the logits before it records raw log-probs |
| ``raw_logits``, ``processed_logits`` | | no log-probs |

TorchRL 0.14's ``TransformersWrapper`` records ``log softmax(logits)``. Of an engine in another process, or of another kind, the
mode is not known: only what was sampled with ``temperature=1`` (or 0) and nothing else is known to be ``log softmax(logits)``.

It knows tensors, and wrappers and engines by their attributes; it asks nobody.
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

# Sampling parameters that change no logits (vLLM 0.32). Any other that is not at its default does, or may.
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

# A recorded zero is believed where the reference gives the token at least this log-prob, nats: a probability of 0.9. One that
# is none costs at most this much KL a token; a policy that is sure where the reference is not, is asked again. Token by token: the
# sum over a long answer of a deterministic policy is far below it, and its mean would hide an end token that was not sampled.
SURE = -0.1

# The largest log-prob that is rounding: bfloat16 numbers below 64 are 0.25 apart, so a log-sum-exp that is rounded to one is at
# most half of that below its largest logit.
ROUNDING = 0.125


class Recorded(NamedTuple):
    """Of which distribution recorded log-probs are."""

    temperature: float | None  # of softmax(logits / temperature); None: of none that a reference has
    why: str  # what says so


def recorded_by(policy: Any, params: Any = None) -> Recorded | None:
    """Return what a policy records while it samples; ``None`` where nothing is known of its sampling parameters.

    Args:
        policy: a wrapper of TorchRL's.
        params: those that it sampled with; ``None``: those that it has.
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
            None, f"they are logits, no log-probs: the policy's engine has logprobs_mode={mode!r}"
        )
    if "structured_outputs" in changes:
        return Recorded(
            None, f"they are those of the logits that structured_outputs left, in any logprobs_mode: {why}"
        )
    if mode == "raw_logprobs" or (not changes and temperature in (0.0, 1.0) and mode != "processed_logprobs"):
        return Recorded(1.0, why)
    if mode != "processed_logprobs":
        why = f"the policy samples with {sampled_with}, and its engine does not tell whether it records raw or processed log-probs"
        return Recorded(None, why)
    changes |= dict.fromkeys(_processors(model))
    if changes:
        return Recorded(
            None, f"they are processed, those of the logits that {', '.join(changes)} left: {why}"
        )
    return Recorded(temperature or 1.0, why)  # greedy: logits are not divided by 0


def _shown(parameter: tuple[str, Any]) -> str:
    name, value = parameter
    return f"{name}={value!r}" if isinstance(value, (int, float, str)) else name


def _processors(engine: Any) -> list[str]:
    """Return an engine's own logits processors, those of installed plugins among them."""
    given = getattr(config_of(engine), "logits_processors", None) or []
    return [f"logits_processors={name}" for name in (*map(str, given), *_plugins())]


@functools.cache
def _plugins() -> tuple[str, ...]:
    return tuple(plugin.name for plugin in entry_points(group="vllm.logits_processors"))


def _changes(params: Any) -> dict[str, Any]:
    """Return the sampling parameters that may change logits, of vLLM's ``SamplingParams`` or a mapping of such names."""
    from vllm import SamplingParams

    default = SamplingParams()
    if not isinstance(params, dict):
        params = {
            name: getattr(params, name, None) for name in SamplingParams.__struct_fields__ if name[0] != "_"
        }
    if (params.get("top_k") or 0) <= 0:  # both 0 and -1 are all tokens
        params = {**params, "top_k": default.top_k}
    return {
        k: v
        for k, v in params.items()
        if k not in NEUTRAL and v not in (None, {}, [], getattr(default, k, None))
    }


def check_on_zero(on_zero: str) -> None:
    """Refuse what is no choice."""
    if on_zero not in get_args(OnZero):
        raise OptionError(f"on_zero={on_zero!r} does not exist; choose one of {', '.join(get_args(OnZero))}")


def check_recorded(values_N: torch.Tensor, lengths: Sequence[int], *, what: str) -> None:
    """Refuse a recorded value above 0, beyond rounding: a probability is at most 1.

    Args:
        values_N: of all samples laid end to end, 0.0 outside the mask.

    Raises:
        MissingLogProbError: with the sample, the token and the value.
    """
    if len(values_N) and values_N.max() > ROUNDING:
        bad = values_N > ROUNDING
        i, t = place_of(bad, lengths)
        raise MissingLogProbError(
            f"{what}: sample {i}, token {t} of {lengths[i]} is {float(values_N[bad][0])}, which is no log-prob: a probability is "
            "at most 1. Are they logits (logprobs_mode='raw_logits' or 'processed_logits')?"
        )


def has_zeros(values_N: torch.Tensor, keep_N: torch.Tensor) -> bool:
    """Whether a value that the mask keeps is exactly 0.0, where all others are."""
    return int(values_N.count_nonzero()) < int(keep_N.sum())


def doubtful_zeros(
    values_N: torch.Tensor, other_N: torch.Tensor | None, keep_N: torch.Tensor, lengths: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Return the tokens whose recorded log-prob is exactly 0.0 though the other side is not sure of them, by sample.

    Missing log-probs are written as 0.0 by many: TorchRL 0.14 and SGLang's wrapper for prompts, trainers for a synthetic end
    token or a padded row. A policy that is sure records 0.0 as well (float32 has no room for a probability above 1 - 6e-8), and
    then a reference that is near it is sure too, see :data:`SURE`.

    Args:
        values_N: recorded log-probs of all samples laid end to end, on the CPU, 0.0 outside the mask.
        other_N: the other side's; ``None``: not known, every zero is doubtful.
        keep_N: tokens that count, bool.
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
    """Refuse recorded zeros that are doubtful where nobody can be asked, or warn of them.

    Args:
        values_N, other_N, keep_N, lengths: as :func:`doubtful_zeros` takes them.
        what, who: what messages call the two sides.
        cure: what to do instead.

    Raises:
        MissingLogProbError: there is one, and ``on_zero="raise"``.
    """
    if on_zero == "allow" or not (doubtful := doubtful_zeros(values_N, other_N, keep_N, lengths)):
        return
    i, at = next(iter(doubtful.items()))
    t = int(at[0])
    value = float(other_N.split(list(lengths))[i][t])
    complain(zero_text(what, i, t, f"{who} gives it {value:.4f}", doubtful) + f". {cure}", on_zero)


def zero_text(what: str, sample: int, token: int, but: str, found: dict[int, torch.Tensor]) -> str:
    """Return what is said of a recorded 0.0 that is taken for a placeholder."""
    return (
        f"{what}: sample {sample}, token {token} is exactly 0.0, a probability of 1, but {but}: a missing log-prob, a padded "
        f"row or an end token that was not sampled ({sum(map(len, found.values()))} such tokens in {len(found)} samples)"
    )


def complain(message: str, on_zero: OnZero) -> None:
    """Raise or warn."""
    if on_zero == "raise":
        raise MissingLogProbError(message)
    warnings.warn(message, MismatchWarning, stacklevel=3)
