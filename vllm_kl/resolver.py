"""Which scorer stands behind a side of a KL: a given model, or the policy of the collector.

A side is anything with ``log_probs(batch, td)``. Models are only the carriers of weights here: every side scores the
same ids, at the same rows, by our own path, so two sides cannot disagree about tokens, masks or padding.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.utils import NestedKey
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from torchrl.modules.llm.policies import LLMWrapperBase, Tokens

from vllm_kl.alignment import check_finite, from_layout, scored_span, spread
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.transformers import TransformersScorer
from vllm_kl.errors import CollectorError, InputError, MissingLogProbError, OptionError
from vllm_kl.inputs import nested, rows_of
from vllm_kl.scorer import VLLMScorer
from vllm_kl.types import Scorer, TokenBatch

GenLogProbs = Literal["auto", "reuse", "rescore"]


def score_batch(scorer: Scorer, batch: TokenBatch) -> list[torch.Tensor]:
    """Return B float32 tensors ``[L]``: log-probs of the kept tokens, 0.0 elsewhere.

    Only what is needed is sent: nothing before the first kept row is read out, nothing after the last kept token is
    prefilled, and a sample that keeps no token is not sent at all.
    """
    spans = [scored_span(keep) for keep in batch.keep]
    sent = [i for i, (start, stop) in enumerate(spans) if start < stop]
    scored = [torch.empty(0)] * len(batch)
    if sent:
        results = scorer.score([batch.token_ids[i][: spans[i][1]] for i in sent], [spans[i][0] for i in sent])
        for i, result in zip(sent, results, strict=True):
            scored[i] = result
    return [spread(values, keep) for values, keep in zip(scored, batch.keep, strict=True)]


def scorer_for(model: Any) -> Scorer:
    """Return what scores with the weights of a TorchRL wrapper.

    A ``VLLMReference`` brings its own; a ``vLLMWrapper`` lends its engine, a ``TransformersWrapper`` its model; any
    other wrapper is asked in its ``tokens`` mode.
    """
    scorer = getattr(model, "scorer", None)
    if scorer is not None:
        return scorer
    if isinstance(model, vLLMWrapper):
        # _call_generate reaches all three kinds of engine that the wrapper takes: LLM, AsyncVLLM, Ray actor.
        return VLLMScorer(GenerateEngine(model.model, model._call_generate))
    if isinstance(model, TransformersWrapper):
        return TransformersScorer(model.model)
    if isinstance(model, LLMWrapperBase):
        return WrapperScorer(model)
    raise OptionError(
        f"a side of a KL must be a VLLMReference, vLLMWrapper, TransformersWrapper or another LLMWrapperBase, got "
        f"{type(model).__name__}"
    )


class WrapperScorer:
    """Scores with any :class:`~torchrl.modules.llm.policies.LLMWrapperBase`, through its own ``tokens`` mode.

    The wrapper must return one value per id; a wrapper that drops ids (TorchRL's drop pad ids) is refused, not padded.
    """

    def __init__(self, model: LLMWrapperBase) -> None:
        self._model = model.get_new_version(
            generate=False, return_log_probs=True, input_mode="tokens", pad_output=False, inplace=False
        )

    def score(self, token_ids: list[torch.Tensor], start: list[int]) -> list[torch.Tensor]:
        """Return B float32 tensors ``[L - start]``, nats."""
        td = lazy_stack(
            [TensorDict(tokens=Tokens(full=ids), masks=TensorDict(all_attention_mask=ids >= 0)) for ids in token_ids]
        )
        rows = rows_of(self._model(td), nested(self._model.log_probs_key, "full"))
        for i, (row, ids) in enumerate(zip(rows or [], token_ids, strict=True)):
            if len(row) != len(ids):
                raise MissingLogProbError(
                    f"{type(self._model).__name__} returned {len(row)} log-probs for the {len(ids)} tokens of sample {i}. "
                    "It drops pad ids: give its tokenizer a pad token that no sequence contains."
                )
        return [row[s:].float() for row, s in zip(rows or [], start, strict=True)]


class Side(Protocol):
    """One side of a KL."""

    def log_probs(self, batch: TokenBatch, td: TensorDictBase, collector: Any) -> list[torch.Tensor]:
        """Return B float32 tensors ``[L]``: finite inside the batch's mask, 0.0 outside."""
        ...


class ModelSide:
    """The side whose weights are a given model's."""

    def __init__(self, model: Any) -> None:
        self._scorer = scorer_for(model)

    def log_probs(self, batch: TokenBatch, td: TensorDictBase, collector: Any) -> list[torch.Tensor]:
        return score_batch(self._scorer, batch)


class FromCollector:
    """The generation side of a KL, taken from the collector whose policy made the tokens.

    Args:
        gen_log_probs: ``"reuse"`` takes the log-probs that the policy recorded when it sampled; ``"rescore"`` asks the
            policy's engine again; ``"auto"`` reuses them where they are there and finite on every kept token, else
            rescores.

    Specs and construction never need the collector: the policy is looked up at each step, so one that is replaced or
    updated is followed. Outside an env (a ``postproc``, a replay buffer, a plain batch) there is no collector and only
    recorded log-probs can be used.

    >>> FromCollector("reuse")
    FromCollector('reuse')
    """

    def __init__(self, gen_log_probs: GenLogProbs = "auto") -> None:
        if gen_log_probs not in get_args(GenLogProbs):
            raise OptionError(
                f"gen_log_probs={gen_log_probs!r} does not exist; choose one of {', '.join(get_args(GenLogProbs))}"
            )
        self.gen_log_probs = gen_log_probs
        self._key: NestedKey = ("log_probs", "full")
        self._pad_output: bool | None = None
        self._resolved: tuple[Any, Scorer] | None = None

    def __repr__(self) -> str:
        return f"FromCollector({self.gen_log_probs!r})"

    def expect(self, *, log_probs_full_key: NestedKey, pad_output: bool | None) -> None:
        """Say where recorded log-probs lie when no policy tells, and which ``pad_output`` the policy must have."""
        self._key = log_probs_full_key
        self._pad_output = pad_output

    def log_probs(self, batch: TokenBatch, td: TensorDictBase, collector: Any) -> list[torch.Tensor]:
        """Return B float32 tensors ``[L]``: finite inside the batch's mask, 0.0 outside.

        Raises:
            CollectorError: nothing recorded to reuse, or nobody to ask; says what to pass instead.
            InputError: the policy's ``pad_output`` is not the reference's.
        """
        policy = self._policy(collector)
        if self.gen_log_probs != "rescore":
            recorded, why_not = self._recorded(batch, td, policy)
            if recorded is not None:
                return recorded
            if self.gen_log_probs == "reuse":
                raise CollectorError(
                    f"gen_log_probs='reuse', but {why_not}. Let the policy record log-probs (return_log_probs=True), or "
                    "pass gen_log_probs='rescore' inside a collector."
                )
            why = f"{why_not}, and "
        else:
            why = ""
        if policy is None:
            raise CollectorError(
                f"from_collector: {why}there is no collector whose policy could be asked to score. Append the transform to "
                "the env of an LLMCollector, keep the policy's log-probs in the batch, or pass gen_model= with a model."
            )
        return score_batch(self._scorer_of(policy), batch)

    def _policy(self, collector: Any) -> Any:
        if collector is None:
            return None
        policy = getattr(collector, "policy", None)
        if not isinstance(policy, LLMWrapperBase):
            raise CollectorError(
                f"from_collector: the collector's policy is a {type(policy).__name__}, expected an LLMWrapperBase such as "
                "vLLMWrapper. Pass gen_model= with the model that sampled."
            )
        if self._pad_output is not None and policy.pad_output != self._pad_output:
            raise InputError(
                f"pad_output mismatch: the collector's policy has pad_output={policy.pad_output}, the reference "
                f"pad_output={self._pad_output}. Both sides of a KL share one value."
            )
        return policy

    def _recorded(
        self, batch: TokenBatch, td: TensorDictBase, policy: Any
    ) -> tuple[list[torch.Tensor] | None, str | None]:
        """Return the recorded log-probs, or why they cannot be used."""
        key = self._key
        if policy is not None:
            if not policy.return_log_probs:
                return None, "the policy records no log-probs (return_log_probs=False)"
            key = nested(policy.log_probs_key, "full")
        rows = rows_of(td, key)
        if rows is None:
            # ("log_probs", "response") alone is not enough: TorchRL 0.14's TransformersWrapper writes 0.0 for the first
            # token of every response there.
            return None, f"the batch has no {key}"
        if not batch.stored:
            return None, "the batch has log-probs but not the ids they belong to"
        try:
            values = from_layout([row.detach().float().cpu() for row in rows], batch, what=str(key))
            check_finite(values, batch.keep, what=str(key))
        except (InputError, MissingLogProbError) as error:
            return None, str(error)
        return [torch.where(keep, value, 0.0) for value, keep in zip(values, batch.keep, strict=True)], None

    def _scorer_of(self, policy: Any) -> Scorer:
        if self._resolved is None or self._resolved[0] is not policy.model:
            self._resolved = policy.model, scorer_for(policy)
        return self._resolved[1]
