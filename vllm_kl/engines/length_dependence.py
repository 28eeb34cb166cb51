"""Finds models whose log-probs depend on the engine's length, or on the longest row of a batch.

- LongRoPE has short and long factors. transformers uses the long factors for a batch whose longest row is
  longer than the model's original length. vLLM uses them for every position of an engine whose
  ``max_model_len`` is longer.
- Llama 4 scales attention in a vLLM engine whose ``max_model_len`` is above 32,768.
- "dynamic" RoPE: transformers computes it for the longest row so far. vLLM has positions for the original
  length only.

The functions read a model's config. They do not import vLLM.

Source: ``phi3_long_rope_scaled_rope.py``, ``dynamic_ntk_scaling_rope.py``, ``models/llama4.py``, vLLM 0.32;
``dynamic_rope_update``, ``modeling_rope_utils.py``, transformers 5.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

# The switch is the length at which a model's log-probs change. "short", "long": the engine computes every row
# as a row below or above the switch. "row": it computes each row by the row's own length.
LengthSide = Literal["short", "long", "row"]

_LLAMA4_SWITCH = 32768


def rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the sets of RoPE parameters in a text model's config: one, or one for each type of layers."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    sets = [found, *found.values()] if isinstance(found, dict) else []
    yield from (one for one in sets if isinstance(one, dict) and _rope_type(one))


def switch_length(config: Any) -> int | None:
    """Return the length above which the log-probs of all positions change; ``None``: they never do."""
    for parameters in rope_parameters(config):
        if _rope_type(parameters) in ("longrope", "su"):
            name = "original_max_position_embeddings"
            return int(parameters.get(name) or getattr(config, name, None) or config.max_position_embeddings)
    if str(getattr(config, "model_type", "")).startswith("llama4"):
        return _LLAMA4_SWITCH
    return None


def dynamic_length(config: Any) -> int | None:
    """Return the length above which "dynamic" RoPE depends on the row; ``None``: another RoPE."""
    for parameters in rope_parameters(config):
        if _rope_type(parameters) == "dynamic" and "alpha" not in parameters:
            return int(config.max_position_embeddings)
    return None


def side_of(config: Any, max_model_len: int) -> LengthSide | None:
    """Return the side of the switch for a vLLM engine of this length; ``None``: the model has no switch."""
    switch = switch_length(config)
    return None if switch is None else "long" if max_model_len > switch else "short"


def side_in(llm_engine: Any) -> LengthSide | None:
    """Return the side of the switch that a live engine computes with.

    vLLM shares RoPE among all engines of a process whose models have equal configs, whatever the engines'
    lengths (``rotary_embedding/__init__.py``, 0.32). So a second engine computes with the factors of the
    first.
    """
    config = llm_engine.model_config
    side = side_of(config.hf_text_config, config.max_model_len)
    executor = getattr(llm_engine, "model_executor", None)  # None: the engine has a process of its own
    if side is None or executor is None or not hasattr(executor, "driver_worker"):
        return side
    for module in executor.driver_worker.worker.get_model().modules():
        if hasattr(module, "use_long_rope"):
            return "long" if module.use_long_rope else "short"
    return side


def note_on(config: Any, max_model_len: int, side: LengthSide | None = None) -> str:
    """Return a note for the user of an engine of this length; empty if the model has no switch.

    Args:
        config: the model's config.
        max_model_len: the engine's length.
        side: the side that the engine computes with, if it is known.
    """
    switch = switch_length(config)
    if switch is None:
        return ""
    if side is not None and side != side_of(config, max_model_len):
        return (
            f"max_model_len={max_model_len}, but every position is computed as in a {side} sequence: vLLM "
            "took RoPE from an earlier engine of this process, on the other side of the model's original "
            f"length {switch}.\nMake the engine in a process of its own"
        )
    if max_model_len > switch:
        return (
            f"max_model_len={max_model_len} is above the model's original length {switch}: vLLM computes "
            f"every position as in a long sequence. So log-probs of sequences up to {switch} tokens differ "
            "from those of transformers.\n"
            f"If no sequence is longer, make the engine with max_model_len={switch}"
        )
    return (
        f"max_model_len={max_model_len} is at or below the model's original length {switch}: vLLM computes "
        "every position as in a short sequence. An engine with a larger max_model_len gives other log-probs"
    )


def why_two_lengths(one: LengthSide | None, other: LengthSide | None) -> str:
    """Return why two engines compute log-probs of equal weights differently; empty if they do not."""
    if "long" not in (one, other) or one == other or None in (one, other):
        return ""
    second = (
        "the other is a transformers model, which computes short sequences as short ones"
        if "row" in (one, other)
        else "the other is not"
    )
    return (
        "this model's log-probs depend on the engine's max_model_len. One engine's max_model_len is above "
        f"the model's original length, {second}. So equal weights give a KL that is not 0.\nGive both "
        "engines the same max_model_len"
    )


class Lengths:
    """Groups rows into batches in which a transformers model gives each row the log-probs that it has alone.

    Args:
        model: a module of transformers. The rows of a module without a config count as independent.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        config = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else None
        self._dynamic, self._switch = dynamic_length(config), switch_length(config)

    @property
    def is_dynamic(self) -> bool:
        return self._dynamic is not None

    @property
    def side(self) -> LengthSide | None:
        return None if self._switch is None else "row"

    def alike(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return groups of rows that may share a batch: short, or long, or ("dynamic" RoPE) of one length."""
        groups = defaultdict(list)
        for row, length in enumerate(lengths):
            is_dynamic = self._dynamic is not None and length > self._dynamic
            groups[length if is_dynamic else self._switch is not None and length > self._switch].append(row)
        return list(groups.values())

    def forget(self) -> None:
        """Reset "dynamic" RoPE: transformers keeps the length of the longest row so far."""
        for module in self._model.modules() if self.is_dynamic else ():
            for prefix in ("", *(f"{kind}_" for kind in getattr(module, "layer_types", None) or ())):
                original = getattr(module, f"{prefix}original_inv_freq", None)
                if original is not None and hasattr(module, f"{prefix}max_seq_len_cached"):
                    buffer = getattr(module, f"{prefix}inv_freq")
                    setattr(module, f"{prefix}inv_freq", original.to(buffer.device))
                    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _rope_type(parameters: dict[str, Any]) -> str | None:
    return parameters.get("rope_type") or parameters.get("type")
