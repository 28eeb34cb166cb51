"""What only a worker knows of LoRA adapters: methods that the plugin gives to vLLM's ``WorkerBase``.

vLLM 0.32 serves three things without a word, and other log-probs than those that were asked for. They are looked up here, and
refused in :mod:`vllm_kl.engines.adapters`:

- An LM head that is wrapped for LoRA applies one adapter slot per *sampled* row; prompt log-probs have many rows a request.
- An adapter's weights for a module that the engine did not wrap (``lora_target_modules``) are left out.
- Of two adapters with one ``lora_int_id`` the one that was loaded first serves for both. So does an adapter whose file was
  written again.

Source: ``lora/worker_manager.py``, ``lora/model_manager.py``, ``lora/layers/logits_processor.py``, vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

import torch

# Names of the methods, for ``collective_rpc``.
MODULES = "vllm_kl_lora_modules"
ADAPTER = "vllm_kl_lora_adapter"


def install() -> None:
    """Give every worker of this process the methods. Idempotent; imports no model."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, MODULES, lora_modules)
    setattr(WorkerBase, ADAPTER, lora_adapter)


def lora_modules(worker: Any) -> tuple[list[str], list[str]]:
    """Return the LM heads that are wrapped for LoRA, and what ``lora_target_modules`` may name beside them."""
    manager = worker.model_runner.lora_manager._adapter_manager
    named = worker.model_runner.get_model().named_modules()
    heads = [name for name, module in named if type(module).__name__ == "LogitsProcessorWithLoRA"]
    names: set[str] = set()
    for module in manager.modules:
        suffix = module.rpartition(".")[2]
        # Adapters name the parts of a packed module: q_proj, k_proj and v_proj, not qkv_proj.
        parts = [part for part in manager.packed_modules_mapping.get(suffix, ()) if "." not in part]
        names.update(parts or [suffix])
    return heads, sorted(names - {"lm_head"})


def lora_adapter(worker: Any, name: str, int_id: int, path: str) -> tuple[list[str], list[str], bool]:
    """Read an adapter as the engine would, without loading it.

    Returns:
        The adapter's modules whose weights this worker would use; all of the adapter's modules; and whether what is loaded
        under ``int_id``, if anything, is this adapter.

    Raises:
        Exception: whatever vLLM refuses it with: not there, a rank above ``max_lora_rank``, modules that the model lacks.
    """
    from vllm.lora.request import LoRARequest

    loader = worker.model_runner.lora_manager
    manager = loader._adapter_manager
    adapter = loader._load_adapter(LoRARequest(name, int_id, path))
    if not adapter.loras:
        raise ValueError("it has no weights")
    manager._create_merged_loras_inplace(adapter)  # as the loaded one was: packed, its scaling inside B
    found = [manager._get_lora_layer_weights(adapter, module) for module in manager.modules]
    used = {id(weights) for weights in found if weights is not None}
    served = [module for module, weights in adapter.loras.items() if id(weights) in used]
    loaded = manager.get_adapter(int_id)
    return served, list(adapter.loras), loaded is None or _are_equal(adapter.loras, loaded.loras)


def _are_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        _same(x, y) for name in a for x, y in ((a[name].lora_a, b[name].lora_a), (a[name].lora_b, b[name].lora_b))
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    # Packed: a matrix per part, None where it has none.
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is None and b is None
