"""Reference log-probs and per-token KL for RL post-training on TorchRL, served by vLLM.

Start with :class:`VLLMScorer` (token ids -> log-probs), :class:`VLLMReference` (the same as a TorchRL module) and
:class:`RetrieveKL` (the transform). Importing this package loads neither vLLM nor Ray, and TorchRL only when one of
its classes is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_kl.background import check_collector
    from vllm_kl.computation import KLComputation
    from vllm_kl.deferred import fill_deferred
    from vllm_kl.diagnostics import mismatch
    from vllm_kl.from_collector import FromCollector
    from vllm_kl.kl import kl_estimate
    from vllm_kl.reference import VLLMReference
    from vllm_kl.samples import Sample, read_samples, samples_from_batch, write_samples
    from vllm_kl.scorer import VLLMScorer
    from vllm_kl.sync import (
        EnginePolicyVersion,
        VLLMSyncScheme,
        VLLMWeightUpdater,
        finish_update,
        push_weights,
        push_weights_async,
    )
    from vllm_kl.transforms import RetrieveKL, RetrieveLogProb
    from vllm_kl.turns import RetokenizedTurns
    from vllm_kl.versions import check_versions
    from vllm_kl.wrapper import LoRAWrapper

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
    "EnginePolicyVersion": "sync",
    "FromCollector": "from_collector",
    "KLComputation": "computation",
    "LoRAWrapper": "wrapper",
    "RetokenizedTurns": "turns",
    "RetrieveKL": "transforms",
    "RetrieveLogProb": "transforms",
    "Sample": "samples",
    "VLLMReference": "reference",
    "VLLMScorer": "scorer",
    "VLLMSyncScheme": "sync",
    "VLLMWeightUpdater": "sync",
    "check_collector": "background",
    "check_versions": "versions",
    "fill_deferred": "deferred",
    "finish_update": "sync",
    "kl_estimate": "kl",
    "mismatch": "diagnostics",
    "push_weights": "sync",
    "push_weights_async": "sync",
    "read_samples": "samples",
    "samples_from_batch": "samples",
    "write_samples": "samples",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vllm_kl' has no attribute {name!r}")
    return getattr(import_module(f"vllm_kl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
