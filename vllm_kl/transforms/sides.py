"""Chooses the scorer of a side of a KL: a side is a given model, or the policy of the collector.

A side implements ``log_probs(batch, td, collector, temperature)``. Both sides score the same ids through this
package's own code; a model only provides its weights. So the sides cannot disagree about tokens, masks or
padding.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from torchrl.modules.llm.policies import LLMWrapperBase

from vllm_kl.batch.alignment import scored_spans, spread
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.length_dependence import Lengths, LengthSide, side_in, why_two_lengths
from vllm_kl.engines.placeholders import Placeholders
from vllm_kl.errors import InputError, MissingLogProbError, OptionError, VLLMKLError
from vllm_kl.scorer import VLLMScorer
from vllm_kl.transforms.transformers_scorer import TransformersScorer
from vllm_kl.transforms.watched_policy import adapter_id, engine_of, unwatched_call
from vllm_kl.transforms.wrapper_scorer import WrapperScorer
from vllm_kl.types import Origin, Scored, Scorer, TokenBatch


def score_batch(scorer: Scorer, batch: TokenBatch, adapter: int | None = 0) -> Scored:
    """Return the log-probs of the kept tokens, 0.0 elsewhere, and the weights that made them.

    The scorer reads out no row before the first kept token, prefills no token after the last kept one, and
    does not get a sample that keeps no token.
    """
    spans = scored_spans(batch.packed_keep, batch.lengths)
    sent = [i for i, (start, stop) in enumerate(spans) if start < stop]
    results: list[torch.Tensor] = []
    version: int | None = None
    if sent:
        ids, starts = [batch.token_ids[i][: spans[i][1]] for i in sent], [spans[i][0] for i in sent]
        try:
            results, version = _call_scorer(scorer, ids, starts)
        except (InputError, MissingLogProbError) as error:
            raise _of_samples(error, sent) from error
    else:
        version = serving_version(scorer)
    scored = [results[0].new_empty(0) if results else torch.empty(0)] * len(batch)
    for i, result in zip(sent, results, strict=True):
        scored[i] = result
    return Scored(values=spread(scored, spans, batch, what="log-probs"), origin=Origin(version, adapter))


def _call_scorer(
    scorer: Scorer, token_ids: list[torch.Tensor], starts: list[int]
) -> tuple[list[torch.Tensor], int | None]:
    if hasattr(scorer, "score_and_tell"):
        results, stats = scorer.score_and_tell(token_ids, starts)
        return results, None if stats is None else stats.weight_version
    return scorer.score(token_ids, starts), serving_version(scorer)


def _of_samples(error: VLLMKLError, sent: list[int]) -> VLLMKLError:
    """Return the scorer's error with the batch's sample number instead of the scorer's own."""
    text = str(error)
    found = re.search(r"\b(?:sequence|sample) (\d+)", text)
    if found is None or int(found[1]) >= len(sent):
        return type(error)(text)
    sample = sent[int(found[1])]
    named = type(error)(f"{text[: found.start()]}sample {sample}{text[found.end() :]}")
    named.sample = sample
    return named


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


def serving_version(scorer: Scorer) -> int | None:
    """Return the version of the weights that the scorer serves now; ``None``: not known."""
    return getattr(scorer, "weight_version", None)


def temperature_of(scorer: Scorer) -> float:
    """Return the temperature of a scorer's log-probs; 1.0 if the scorer has no such setting."""
    return getattr(scorer, "temperature", 1.0)


def is_same_temperature(one: float, other: float) -> bool:
    """Tell whether two temperatures are equal, up to rounding."""
    return math.isclose(one, other, rel_tol=1e-6)


def check_two_models(gen_model: Any, ref_model: Any) -> None:
    """Refuse a reference that is the policy itself: their KL would stay 0 whatever the policy learns.

    Raises:
        OptionError: both sides use one engine or one model, with the same adapter or with none.
    """
    one, other = _weights_behind(gen_model), _weights_behind(ref_model)
    if one is not None and other is not None and one[0] is other[0] and one[1] == other[1]:
        engine, adapter = one
        what = f"adapter {adapter} on one engine" if adapter else f"one {type(engine).__name__}"
        raise OptionError(
            f"both sides are {what}: the KL would be 0 at every update. Give the reference an engine of its "
            "own (VLLMReference(path)). If the policy is an adapter, give lora_request to the policy only"
        )


def warn_of_two_lengths(gen_model: Any, ref_model: Any, stacklevel: int = 3) -> None:
    """Warn if the sides compute differently because of their lengths (``length_dependence``)."""
    if why := why_two_lengths(_length_side(gen_model), _length_side(ref_model)):
        warnings.warn(why, stacklevel=stacklevel)


def _length_side(model: Any) -> LengthSide | None:
    if isinstance(scorer := getattr(model, "scorer", None), VLLMScorer):
        return scorer._engine.info.length_side
    if isinstance(model, vLLMWrapper):
        engine = getattr(model.model, "llm_engine", None)  # TorchRL's AsyncVLLM does not tell
        return None if engine is None else side_in(engine)
    return Lengths(getattr(model, "model", None)).side


