"""Refuses a load that leaves a parameter of the model without weights, and names the parameter.

Before the load the parameters are filled with NaN marks. After the load no mark may be left.

The names that ``load_weights`` returns do not suffice. A packed parameter (``qkv_proj``) counts as loaded
when one of its parts is. vLLM (0.32) exempts every linear layer, the embeddings and the head from its own
check, so it serves a checkpoint that lacks ``lm_head.weight`` with the numbers that were in memory.

Buffers and the parameters of quantised models get no marks: if a checkpoint lacks them, vLLM fills them
otherwise.

Source: ``DefaultModelLoader.track_weights_loading``, ``model_executor/model_loader/default_loader.py``, vLLM
0.32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Parameters with more than _MARK_ALL numbers get about _NUM_MARKS marks. Every part that a checkpoint fills
# gets some: parameters of experts have the most parts, two for each of at most some hundred experts.
_MARK_ALL = 1 << 16
_NUM_MARKS = 1 << 11
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

LoadWeights = Callable[[Any, torch.nn.Module, Any], None]


def refusing_missing_weights(load_weights: LoadWeights) -> LoadWeights:
    """Return a ``load_weights`` that raises ``ValueError`` with the names of parameters without weights."""
    if hasattr(load_weights, "refuses_missing_weights"):
        return load_weights

    @functools.wraps(load_weights)
    def load(loader: Any, model: torch.nn.Module, model_config: Any) -> None:
        marks = [] if model_config.quantization is not None else list(_mark(model))
        load_weights(loader, model, model_config)
        if missing := [name for name, is_missing in _unmark(marks) if is_missing]:
            names = ", ".join(missing[:5]) + (" and others" if len(missing) > 5 else "")
            raise ValueError(f"no weights for {names}: the checkpoint lacks them, or they are NaN")

    load.refuses_missing_weights = True
    return load


def install() -> None:
    """Check every later load from files in this process. Idempotent."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    DefaultModelLoader.load_weights = refusing_missing_weights(DefaultModelLoader.load_weights)


Mark = tuple[str, torch.nn.Parameter, torch.Tensor]  # name, parameter, the numbers that the marks replaced


def _mark(model: torch.nn.Module) -> Iterator[Mark]:
    for name, parameter in model.named_parameters():
        if parameter.dtype in _FLOATS and not parameter.is_meta:
            places = _places(parameter)
            yield name, parameter, places.clone()
            places.fill_(torch.nan)


def _unmark(marks: list[Mark]) -> Iterator[tuple[str, bool]]:
    """Yield each parameter's name and whether weights are missing; put the old numbers back into marks."""
    for name, parameter, before in marks:
        places = _places(parameter)
        unwritten = places.isnan()
        num_unwritten = int(unwritten.sum())
        if num_unwritten:
            places.copy_(torch.where(unwritten, before, places))
        yield name, num_unwritten > _num_padding(parameter)


def _places(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a view of the numbers of a parameter that get marks."""
    data = parameter.data
    if data.numel() <= _MARK_ALL or not data.is_contiguous() or _num_padding(parameter):
        return data
    step = data.numel() // _NUM_MARKS | 1  # odd: rows have even lengths, so every column gets marks
    return data.view(-1)[::step]


def _num_padding(parameter: torch.nn.Parameter) -> int:
    """Return how many numbers of a parameter are padding. vLLM's layers of experts tell how many are not."""
    return parameter.numel() - getattr(parameter, "weight_loader_numel", parameter.numel())
