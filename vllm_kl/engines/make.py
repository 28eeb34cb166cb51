"""What a scorer was given -> the engine it scores with."""

from __future__ import annotations

import os
from typing import Any

from vllm_kl.engines.base import Engine
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.process import ProcessEngine
from vllm_kl.errors import OptionError, ReadoutUnavailableError
from vllm_kl.types import EngineInfo, ReadoutName


def make_engine(model: Any, readout: ReadoutName, engine_options: dict[str, Any], lora_request: Any = None) -> Engine:
    """Return the engine for a path or a name (owned), a live ``vllm.LLM`` (shared), or an engine (as it is).

    Raises:
        OptionError: ``model`` is none of these, or options, or an adapter, were given for an engine that already runs.
        ReadoutUnavailableError: the engine cannot do this read-out, or takes no adapters; says why.
        WeightsError: the adapter cannot be loaded, or would not be served as it is written.
    """
    if isinstance(model, (str, os.PathLike)):
        return ProcessEngine(os.fspath(model), readout=readout, options=engine_options, lora_request=lora_request)
    is_engine = isinstance(getattr(model, "info", None), EngineInfo)
    if not is_engine and not callable(getattr(model, "generate", None)):
        raise OptionError(f"model must be a path, a model name or a live vllm.LLM, got {type(model).__name__}")
    if engine_options:
        raise OptionError(
            f"engine options have no effect on an engine that already runs: {', '.join(engine_options)}. Give them "
            "where the engine is made."
        )
    if not is_engine:
        return GenerateEngine(model, readout=readout, lora_request=lora_request)
    if readout not in ("auto", model.info.readout):
        raise ReadoutUnavailableError(f"readout={readout!r} is not available: this engine does {model.info.readout!r}")
    if lora_request is not None:
        raise OptionError(
            f"lora_request has no effect on a {type(model).__name__} that already runs: give it where the engine is made"
        )
    return model
