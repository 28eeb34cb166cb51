"""Gives vLLM 0.26 the version of an engine's weights, which later versions of vLLM have themselves.

The engine's core process keeps the version. Front ends ask for it under the names of later versions.

Source: ``EngineCore.set_weight_version``, ``v1/engine/core.py``, and its callers, vLLM 0.27.1.
"""

from __future__ import annotations

from typing import Any

_VERSION = "_vllm_kl_weight_version"


def install() -> None:
    """Add the methods to the engines of this process, if vLLM has none. Idempotent."""
    from vllm.v1.engine.core import EngineCore

    if hasattr(EngineCore, "get_weight_version"):
        return
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import InprocClient, SyncMPClient
    from vllm.v1.engine.llm_engine import LLMEngine

    EngineCore.get_weight_version = lambda core: getattr(core, _VERSION, "default")
    EngineCore.set_weight_version = lambda core, version: setattr(core, _VERSION, version)
    InprocClient.get_weight_version = lambda client: client.engine_core.get_weight_version()
    InprocClient.set_weight_version = lambda client, version: client.engine_core.set_weight_version(version)
    SyncMPClient.get_weight_version = lambda client: client.call_utility("get_weight_version")
    SyncMPClient.set_weight_version = lambda client, version: client.call_utility(
        "set_weight_version", version
    )
    LLMEngine.get_weight_version = lambda engine: engine.engine_core.get_weight_version()
    LLMEngine.set_weight_version = lambda engine, version: engine.engine_core.set_weight_version(version)
    AsyncLLM.get_weight_version = _get
    AsyncLLM.update_weight_version = _update


async def _get(engine: Any) -> str:
    return await engine.engine_core.call_utility_async("get_weight_version")


async def _update(engine: Any, new_version: str) -> None:
    await engine.engine_core.call_utility_async("set_weight_version", new_version)
