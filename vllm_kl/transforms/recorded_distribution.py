"""Tells the distribution of a policy's recorded log-probs.

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
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from torchrl.modules.llm import TransformersWrapper

from vllm_kl.engines.generate import config_of

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