def _weights_behind(model: Any) -> tuple[Any, int] | None:
    """Return the engine or model that holds a wrapper's weights, and its adapter's id.

    ``None``: not known, because an adapter may be loaded in another way, or later.
    """
    engine, adapter = getattr(model, "model", None), adapter_id(getattr(model, "lora_request", None))
    if isinstance(scorer := getattr(model, "scorer", None), VLLMScorer):
        if not isinstance(scorer._engine, GenerateEngine) or scorer._engine.weights is None:
            return scorer._engine, 0
        return scorer._engine.weights._engine, adapter_id(scorer._engine._lora_request)
    if isinstance(model, TransformersWrapper):
        return (engine, 0) if type(model) is TransformersWrapper else None
    if not isinstance(model, vLLMWrapper):
        return None
    if hasattr(engine, "llm_engine"):
        takes_adapters = engine.llm_engine.vllm_config.lora_config is not None
        engine = engine.llm_engine
    elif hasattr(engine, "engine_args"):  # TorchRL's AsyncVLLM
        takes_adapters = bool(engine.engine_args.enable_lora)
    else:
        return None
    return (engine, adapter) if adapter or not takes_adapters else None


class Side(Protocol):
    """One side of a KL. It stores nothing of a call, so threads may share it."""

    def log_probs(self, batch: TokenBatch, td: TensorDictBase, collector: Any, temperature: float) -> Scored:
        """Return the log-probs of a batch.

        Args:
            batch: the tokens.
            td: the tensordict of the batch, which may hold recorded log-probs.
            collector: the collector whose policy may be asked, or ``None``.
            temperature: the log-probs must be those of ``softmax(logits / temperature)``.
        """
        ...

    def scores_with(self, policy: Any) -> bool:
        """Tell whether this side scores with the engine of the given policy."""
        ...


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


class ModelSide:
    """The side that a given model scores."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._scorer_of = ScorerOf()
        self.has_versions = serving_version(self._scorer_of(model)) is not None

    @property
    def temperature(self) -> float:
        """The side's log-probs are those of ``softmax(logits / temperature)``."""
        return temperature_of(self._scorer_of(self._model))

    def check_temperature(self, temperature: float) -> None:
        """Refuse a temperature that is not this side's.

        Raises:
            OptionError: names both temperatures.
        """
        if not is_same_temperature(self.temperature, temperature):
            raise OptionError(
                f"one side's log-probs are those of softmax(logits / {self.temperature:g}), the other's of "
                f"softmax(logits / {temperature:g}), so the KL of equal weights would not be 0. Give both "
                "one temperature"
            )

    def log_probs(self, batch: TokenBatch, td: TensorDictBase, collector: Any, temperature: float) -> Scored:
        self.check_temperature(temperature)
        scorer = self._scorer_of(self._model)
        return score_batch(
            scorer, batch, adapter_id(getattr(getattr(scorer, "_engine", None), "_lora_request", None))
        )

    def scores_with(self, policy: Any) -> bool:
        engine = getattr(getattr(self._scorer_of(self._model), "_engine", None), "_llm_engine", None)
        return engine is not None and engine is engine_of(policy)


def check_side(model: Any, assistant_only: bool, name: str = "model") -> None:
    """Refuse a model that cannot be a side. The messages begin as TorchRL's do.

    Raises:
        InputError: the model generates, returns no log-probs, or has the wrong ``input_mode``.
    """
    if not getattr(model, "return_log_probs", True):
        raise InputError(f"The {name} must have `return_log_probs=True`: it has to compute log-probs.")
    if getattr(model, "generate", True) is not False:
        raise InputError(
            f"The {name} must have `generate=False`: use {name}.get_new_version(generate=False, "
            "return_log_probs=True)."
        )
    input_mode = getattr(model, "input_mode", "history")
    if assistant_only and input_mode != "history":
        raise InputError(
            f"The model must have `input_mode='history'` when `assistant_only=True`, but {name} has "
            f"{input_mode!r}. To use it, set `assistant_only=False`."
        )


def warn_unless_full(key: NestedKey, stacklevel: int = 3) -> None:
    """Warn of a key that TorchRL's losses do not find by default."""
    if not isinstance(key, tuple) or key[-1] != "full":
        warnings.warn(
            f"The log-probs key {key!r} is not a tuple that ends with 'full': TorchRL's losses will not find "
            "it by default.",
            stacklevel=stacklevel,
        )


def one_of(side: str, model: Any, factory: Callable[[], Any] | None) -> Any:
    """Return the model of a side, or the model that its factory makes."""
    if (model is None) == (factory is None):
        raise InputError(
            f"Cannot build the {side} side: pass exactly one of '{side}_model' and '{side}_model_factory'."
        )
    return model if factory is None else factory()
