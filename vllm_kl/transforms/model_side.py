"""``Side`` is one side of a KL, and ``ModelSide`` the side that a given model scores.

The other kind of side is :class:`~vllm_kl.FromCollector`. Both sides of a KL score the same ids through this
package's own code; a model only provides its weights. So the sides cannot disagree about tokens, masks or
padding.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from vllm_kl.errors import InputError, OptionError
from vllm_kl.transforms.choose_scorer import ScorerOf, is_same_temperature, serving_version, temperature_of
from vllm_kl.transforms.score_batch import score_batch
from vllm_kl.transforms.watched_policy import adapter_id, engine_of
from vllm_kl.types import EngineInfo, Scored, Scorer, TokenBatch


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


class ModelSide:
    """The side that a given model scores.

    Args:
        model: a TorchRL wrapper.
        entropy: the scores have entropies, too.

    Raises:
        OptionError: ``entropy``, and the model's scorer cannot return it.
    """

    def __init__(self, model: Any, *, entropy: bool = False) -> None:
        self._model = model
        self._scorer_of = ScorerOf()
        self._entropy = entropy
        scorer = self._scorer_of(model)
        if entropy:
            _check_entropy(scorer)
        self.has_versions = serving_version(scorer) is not None

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
            scorer,
            batch,
            adapter_id(getattr(getattr(scorer, "_engine", None), "_lora_request", None)),
            entropy=self._entropy,
        )

    def scores_with(self, policy: Any) -> bool:
        engine = getattr(getattr(self._scorer_of(self._model), "_engine", None), "_llm_engine", None)
        return engine is not None and engine is engine_of(policy)


def _check_entropy(scorer: Scorer) -> None:
    info: EngineInfo | None = getattr(scorer, "info", None)
    if info is None:
        raise OptionError(
            f"a {type(scorer).__name__} returns no entropy. Give a VLLMReference(path), whose engine does"
        )
    if "entropy" not in info.can:
        raise OptionError(
            f"the read-out {info.readout!r} returns no entropy. Give a VLLMReference that owns its engine, "
            "VLLMReference(path), with the read-out 'pooling'"
        )


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
