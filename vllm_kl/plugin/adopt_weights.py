"""Copies all tensors of a newly loaded model into the serving model, in place.

Both models have the same architecture. So they hold the same tensors at the same places: in parameters, in
buffers, in attributes of layers, and inside objects that layers compute with (vLLM's quantization methods and
kernels). :func:`pair_tensors` walks through both models and pairs the tensors. :func:`adopt` copies them, so
everything that holds a tensor of the serving model (a kernel, a captured CUDA graph, an attention with sinks)
sees the new numbers.

Some values cannot be copied. :func:`adopt` moves them, which means that it replaces the serving model's
value:

- a linear layer's product on a CPU: a function over weights that oneDNN has packed, which Python cannot read;
- a float that a layer read from a weight with ``item()``;
- ``None``, where a layer makes a tensor of its weights in its first forward (``_combined_gate_weight``,
  ``fused_moe/runner/moe_runner.py``, vLLM 0.32). The serving model drops its tensor and makes it again.

A tensor without a counterpart, or with another shape, is an obstacle: :func:`pair_tensors` reports it.

The module knows no architecture. KV caches are no weights: they are not copied.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MappingProxyType
from typing import Any

import torch

# Attributes that the engine fills with its KV cache.
_NOT_WEIGHTS = frozenset({"kv_cache"})
# The packages of classes whose objects may hold tensors of weights.
_PACKAGES = ("vllm.", "vllm_kl.")
_CONFIGS = "vllm.config."
# The dtypes between which a layer may cast.
_CAST = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


@dataclass
class Differences:
    """What the serving model must take from the loaded model, and what it cannot take."""

    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # (target, source)
    # The copies of tensors that equal those of the checkpoint.
    plain: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    moves: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)  # (target, key, value)
    # The places of the moves, which compiled code does not read again.
    moved: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)  # sentences about places that do not match


def pair_tensors(serving: torch.nn.Module, loaded: torch.nn.Module) -> Differences:
    """Pair every value of the loaded model with the serving model's value at the same place."""
    walk = _Walk()
    modules = dict(_named_modules(serving))
    for name, module in loaded.named_modules():
        if name not in modules:
            walk.found.obstacles += [f"{name} is not in the serving model"] if _holds_tensors(module) else []
        else:
            walk.module(name, modules[name], module)
    return walk.found


def saved(found: Differences) -> Differences:
    """Return what :func:`adopt` must take to undo the adoption of ``found``: copies in the host's memory."""
    return Differences(
        copies=[(into, into.to("cpu", copy=True)) for into, _ in found.copies],
        moves=[(holder, name, holder[name]) for holder, name, _ in found.moves],
    )


@torch.no_grad()
def adopt(found: Differences) -> None:
    """Copy and move all values. If it is interrupted it starts again, because half a model must not serve."""
    try:
        _adopt(found)
    except BaseException:
        _adopt(found)
        raise


def _adopt(found: Differences) -> None:
    for into, source in found.copies:
        into.copy_(source)
    for holder, name, value in found.moves:
        holder[name] = value


def _named_modules(model: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Module]]:
    """Yield modules by their names without LoRA, which wraps each adapted layer in another layer."""
    from vllm.lora.layers import BaseLayerWithLoRA

    for name, module in model.named_modules():
        if not isinstance(module, BaseLayerWithLoRA):
            yield name.replace(".base_layer", ""), module


