"""LoRA adapters of a live engine: what would be scored wrongly without a sign of it is refused before anything is scored.

vLLM 0.32 serves three things without a word, and other log-probs than those that were asked for:

- An LM head that is wrapped for LoRA applies one adapter slot per *sampled* row; prompt log-probs have many rows a request.
- An adapter's weights for a module that the engine did not wrap (``lora_target_modules``) are left out.
- Of two adapters with one ``lora_int_id`` the one that was loaded first serves for both. So does an adapter whose file was
  written again.

Workers say which modules they wrapped (:mod:`vllm_kl.plugin.adapters`), an adapter's files which it has. It is loaded here, because
one that cannot be loaded ends vLLM's engine if a request is the first to ask for it; from which files is kept for each engine and
id. The weights in the engine are not compared with the files: what others load under an id later is not seen here.

Source: ``lora/worker_manager.py``, ``lora/model_manager.py``, ``lora/layers/logits_processor.py``, vLLM 0.32.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from vllm_kl.errors import OptionError, ReadoutUnavailableError, WeightsError
from vllm_kl.weights.live import lock_of


class _Adapter(NamedTuple):
    """What the files of an adapter tell."""

    rank: int  # the largest
    modules: list[str]  # whole names
    files: tuple[str, ...]  # folder, sizes and times: others when it was written again


# By engine and id: the files of what was loaded here.
_LOADED: weakref.WeakKeyDictionary[Any, dict[int, tuple[str, ...]]] = weakref.WeakKeyDictionary()


def check_adapter(llm_engine: Any, lora_request: Any) -> None:
    """Refuse an engine that generates, or an adapter on it, whose prompt log-probs would be wrong.

    Args:
        llm_engine: an ``LLMEngine``.
        lora_request: a ``LoRARequest``, or ``None`` for the base model.

    Raises:
        ReadoutUnavailableError: the engine takes no adapters, or cannot be asked; or its LM head is wrapped for them, which
            spoils the base model's prompt log-probs too.
        WeightsError: as :func:`load_adapter`.
    """
    config = llm_engine.vllm_config.lora_config
    check_enabled(config is not None, lora_request)
    if config is None:
        return
    if is_head_targeted(config.target_modules):
        names = {_last_name(module) for module in _wrapped_modules(llm_engine)}
        if "lm_head" in names:
            raise _head_error("is", str(sorted(names - {"lm_head"})))
    if lora_request is not None:
        load_adapter(llm_engine, lora_request)


def load_adapter(llm_engine: Any, lora_request: Any) -> None:
    """Load an adapter, unless it is; refuse one that the engine would not serve as it is written.

    Raises:
        WeightsError: it cannot be read or loaded; it has weights that the engine leaves out, or for the LM head; under its id
            something else is loaded, or nobody knows what.
        ReadoutUnavailableError: the engine cannot be asked.
    """
    name, int_id = describe(lora_request), lora_request.lora_int_id
    adapter = _read(lora_request)
    wrapped = {_place(module) for module in _wrapped_modules(llm_engine)}
    if left_out := [module for module in adapter.modules if _place(module) not in wrapped]:
        names = ", ".join(sorted({_last_name(module) for module in left_out}))
        raise WeightsError(
            f"{name} has weights that the engine would leave out without a word: {left_out[0]}, {len(left_out)} in all ({names}). "
            "Make the engine with lora_target_modules that name them, or without lora_target_modules if its LM head stays out; an "
            "adapter of another model cannot be served"
        )
    with lock_of(llm_engine):
        loaded = _LOADED.setdefault(llm_engine, {})
        if int_id not in llm_engine.list_loras():
            _load(llm_engine, lora_request)
            loaded[int_id] = adapter.files
    if loaded.get(int_id) != adapter.files:
        is_not = "is not" if int_id in loaded else "was not loaded here first, and may not be"
        raise WeightsError(
            f"{name} {is_not} what the engine serves under id {int_id}: vLLM keeps what was loaded first. Give each adapter a "
            "lora_int_id of its own; where its file was written again, drop the old one and its KV: "
            f"llm.llm_engine.remove_lora({int_id}); assert llm.reset_prefix_cache()"
        )


def _load(llm_engine: Any, lora_request: Any) -> None:
    try:
        llm_engine.add_lora(lora_request)
    except Exception as error:
        with contextlib.suppress(Exception):
            llm_engine.remove_lora(lora_request.lora_int_id)  # what failed half-way counts as loaded
        raise WeightsError(f"{describe(lora_request)} cannot be loaded: {error}") from error


def check_enabled(is_enabled: bool, lora_request: Any) -> None:
    """Refuse an adapter on an engine that takes none."""
    if lora_request is not None and not is_enabled:
        raise ReadoutUnavailableError(
            f"{describe(lora_request)} cannot be scored: the engine was made without enable_lora=True. Make it with "
            "enable_lora=True, max_lora_rank=... and lora_target_modules=[...] without 'lm_head'"
        )


def is_head_targeted(target_modules: list[str] | None) -> bool:
    """Return whether an LM head may be wrapped: all modules are, or it is named."""
    return target_modules is None or any(name.rpartition(".")[2] == "lm_head" for name in target_modules)


def check_engine_args(engine_args: Any, lora_request: Any) -> None:
    """As :func:`check_adapter`, for an engine whose workers cannot be asked from here: what may be wrong is refused."""
    check_enabled(engine_args.enable_lora, lora_request)
    if engine_args.enable_lora and is_head_targeted(engine_args.lora_target_modules):
        raise _head_error("may be", "[...] that does not name 'lm_head'")


def _head_error(is_wrapped: str, targets: str) -> ReadoutUnavailableError:
    return ReadoutUnavailableError(
        f"this engine's LM head {is_wrapped} wrapped for LoRA: vLLM 0.32 then computes prompt log-probs with the adapters of "
        f"other rows, or fails, for the base model too. Make the engine with enable_lora=True and lora_target_modules={targets}"
    )


def describe(lora_request: Any) -> str:
    """Return an adapter's name for messages."""
    return f"adapter {lora_request.lora_name!r} (id {lora_request.lora_int_id}, {lora_request.lora_path})"


