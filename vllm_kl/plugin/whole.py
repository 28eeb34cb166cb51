"""Every parameter of a model gets its weights when it is loaded, or the load is refused by the parameters' names.

That is seen, not believed: parameters are marked with NaN before the load, and no mark may be left. The names that
``load_weights`` returns are not looked at: a packed parameter (``qkv_proj``) counts as loaded when one of its parts is, and vLLM
(0.32) exempts every linear layer, the embeddings and the head from its own check of them, so that a checkpoint that lacks
``lm_head.weight`` is served with whatever was in memory. Buffers and the parameters of quantized models are not marked: those that
a checkpoint lacks are filled by other means.

Source: ``DefaultModelLoader.track_weights_loading``, ``model_executor/model_loader/default_loader.py``, vLLM 0.32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Parameters of more numbers than this are marked at so many places. Each part that a checkpoint fills is hit: the most parts have
# the experts' parameters, two for each of at most some hundred experts.
_MARK_ALL = 1 << 16
_NUM_MARKS = 1 << 11
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

LoadWeights = Callable[[Any, torch.nn.Module, Any], None]


def seen_to_be_whole(load_weights: LoadWeights) -> LoadWeights:
    """Return a loader's ``load_weights`` that raises ``ValueError`` where a parameter is left without weights, with the names."""
    if hasattr(load_weights, "is_seen"):
        return load_weights

    @functools.wraps(load_weights)
    def load(loader: Any, model: torch.nn.Module, model_config: Any) -> None:
        marks = [] if model_config.quantization is not None else list(_mark(model))
        load_weights(loader, model, model_config)
        if missing := [name for name, is_missing in _unmark(marks) if is_missing]:
            names = ", ".join(missing[:5]) + (" and others" if len(missing) > 5 else "")
            raise ValueError(f"no weights for {names}: they are missing there, or NaN")

    load.is_seen = True
    return load


def install() -> None:
    """Look at the models that this process loads from files from here on. Idempotent."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    DefaultModelLoader.load_weights = seen_to_be_whole(DefaultModelLoader.load_weights)


Mark = tuple[str, torch.nn.Parameter, torch.Tensor]  # name, parameter, what stood at its marked places


def _mark(model: torch.nn.Module) -> Iterator[Mark]:
    for name, parameter in model.named_parameters():
        if parameter.dtype in _FLOATS and not parameter.is_meta:
            places = _places(parameter)
            yield name, parameter, places.clone()
            places.fill_(torch.nan)


def _unmark(marks: list[Mark]) -> Iterator[tuple[str, bool]]:
    """Yield every parameter's name, and whether more of it is unwritten than its padding; put back what stood there."""
    for name, parameter, before in marks:
        places = _places(parameter)
        unwritten = places.isnan()
        num_unwritten = int(unwritten.sum())
        if num_unwritten:
            places.copy_(torch.where(unwritten, before, places))
        yield name, num_unwritten > _num_padding(parameter)


def _places(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a view of the numbers of a parameter that are marked."""
    data = parameter.data
    if data.numel() <= _MARK_ALL or not data.is_contiguous() or _num_padding(parameter):
        return data
    return data.view(-1)[
        :: data.numel() // _NUM_MARKS | 1
    ]  # odd: rows have even lengths, and all columns are hit


def _num_padding(parameter: torch.nn.Parameter) -> int:
    """Return how many numbers no checkpoint fills: vLLM's layers of experts say how many it does."""
    return parameter.numel() - getattr(parameter, "weight_loader_numel", parameter.numel())
