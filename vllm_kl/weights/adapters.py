"""Loads LoRA adapters into a live engine, and refuses those that the engine would score wrongly.

vLLM 0.32 returns wrong log-probs in three cases, without an error:

- The LM head is wrapped for LoRA. It then applies one adapter slot per *sampled* row, but prompt log-probs
  have many rows per request.
- The adapter has weights for a module that the engine did not wrap (``lora_target_modules``). vLLM leaves
  them out.
- Two adapters have the same ``lora_int_id``, or an adapter's file was written again. vLLM uses the weights
  that it loaded first.

The workers say which modules they wrapped (:mod:`vllm_kl.plugin.lora_modules`), and the files of the adapter
say which modules it has. This module loads the adapter before a request needs it, because a load that fails
during a request ends vLLM's engine. It remembers for each engine and id which files it loaded. It does not
compare the engine's weights with the files, so it does not notice a later load by another program under the
same id.

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
from vllm_kl.weights.live_weights import lock_of
from vllm_kl.weights.loading import Call, run_sync


class _Adapter(NamedTuple):
    """The contents of an adapter's files."""

    rank: int  # the largest rank of all modules
    modules: list[str]  # whole names
    files: tuple[str, ...]  # folder, sizes and times: they change when the adapter is written again


# Engine -> the adapter's id -> the files that were loaded here.
_LOADED: weakref.WeakKeyDictionary[Any, dict[int, tuple[str, ...]]] = weakref.WeakKeyDictionary()


def check_adapter(llm_engine: Any, lora_request: Any) -> None:
    """Run :func:`check` on an ``LLMEngine``."""
    with lock_of(llm_engine):
        run_sync(check(llm_engine, _calls(llm_engine), lora_request))


def load_adapter(llm_engine: Any, lora_request: Any) -> None:
    """Run :func:`load` on an ``LLMEngine``."""
    with lock_of(llm_engine):
        run_sync(load(llm_engine, _calls(llm_engine), lora_request))


def _calls(llm_engine: Any) -> Call:
    async def call(method: str, *args: Any) -> Any:
        return getattr(llm_engine, method)(*args)

    return call


async def check(engine: Any, call: Call, lora_request: Any) -> None:
    """Refuse a shared engine whose prompt log-probs would be wrong; load the adapter, if there is one.

    Args:
        engine: an ``LLMEngine`` or an ``AsyncLLM``.
        call: calls a method of the engine.
        lora_request: a ``LoRARequest``, or ``None`` for the base model.

    Raises:
        ReadoutUnavailableError: the engine takes no adapters, or cannot be asked; or vLLM has wrapped its LM
            head for adapters, which makes the prompt log-probs of the base model wrong too.
        WeightsError: as in :func:`load`.
    """
    config = engine.vllm_config.lora_config
    if config is None and lora_request is not None:
        raise ReadoutUnavailableError(
            f"{describe(lora_request)} cannot be scored: the engine was made without enable_lora=True. Make "
            "it with enable_lora=True, max_lora_rank=... and lora_target_modules=[...] without 'lm_head'"
        )
    if config is None:
        return
    if config.target_modules is None or any(_last_name(name) == "lm_head" for name in config.target_modules):
        names = {_last_name(module) for module in await _wrapped_modules(call)}
        if "lm_head" in names:
            raise ReadoutUnavailableError(
                "this engine's LM head is wrapped for LoRA: vLLM 0.32 then computes prompt log-probs with "
                "the adapters of other rows, or fails, also for the base model.\n"
                "Make the engine with enable_lora=True and "
                f"lora_target_modules={sorted(names - {'lm_head'})}"
            )
    if lora_request is not None:
        await load(engine, call, lora_request)


async def load(engine: Any, call: Call, lora_request: Any) -> None:
    """Load an adapter, unless it is loaded; refuse it if the engine would not use all of its weights.

    Raises:
        WeightsError: the adapter cannot be read or loaded; it has weights that the engine leaves out, or
            weights for the LM head; or other weights, or unknown ones, are loaded under its id.
        ReadoutUnavailableError: the engine cannot be asked.
    """
    name, int_id = describe(lora_request), lora_request.lora_int_id
    adapter = _read(lora_request)
    wrapped = {_place(module) for module in await _wrapped_modules(call)}
    if left_out := [module for module in adapter.modules if _place(module) not in wrapped]:
        names = ", ".join(sorted({_last_name(module) for module in left_out}))
        raise WeightsError(
            f"{name} has weights that the engine would leave out without an error: {left_out[0]}, "
            f"{len(left_out)} in all ({names}).\n"
            "Make the engine with lora_target_modules that name these modules and not 'lm_head'. An adapter "
            "of another model cannot be used"
        )
    loaded = _LOADED.setdefault(engine, {})
    if int_id not in await call("list_loras"):
        await _load(call, lora_request)
        loaded[int_id] = adapter.files
    if loaded.get(int_id) != adapter.files:
        is_not = "is not" if int_id in loaded else "was not loaded here first, and may not be"
        raise WeightsError(
            f"{name} {is_not} the adapter that the engine has under id {int_id}: vLLM keeps the adapter that "
            "was loaded first.\n"
            "Give each adapter its own lora_int_id. If the adapter's file was written again, drop the old "
            f"adapter and its KV: llm.llm_engine.remove_lora({int_id}); assert llm.reset_prefix_cache()"
        )


