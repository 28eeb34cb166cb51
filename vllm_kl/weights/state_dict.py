"""Converts the model of a training loop to plain tensors with the names of transformers' ``state_dict()``.

    module, tensordict or state dict -> remove wrappers from names -> gather sharded tensors
        -> weights/checkpoint.py

A training loop wraps its model: ``torch.compile``, DDP, FSDP, activation checkpointing, value heads, PEFT,
Lightning and TorchRL modules. This module recognises wrappers by their structure, and imports neither PEFT
nor DeepSpeed nor bitsandbytes. LoRA adapters are merged into new tensors; the model keeps its own. Weights
that cannot be made plain without loss are refused: quantised weights, other adapters that are not merged, and
tensors on other ranks or devices.

A tensor that is sharded over ranks (a ``DTensor``, or a model in FSDP) is gathered. The gathering is a
collective operation: all ranks must call it, or those that do wait for ever.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import transformers
from tensordict import TensorDictBase
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.tensor import DTensor

from vllm_kl.errors import WeightsError

# A wrapper holds its module under one of these names, which then stands in the names of the state dict.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN_LORA = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.layer.Embedding")
_COUNTS = (torch.int64, torch.int32, torch.bool)  # buffers
_UNMERGED = (
    "Call merge_adapter() on the PEFT model before the push and unmerge_adapter() after it, or push "
    "merge_and_unload()"
)
_DEQUANTIZE = (
    "Push weights in float32, bfloat16 or float16: from an unquantised copy, or from model.dequantize()"
)
_GATHER = (
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of "
    "torch.distributed.checkpoint.state_dict, called on every rank, gives rank 0 the whole weights: push "
    "there"
)


def as_state_dict(source: Any, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of a model: with the model's own names, detached, gathered and not quantised.

    Args:
        source: a module, a tensordict or a state dict of the model, or of a wrapper of the model. If a module
            holds several models, the one with ``names`` is taken.
        names: the names that the model must have, as in transformers. The caller checks for missing names.

    Raises:
        WeightsError: ``source`` cannot be made plain. The message names the tensor or layer, and says what to
            pass instead.
    """
    # tensordict's TensorDictParams is a module and a tensordict.
    is_module = isinstance(source, torch.nn.Module) and not isinstance(source, TensorDictBase)
    given = _of_module(source, names) if is_module else _of_mapping(source)
    if not given:
        raise WeightsError(f"this {type(source).__name__} has no weights.\nIf they are sharded: {_GATHER}")
    return {name: _plain(name, tensor) for name, tensor in _of_the_model(given, names)}


def _of_mapping(source: Any) -> Mapping[str, Any]:
    """Return the tensors of a state dict or a tensordict, with names without wrappers."""
    given = dict(source.flatten_keys(".").items()) if isinstance(source, TensorDictBase) else source
    if not isinstance(given, Mapping):
        raise WeightsError(f"expected a state dict, a tensordict or a module, got {type(source).__name__}")
    plain = {_without_wrappers(str(name)): tensor for name, tensor in given.items()}
    if len(plain) < len(given):
        raise WeightsError(
            "the state dict has the same weights twice: with and without the name of a wrapper"
        )
    for name in plain:
        if name.startswith("base_model.model.") or ".base_layer." in name or ".lora_" in name:
            raise WeightsError(
                f"{name} is a name of a PEFT model: pass merge_and_unload().state_dict(), or the PEFT model "
                "itself after merge_adapter(). A state dict does not show whether its adapters are merged"
            )
    return plain


def _of_module(source: torch.nn.Module, names: Collection[str]) -> Mapping[str, Any]:
    """Return the state dict of the model inside a module, with names that may begin with a prefix."""
    holders = dict(_holders(source)) or {"": source}
    states = {path: _named_tensors(holder) for path, holder in holders.items()}
    if len(states) > 1:
        states = {p: state for p, state in states.items() if _has_head(holders[p]) and _has_all(state, names)}
        if len(states) != 1:
            found = ", ".join(
                f"{path} ({type(_inside(holder)).__name__})" for path, holder in holders.items()
            )
            raise WeightsError(
                f"{type(source).__name__} holds {len(holders)} models, of which {len(states)} have the names "
                f"of the engine's model: {found}. Push one of them"
            )
    ((path, state),) = states.items()
    _refuse_what_is_not_whole(source, holders[path])
    return {**state, **_merged_weights(holders[path])}


def _has_head(holder: torch.nn.Module) -> bool:
    models = (module for module in holder.modules() if isinstance(module, transformers.PreTrainedModel))
    # A critic may have the names of a policy with tied weights, but has no LM head.
    return any(model.get_output_embeddings() is not None for model in models)


