"""Which scorer stands behind a side of a KL: a given model, or the policy of the collector.

A side is anything with ``log_probs(batch, td)``. Models are only the carriers of weights here: every side scores the
same ids, at the same rows, by our own path, so two sides cannot disagree about tokens, masks or padding.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.utils import NestedKey
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from torchrl.modules.llm.policies import LLMWrapperBase, Tokens

from vllm_kl.batch.alignment import scored_spans, spread
from vllm_kl.batch.inputs import nested, rows_of
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.lengths import Lengths, LengthSide, side_in, why_two_lengths
from vllm_kl.engines.placeholders import Placeholders
from vllm_kl.errors import InputError, MissingLogProbError, OptionError, VLLMKLError
from vllm_kl.scorer import VLLMScorer
from vllm_kl.transforms.transformers_scorer import TransformersScorer
from vllm_kl.transforms.watched_policy import adapter_id, engine_of, unwatched_call
from vllm_kl.types import Origin, Scored, Scorer, TokenBatch


def score_batch(scorer: Scorer, batch: TokenBatch, adapter: int | None = 0) -> Scored:
    """Return the log-probs of the kept tokens, 0.0 elsewhere, and the weights that made them.

    Only what is needed is sent: nothing before the first kept row is read out, nothing after the last kept token is
    prefilled, and a sample that keeps no token is not sent at all.
    """
    spans = scored_spans(batch.packed_keep, batch.lengths)
    sent = [i for i, (start, stop) in enumerate(spans) if start < stop]
    results: list[torch.Tensor] = []
    version: int | None = None
    if sent:
        ids, starts = [batch.token_ids[i][: spans[i][1]] for i in sent], [spans[i][0] for i in sent]
        try:
            results, version = _score(scorer, ids, starts)
        except (InputError, MissingLogProbError) as error:
            raise _of_samples(error, sent) from error
    else:
        version = serving_version(scorer)
    scored = [results[0].new_empty(0) if results else torch.empty(0)] * len(batch)
    for i, result in zip(sent, results, strict=True):
        scored[i] = result
    return Scored(values=spread(scored, spans, batch, what="log-probs"), origin=Origin(version, adapter))


def _score(
    scorer: Scorer, token_ids: list[torch.Tensor], starts: list[int]
) -> tuple[list[torch.Tensor], int | None]:
    if hasattr(scorer, "score_and_tell"):
        results, stats = scorer.score_and_tell(token_ids, starts)
        return results, None if stats is None else stats.weight_version
    return scorer.score(token_ids, starts), serving_version(scorer)


def _of_samples(error: VLLMKLError, sent: list[int]) -> VLLMKLError:
    """Return an error that names the batch's sample in the place of the sequence that a scorer was sent."""
    text = str(error)
    found = re.search(r"\b(?:sequence|sample) (\d+)", text)
    if found is None or int(found[1]) >= len(sent):
        return type(error)(text)
    sample = sent[int(found[1])]
    named = type(error)(f"{text[: found.start()]}sample {sample}{text[found.end() :]}")
    named.sample = sample
    return named


def scorer_for(model: Any, placeholders: Placeholders = "refuse") -> Scorer:
    """Return what scores with the weights of a TorchRL wrapper.

    A ``VLLMReference`` brings its own; a ``vLLMWrapper`` lends its engine, a ``TransformersWrapper`` its model; any
    other wrapper is asked in its ``tokens`` mode.
    """
    scorer = getattr(model, "scorer", None)
    if scorer is not None:
        return scorer
    if isinstance(model, vLLMWrapper):
        # _call_generate reaches all three kinds of engine that the wrapper takes: LLM, AsyncVLLM, Ray actor. It names the
        # policy's adapter, if it has one: what generated is what scores.
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
        f"a side of a KL must be a VLLMReference, vLLMWrapper, TransformersWrapper or another LLMWrapperBase, got "
        f"{type(model).__name__}"
    )


def serving_version(scorer: Scorer) -> int | None:
    """Return the version of the weights that serve now; ``None``: not known."""
    return getattr(scorer, "weight_version", None)


def temperature_of(scorer: Scorer) -> float:
    """Return the temperature whose log-probs a scorer returns; 1.0 where it has none to set."""
    return getattr(scorer, "temperature", 1.0)


def is_same_temperature(one: float, other: float) -> bool:
    """Tell whether two temperatures differ by rounding at most."""
    return math.isclose(one, other, rel_tol=1e-6)


def check_two_models(gen_model: Any, ref_model: Any) -> None:
    """Refuse a reference that is the policy itself: their KL is 0, and stays it whatever the policy learns.

    Raises:
        OptionError: both are one engine, or one model, with one adapter or none.
    """
    one, other = _weights_behind(gen_model), _weights_behind(ref_model)
    if one is not None and other is not None and one[0] is other[0] and one[1] == other[1]:
        engine, adapter = one
        what = f"adapter {adapter} on one engine" if adapter else f"one {type(engine).__name__}"
        raise OptionError(
            f"both sides are {what}: the KL would be 0 at every update. Give the reference an engine of its own "
            "(VLLMReference(path)), or, where the policy is an adapter, let only the policy name it (lora_request)"
        )


def warn_of_two_lengths(gen_model: Any, ref_model: Any, stacklevel: int = 3) -> None:
    """Warn where two sides lie on two sides of a length that changes a model's numbers; see :mod:`vllm_kl.engines.lengths`."""
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
    """Return what holds a model's weights, and the id of its adapter; ``None``: an adapter may come in otherwise, or later."""
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