async def _load(call: Call, lora_request: Any) -> None:
    try:
        await call("add_lora", lora_request)
    except Exception as error:
        with contextlib.suppress(Exception):  # vLLM counts an adapter as loaded if its load failed halfway
            await call("remove_lora", lora_request.lora_int_id)
        raise WeightsError(f"{describe(lora_request)} cannot be loaded: {error}") from error


def describe(lora_request: Any) -> str:
    """Return an adapter's name for messages."""
    return f"adapter {lora_request.lora_name!r} (id {lora_request.lora_int_id}, {lora_request.lora_path})"


def identity(lora_request: Any) -> tuple[str, int, str] | None:
    """Return the name, id and path of an adapter: equal for two requests of one adapter.

    vLLM's own ``==`` compares the name only.
    """
    return (
        None
        if lora_request is None
        else (lora_request.lora_name, lora_request.lora_int_id, lora_request.lora_path)
    )


def lora_options(lora_request: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Complete the options of a scorer's own engine with the rank and modules of this adapter.

    Raises:
        OptionError: ``enable_lora=False`` together with an adapter.
        WeightsError: the adapter's files cannot be read, have no weights, or have weights for the LM head.
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
    """Read the files of an adapter.

    Raises:
        WeightsError: the files cannot be read, have no weights, or have weights for the LM head.
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
    except Exception as error:  # safetensors and pickle raise errors of their own
        raise WeightsError(
            f"{name} cannot be read: {type(error).__name__}: {error}. Expected a folder with "
            "adapter_config.json and adapter_model.safetensors"
        ) from error
    if not modules:
        raise WeightsError(f"{name} has no weights")
    if heads := [module for module in sorted(modules) if _last_name(module) == "lm_head"]:
        raise WeightsError(
            f"{name} has weights for the LM head ({', '.join(heads)}): vLLM 0.32 cannot apply them to prompt "
            "tokens. Train the adapter without lm_head in target_modules, or merge it (merge_and_unload) "
            "and score the merged checkpoint"
        )
    return _Adapter(
        rank, sorted(modules), (str(folder), *(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats))
    )


def _weights_in(folder: Path) -> tuple[Path, list[str]]:
    """Return an adapter's file of weights, and the names of its tensors."""
    from safetensors import safe_open

    if (file := folder / "adapter_model.safetensors").exists():
        with safe_open(file, framework="pt") as opened:
            return file, list(opened.keys())
    file = next((f for f in (folder / "adapter_model.bin", folder / "adapter_model.pt") if f.exists()), file)
    return file, list(torch.load(file, map_location="meta", weights_only=True))


def _last_name(module: str) -> str:
    """Return a module's name in ``lora_target_modules``; all experts of a layer are one module."""
    return "experts" if ".experts" in module else module.rpartition(".")[2]


def _place(module: str) -> tuple[str, str]:
    """Return a module's layer and last name.

    The rest of the name is not the same in an adapter's file and in vLLM's model.
    """
    return next((part for part in module.split(".") if part.isdigit()), ""), _last_name(module)


async def _wrapped_modules(call: Call) -> list[str]:
    """Return the modules that the engine wrapped for LoRA, with the names that adapters use."""
    from vllm_kl.plugin.lora_modules import MODULES

    try:
        answers = await call("collective_rpc", MODULES)
    except Exception as error:
        # An engine in another process sends its error as text.
        if f"Method {MODULES!r} is not implemented" not in str(error):
            raise
        raise ReadoutUnavailableError(
            "this engine cannot say whether its LM head is wrapped for LoRA: its processes have not loaded "
            "the plugin vllm_kl. Make the engine where VLLM_PLUGINS is not set, or names vllm_kl"
        ) from error
    return [module for answer in answers for module in answer]