def identity(lora_request: Any) -> tuple[str, int, str] | None:
    """Return what makes two requests ask for one adapter. vLLM's own ``==`` looks at the name only."""
    return (
        None
        if lora_request is None
        else (lora_request.lora_name, lora_request.lora_int_id, lora_request.lora_path)
    )


def lora_options(lora_request: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return an owned engine's options with what this adapter needs: its rank, its modules, one slot.

    Raises:
        OptionError: ``enable_lora=False`` beside an adapter.
        WeightsError: the adapter's files cannot be read; or hold no weights, or weights for the LM head.
    """
    from vllm.config.lora import MaxLoRARanks

    if lora_request is None:
        return options
    if options.get("enable_lora") is False:
        raise OptionError("lora_request has no effect with enable_lora=False: leave one of them out")
    adapter = _read(lora_request)
    ranks = get_args(MaxLoRARanks)
    return {
        "enable_lora": True,
        "max_lora_rank": min((rank for rank in ranks if rank >= adapter.rank), default=max(ranks)),
        "lora_target_modules": sorted({_last_name(module) for module in adapter.modules}),
        **options,
    }


def _read(lora_request: Any) -> _Adapter:
    """Return what the files of an adapter tell.

    Raises:
        WeightsError: they cannot be read; or hold no weights, or weights for the LM head.
    """
    from vllm.lora.utils import (
        get_adapter_absolute_path,
        is_base_embedding_weights,
        parse_fine_tuned_lora_name,
    )

    name = describe(lora_request)
    try:
        folder = Path(get_adapter_absolute_path(lora_request.lora_path)).resolve()
        config_file = folder / "adapter_config.json"
        config = json.loads(config_file.read_text())
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
        weights_file, keys = _weights_in(folder)
        modules = {parse_fine_tuned_lora_name(key)[0] for key in keys if not is_base_embedding_weights(key)}
        stats = [file.stat() for file in (config_file, weights_file)]
    except Exception as error:  # safetensors and pickles have errors of their own
        raise WeightsError(
            f"{name} cannot be read: {type(error).__name__}: {error}. Expected a folder with adapter_config.json and "
            "adapter_model.safetensors"
        ) from error
    if not modules:
        raise WeightsError(f"{name} has no weights")
    if heads := [module for module in sorted(modules) if _last_name(module) == "lm_head"]:
        raise WeightsError(
            f"{name} has weights for the LM head ({', '.join(heads)}): vLLM 0.32 cannot apply them to prompt tokens. Train it "
            "without lm_head in target_modules, or merge it (merge_and_unload) and score the merged checkpoint"
        )
    return _Adapter(
        rank, sorted(modules), (str(folder), *(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats))
    )


def _weights_in(folder: Path) -> tuple[Path, list[str]]:
    """Return an adapter's file of weights, and its tensors' names."""
    from safetensors import safe_open

    if (file := folder / "adapter_model.safetensors").exists():
        with safe_open(file, framework="pt") as opened:
            return file, list(opened.keys())
    file = next((f for f in (folder / "adapter_model.bin", folder / "adapter_model.pt") if f.exists()), file)
    return file, list(torch.load(file, map_location="meta", weights_only=True))


def _last_name(module: str) -> str:
    """Return what ``lora_target_modules`` calls a module; all experts of a layer are one."""
    return "experts" if ".experts" in module else module.rpartition(".")[2]


def _place(module: str) -> tuple[str, str]:
    """Return a module's layer and last name: what lies between is not the same in an adapter's file and in vLLM's model."""
    return next((part for part in module.split(".") if part.isdigit()), ""), _last_name(module)


def _wrapped_modules(llm_engine: Any) -> list[str]:
    """Return the modules that the engine wrapped for LoRA, under the names that adapters have for them."""
    from vllm_kl.plugin.adapters import MODULES

    try:
        with lock_of(llm_engine):
            answers = llm_engine.collective_rpc(MODULES)
    except Exception as error:
        # From a process of the engine's own the error comes as a text.
        if f"Method {MODULES!r} is not implemented" not in str(error):
            raise
        raise ReadoutUnavailableError(
            "whether this engine's LM head is wrapped for LoRA, and what else, cannot be asked: vllm_kl's plugin is not loaded in "
            "the engine's processes. VLLM_PLUGINS, where it is set, must name vllm_kl"
        ) from error
    return [module for answer in answers for module in answer]
