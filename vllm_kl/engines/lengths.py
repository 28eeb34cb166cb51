"""Models whose numbers depend on a length: of the engine, or of the longest row in a batch.

LongRoPE has two sets of factors. transformers takes the long ones for a batch whose longest row is longer than the model's
original length; vLLM for every position of an engine whose ``max_model_len`` is. Llama 4 scales attention in an engine longer
than 32,768. "dynamic" RoPE is computed by transformers for the longest row so far; vLLM has positions for the original length only.

Plain functions of a model's config; no vLLM is imported.

Source: ``phi3_long_rope_scaled_rope.py``, ``dynamic_ntk_scaling_rope.py``, ``models/llama4.py``, vLLM 0.32;
``dynamic_rope_update``, ``modeling_rope_utils.py``, transformers 5.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

# "short", "long": the side of the switch that an engine computes every row with. "row": each row by its own length.
LengthSide = Literal["short", "long", "row"]

_LLAMA4_SWITCH = 32768


def rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the RoPE parameters of a text model's config: one set, or one for each type of layers."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    sets = [found, *found.values()] if isinstance(found, dict) else []
    yield from (one for one in sets if isinstance(one, dict) and _rope_type(one))


def switch_length(config: Any) -> int | None:
    """Return the length above which the numbers of all positions are others; ``None``: there is no such length."""
    for parameters in rope_parameters(config):
        if _rope_type(parameters) in ("longrope", "su"):
            name = "original_max_position_embeddings"
            return int(parameters.get(name) or getattr(config, name, None) or config.max_position_embeddings)
    if str(getattr(config, "model_type", "")).startswith("llama4"):
        return _LLAMA4_SWITCH
    return None


def dynamic_length(config: Any) -> int | None:
    """Return the length above which "dynamic" RoPE depends on the sequence; ``None``: the model has none."""
    for parameters in rope_parameters(config):
        if _rope_type(parameters) == "dynamic" and "alpha" not in parameters:
            return int(config.max_position_embeddings)
    return None


def side_of(config: Any, max_model_len: int) -> LengthSide | None:
    """Return the side that vLLM computes with in an engine of this length; ``None``: the length enters no number."""
    switch = switch_length(config)
    return None if switch is None else "long" if max_model_len > switch else "short"


def side_in(llm_engine: Any) -> LengthSide | None:
    """Return the side that a live engine computes with.

    vLLM keeps RoPE by the model's config for the whole process (``rotary_embedding/__init__.py``, 0.32): of two engines in one
    process the second computes with the first one's factors, whatever its length.
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
    """Return what a user must know of an engine of this length; empty where the length enters no number.

    Args:
        config: the model's.
        max_model_len: the engine's.
        side: what the engine computes with, where that was looked at.
    """
    switch = switch_length(config)
    if switch is None:
        return ""
    if side is not None and side != side_of(config, max_model_len):
        return (
            f"max_model_len={max_model_len}, but every position is computed as in a {side} sequence: vLLM took RoPE from an engine "
            f"that was made before in this process, on the other side of the model's original length {switch}. Make the engine "
            "in a process of its own"
        )
    if max_model_len > switch:
        return (
            f"max_model_len={max_model_len} is above the model's original length {switch}: vLLM computes every position as in a "
            f"long sequence, so the numbers of sequences up to {switch} tokens differ from transformers', and from those of an "
            f"engine with max_model_len={switch}"
        )
    return (
        f"max_model_len={max_model_len} is at or below the model's original length {switch}: every position is computed as in a "
        "short sequence. An engine with a larger max_model_len gives other numbers"
    )


def why_two_lengths(one: LengthSide | None, other: LengthSide | None) -> str:
    """Return why two sides of a KL compute the same weights differently; empty where they do not."""
    if "long" not in (one, other) or one == other or None in (one, other):
        return ""
    what = (
        "a transformers model, which computes short sequences as short ones"
        if "row" in (one, other)
        else "below it"
    )
    return (
        "this model's numbers depend on the engine's max_model_len, and the two sides lie on two sides of the switch: one is above "
        f"the model's original length, the other is {what}. Equal weights give a KL that is not 0. Give both engines one "
        "max_model_len"
    )


class Lengths:
    """Which rows a transformers model may compute in one batch, so that each has the numbers that it has alone.

    Args:
        model: a module of transformers; anything without a config is taken as one whose rows are independent.
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
        """Return the rows in groups that may share a batch: short and long ones; with "dynamic" RoPE those of one length."""
        groups = defaultdict(list)
        for row, length in enumerate(lengths):
            is_dynamic = self._dynamic is not None and length > self._dynamic
            groups[length if is_dynamic else self._switch is not None and length > self._switch].append(row)
        return list(groups.values())

    def forget(self) -> None:
        """Let "dynamic" RoPE look at the next batch alone: transformers remembers the longest row so far."""
        for module in self._model.modules() if self.is_dynamic else ():
            for prefix in ("", *(f"{kind}_" for kind in getattr(module, "layer_types", None) or ())):
                original = getattr(module, f"{prefix}original_inv_freq", None)
                if original is not None and hasattr(module, f"{prefix}max_seq_len_cached"):
                    buffer = getattr(module, f"{prefix}inv_freq")
                    setattr(module, f"{prefix}inv_freq", original.to(buffer.device))
                    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _rope_type(parameters: dict[str, Any]) -> str | None:
    return parameters.get("rope_type") or parameters.get("type")
