"""Reference log-probs and per-token KL for RL post-training on TorchRL, served by vLLM.

Start with :class:`VLLMScorer` (token ids -> log-probs), :class:`VLLMReference` (the same as a TorchRL module) and
:class:`RetrieveKL` (the transform). Importing this package loads neither vLLM nor Ray, and TorchRL only when one of
its classes is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_kl.diagnostics import mismatch
    from vllm_kl.kl import kl_estimate
    from vllm_kl.scorer import VLLMScorer
    from vllm_kl.transforms.deferred import fill_deferred
    from vllm_kl.transforms.engine_policy_version import EnginePolicyVersion
    from vllm_kl.transforms.from_collector import FromCollector
    from vllm_kl.transforms.kl_computation import KLComputation
    from vllm_kl.transforms.lora_wrapper import LoRAWrapper
    from vllm_kl.transforms.retokenized_turns import RetokenizedTurns
    from vllm_kl.transforms.retrieve_kl import RetrieveKL
    from vllm_kl.transforms.retrieve_log_prob import RetrieveLogProb
    from vllm_kl.transforms.sync_scheme import VLLMSyncScheme
    from vllm_kl.transforms.vllm_reference import VLLMReference
    from vllm_kl.transforms.weight_updater import VLLMWeightUpdater
    from vllm_kl.view.samples import Sample, read_samples, samples_from_batch, write_samples
    from vllm_kl.weights.collector_errors import check_collector
    from vllm_kl.weights.push import finish_update, push_weights, push_weights_async
    from vllm_kl.weights.versions import check_versions

__version__ = "0.1.0"

__all__ = [
    "EnginePolicyVersion",
    "FromCollector",
    "KLComputation",
    "LoRAWrapper",
    "RetokenizedTurns",
    "RetrieveKL",
    "RetrieveLogProb",
    "Sample",
    "VLLMReference",
    "VLLMScorer",
    "VLLMSyncScheme",
    "VLLMWeightUpdater",
    "check_collector",
    "check_versions",
    "fill_deferred",
    "finish_update",
    "kl_estimate",
    "mismatch",
    "push_weights",
    "push_weights_async",
    "read_samples",
    "samples_from_batch",
    "write_samples",
]

_HOME = {
    "EnginePolicyVersion": "transforms.engine_policy_version",
    "FromCollector": "transforms.from_collector",
    "KLComputation": "transforms.kl_computation",
    "LoRAWrapper": "transforms.lora_wrapper",
    "RetokenizedTurns": "transforms.retokenized_turns",
    "RetrieveKL": "transforms.retrieve_kl",
    "RetrieveLogProb": "transforms.retrieve_log_prob",
    "Sample": "view.samples",
    "VLLMReference": "transforms.vllm_reference",
    "VLLMScorer": "scorer",
    "VLLMSyncScheme": "transforms.sync_scheme",
    "VLLMWeightUpdater": "transforms.weight_updater",
    "check_collector": "weights.collector_errors",
    "check_versions": "weights.versions",
    "fill_deferred": "transforms.deferred",
    "finish_update": "weights.push",
    "kl_estimate": "kl",
    "mismatch": "diagnostics",
    "push_weights": "weights.push",
    "push_weights_async": "weights.push",
    "read_samples": "view.samples",
    "samples_from_batch": "view.samples",
    "write_samples": "view.samples",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vllm_kl' has no attribute {name!r}")
    return getattr(import_module(f"vllm_kl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