def _holders(
    module: torch.nn.Module, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the path and module of each transformers model inside, once.

    A model in FSDP1 comes with its outermost wrapper, because only this wrapper can gather the tensors.
    """
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    is_sharded = isinstance(module, FullyShardedDataParallel)
    if any(
        isinstance(part, transformers.PreTrainedModel)
        for part in (module.modules() if is_sharded else [module])
    ):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _holders(child, f"{path}.{name}".lstrip("."), seen)


def _named_tensors(holder: torch.nn.Module) -> dict[str, Any]:
    """Return a module's state dict, with the names that its layers have without PEFT's wrappers."""
    if shards := [module for module in holder.modules() if isinstance(module, FullyShardedDataParallel)]:
        # torch 2.13 offloads a CPU tensor wrongly: it frees the tensor before the copy
        # (_unshard_fsdp_state_params).
        is_elsewhere = shards[0].compute_device.type != "cpu"
        whole = FullStateDictConfig(offload_to_cpu=is_elsewhere, rank0_only=False)
        with warnings.catch_warnings():
            # torch 2.13 deprecates state_dict_type; its replacement gathers on the device, or for rank 0
            # only.
            warnings.simplefilter("ignore", FutureWarning)
            with FullyShardedDataParallel.state_dict_type(holder, StateDictType.FULL_STATE_DICT, whole):
                state = holder.state_dict()
    else:
        state = holder.state_dict()
    names = {name: _served_name(holder, _without_wrappers(name)) for name in state}
    return {new: state[name] for name, new in names.items() if new is not None}


def _served_name(module: torch.nn.Module | None, name: str) -> str | None:
    """Return a tensor's name without PEFT's wrappers; ``None`` if the model does not use the tensor."""
    kept, due = [], []
    for part in name.split("."):
        module = None if module is None else _inside(module)
        due = due or _served_child(module)
        if not due:
            kept.append(part)
        elif part != due.pop(0):
            return None
        module = None if module is None else module._modules.get(part)
    return ".".join(kept)


def _served_child(module: torch.nn.Module | None) -> list[str]:
    """Return the path to the base weights of a PEFT layer; empty if the module is no PEFT layer."""
    children = {} if module is None else module._modules
    if "base_layer" in children and hasattr(module, "merged"):
        return ["base_layer"]
    if "token_adapter" in children and hasattr(module, "active_adapters"):
        return ["token_adapter"]
    if "modules_to_save" in children and "original_module" in children:
        active = [adapter for adapter in module.active_adapters if adapter in children["modules_to_save"]]
        return (
            ["original_module"] if module.disable_adapters or not active else ["modules_to_save", active[0]]
        )
    return []


def _inside(module: torch.nn.Module) -> torch.nn.Module:
    for wrapper in _WRAPPERS:
        if module._modules.get(wrapper) is not None:
            return _inside(module._modules[wrapper])
    return module


def _refuse_what_is_not_whole(source: torch.nn.Module, holder: torch.nn.Module) -> None:
    for module in source.modules():
        if getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False):
            raise WeightsError(
                f"{type(module).__name__} puts learned prompts (PEFT) before every text, which weights alone "
                "cannot do. Use LoRA, or score with the model itself"
            )
    is_flat = any(isinstance(module, FullyShardedDataParallel) for module in holder.modules())
    for name, module in holder.named_modules():
        if _served_child(module) == ["base_layer"] and (state := _unserved_state(module, is_flat=is_flat)):
            raise WeightsError(
                f"{name}: its adapter (PEFT's {type(module).__name__}) is {state}. {_UNMERGED}"
            )
        if (quantizer := getattr(module, "hf_quantizer", None)) is not None:
            raise WeightsError(
                f"{type(module).__name__} is quantised ({type(quantizer).__name__}). {_DEQUANTIZE}"
            )
    for name, parameter in holder.named_parameters():
        if hasattr(parameter, "ds_id") and not parameter.numel():
            raise WeightsError(
                f"{name} is empty here: DeepSpeed's ZeRO-3 splits it over all ranks. Push inside `with "
                "deepspeed.zero.GatheredParameters(list(model.parameters())):`, which every rank must enter"
            )


def _unserved_state(layer: Any, *, is_flat: bool) -> str:
    """Return why the output of a PEFT layer is not that of a plain layer; ``""`` if it is.

    Args:
        layer: the PEFT layer.
        is_flat: FSDP1 holds the layer's weights in a flat tensor, so they cannot be merged here.
    """
    if layer.merged:
        return "switched off while merged" if layer.disable_adapters else ""
    adapters = _adapters_in_use(layer)
    if layer.disable_adapters or not adapters or (not is_flat and _is_plain_lora(layer, adapters)):
        return ""
    return "not merged"


def _merged_weights(holder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the merged weight of each LoRA layer whose adapters are not merged; the model stays as it is."""
    found = {}
    for path, layer in holder.named_modules(remove_duplicate=False):
        if _served_child(layer) == ["base_layer"] and not layer.merged and not layer.disable_adapters:
            name = _served_name(holder, _without_wrappers(f"{path}.base_layer.weight"))
            if name is not None and (adapters := _adapters_in_use(layer)):
                found[name] = _merged_weight(layer, adapters)
    return found


@torch.no_grad()
def _merged_weight(layer: Any, adapters: list[str]) -> torch.Tensor:
    weight = layer.get_base_layer().weight.detach().clone()
    for adapter in adapters:
        weight += layer.get_delta_weight(adapter)  # as PEFT merges: rounded to the base's dtype each time
    # The device need not have room for a second model.
    return weight if isinstance(weight, DTensor) else weight.cpu()


def _adapters_in_use(layer: Any) -> list[str]:
    """Return the active adapters of a PEFT layer that have weights in it, in the order of merging."""
    held = {adapter for part in layer.adapter_layer_names for adapter in getattr(layer, part)}
    return [adapter for adapter in layer.active_adapters if adapter in held]


def _is_plain_lora(layer: Any, adapters: list[str]) -> bool:
    """Whether the layer computes with its base weight plus PEFT's ``get_delta_weight`` of each adapter."""
    # PEFT's layers for quantised weights derive from Linear: only the class itself will do. lora_variant has
    # the adapters with another formula, such as DoRA's (peft 0.16 and later).
    return (
        f"{type(layer).__module__}.{type(layer).__name__}" in _PLAIN_LORA
        and layer.get_base_layer().weight.dtype in _FLOATS
        and not any(layer.lora_bias.get(adapter) for adapter in adapters)
        and set(adapters).isdisjoint(getattr(layer, "lora_variant", adapters))
    )


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefixes(given: Collection[str], names: Collection[str]) -> list[str]:
    """Return the prefixes under which ``given`` has all ``names``.

    If there is none: the prefix that has most of them, or ``""``.
    """
    count: Counter[str] = Counter()
    for name in given:
        starts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        count.update(name[:start] for start in starts if name[start:] in names)
    return (
        [prefix for prefix, n in count.items() if n == len(names)]
        or [p for p, _ in count.most_common(1)]
        or [""]
    )


def _has_all(given: Collection[str], names: Collection[str]) -> bool:
    return all(prefix + name in given for prefix in _prefixes(given, names) for name in names)


def _of_the_model(given: Mapping[str, Any], names: Collection[str]) -> list[tuple[str, Any]]:
    """Return the tensors under the model's prefix (for DDP ``module.``), with names without the prefix.

    Other tensors, such as those of a value head, have another prefix.
    """
    prefixes = _prefixes(given, names)
    if len(prefixes) > 1:
        raise WeightsError(
            f"the state dict has the weights of {len(prefixes)} models, under "
            f"{', '.join(repr(p) for p in prefixes)}. Push one of them"
        )
    (prefix,) = prefixes
    inside = [
        (name.removeprefix(prefix), tensor) for name, tensor in given.items() if name.startswith(prefix)
    ]
    # trl's AutoModelForCausalLMWithValueHead.state_dict() gives its head no other prefix. A module's
    # get_extra_state() is not a weight.
    return [
        (n, tensor) for n, tensor in inside if not (n.startswith("v_head.") or n.endswith("_extra_state"))
    ]


def _plain(name: str, tensor: Any) -> torch.Tensor:
    """Return a tensor gathered and detached.

    Raises:
        WeightsError: the tensor is quantised, empty, sharded in a way that cannot be gathered, or on the meta
            device.
    """
    if not isinstance(tensor, torch.Tensor):
        cure = f". Pass the part under {name!r}" if isinstance(tensor, Mapping) else ""
        raise WeightsError(f"{name}: expected a tensor, got {type(tensor).__name__}{cure}")
    if isinstance(tensor, DTensor):
        # With CPU offload FSDP2 keeps the shards on the CPU, but only the mesh's own backend can gather them.
        # The gathered tensor goes to the CPU: the device has room for a shard of each tensor, not for the
        # whole model.
        tensor = tensor.detach().to(tensor.device_mesh.device_type).full_tensor().cpu()
    kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
    if hasattr(tensor, "local_shards"):
        raise WeightsError(f"{name} is a {kind}: it has the shards of one rank only.\n{_GATHER}")
    if tensor.is_meta:
        raise WeightsError(
            f"{name} is on the meta device: it has no numbers. accelerate puts offloaded weights there "
            "(device_map): load the model without offload"
        )
    if type(tensor).__torch_dispatch__ != torch.Tensor.__torch_dispatch__:
        raise WeightsError(f"{name} is a {kind}: no plain tensor, and probably quantised. {_DEQUANTIZE}")
    if tensor.layout is not torch.strided:
        raise WeightsError(f"{name} is a tensor of layout {tensor.layout}: pass a dense one")
    if tensor.dtype not in _FLOATS + _COUNTS:
        raise WeightsError(f"{name} is quantised ({kind}, {tensor.dtype}). {_DEQUANTIZE}")
    if not tensor.numel():
        raise WeightsError(
            f"{name} is empty (shape {list(tensor.shape)}): with FSDP and DeepSpeed's ZeRO-3 its numbers are "
            "on other ranks.\n"
            f"FSDP: {_GATHER}. ZeRO-3: make the state dict inside deepspeed.zero.GatheredParameters"
        )
    return tensor.detach()
