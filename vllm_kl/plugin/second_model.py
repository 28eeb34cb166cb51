"""Loads a second model in a worker, from a checkpoint, by the code that loads a model at an engine's start.

vLLM's own ``reload_weights`` (0.32) loads into the live layers instead, and silently leaves some of them
wrong. On a CPU it leaves experts in the checkpoint's layout instead of the packed one. It loses tensors that
a model writes with ``copy_``. It does not update tensors that were made of a weight at the start (the packed
product of a tied head, MLA's ``W_UK_T``). A new model has none of these errors, and its load does not change
the serving model.

:mod:`vllm_kl.plugin.missing_weights` checks that every parameter got weights. A checkpoint for a quantised
engine must have the tensors of the engine's own checkpoint, with the same kinds of numbers. Otherwise vLLM
would copy numbers that were never quantised into 8 bits, and keep old scales where the new ones are missing.

Source: ``BaseModelLoader.load_model``, ``model_executor/model_loader/base_loader.py``, vLLM 0.32.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_kl.plugin.missing_weights import refusing_missing_weights

Sent = Iterator[tuple[str, torch.Tensor]]


class CannotLoadBesideError(RuntimeError):
    """This process cannot make a second model. A new engine may be able to load the weights."""


def load_second_model(worker: Any, folder: str | None, sent: Sent | None = None) -> torch.nn.Module:
    """Return a model with the weights of a folder, in the layout that the worker's kernels use.

    Args:
        worker: vLLM's worker. Its model goes on serving unchanged.
        folder: of safetensors files; ``None``: the checkpoint that the engine was started with.
        sent: yields names and tensors, which are taken instead of those of files.

    Raises:
        CannotLoadBesideError: the model could not be made, or its weights could not be brought into the
            layout.
        ValueError: a parameter got no weights, or the folder is not quantised as the engine's checkpoint is.
            The message names a parameter.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    first = worker.vllm_config.model_config
    if folder is not None and quantization_of(first.hf_config):
        _check_format(Path(folder), first.model)
    config = _config_of_a_second_model(worker.vllm_config, folder, is_sent=sent is not None)
    _choose_device(config, worker)
    loader = get_model_loader(config.load_config)
    if sent is not None:
        loader.get_all_weights = lambda model_config, model: sent
    load_weights = refusing_missing_weights(type(loader).load_weights)

    def load_or_explain(model: torch.nn.Module, model_config: Any) -> None:
        try:
            load_weights(loader, model, model_config)
        except Exception as error:
            reason = _explain(error, folder, first.model)
            raise _LoadError(ValueError(reason) if reason else error) from error

    loader.load_weights = load_or_explain
    try:
        with set_current_vllm_config(config), _rotary_embeddings_of_its_own():
            return loader.load_model(vllm_config=config, model_config=config.model_config)
    except _LoadError as error:
        raise error.args[0] from None
    except Exception as error:
        raise CannotLoadBesideError(f"{type(error).__name__}: {error}") from error


def quantization_of(config: Any) -> str:
    """Return how a model's checkpoint is quantised; empty if it is not."""
    for part in (config, config.get_text_config()):
        # compression_config: older compressed-tensors
        for name in ("quantization_config", "compression_config"):
            if settings := getattr(part, name, None):
                settings = settings if isinstance(settings, dict) else settings.to_dict()
                return str(settings.get("quant_method") or "its configuration does not say how")
    return ""


class _LoadError(Exception):
    """Marks an error of ``load_weights``, to tell it from an error while the model is made."""


def _check_format(folder: Path, model: str) -> None:
    """Refuse a folder that lacks tensors of the engine's checkpoint, or has other kinds of numbers in them.

    Args:
        folder: the new checkpoint.
        model: path or name of the engine's model, whose files are on this machine.
    """
    found = _tensors(folder)
    for name, (kind, _) in _tensors(_folder_of(model)).items():
        here = found[name][0] if name in found else "missing"
        if here != kind:
            raise ValueError(
                "the engine's checkpoint is quantised, and these weights are not quantised in the same way: "
                f"{name} is {kind} in the engine's checkpoint, and {here} here"
            )


def _explain(error: Exception, folder: str | None, model: str) -> str:
    """Return a better message for a loader's error (vLLM asserts shapes without a text), or ""."""
    with contextlib.suppress(Exception):  # if the folder is damaged, the first error says so
        own = {} if folder is None else _tensors(_folder_of(model))
        for name, (_, shape) in (_tensors(Path(folder)) if own else {}).items():
            if name in own and shape != own[name][1]:
                return f"{name} has shape {shape}, and {own[name][1]} in the engine's checkpoint"
    return "" if str(error) else type(error).__name__


def _folder_of(model: str) -> Path:
    from transformers.utils import cached_file

    # Without a network, a question to the hub is repeated for 20 s.
    return Path(cached_file(model, "config.json", local_files_only=True)).parent


def _tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of each tensor of a checkpoint; "a float" for dtypes of 16 bits and more."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                kind = part.get_dtype()
                found[name] = ("a float" if kind in ("F64", "F32", "F16", "BF16") else kind, part.get_shape())
    return found


def _config_of_a_second_model(first: Any, folder: str | None, *, is_sent: bool) -> Any:
    """Return the engine's config with another folder, and with new, empty registers of layers."""
    config = copy.copy(first)
    config.compilation_config = copy.copy(first.compilation_config)
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    config.compilation_config.enabled_custom_ops = Counter()
    config.compilation_config.disabled_custom_ops = Counter()
    config.load_config = copy.copy(first.load_config)
    if folder is not None:
        config.model_config = copy.copy(first.model_config)
        config.model_config.model = folder
        config.model_config.model_weights = ""
        config.model_config.revision = None
    if folder is not None or is_sent:
        config.load_config.load_format = "hf"  # safetensors files or, where there are none, .bin files
        config.load_config.model_loader_extra_config = {}
    return config


@contextlib.contextmanager
def _rotary_embeddings_of_its_own() -> Iterator[None]:
    """Make new rotary embeddings. vLLM shares them among engines, also among those of other lengths."""
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    shared = dict(_ROPE_DICT)
    _ROPE_DICT.clear()
    try:
        yield
    finally:
        _ROPE_DICT.clear()
        _ROPE_DICT.update(shared)


def _choose_device(config: Any, worker: Any) -> None:
    """Load into the host's memory if the GPU has no room for a second model."""
    if worker.device.type == "cpu" or config.load_config.device is not None:
        return
    size_bytes = sum(p.numel() * p.element_size() for p in worker.model_runner.get_model().parameters())
    free, _ = torch.accelerator.get_memory_info(worker.device)
    if free < 1.1 * size_bytes:
        config.load_config.device = "cpu"
