"""``FromCollector`` is the generation side of a KL, with the log-probs of the collector's policy.

The side reuses the log-probs that the policy recorded while it sampled, if they fit the reference. Else it
asks the policy's engine to score the ids again:

    policy's engine and sampling parameters -> distribution of the recorded log-probs
        the reference's: reuse them, audit a few, check exact zeros
        another: the policy's engine scores the ids again, or an error says what to change

The module reads collectors and their policies. Of the reference it only knows the temperature.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import warnings
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.modules.llm import TransformersWrapper
from torchrl.modules.llm.policies import LLMWrapperBase

from vllm_kl.batch.alignment import from_layout, only_kept
from vllm_kl.batch.origins import origins
from vllm_kl.batch.read_tokens import nested, read_rows, rows_of
from vllm_kl.diagnostics import MismatchWarning
from vllm_kl.engines.generate import config_of
from vllm_kl.engines.placeholders import Placeholders, check_placeholders
from vllm_kl.errors import CollectorError, InputError, MissingLogProbError, OptionError
from vllm_kl.transforms.audit import Audit, OnDrift
from vllm_kl.transforms.choose_scorer import ScorerOf, is_same_temperature, temperature_of
from vllm_kl.transforms.pools import where_to_stand
from vllm_kl.transforms.recorded_distribution import Recorded, recorded_by
from vllm_kl.transforms.recorded_zeros import (
    SURE,
    OnZero,
    check_on_zero,
    check_recorded,
    check_zeros,
    complain,
    doubtful_zeros,
    has_zeros,
    zero_text,
)
from vllm_kl.transforms.score_batch import score_batch
from vllm_kl.transforms.watched_policy import adapter_id, watch
from vllm_kl.types import Origin, Scored, TokenBatch

logger = logging.getLogger("vllm_kl")

GenLogProbs = Literal["auto", "reuse", "rescore"]

TEMPERATURES = (
    "The KL of equal weights would not be 0.\nEither make the policy's engine with "
    "logprobs_mode='raw_logprobs' (vLLM's default) and leave the reference at temperature 1; or make it with "
    "logprobs_mode='processed_logprobs', sample with no parameter but temperature=T, and give the reference "
    "the same (VLLMReference(path, temperature=T))"
)


def policy_of(collector: Any) -> Any:
    """Return a collector's policy.

    If the policy is a module that contains one generating ``LLMWrapperBase``, that wrapper is returned.
    """
    policy = getattr(collector, "policy", None)
    if isinstance(policy, torch.nn.Module) and not isinstance(policy, LLMWrapperBase):
        inside = [m for m in policy.modules() if isinstance(m, LLMWrapperBase) and m.generate]
        return inside[0] if len(inside) == 1 else policy
    return policy


def recorded_distribution(policy: Any) -> Recorded | None:
    """Return the distribution of a policy's recorded log-probs; ``None``: not known.

    The sampling parameters are those of the policy's last call; without a call, those that the policy has.
    """
    watched = watch(policy)
    return recorded_by(policy, None if watched is None else watched.last)


def _is_unseen(policy: Any) -> bool:
    """Tell whether a watched ``vLLMWrapper`` has made no call of its own yet.

    Others may have generated, for example with ``policy.model.generate``.
    """
    watched = watch(policy)
    return watched is not None and watched.last is None


def why_not_at_temperature(found: Recorded | None, temperature: float) -> str:
    """Return why recorded log-probs are not those of ``softmax(logits / temperature)``.

    The text is empty if they are, or if nothing is known.
    """
    if found is None:
        return ""
    if found.temperature is None:
        return f"the recorded log-probs are not those of softmax(logits) at any temperature: {found.why}"
    if not is_same_temperature(found.temperature, temperature):
        return (
            f"the recorded log-probs are those of softmax(logits / {found.temperature:g}), the reference's "
            f"of softmax(logits / {temperature:g}): {found.why}"
        )
    return ""


class FromCollector:
    """The generation side of a KL, with the log-probs of the policy of a collector.

    Args:
        gen_log_probs: ``"reuse"`` takes the log-probs that the policy recorded while it sampled.
            ``"rescore"`` asks the policy's engine to score the ids again. ``"auto"`` reuses log-probs that
            are there, finite on every kept token and of the reference's distribution; else it rescores.
        audit: the fraction of the samples with reused log-probs that the policy's engine scores again, to
            compare.
        audit_tolerance, on_drift: see :class:`~vllm_kl.transforms.audit.Audit`.
        on_zero: what to do if a recorded log-prob is exactly 0.0, the reference is not sure of the token
            (probability below 0.9), and no policy can be asked: ``"raise"`` (the default), ``"warn"`` for
            each such batch, or ``"allow"``, which believes every 0.0. If the policy's engine can be asked, it
            scores such samples. A token that the engine is not sure of either is a placeholder: then
            ``"auto"`` takes the engine's log-probs of the sample and ``"reuse"`` refuses. With ``deferred=``
            the reference's log-probs are not there yet, so the policy's engine scores every sample with a
            recorded 0.0.
        placeholders: as in :class:`~vllm_kl.VLLMScorer`, for a policy that is asked again.
        policy: for use without a collector (a ``postproc``, a replay buffer, a plain batch): the wrapper that
            sampled, whose engine is asked. Inside an env the collector's policy is asked. Stored log-probs do
            not tell their sampling parameters. Unless ``logprobs_mode`` is ``raw_logprobs``, they are assumed
            to be sampled with the parameters of the policy's last call (without a call: with those that it
            has). There is one warning, unless all calls of the policy since this object was made had the same
            parameters. Change a temperature only if no stored log-probs are reused, or pass ``"rescore"``.

    Both sides are log-probs of ``softmax(logits / T)``, where T is the reference's temperature
    (``VLLMReference(path, temperature=T)``). The policy's engine and its sampling parameters tell what the
    policy recorded, see :mod:`vllm_kl.transforms.recorded_distribution`:

    | the policy's engine | it samples with | recorded | ``"reuse"``, ``"auto"`` | ``"rescore"`` |
    |---|---|---|---|---|
    | ``raw_logprobs`` (default) | anything but structured outputs | T = 1 | reference at 1 | reference at 1 |
    | ``processed_logprobs`` | the defaults, or ``temperature=0`` | T = 1 | reference at 1 | reference at 1 |
    | ``processed_logprobs`` | ``temperature=0.5`` | T = 0.5 | reference at 0.5 | reference at 1 |
    | ``processed_logprobs`` | ``top_p``, ``top_k``, penalties, ... | no T | never | reference at 1 |
    | either | structured outputs | no T | never | reference at 1 |
    | ``raw_logits``, ``processed_logits`` | | no log-probs | never | never: the engine is refused |

    Where a reference does not fit the table, ``"reuse"`` raises, ``"auto"`` warns once and rescores if the
    last column allows it, and an ``audit`` raises. Samples drawn at another temperature than 1 and compared
    at 1 give the log-ratio of the two models' own distributions: 0 for equal weights, but no unbiased
    estimate of their KL. Without a collector and ``policy=``, or if the policy is a plain function, nothing
    is known of the engine: recorded log-probs are assumed to be at the reference's temperature.

    Construction and specs need no collector. The policy is looked up at each step, so a policy that is
    replaced or updated is followed. Without a collector and ``policy=`` only recorded log-probs can be used.

    >>> FromCollector("reuse")
    FromCollector('reuse')
    """

    def __init__(
        self,
        gen_log_probs: GenLogProbs = "auto",
        *,
        audit: float = 0.0,
        audit_tolerance: float = 0.05,
        on_drift: OnDrift = "raise",
        on_zero: OnZero = "raise",
        placeholders: Placeholders = "refuse",
        policy: LLMWrapperBase | None = None,
    ) -> None:
        if gen_log_probs not in get_args(GenLogProbs):
            raise OptionError(
                f"gen_log_probs={gen_log_probs!r} does not exist; choose one of "
                f"{', '.join(get_args(GenLogProbs))}"
            )
        self.gen_log_probs = gen_log_probs
        self.audit = Audit(audit, tolerance=audit_tolerance, on_drift=on_drift)
        if audit and gen_log_probs == "rescore":
            raise OptionError(
                "audit has no effect with gen_log_probs='rescore': the engine itself computes every log-prob"
            )
        self._placeholders = check_placeholders(placeholders)
        check_on_zero(on_zero)
        self.on_zero: OnZero = on_zero
        self._key: NestedKey = ("log_probs", "full")
        self._policy = policy
        watch(policy)
        self._pad_output: bool | None = None
        self._scorer_of = ScorerOf(self._placeholders)
        self._said: set[str] = set()

    def __repr__(self) -> str:
        return f"FromCollector({self.gen_log_probs!r})"

    @classmethod
    def of(cls, gen_model: Any, gen_log_probs: GenLogProbs, **options: Any) -> FromCollector:
        """Return the side that a ``gen_model`` stands for: ``"from_collector"``, or an instance.

        Raises:
            OptionError: ``gen_model`` is neither, or an instance and an option contradict each other.
        """
        if isinstance(gen_model, FromCollector):
            if gen_log_probs not in ("auto", gen_model.gen_log_probs):
                raise OptionError(f"gen_log_probs={gen_log_probs!r} contradicts {gen_model!r}: give it once")
            if options:
                raise OptionError(f"give {', '.join(options)} to {gen_model!r} only")
            return gen_model
        if gen_model != "from_collector":
            raise OptionError(f"gen_model must be a model or 'from_collector', got {gen_model!r}")
        return cls(gen_log_probs, **options)

    def expecting(
        self, *, log_probs_full_key: NestedKey | None = None, pad_output: bool | None = None
    ) -> FromCollector:
        """Return a copy with other expectations.

        Args:
            log_probs_full_key: where recorded log-probs are if no policy tells.
            pad_output: of the reference; a policy must have the same.
        """
        twin = copy.copy(self)
        twin._key = self._key if log_probs_full_key is None else log_probs_full_key
        twin._pad_output = self._pad_output if pad_output is None else pad_output
        twin.audit = copy.deepcopy(self.audit)  # each transform has its own audit
        twin._said, twin._scorer_of = set(), ScorerOf(self._placeholders)
        return twin

    def policy(self, collector: Any) -> LLMWrapperBase | None:
        """Return the collector's policy, or the one that was given; ``None``: there is no ``LLMWrapperBase``.

        Raises:
            InputError: its ``pad_output`` is not the reference's.
        """
        policy = self._policy if collector is None else policy_of(collector)
        if not isinstance(policy, LLMWrapperBase):
            return None
        if self._pad_output is not None and policy.pad_output != self._pad_output:
            raise InputError(
                f"pad_output mismatch: the collector's policy has pad_output={policy.pad_output}, the "
                f"reference pad_output={self._pad_output}. Both sides of a KL share one value."
            )
        return policy

    def scores_with(self, policy: Any) -> bool:
        return True

    def log_probs(
        self, batch: TokenBatch, td: TensorDictBase, collector: Any, temperature: float = 1.0
    ) -> Scored:
        """Return the log-probs of a batch, recorded or scored again.

        Raises:
            CollectorError: there are no log-probs to reuse, or no policy to ask; says what to pass instead.
            DriftError: an audit measured too large a difference, or the recorded log-probs are not at
                ``temperature``.
            InputError: the policy's ``pad_output`` is not the reference's.
            OptionError: neither the recorded log-probs nor those of the policy's engine are at
                ``temperature``.
        """
        policy, why = self.policy(collector), ""
        if self.gen_log_probs != "rescore":
            unlike = self._why_not_comparable(batch, td, policy, temperature)
            recorded, why_not = (None, unlike) if unlike else self._recorded(batch, td, policy)
            if recorded is not None:
                if policy is None and collector is not None:
                    self._warn_once(
                        "nothing is known of how the collector's policy, a "
                        f"{type(collector.policy).__name__}, samples: its recorded log-probs are assumed to "
                        f"be those of softmax(logits / {temperature:g}).\nGive the collector the "
                        "LLMWrapperBase itself, or a module that holds one: then the policy's engine tells"
                    )
                if policy is not None and (collector is None or _is_unseen(policy)):
                    self._warn_of_unseen(policy)
                self._audit(recorded, batch, td, policy, temperature)
                return Scored(values=recorded, origin=Origin(None, None), is_recorded=True)
            if unlike and self.audit.fraction:
                self.audit.complain(f"{unlike}. {TEMPERATURES}; or pass audit=0")
            if self.gen_log_probs == "reuse":
                cure = TEMPERATURES if unlike else "Let the policy record log-probs (return_log_probs=True)"
                raise CollectorError(
                    f"gen_log_probs='reuse', but {why_not}. {cure}; or pass gen_log_probs='rescore' inside a "
                    "collector."
                )
            why = f"{why_not}, and "
            if self._can_score(policy, temperature):
                again = "They are scored again (gen_log_probs='auto')"
                if unlike:
                    self._warn_once(f"{unlike}. {again}. {TEMPERATURES}")
                else:
                    self._log_once(
                        f"nothing is reused: {why_not}. {again}, which costs another pass over every sample"
                    )
        if policy is None and collector is not None:
            raise CollectorError(
                f"from_collector: {why}the collector's policy is a {type(collector.policy).__name__}, which "
                "cannot score: expected an LLMWrapperBase such as vLLMWrapper.\nPass gen_model= with the "
                "model that sampled."
            )
        if policy is None:
            raise CollectorError(
                f"from_collector: {why}there is no collector whose policy could score.\n{where_to_stand()}; "
                "keep the policy's log-probs in the batch; or pass gen_model= with a model (or "
                "FromCollector(policy=...))."
            )
        if not self._can_score(policy, temperature):
            raise OptionError(
                f"from_collector: {why}the policy's engine scores at temperature "
                f"{temperature_of(self._scorer_of(policy)):g} only, while the reference's log-probs are "
                f"those of softmax(logits / {temperature:g}). {TEMPERATURES}"
            )
        return self._score(batch, policy)

    def settle_zeros(
        self,
        recorded: torch.Tensor,
        ref: torch.Tensor | None,
        batch: TokenBatch,
        collector: Any,
        temperature: float,
    ) -> tuple[Scored, list[int] | None]:
        """Check recorded zeros, and return log-probs without placeholders.

        Args:
            recorded: the values that :meth:`log_probs` returned, ``[N]``, nats.
            ref: the reference's log-probs; ``None``: they are not computed yet.
            batch: the tokens.
            collector: the collector whose policy may be asked, or ``None``.
            temperature: of both sides.

        Returns:
            The log-probs, and the samples that the policy's engine scored again; its weights are the
            log-probs' origin. The samples are ``None`` if there are doubtful zeros that only the missing
            reference could settle.

        Raises:
            MissingLogProbError: a 0.0 is a placeholder, and ``gen_log_probs="reuse"`` or no policy can be
                asked.
        """
        settled = Scored(values=recorded, origin=Origin(None, None), is_recorded=True)
        doubtful = (
            {} if self.on_zero == "allow" else doubtful_zeros(recorded, ref, batch.packed_keep, batch.lengths)
        )
        if not doubtful:
            return settled, []
        policy = self.policy(collector)
        if policy is None or not self._can_score(policy, temperature):
            if ref is None:
                return settled, None
            self.check_zeros(recorded, ref, batch, temperature)
            return settled, []
        samples = list(doubtful)
        part = batch.select(samples)
        again = self._score(part, policy)
        scored = dict(zip(samples, again.values.split(part.lengths), strict=True))
        false = {i: at[scored[i].cpu()[at] < SURE] for i, at in doubtful.items()}
        false = {i: at for i, at in false.items() if len(at)}
        if not false:
            return settled, []
        i, at = next(iter(false.items()))
        but = f"the policy's engine gives it {float(scored[i][at[0]]):.4f}"
        text = zero_text("recorded log-probs", i, int(at[0]), but, false)
        if self.gen_log_probs == "reuse":
            complain(
                f"{text}.\nPass gen_log_probs='auto' or 'rescore', or leave such tokens out of the mask",
                self.on_zero,
            )
            return settled, []
        self._warn_once(f"{text}. Such samples are scored again (gen_log_probs='auto')")
        rows = [scored[i].cpu() if i in false else row for i, row in enumerate(recorded.split(batch.lengths))]
        return dataclasses.replace(settled, values=torch.cat(rows), origin=again.origin), list(false)

    def check_zeros(
        self, recorded: torch.Tensor, ref: torch.Tensor, batch: TokenBatch, temperature: float
    ) -> None:
        """Refuse a 0.0 that the reference is not sure of, if no policy can be asked.

        Raises:
            MissingLogProbError: there is one, and ``on_zero="raise"``.
        """
        if is_same_temperature(temperature, 1.0):
            ask = (
                f"{where_to_stand()}, so that the policy can be asked; or pass FromCollector(policy=...), or "
                "gen_model= with the model that sampled"
            )
        else:
            ask = (
                f"An engine that generates cannot be asked about softmax(logits / {temperature:g}), only "
                "about temperature 1: make the policy's with logprobs_mode='raw_logprobs' and leave the "
                "reference at temperature 1"
            )
        cure = (
            f"{ask}; or leave the token out of the mask; or, if the policy is that sure, pass on_zero='allow'"
        )
        names = {"what": "recorded log-probs", "who": "the reference", "cure": cure}
        check_zeros(recorded, ref, batch.packed_keep, batch.lengths, on_zero=self.on_zero, **names)

    def _score(self, batch: TokenBatch, policy: Any) -> Scored:
        # If a wrapper names no adapter, its call may still use one: then the adapter is not known.
        adapter = adapter_id(policy.lora_request) if hasattr(policy, "lora_request") else None
        return score_batch(self._scorer_of(policy), batch, adapter)

    def _why_not_comparable(
        self, batch: TokenBatch, td: TensorDictBase, policy: Any, temperature: float
    ) -> str | None:
        """Return why recorded log-probs cannot be compared with the reference's; ``None``: not known."""
        if policy is None or not policy.return_log_probs:
            return None
        found = recorded_distribution(policy)
        if found is None:
            return None
        if why := why_not_at_temperature(found, temperature):
            return why
        if found.temperature != 1.0 and any(kept.any() for kept in self._kept_prompts(batch, td, policy)):
            return (
                "prompt tokens are kept, and their recorded log-probs are those of softmax(logits), while "
                f"the reference's are those of softmax(logits / {temperature:g}): {found.why}"
            )
        return None

    def _warn_of_unseen(self, policy: Any) -> None:
        """Warn if the sampling parameters of recorded log-probs are assumed and not known."""
        watched = watch(policy)
        is_sure = watched is not None and watched.last is not None and not watched.has_varied
        mode = getattr(config_of(getattr(policy, "model", None)), "logprobs_mode", None)
        if is_sure or mode == "raw_logprobs" or isinstance(policy, TransformersWrapper):
            return
        self._warn_once(
            "the sampling parameters of the recorded log-probs are not known: this package assumes those of "
            f"the policy's last call, or those that the policy has. Its engine has logprobs_mode={mode!r}, "
            "so another temperature or top_p makes the KL wrong.\nPass gen_log_probs='rescore', or make the "
            "policy's engine with logprobs_mode='raw_logprobs'"
        )

    def _kept_prompts(self, batch: TokenBatch, td: TensorDictBase, policy: Any) -> list[torch.Tensor]:
        """Return each sample's kept prompt tokens, ``[L]`` bool; an empty list: no prompts are stored."""
        prompts = rows_of(td, nested(getattr(policy, "tokens_key", "tokens"), "prompt"))
        if prompts is None:
            return []
        rows = zip(batch.keep, batch.columns, prompts, strict=True)
        return [keep & (columns < len(prompt)) for keep, columns, prompt in rows]

    def _recorded(
        self, batch: TokenBatch, td: TensorDictBase, policy: Any
    ) -> tuple[torch.Tensor | None, str | None]:
        """Return the recorded log-probs, or why they cannot be used."""
        key = self._key
        if policy is not None:
            if not policy.return_log_probs:
                return None, "the policy records no log-probs (return_log_probs=False)"
            key = nested(policy.log_probs_key, "full")
        rows = read_rows(td, key)
        if rows is None:
            # ("log_probs", "response") alone is not enough: TorchRL 0.14's TransformersWrapper writes 0.0
            # there for the first token of every response.
            return None, f"the batch has no {key}"
        if not batch.stored:
            return None, "the batch has log-probs but not the ids they belong to"
        try:
            values = from_layout(rows, batch, what=str(key)).detach().float()
            values = only_kept(values, batch.packed_keep, batch.lengths, what=str(key))
            check_recorded(values, batch.lengths, what=str(key))
        except (InputError, MissingLogProbError) as error:
            return None, str(error)
        kept_prompts = self._kept_prompts(batch, td, policy) if has_zeros(values, batch.packed_keep) else []
        for i, (row, kept) in enumerate(zip(values.split(batch.lengths), kept_prompts, strict=False)):
            # TorchRL 0.14's vLLMWrapper writes 0.0 for a prompt token that got no log-prob from vLLM.
            at = (kept & (row == 0)).nonzero()
            if len(at):
                return (
                    None,
                    f"{key} of sample {i} is 0.0 at token {int(at[0])}, a prompt token that was not scored",
                )
        return values.clamp_(max=0.0), None

    def _audit(
        self, recorded: torch.Tensor, batch: TokenBatch, td: TensorDictBase, policy: Any, temperature: float
    ) -> None:
        """Score a few samples again and compare them with the recorded log-probs."""
        if not self.audit.fraction:
            return
        if policy is None:
            raise CollectorError(
                f"audit={self.audit.fraction} scores reused log-probs again with the policy's engine, but "
                f"there is no collector.\n{where_to_stand()}; or pass audit=0."
            )
        if not self._can_score(policy, temperature):
            raise OptionError(
                f"audit={self.audit.fraction} scores reused log-probs again, but the policy's engine scores "
                f"at temperature {temperature_of(self._scorer_of(policy)):g} only, and the recorded ones are "
                f"those of softmax(logits / {temperature:g}).\nPass audit=0, or make the policy's engine "
                "with logprobs_mode='raw_logprobs' and leave the reference at temperature 1"
            )
        tokenizer = getattr(policy, "tokenizer", None)
        score = lambda part: self._score(part, policy)  # noqa: E731
        self.audit.check(recorded, batch, origins(td), score, tokenizer)

    def _can_score(self, policy: Any, temperature: float) -> bool:
        return policy is not None and is_same_temperature(
            temperature_of(self._scorer_of(policy)), temperature
        )

    def _warn_once(self, message: str) -> None:
        """Warn once for each cause."""
        if self._is_new(message):
            warnings.warn(message, MismatchWarning, stacklevel=2)

    def _log_once(self, message: str) -> None:
        """Log once for each cause; nothing is wrong."""
        if self._is_new(message):
            logger.warning("vllm_kl: from_collector: %s", message)

    def _is_new(self, message: str) -> bool:
        # All temperatures of a schedule are one cause.
        cause = re.sub(r"[0-9.]+", "", message.partition(":")[0])
        is_new = cause not in self._said
        self._said.add(cause)
        return is_new
