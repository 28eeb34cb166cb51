"""Adds a method to vLLM's ``WorkerBase`` that tells which modules a worker wrapped for LoRA.

Only the worker knows them: they depend on the model, on ``lora_target_modules`` and on what vLLM can wrap.
:mod:`vllm_kl.weights.adapters` calls the method.

Source: ``LoRAModelManager._create_lora_modules``, ``lora/model_manager.py``, vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

# The name of the method, for ``collective_rpc``.
MODULES = "vllm_kl_lora_modules"


def install() -> None:
    """Add the method to the workers of this process. Idempotent; imports no model."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, MODULES, lora_modules)


def lora_modules(worker: Any) -> list[str]:
    """Return the wrapped modules, by the names that adapters use for them (``lm_head`` for the LM head)."""
    manager = worker.model_runner.get_model().lora_manager
    names: list[str] = []
    for module in manager.modules:
        parent, dot, last = module.rpartition(".")
        # An adapter names the parts of a packed module: q_proj, k_proj and v_proj, not qkv_proj.
        parts = [part for part in manager.packed_modules_mapping.get(last, ()) if "." not in part]
        names += [f"{parent}{dot}{part}" for part in parts or [last]]
    return names
