"""Reference log-probs and per-token KL for RL post-training on TorchRL, served by vLLM.

Start with :class:`VLLMScorer` (token ids -> log-probs), :class:`VLLMReference` (the same as a TorchRL module)
and :class:`RetrieveKL` (the transform). ``import vllm_kl`` loads neither vLLM nor Ray nor TorchRL: a public
name is imported from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Type checkers and editors read this block; ``import X as X`` tells them that X is public. Python reads
# _PUBLIC.
if TYPE_CHECKING:
    from vllm_kl.batch.mask_recorded import mask_recorded as mask_recorded
    from vllm_kl.diagnostics import Mismatch as Mismatch
    from vllm_kl.diagnostics import MismatchWarning as MismatchWarning
    from vllm_kl.diagnostics import WorstToken as WorstToken
    from vllm_kl.diagnostics import mismatch as mismatch
    from vllm_kl.engines.base import Engine as Engine
    from vllm_kl.errors import CollectorError as CollectorError
    from vllm_kl.errors import DriftError as DriftError
    from vllm_kl.errors import EngineError as EngineError
    from vllm_kl.errors import FrozenError as FrozenError
    from vllm_kl.errors import InputError as InputError
    from vllm_kl.errors import MissingLogProbError as MissingLogProbError
    from vllm_kl.errors import OptionError as OptionError
    from vllm_kl.errors import ReadoutUnavailableError as ReadoutUnavailableError
    from vllm_kl.errors import StaleError as StaleError
    from vllm_kl.errors import VLLMKLError as VLLMKLError
    from vllm_kl.errors import WeightsError as WeightsError
    from vllm_kl.exact_kl import LMHead as LMHead
    from vllm_kl.importance import Importance as Importance
    from vllm_kl.importance import importance_weights as importance_weights
    from vllm_kl.kl import kl_estimate as kl_estimate
    from vllm_kl.scorer import VLLMScorer as VLLMScorer
    from vllm_kl.transforms.audit import Audit as Audit
    from vllm_kl.transforms.coefficient import Coefficient as Coefficient
    from vllm_kl.transforms.deferred import fill_deferred as fill_deferred
    from vllm_kl.transforms.engine_policy_version import EnginePolicyVersion as EnginePolicyVersion
    from vllm_kl.transforms.estimation import Estimation as Estimation
    from vllm_kl.transforms.from_collector import FromCollector as FromCollector
    from vllm_kl.transforms.importance_weights import ImportanceWeights as ImportanceWeights
    from vllm_kl.transforms.kl_computation import KLComputation as KLComputation
    from vllm_kl.transforms.log_metrics import LogMetrics as LogMetrics
    from vllm_kl.transforms.lora_wrapper import LoRAWrapper as LoRAWrapper
    from vllm_kl.transforms.penalty import Penalty as Penalty
    from vllm_kl.transforms.retokenized_turns import RetokenizedTurns as RetokenizedTurns
    from vllm_kl.transforms.retrieve_kl import RetrieveKL as RetrieveKL
    from vllm_kl.transforms.retrieve_log_prob import RetrieveLogProb as RetrieveLogProb
    from vllm_kl.transforms.sync_scheme import VLLMSender as VLLMSender
    from vllm_kl.transforms.sync_scheme import VLLMSyncScheme as VLLMSyncScheme
    from vllm_kl.transforms.vllm_reference import VLLMReference as VLLMReference
    from vllm_kl.transforms.weight_updater import VLLMWeightUpdater as VLLMWeightUpdater
    from vllm_kl.types import EngineInfo as EngineInfo
    from vllm_kl.types import Origin as Origin
    from vllm_kl.types import Scored as Scored
    from vllm_kl.types import ScoreRequest as ScoreRequest
    from vllm_kl.types import ScoreResult as ScoreResult
    from vllm_kl.types import ScoreStats as ScoreStats
    from vllm_kl.types import TokenBatch as TokenBatch
    from vllm_kl.types import TopK as TopK
    from vllm_kl.view.samples import Sample as Sample
    from vllm_kl.view.samples import read_samples as read_samples
    from vllm_kl.view.samples import samples_from_batch as samples_from_batch
    from vllm_kl.view.samples import write_samples as write_samples
    from vllm_kl.weights.checkpoint import Checkpoint as Checkpoint
    from vllm_kl.weights.checkpoint import Skeleton as Skeleton
    from vllm_kl.weights.collector_errors import check_collector as check_collector
    from vllm_kl.weights.live_weights import Weights as Weights
    from vllm_kl.weights.push import finish_update as finish_update
    from vllm_kl.weights.push import push_weights as push_weights
    from vllm_kl.weights.push import push_weights_async as push_weights_async
    from vllm_kl.weights.versions import StaleWarning as StaleWarning
    from vllm_kl.weights.versions import check_versions as check_versions

__version__ = "0.2.0"

_PUBLIC = {
    "batch.mask_recorded": "mask_recorded",
    "diagnostics": "Mismatch MismatchWarning WorstToken mismatch",
    "engines.base": "Engine",
    "errors": "CollectorError DriftError EngineError FrozenError InputError MissingLogProbError OptionError "
    "ReadoutUnavailableError StaleError VLLMKLError WeightsError",
    "exact_kl": "LMHead",
    "importance": "Importance importance_weights",
    "kl": "kl_estimate",
    "scorer": "VLLMScorer",
    "transforms.audit": "Audit",
    "transforms.coefficient": "Coefficient",
    "transforms.deferred": "fill_deferred",
    "transforms.engine_policy_version": "EnginePolicyVersion",
    "transforms.estimation": "Estimation",
    "transforms.from_collector": "FromCollector",
    "transforms.importance_weights": "ImportanceWeights",
    "transforms.kl_computation": "KLComputation",
    "transforms.log_metrics": "LogMetrics",
    "transforms.lora_wrapper": "LoRAWrapper",
    "transforms.penalty": "Penalty",
    "transforms.retokenized_turns": "RetokenizedTurns",
    "transforms.retrieve_kl": "RetrieveKL",
    "transforms.retrieve_log_prob": "RetrieveLogProb",
    "transforms.sync_scheme": "VLLMSender VLLMSyncScheme",
    "transforms.vllm_reference": "VLLMReference",
    "transforms.weight_updater": "VLLMWeightUpdater",
    "types": "EngineInfo Origin ScoreRequest ScoreResult ScoreStats Scored TokenBatch TopK",
    "view.samples": "Sample read_samples samples_from_batch write_samples",
    "weights.checkpoint": "Checkpoint Skeleton",
    "weights.collector_errors": "check_collector",
    "weights.live_weights": "Weights",
    "weights.push": "finish_update push_weights push_weights_async",
    "weights.versions": "StaleWarning check_versions",
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names.split()}

# Packages that only an extra installs; without them vllm_kl.client works.
_OF_EXTRAS = ("jinja2", "platformdirs", "tensordict", "torch", "torchrl", "transformers")

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vllm_kl' has no attribute {name!r}")
    try:
        module = import_module(f"vllm_kl.{_MODULE_OF[name]}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_EXTRAS:
            raise
        raise ImportError(
            f"vllm_kl.{name} needs {error.name}: pip install 'vllm-kl[cpu]' or 'vllm-kl[gpu]' for engines, "
            "'vllm-kl[torchrl]' to ask a server. vllm_kl.client asks a server without them",
            name=error.name,
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