class WrapperScorer:
    """Scores with any :class:`~torchrl.modules.llm.policies.LLMWrapperBase`, through its own ``tokens`` mode.

    The wrapper must return one value per id; a wrapper that drops ids (TorchRL's drop pad ids) is refused, not padded.
    """

    def __init__(self, model: LLMWrapperBase) -> None:
        self._model = model.get_new_version(
            generate=False, return_log_probs=True, input_mode="tokens", pad_output=False, inplace=False
        )
        self._lengths = Lengths(getattr(model, "model", None))

    def score(self, token_ids: list[torch.Tensor], start: list[int]) -> list[torch.Tensor]:
        """Return B float32 tensors ``[L - start]``, nats."""
        out: dict[int, torch.Tensor] = {}
        for samples in self._lengths.alike([len(ids) for ids in token_ids]):
            self._lengths.forget()
            rows = self._score_together(samples, [token_ids[i] for i in samples])
            out.update(zip(samples, rows, strict=True))
        return [out[i][s:].float() for i, s in enumerate(start)]

    def _score_together(self, samples: list[int], token_ids: list[torch.Tensor]) -> list[torch.Tensor]:
        td = lazy_stack(
            [
                TensorDict(tokens=Tokens(full=ids), masks=TensorDict(all_attention_mask=ids >= 0))
                for ids in token_ids
            ]
        )
        rows = rows_of(self._model(td), nested(self._model.log_probs_key, "full")) or []
        for i, row, ids in zip(samples, rows, token_ids, strict=True):
            if len(row) != len(ids):
                raise MissingLogProbError(
                    f"{type(self._model).__name__} returned {len(row)} log-probs for the {len(ids)} tokens of sample {i}. "
                    "It drops pad ids: give its tokenizer a pad token that no sequence contains."
                )
        return rows


class Side(Protocol):
    """One side of a KL. It keeps nothing of a call: threads may share it."""

    def log_probs(self, batch: TokenBatch, td: TensorDictBase, collector: Any, temperature: float) -> Scored:
        """Return the log-probs of a batch.

        Args:
            temperature: they must be those of ``softmax(logits / temperature)``.
        """
        ...

    def asks(self, policy: Any) -> bool:
        """Tell whether it is the engine of this policy that scores."""
        ...


class ScorerOf:
    """The scorer of a wrapper, made again when the wrapper has another engine, or another adapter."""

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
        return {**self.__dict__, "_made": None}  # an engine stays where it runs


class ModelSide:
    """The side whose weights are a given model's."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._scorer_of = ScorerOf()
        self.has_versions = serving_version(self._scorer_of(model)) is not None

    @property
    def temperature(self) -> float:
        """Its log-probs are those of ``softmax(logits / temperature)``."""
        return temperature_of(self._scorer_of(self._model))

    def check_temperature(self, temperature: float) -> None:
        """Refuse to stand beside a side of another temperature.

        Raises:
            OptionError: with both temperatures.
        """
        if not is_same_temperature(self.temperature, temperature):
            raise OptionError(
                f"one side's log-probs are those of softmax(logits / {self.temperature:g}), the other's of softmax(logits / "
                f"{temperature:g}): the KL of equal weights would not be 0. Give both one temperature"
            )

    def log_probs(self, batch: TokenBatch, td: TensorDictBase, collector: Any, temperature: float) -> Scored:
        self.check_temperature(temperature)
        scorer = self._scorer_of(self._model)
        return score_batch(
            scorer, batch, adapter_id(getattr(getattr(scorer, "_engine", None), "_lora_request", None))
        )

    def asks(self, policy: Any) -> bool:
        engine = getattr(getattr(self._scorer_of(self._model), "_engine", None), "_llm_engine", None)
        return engine is not None and engine is engine_of(policy)


def check_side(model: Any, assistant_only: bool, name: str = "model") -> None:
    """Refuse a model that cannot be a side; messages begin as TorchRL's do."""
    if not getattr(model, "return_log_probs", True):
        raise InputError(f"The {name} must have `return_log_probs=True`: it has to compute log-probs.")
    if getattr(model, "generate", True) is not False:
        raise InputError(
            f"The {name} must have `generate=False`: use {name}.get_new_version(generate=False, return_log_probs=True)."
        )
    input_mode = getattr(model, "input_mode", "history")
    if assistant_only and input_mode != "history":
        raise InputError(
            f"The model must have `input_mode='history'` when `assistant_only=True`; {name} has {input_mode!r}. To use it, "
            "set `assistant_only=False`."
        )


def warn_unless_full(key: NestedKey, stacklevel: int = 3) -> None:
    """Warn of a key that TorchRL's losses would not find."""
    if not isinstance(key, tuple) or key[-1] != "full":
        warnings.warn(
            f"The log-probs key {key!r} is not a tuple that ends with 'full': TorchRL's losses will not find it by default.",
            stacklevel=stacklevel,
        )


def one_of(side: str, model: Any, factory: Callable[[], Any] | None) -> Any:
    """Return the model of a side, made now if it was given as a factory."""
    if (model is None) == (factory is None):
        raise InputError(
            f"Cannot build the {side} side: pass exactly one of '{side}_model' and '{side}_model_factory'."
        )
    return model if factory is None else factory()
