"""LoRA adapters of a live engine: what would be scored wrongly without a sign of it is refused before anything is scored.

Workers are asked (:mod:`vllm_kl.plugin.adapters`), because what they serve is known nowhere else, and because an adapter that
cannot be loaded ends vLLM's engine if a request is the first to ask for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_kl.engines.weights import lock_of
from vllm_kl.errors import OptionError, ReadoutUnavailableError, WeightsError

_PLUGIN = "vllm_kl's plugin is not loaded in the engine's processes: VLLM_PLUGINS, where it is set, must name vllm_kl"


def check_adapter(llm_engine: Any, lora_request: Any) -> None:
    """Refuse an engine that generates, or an adapter on it, whose prompt log-probs would be wrong.

    Args:
        llm_engine: an ``LLMEngine``.
        lora_request: a ``LoRARequest``, or ``None`` for the base model.

    Raises:
        ReadoutUnavailableError: the engine takes no adapters; or its LM head is wrapped for them, which spoils the base
            model's prompt log-probs too.
        WeightsError: as :func:`check_weights`.
    """
    config = llm_engine.vllm_config.lora_config
    check_enabled(config is not None, lora_request)
    if config is None:
        return
    if is_head_targeted(config.target_modules):
        _check_head(llm_engine)
    if lora_request is not None:
        check_weights(llm_engine, lora_request)


def check_weights(llm_engine: Any, lora_request: Any) -> None:
    """Refuse an adapter that the engine would not serve as it is written.

    Raises:
        WeightsError: it cannot be loaded; it has weights that the engine leaves out, or for the LM head; another one is loaded
            under its id.
        ReadoutUnavailableError: the engine cannot be asked.
    """
    from vllm_kl.plugin.adapters import ADAPTER

    name = describe(lora_request)
    args = (lora_request.lora_name, lora_request.lora_int_id, lora_request.lora_path)
    try:
        answers = _ask(llm_engine, ADAPTER, *args)
    except Exception as error:
        if _is_unknown(error, ADAPTER):
            raise ReadoutUnavailableError(f"{name} cannot be checked: {_PLUGIN}") from error
        raise WeightsError(
            f"{name} cannot be loaded: {error}. The path must be a folder with adapter_config.json and "
            "adapter_model.safetensors that the engine's processes can read, its rank at most max_lora_rank"
        ) from error
    served = {module for modules, _, _ in answers for module in modules}
    written = {module for _, modules, _ in answers for module in modules}
    if heads := sorted(module for module in written if module.rpartition(".")[2] == "lm_head"):
        raise WeightsError(
            f"{name} has weights for the LM head ({', '.join(heads)}): vLLM 0.32 cannot apply them to prompt tokens. Train it "
            "without lm_head in target_modules, or merge it (merge_and_unload) and score the merged checkpoint"
        )
    if left_out := sorted(written - served):
        raise WeightsError(
            f"{name} has weights that the engine would leave out without a word: {_some(left_out)}. Make the engine with "
            "lora_target_modules that name them, or without lora_target_modules if its LM head stays out"
        )
    if not all(is_same for _, _, is_same in answers):
        raise WeightsError(
            f"{name} is not what the engine serves under id {lora_request.lora_int_id}: vLLM keeps what was loaded first. Give "
            "each adapter a lora_int_id of its own; where its file was written again, load it anew and drop the KV of the old: "
            "llm.llm_engine.add_lora(LoRARequest(name, id, path, load_inplace=True)); assert llm.reset_prefix_cache()"
        )


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
    return None if lora_request is None else (lora_request.lora_name, lora_request.lora_int_id, lora_request.lora_path)


def lora_options(lora_request: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return an owned engine's options with what this adapter needs: its rank, its modules, one slot.

    Raises:
        OptionError: ``enable_lora=False`` beside an adapter.
        WeightsError: the adapter's files cannot be read.
    """
    if lora_request is None:
        return options
    if options.get("enable_lora") is False:
        raise OptionError("lora_request has no effect with enable_lora=False: leave one of them out")
    defaults: dict[str, Any] = {"enable_lora": True}
    try:
        rank, modules = _read(lora_request.lora_path)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{describe(lora_request)} cannot be read: {error}. Expected a folder with adapter_config.json and "
            "adapter_model.safetensors"
        ) from error
    defaults["max_lora_rank"] = _max_rank(rank)
    if targets := sorted(modules - {"lm_head"}):  # an adapter of the head is refused when the engine is asked
        defaults["lora_target_modules"] = targets
    return {**defaults, **options}


def _read(lora_path: str) -> tuple[int, set[str]]:
    """Return an adapter's largest rank, and the last names of its modules (empty if its tensors are not safetensors)."""
    import json

    from safetensors import safe_open
    from vllm.lora.utils import get_adapter_absolute_path

    folder = Path(get_adapter_absolute_path(lora_path))
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = max([int(config.get("r", 0)), *map(int, (config.get("rank_pattern") or {}).values())])
    modules: set[str] = set()
    if (weights := folder / "adapter_model.safetensors").exists():
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():
                # base_model.model.model.layers.0.mlp.up_proj.lora_A.weight, ...embed_tokens.lora_embedding_A
                module = key.partition(".lora_")[0]
                modules.add("experts" if ".experts" in module else module.rpartition(".")[2])
    return rank, modules


def _max_rank(rank: int) -> int:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    return min((allowed for allowed in get_args(MaxLoRARanks) if allowed >= rank), default=max(get_args(MaxLoRARanks)))


def _check_head(llm_engine: Any) -> None:
    from vllm_kl.plugin.adapters import MODULES

    try:
        answers = _ask(llm_engine, MODULES)
    except Exception as error:
        if not _is_unknown(error, MODULES):
            raise
        raise ReadoutUnavailableError(
            f"whether this engine's LM head is wrapped for LoRA cannot be asked: {_PLUGIN}. Or make the engine with "
            "lora_target_modules that do not name 'lm_head'"
        ) from error
    if any(heads for heads, _ in answers):
        raise _head_error("is", str(sorted({name for _, names in answers for name in names})))


def _ask(llm_engine: Any, method: str, *args: Any) -> list[Any]:
    with lock_of(llm_engine):
        return llm_engine.collective_rpc(method, args=args)


def _is_unknown(error: Exception, method: str) -> bool:
    """Whether workers do not have the method. From a process of the engine's own the error comes as a text."""
    return f"Method {method!r} is not implemented" in str(error)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} others" if len(names) > most else "")
