"""The generation side of a KL, from the collector whose policy made the tokens: reused where it can be, else scored again.

    policy's engine and sampling parameters -> of which distribution its log-probs are (recorded.py) -> the reference's?
        yes: the batch's own log-probs, a few of them audited, exact zeros checked
        no: the policy's engine scores the ids again, or an error that says what to change

It knows collectors and their policies; nothing of the reference but its temperature.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.modules.llm import TransformersWrapper
from torchrl.modules.llm.policies import LLMWrapperBase

from vllm_kl.alignment import check_finite, from_layout
from vllm_kl.audit import Audit, OnDrift
from vllm_kl.diagnostics import MismatchWarning
from vllm_kl.engines.generate import config_of
from vllm_kl.errors import CollectorError, InputError, MissingLogProbError, OptionError
from vllm_kl.generated import adapter_id, watch
from vllm_kl.inputs import nested, rows_of
from vllm_kl.placeholders import Placeholders, check_placeholders
from vllm_kl.recorded import (
    SURE,
    OnZero,
    Recorded,
    check_on_zero,
    check_recorded,
    check_zeros,
    complain,
    doubtful_zeros,
    recorded_by,
    zero_text,
)
from vllm_kl.resolver import is_same_temperature, score_batch, scorer_for, temperature_of, version_of
from vllm_kl.types import Scorer, TokenBatch

GenLogProbs = Literal["auto", "reuse", "rescore"]

TEMPERATURES = (
    "Equal weights would not give 0. What works: logprobs_mode='raw_logprobs' (vLLM's default) in the policy's engine, and a "
    "reference at temperature 1; or logprobs_mode='processed_logprobs' and no sampling parameter but temperature=T, and the "
    "same for the reference (VLLMReference(path, temperature=T))"
)


def policy_of(collector: Any) -> Any:
    """Return a collector's policy; of a module that is none of TorchRL's wrappers, the one wrapper in it that generates."""
    policy = getattr(collector, "policy", None)
    if isinstance(policy, torch.nn.Module) and not isinstance(policy, LLMWrapperBase):
        inside = [m for m in policy.modules() if isinstance(m, LLMWrapperBase) and m.generate]
        return inside[0] if len(inside) == 1 else policy
    return policy


def _found(policy: Any) -> Recorded | None:
    watched = watch(policy)
    return recorded_by(policy, None if watched is None else watched.last)


def why_unlike(policy: LLMWrapperBase, temperature: float) -> str:
    """Return why what a policy records is not of ``softmax(logits / temperature)``; empty: it is, or nothing is known."""
    found = _found(policy)
    if found is None:
        return ""
    if found.temperature is None:
        return f"the recorded log-probs are not those of softmax(logits) at any temperature: {found.why}"
    if not is_same_temperature(found.temperature, temperature):
        return (
            f"the recorded log-probs are those of softmax(logits / {found.temperature:g}), the reference's of softmax(logits / "
            f"{temperature:g}): {found.why}"
        )
    return ""


class FromCollector:
    """The generation side of a KL, taken from the collector whose policy made the tokens.

    Args:
        gen_log_probs: ``"reuse"`` takes the log-probs that the policy recorded when it sampled; ``"rescore"`` asks the
            policy's engine again; ``"auto"`` reuses them where they are there, finite on every kept token and those of the
            reference's distribution, else rescores.
        audit: this fraction of the samples whose log-probs are reused is scored again and compared.
        audit_tolerance, on_drift: see :class:`~vllm_kl.audit.Audit`.
        on_zero: what to do with a recorded log-prob of exactly 0.0 that the reference is not sure of (less than 0.9)
            and that nobody can be asked about: ``"raise"`` (the default), ``"warn"`` of each such batch, or ``"allow"``,
            which believes all of them. Where the policy's engine can be asked, it is: what it is not sure of either is a
            placeholder, and ``"auto"`` takes the engine's log-probs of that sample, ``"reuse"`` refuses. With ``deferred=`` the
            reference is not there yet, and every sample with a recorded 0.0 is scored again by the policy's engine.
        placeholders: of a policy that is asked again; as :class:`~vllm_kl.VLLMScorer` takes it.
        policy: where there is no collector (a ``postproc``, a replay buffer, a plain batch): the wrapper that sampled, whose
            engine is asked then. Inside an env the collector's is. Log-probs do not tell what they were sampled with: where
            ``logprobs_mode`` is ``processed_logprobs``, or not known, stored ones are taken for those of the parameters
            that the policy sampled with last (else: has), with one warning unless all its calls since this was made had the
            same. Change a temperature only where no stored log-probs are reused, or pass ``"rescore"``.

    Both sides are log-probs of ``softmax(logits / T)``, T the reference's temperature (``VLLMReference(path, temperature=T)``).
    What the policy recorded is told by its engine and its sampling parameters, see :mod:`vllm_kl.recorded`:

    | the policy's engine | it samples with | recorded | ``"reuse"``, ``"auto"`` | ``"rescore"`` |
    |---|---|---|---|---|
    | ``raw_logprobs`` (vLLM's default) | anything but structured outputs | T = 1 | with a reference at 1 | the same |
    | ``processed_logprobs`` | nothing else, or ``temperature=0`` | T = 1 | with a reference at 1 | the same |
    | ``processed_logprobs`` | ``temperature=0.5`` | T = 0.5 | with a reference at 0.5 | with a reference at 1 |
    | ``processed_logprobs`` | ``top_p``, ``top_k``, penalties, ... | neither | never | with a reference at 1 |
    | either | structured outputs | neither | never | with a reference at 1 |
    | ``raw_logits``, ``processed_logits`` | | no log-probs | never | never: the engine is refused |

    Where a cell says no, ``"reuse"`` raises; ``"auto"`` warns once and rescores, if that column says yes; an ``audit`` raises.
    Samples drawn at another temperature than 1 and compared at 1 give the log-ratio of the two models' own distributions: 0 for
    equal weights, but no unbiased estimate of their KL. Without a collector and ``policy=``, or with a policy that is a mere
    function, nothing is known of the engine: what is recorded is taken for log-probs of the reference's temperature.

    Specs and construction never need the collector: the policy is looked up at each step, so one that is replaced or
    updated is followed. Outside an env (a ``postproc``, a replay buffer, a plain batch) there is no collector: without
    ``policy=`` only recorded log-probs can be used.

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
                f"gen_log_probs={gen_log_probs!r} does not exist; choose one of {', '.join(get_args(GenLogProbs))}"
            )
        self.gen_log_probs = gen_log_probs
        self.audit = Audit(audit, tolerance=audit_tolerance, on_drift=on_drift)
        if audit and gen_log_probs == "rescore":
            raise OptionError("audit has no effect with gen_log_probs='rescore': every log-prob is the engine's own")
        self._placeholders = check_placeholders(placeholders)
        check_on_zero(on_zero)
        self.on_zero: OnZero = on_zero
        self._key: NestedKey = ("log_probs", "full")
        self._policy = policy
        if gen_log_probs != "rescore":
            watch(policy)
        self._pad_output: bool | None = None
        self._resolved: tuple[tuple[Any, Any], Scorer] | None = None  # of which engine and adapter
        self._said: set[str] = set()
        self.version: int | None = None
        self.adapter: int | None = None

    def __repr__(self) -> str:
        return f"FromCollector({self.gen_log_probs!r})"

    @classmethod
    def of(cls, gen_model: Any, gen_log_probs: GenLogProbs, **options: Any) -> FromCollector:
        """Return what ``gen_model="from_collector"``, or an instance, stands for."""
        if isinstance(gen_model, FromCollector):
            if gen_log_probs not in ("auto", gen_model.gen_log_probs):
                raise OptionError(f"gen_log_probs={gen_log_probs!r} contradicts {gen_model!r}; give it once")
            if options:
                raise OptionError(f"give {', '.join(options)} to {gen_model!r}, once")
            return gen_model
        if gen_model != "from_collector":
            raise OptionError(f"gen_model must be a model or 'from_collector', got {gen_model!r}")
        return cls(gen_log_probs, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_resolved": None}  # an engine stays where it runs

    def expecting(self, *, log_probs_full_key: NestedKey, pad_output: bool | None) -> FromCollector:
        """Return a copy that knows where recorded log-probs lie when no policy tells, and the ``pad_output`` to expect."""
        twin = copy.copy(self)
        twin._key, twin._pad_output = log_probs_full_key, pad_output
        twin.audit = copy.deepcopy(self.audit)  # each transform audits for itself
        twin._said = set()
        return twin

    def policy(self, collector: Any) -> LLMWrapperBase | None:
        """Return the collector's policy, or the one that was given, if there is one that TorchRL can ask for log-probs.

        Raises:
            InputError: its ``pad_output`` is not the reference's.
        """
        policy = self._policy if collector is None else policy_of(collector)
        if not isinstance(policy, LLMWrapperBase):
            return None
        if self._pad_output is not None and policy.pad_output != self._pad_output:
            raise InputError(
                f"pad_output mismatch: the collector's policy has pad_output={policy.pad_output}, the reference "
                f"pad_output={self._pad_output}. Both sides of a KL share one value."
            )
        return policy

    def watch(self, collector: Any) -> None:
        """Have the collector's policy remember what it samples with, from its first call on."""
        if collector is not None and self.gen_log_probs != "rescore":
            watch(policy_of(collector))

    def log_probs(
        self, batch: TokenBatch, td: TensorDictBase, collector: Any, temperature: float = 1.0
    ) -> tuple[list[torch.Tensor], bool]:
        """Return B float32 tensors ``[L]``, finite inside the batch's mask, 0.0 outside; and whether they were recorded.

        Raises:
            CollectorError: nothing recorded to reuse, or nobody to ask; says what to pass instead.
            DriftError: an audit found other numbers than the recorded ones, or they are not those of ``temperature``.
            InputError: the policy's ``pad_output`` is not the reference's.
            OptionError: neither what was recorded nor what the policy's engine scores again is of ``temperature``.
        """
        policy, why = self.policy(collector), ""
        if self.gen_log_probs != "rescore":
            unlike = self._unlike(batch, td, policy, temperature)
            recorded, why_not = (None, unlike) if unlike else self._recorded(batch, td, policy)
            if recorded is not None:
                if policy is None and collector is not None:
                    self._say(
                        f"nothing is known of how the collector's policy, a {type(collector.policy).__name__}, samples: the "
                        f"log-probs that it recorded are taken for those of softmax(logits / {temperature:g}). Give the collector "
                        "the LLMWrapperBase itself, or a module that holds one, and its engine is asked"
                    )
                if policy is not None and collector is None:
                    self._warn_of_stored(policy)
                self._audit(recorded, batch, policy, temperature)
                return recorded, True
            if unlike and self.audit.fraction:
                self.audit.complain(f"{unlike}. {TEMPERATURES}; or audit=0")
            if self.gen_log_probs == "reuse":
                cure = TEMPERATURES if unlike else "Let the policy record log-probs (return_log_probs=True)"
                raise CollectorError(
                    f"gen_log_probs='reuse', but {why_not}. {cure}, or pass gen_log_probs='rescore' inside a collector."
                )
            why = f"{why_not}, and "
            if unlike and self._can_score(policy, temperature):
                self._say(f"{unlike}. They are scored again (gen_log_probs='auto'). {TEMPERATURES}")
        if policy is None and collector is not None:
            raise CollectorError(
                f"from_collector: {why}the collector's policy is a {type(collector.policy).__name__}, which cannot be asked to "
                "score: expected an LLMWrapperBase such as vLLMWrapper. Pass gen_model= with the model that sampled."
            )
        if policy is None:
            raise CollectorError(
                f"from_collector: {why}there is no collector whose policy could be asked to score. Append the transform to "
                "the env of an LLMCollector, keep the policy's log-probs in the batch, or pass gen_model= with a model "
                "(or FromCollector(policy=...))."
            )
        if not self._can_score(policy, temperature):
            raise OptionError(
                f"from_collector: {why}the policy's engine scores again at temperature {temperature_of(self._scorer_of(policy)):g} "
                f"only, while the reference's log-probs are those of softmax(logits / {temperature:g}). {TEMPERATURES}"
            )
        return self._score(batch, policy), False

    def settle_zeros(
        self,
        recorded: list[torch.Tensor],
        ref: list[torch.Tensor] | None,
        batch: TokenBatch,
        collector: Any,
        temperature: float,
    ) -> tuple[list[torch.Tensor], list[int] | None]:
        """Return recorded log-probs without placeholders, and which samples were scored again for it.

        Args:
            recorded: as :meth:`log_probs` returned them.
            ref: the reference's; ``None``: not there yet, and ``None`` samples are returned where nobody else can be asked.

        Raises:
            MissingLogProbError: an exact 0.0 is no log-prob, and ``gen_log_probs="reuse"`` or nobody can be asked.
        """
        doubtful = {} if self.on_zero == "allow" else doubtful_zeros(recorded, ref, batch.keep)
        if not doubtful:
            return recorded, []
        policy = self.policy(collector)
        if policy is None or not self._can_score(policy, temperature):
            if ref is None:
                return recorded, None
            self.check_zeros(recorded, ref, batch.keep, temperature)
            return recorded, []
        samples = list(doubtful)
        scored = dict(zip(samples, self._score(batch.select(samples), policy), strict=True))
        false = {i: at[scored[i].cpu()[at] < SURE] for i, at in doubtful.items()}
        false = {i: at for i, at in false.items() if len(at)}
        if not false:
            return recorded, []
        i, at = next(iter(false.items()))
        but = f"the policy's engine gives it {float(scored[i][at[0]]):.4f}"
        text = zero_text("recorded log-probs", i, int(at[0]), but, false)
        if self.gen_log_probs == "reuse":
            complain(
                f"{text}. Pass gen_log_probs='auto' or 'rescore', or leave such tokens out of the mask", self.on_zero
            )
            return recorded, []
        self._say(f"{text}. Such samples are scored again (gen_log_probs='auto')")
        return [scored[i] if i in false else row for i, row in enumerate(recorded)], list(false)

    def check_zeros(
        self, recorded: list[torch.Tensor], ref: list[torch.Tensor], keep: list[torch.Tensor], temperature: float
    ) -> None:
        """Refuse an exact 0.0 that the reference is not sure of, where nobody else can be asked.

        Raises:
            MissingLogProbError: there is one, and ``on_zero="raise"``.
        """
        ask = (
            "append the transform to the env of an LLMCollector, whose policy can be asked, or pass FromCollector(policy=...); "
            "pass gen_model= with the model that sampled"
            if is_same_temperature(temperature, 1.0)
            else f"an engine that generates cannot be asked about softmax(logits / {temperature:g}), only about temperature 1: "
            "make the policy's with logprobs_mode='raw_logprobs' and leave the reference at temperature 1"
        )
        cure = (
            f"It is never taken for a log-prob: {ask}; leave the token out of the mask; or, where the policy is that sure, pass "
            "on_zero='allow'"
        )
        names = {"what": "recorded log-probs", "who": "the reference", "cure": cure}
        check_zeros(recorded, ref, keep, on_zero=self.on_zero, **names)

    def _score(self, batch: TokenBatch, policy: Any) -> list[torch.Tensor]:
        scorer = self._scorer_of(policy)
        values = score_batch(scorer, batch)
        self.version = version_of(scorer, batch)
        # A wrapper that names none may have it bound to its call, which is what scored.
        self.adapter = adapter_id(policy.lora_request) if hasattr(policy, "lora_request") else None
        return values

    def _unlike(self, batch: TokenBatch, td: TensorDictBase, policy: Any, temperature: float) -> str | None:
        """Return why what the policy records is not comparable with the reference; ``None``: it is, or nothing is known."""
        if policy is None or not policy.return_log_probs:
            return None
        if why := why_unlike(policy, temperature):
            return why
        if (
            (found := _found(policy)) is not None
            and found.temperature != 1.0
            and any(kept.any() for kept in self._kept_prompts(batch, td, policy))
        ):
            return (
                "prompt tokens are kept, whose recorded log-probs are those of softmax(logits), while the reference's are those "
                f"of softmax(logits / {temperature:g}): {found.why}"
            )
        return None

    def _warn_of_stored(self, policy: Any) -> None:
        """Warn of log-probs that may have been sampled with other parameters than those that are taken for theirs."""
        watched = watch(policy)
        is_sure = watched is not None and watched.last is not None and not watched.has_varied
        mode = getattr(config_of(getattr(policy, "model", None)), "logprobs_mode", None)
        if is_sure or mode == "raw_logprobs" or isinstance(policy, TransformersWrapper):
            return
        self._say(
            "stored log-probs do not tell what they were sampled with: they are taken for those of the parameters that the given "
            f"policy sampled with last, or has (its engine has logprobs_mode={mode!r}, so a temperature or top_p that was changed "
            "since makes the KL wrong). Pass gen_log_probs='rescore', or make the policy's engine with "
            "logprobs_mode='raw_logprobs'"
        )

    def _kept_prompts(self, batch: TokenBatch, td: TensorDictBase, policy: Any) -> list[torch.Tensor]:
        """Return which tokens are kept and of the prompt, ``[L]`` bool each; none where no prompts are stored."""
        prompts = rows_of(td, nested(getattr(policy, "tokens_key", "tokens"), "prompt"))
        if prompts is None:
            return []
        rows = zip(batch.keep, batch.columns, prompts, strict=True)
        return [keep & (columns < len(prompt)) for keep, columns, prompt in rows]

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
            check_recorded(values, batch.keep, what=str(key))
        except (InputError, MissingLogProbError) as error:
            return None, str(error)
        for i, kept in enumerate(self._kept_prompts(batch, td, policy)):
            # While it generates, TorchRL 0.14's vLLMWrapper writes 0.0 where vLLM gave no log-prob for a prompt token.
            zero = kept & (values[i] == 0)
            if zero.any():
                return (
                    None,
                    f"{key} of sample {i} is 0.0 at token {int(zero.nonzero()[0])}, a prompt token that was not scored",
                )
        return [
            torch.where(keep, value.clamp(max=0.0), 0.0) for value, keep in zip(values, batch.keep, strict=True)
        ], None

    def _audit(self, recorded: list[torch.Tensor], batch: TokenBatch, policy: Any, temperature: float) -> None:
        if not self.audit.fraction:
            return
        if policy is None:
            raise CollectorError(
                f"audit={self.audit.fraction} scores reused log-probs again with the policy's engine, but there is no collector "
                "that has one. Append the transform to the env of an LLMCollector, or pass audit=0."
            )
        if not self._can_score(policy, temperature):
            raise OptionError(
                f"audit={self.audit.fraction} scores reused log-probs again, but the policy's engine does that at temperature "
                f"{temperature_of(self._scorer_of(policy)):g} only, and the recorded ones are those of softmax(logits / "
                f"{temperature:g}): only like can be compared with like. Pass audit=0, or make the policy's engine with "
                "logprobs_mode='raw_logprobs' and leave the reference at temperature 1"
            )
        tokenizer = getattr(policy, "tokenizer", None)
        self.audit.check(recorded, batch, lambda part: score_batch(self._scorer_of(policy), part), tokenizer)

    def _can_score(self, policy: Any, temperature: float) -> bool:
        return policy is not None and is_same_temperature(temperature_of(self._scorer_of(policy)), temperature)

    def _scorer_of(self, policy: Any) -> Scorer:
        weights = (policy.model, getattr(policy, "lora_request", None))
        if self._resolved is None or any(a is not b for a, b in zip(self._resolved[0], weights, strict=True)):
            self._resolved = weights, scorer_for(policy, self._placeholders)
        return self._resolved[1]

    def _say(self, message: str) -> None:
        """Warn of what is found at every step, once for each cause."""
        cause = re.sub(r"[0-9.]+", "", message.partition(":")[0])  # a schedule's temperatures are one cause
        if cause not in self._said:
            self._said.add(cause)
            warnings.warn(message, MismatchWarning, stacklevel=2)