class _Walk:
    """Goes through two models, layer by layer."""

    def __init__(self) -> None:
        self.found = Differences()
        self._seen: set[int] = set()

    def module(self, name: str, ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
        num_before = len(self.found.copies)
        self._mapping(name, ours._parameters, theirs._parameters)
        if type(getattr(theirs, "quant_method", None)) in _plain_methods():
            self.found.plain += self.found.copies[num_before:]
        self._mapping(name, ours._buffers, theirs._buffers)
        own = {key: value for key, value in vars(theirs).items() if key not in vars(_EMPTY)}
        self._mapping(name, vars(ours), own)

    def _mapping(self, path: str, ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> None:
        for key, value in theirs.items():
            if key in _NOT_WEIGHTS:
                continue
            place = f"{path}.{key}"
            if key in ours:
                if not self._value(place, ours[key], value):
                    self._move(place, ours, key, value)
            elif _holds_tensors(value):
                self.found.obstacles.append(f"{place} is not in the serving model")

    def _move(self, place: str, ours: Mapping[Any, Any], key: Any, value: Any) -> None:
        if isinstance(ours, dict) and isinstance(value, (FunctionType, float, type(None))):
            self.found.moves.append((ours, key, value))
            self.found.moved.append(place)
        else:
            self.found.obstacles.append(f"{place} is a {type(value).__name__} that cannot be looked into")

    def _value(self, path: str, ours: Any, theirs: Any) -> bool:
        """Pair two values; return False for a value that can be neither copied nor read."""
        if theirs is ours or isinstance(theirs, torch.nn.Module):  # modules are visited by name
            return True
        if isinstance(theirs, torch.Tensor):
            self._tensor(path, ours, theirs)
            return True
        if isinstance(theirs, float):
            # By bits: NaN equals NaN.
            return isinstance(ours, float) and struct.pack("d", ours) == struct.pack("d", theirs)
        if theirs is None:  # an integer tensor depends on the requests, not on the weights
            return not (isinstance(ours, torch.Tensor) and ours.is_floating_point())
        if isinstance(theirs, (Mapping, list, tuple)):
            return self._items(path, ours, theirs)
        if isinstance(theirs, FunctionType):
            return self._function(path, ours, theirs)
        if isinstance(theirs, functools.partial):
            return self._object(path, ours, theirs, ("args", "keywords"))
        if hasattr(type(theirs), "__del__"):  # it owns a resource outside of Python
            return False
        if _is_vllms(theirs) and id(theirs) not in self._seen:
            self._seen.add(id(theirs))
            return self._object(path, ours, theirs, tuple(vars(theirs)))
        return True

    def _tensor(self, path: str, ours: Any, theirs: torch.Tensor) -> None:
        if not isinstance(ours, torch.Tensor):
            self.found.obstacles.append(f"{path} is no tensor in the serving model")
        elif ours.shape != theirs.shape or not _is_cast_of(ours.dtype, theirs.dtype):
            self.found.obstacles.append(
                f"{path} is {theirs.dtype} {list(theirs.shape)}, and {ours.dtype} {list(ours.shape)} in the "
                "serving model"
            )
        elif not theirs.is_meta:
            self.found.copies.append((ours.data, theirs.data))

    def _items(self, path: str, ours: Any, theirs: Any) -> bool:
        if isinstance(theirs, Mapping):
            ours = ours if isinstance(ours, Mapping) else {}
        else:
            ours = MappingProxyType(dict(enumerate(ours if isinstance(ours, (list, tuple)) else ())))
            theirs = dict(enumerate(theirs))
        self._mapping(path, ours, theirs)
        return True

    def _function(self, path: str, ours: Any, theirs: FunctionType) -> bool:
        cells = theirs.__closure__ or ()
        if not cells:
            return True
        if not isinstance(ours, FunctionType) or ours.__code__ is not theirs.__code__:
            return False
        values = zip(theirs.__code__.co_freevars, ours.__closure__ or (), cells, strict=True)
        looked_into = [
            self._value(f"{path}.{name}", a.cell_contents, b.cell_contents) for name, a, b in values
        ]
        return all(looked_into)

    def _object(self, path: str, ours: Any, theirs: Any, names: tuple[str, ...]) -> bool:
        if type(ours) is not type(theirs):
            if _holds_tensors(theirs):
                self.found.obstacles.append(
                    f"{path} is a {type(theirs).__name__}, and a {type(ours).__name__} in the serving model"
                )
            return True
        holder: Mapping[str, Any] = vars(ours)
        if isinstance(ours, functools.partial):  # its values cannot be replaced
            holder = MappingProxyType({name: getattr(ours, name) for name in names})
        self._mapping(path, holder, {name: getattr(theirs, name) for name in names})
        return True


def _plain_methods() -> tuple[type, ...]:
    """Return the quantization methods of layers that use a checkpoint's weights unchanged, or have none."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return type(None), UnquantizedLinearMethod, UnquantizedEmbeddingMethod


# Attributes that every module has hold no weights, except _parameters and _buffers.
_EMPTY = torch.nn.Module()


def _is_vllms(value: Any) -> bool:
    module = type(value).__module__
    return hasattr(value, "__dict__") and module.startswith(_PACKAGES) and not module.startswith(_CONFIGS)


def _is_cast_of(ours: torch.dtype, theirs: torch.dtype) -> bool:
    """Whether the dtypes are equal, or ``ours`` is a cast to a smaller one (rotary embeddings, vLLM 0.32)."""
    return ours == theirs or ({ours, theirs} < _CAST and torch.promote_types(ours, theirs) == theirs)


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    """Whether a tensor can be reached from a value in at most ``depth`` steps."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    if isinstance(value, torch.nn.Module):
        return any(True for _ in value.parameters()) or any(True for _ in value.buffers())
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif _is_vllms(value):
        inner = vars(value).values()
    else:
        return False
    return any(_holds_tensors(item, depth - 1) for item in inner if not isinstance(item, torch.nn.Module))
