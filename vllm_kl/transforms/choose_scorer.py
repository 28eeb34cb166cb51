"""Chooses the scorer that has a model's weights: ``scorer_for`` makes it, and ``ScorerOf`` caches it."""

from __future__ import annotations

import math
from typing import Any

from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from torchrl.modules.llm.policies import LLMWrapperBase

from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.placeholders import Placeholders
from vllm_kl.errors import OptionError
from vllm_kl.scorer import VLLMScorer
from vllm_kl.transforms.transformers_scorer import TransformersScorer
from vllm_kl.transforms.watched_policy import unwatched_call
from vllm_kl.transforms.wrapper_scorer import WrapperScorer
from vllm_kl.types import Scorer


def scorer_for(model: Any, placeholders: Placeholders = "refuse") -> Scorer:
    """Return a scorer with the weights of a TorchRL wrapper.

    A ``VLLMReference`` has a scorer; a ``vLLMWrapper`` gives its engine, a ``TransformersWrapper`` its model;
    any other wrapper scores in its own ``tokens`` mode.
    """
    scorer = getattr(model, "scorer", None)
    if scorer is not None:
        return scorer
    if isinstance(model, vLLMWrapper):
        # _call_generate works with all three kinds of engine of the wrapper: LLM, AsyncVLLM, Ray actor. It
        # also names the policy's adapter, so the same weights generate and score.
        return VLLMScorer(
            GenerateEngine(
                model.model, unwatched_call(model), lora_request=getattr(model, "lora_request", None)
            ),
            placeholders=placeholders,
        )
    if isinstance(model, TransformersWrapper):
        return TransformersScorer(model.model, placeholders)
    if isinstance(model, LLMWrapperBase):
        return WrapperScorer(model)
    raise OptionError(
        "a side of a KL must be a VLLMReference, vLLMWrapper, TransformersWrapper or another LLMWrapperBase, "
        f"got {type(model).__name__}"
    )


class ScorerOf:
    """Caches the scorer of a wrapper until the wrapper gets another engine or another adapter."""

    def __init__(self, placeholders: Placeholders = "refuse") -> None:
        self._placeholders = placeholders
        self._made: tuple[tuple[Any, ...], Scorer] | None = None

    def __call__(self, model: Any) -> Scorer:
        behind = tuple(getattr(model, name, None) for name in ("scorer", "model", "lora_request"))
        made = self._made
        if made is None or any(a is not b for a, b in zip(made[0], behind, strict=True)):
            self._made = made = behind, scorer_for(model, self._placeholders)
        return made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # a copy makes its own scorer


def serving_version(scorer: Scorer) -> int | None:
    """Return the version of the weights that the scorer serves now; ``None``: not known."""
    return getattr(scorer, "weight_version", None)


def temperature_of(scorer: Scorer) -> float:
    """Return the temperature of a scorer's log-probs; 1.0 if the scorer has no such setting."""
    return getattr(scorer, "temperature", 1.0)


def is_same_temperature(one: float, other: float) -> bool:
    """Tell whether two temperatures are equal, up to rounding."""
    return math.isclose(one, other, rel_tol=1e-6)
