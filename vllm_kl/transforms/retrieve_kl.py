"""``RetrieveKL`` writes the log-probs of policy and reference, their KL, and the reward minus the KL.

The class is a drop-in for TorchRL's ``RetrieveKL`` (``torchrl.envs.llm.transforms``, 0.14): it has the same
arguments, defaults and keys. A batch passes these stages:

    read_batch -> log-probs of both sides -> KL -> to_layout -> write

The transform writes after all stages have succeeded: an error leaves the tensordict as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.data import Composite
from torchrl.modules.llm.policies import LogProbs

from vllm_kl.batch.alignment import PaddingSide
from vllm_kl.batch.mask_recorded import mask_recorded as mask_recorded_log_probs
from vllm_kl.batch.write_entries import declare, set_rows
from vllm_kl.kl import Direction, Estimator
from vllm_kl.transforms.audit import OnDrift
from vllm_kl.transforms.deferred import Deferral, Deferred
from vllm_kl.transforms.estimation import Estimation
from vllm_kl.transforms.from_collector import FromCollector, GenLogProbs
from vllm_kl.transforms.kl_transform import KLTransform
from vllm_kl.transforms.penalty import Penalty
from vllm_kl.transforms.recorded_zeros import OnZero, has_zeros
from vllm_kl.transforms.service_options import service_of
from vllm_kl.transforms.tokens_transform import TokenOptions, side_log_probs
from vllm_kl.transforms.two_sided_transform import TwoSidedTransform, Written
from vllm_kl.transforms.two_sides import (
    check_two_models,
    gen_model_of,
    ref_model_of,
    two_sides,
    warn_of_two_lengths,
)
from vllm_kl.types import Rows, Scored, TokenBatch
from vllm_kl.weights.versions import OnStale, check_stale, policy_range


class RetrieveKL(TwoSidedTransform, KLTransform):
    """Writes the log-probs of policy and reference, the KL of each token, and the reward minus the KL.

    Args:
        gen_model: the model that generated the tokens, with ``generate=False``. Or ``"from_collector"`` (or a
            :class:`FromCollector`): the collector's policy. The transform looks the policy up at each step,
            so the transform can be appended to an env before the collector exists.
        ref_model: the reference, with ``generate=False``: a ``VLLMReference``, ``vLLMWrapper``,
            ``TransformersWrapper`` or another ``LLMWrapperBase``.

    Keyword Args:
        gen_model_factory, ref_model_factory: make the model, instead of passing it; each is called once.
        assistant_only: ``True`` keeps the assistant's tokens, including the token that ends a turn; both
            models need ``input_mode="history"``. ``False`` keeps every token but the first.
        gen_log_probs_full_key, ref_log_probs_full_key: where the log-probs are written.
        history_key: where the history is. The history is read only if the tensordict has no ids.
        tokenizer_kwargs: passed to the chat template when a history is tokenized.
        detach: ``True`` writes results without a graph.
        device: where to move transformers models; vLLM engines stay where they run. Results are on the device
            of the tensordict.
        tokenizer: used if the tensordict has no ids; default: the reference's, else the gen model's.
        padding_side: where rows of different lengths are padded.
        kl_key: where the KL is written.
        add_to_reward: ``True`` also writes ``reward - coeff * kl``; a reward per sequence becomes one per
            token.
        coeff: the KL's coefficient: a number, a schedule (called with the number of earlier batches, or env
            steps) or a controller such as ``torchrl.data.AdaptiveKLController``; see
            :class:`~vllm_kl.transforms.coefficient.Coefficient`.
        service_backend: ``"ray"`` keeps the reference in a Ray actor, where ``ref_model_factory`` makes it;
            everything else stays in the calling process. ``"direct"``: in this process. ``None``: as an
            enclosing ``torchrl.service_backend`` says, else ``"direct"``.
        actor_name: the name of that actor, which makes it a service: all processes of a Ray cluster that give
            the name share its engine. A service of this name that exists must serve the reference that
            ``ref_model_factory`` makes; without a factory it is used as it is.
            ``VLLMReference.close_service`` ends it.
        service_backend_options: options of the actor: Ray's own (``num_gpus``, ``resources``,
            ``max_restarts``, ...), in a dict ``"actor_options"`` or beside it; ``"idle_timeout_s"``: how many
            seconds a service lives after the last process that uses it (600; ``None``: until it is closed);
            ``"ray_init_config"``: arguments of ``ray.init``, for a process that is in no Ray cluster.
        use_ray_service: ``True`` is the older spelling of ``service_backend="ray"``. Deprecated; it goes with
            TorchRL 0.16.
        estimator: of the KL that is written and subtracted: ``"k1"`` (the log-ratio: unbiased, may be
            negative), ``"k2"`` (half the square of the log-ratio: low variance, biased), ``"k3"`` (unbiased,
            never negative) or ``"abs"`` (the absolute log-ratio: a distance, not a KL); see
            :func:`vllm_kl.kl_estimate`.
        extra_estimators: more estimators, written to ``kl_<name>`` and not subtracted. Example: ``("k3",)``
            logs k3 while the reward uses k1.
        clamp_log_ratio, clamp_output, direction: as in :func:`vllm_kl.kl_estimate`.
        mask_key: where the mask is written, bool, for losses and averages: ``True`` at kept tokens. ``None``:
            no mask is written.
        gen_log_probs: with ``"from_collector"``: ``"reuse"``, ``"rescore"`` or ``"auto"``; see
            :class:`FromCollector`.
        on_stale: what to do if the policy is asked to score samples again and its weights are not known to be
            the weights that sampled them: ``"raise"`` (the default), ``"warn"`` or ``"allow"``. "Not known"
            means that the versions or the adapters differ, or that a version is missing or no number.
            ``LLMCollector(track_policy_version=EnginePolicyVersion(engine))`` stamps samples with version and
            adapter; TorchRL's own tracker stamps no adapter. There is no check for a ``gen_model`` whose
            weights have no version, nor if no sample has a version and the engine still serves its first
            weights, nor at an env's step unless the engine told which weights generated the tokens.
        on_two_references: what to do if one batch leaves the collector with scores of two versions of the
            reference, because the reference was refreshed meanwhile: ``"raise"`` (the default), ``"warn"`` or
            ``"allow"``. Each score is right for the version that its sample carries.
        ref_version_key: where the version of the reference's weights is written, int64 ``[B]``; ``None``: it
            is not written. A reference whose scorer counts no versions writes none.
        audit: with ``"from_collector"``: the fraction of the samples with reused log-probs that the policy's
            engine scores again, to compare.
        audit_tolerance: the largest healthy mean difference, nats; default 0.05.
        on_drift: what to do beyond ``audit_tolerance``: ``"raise"`` (the default) or ``"warn"``; see
            :class:`~vllm_kl.transforms.audit.Audit`.
        on_zero: with ``"from_collector"``: what to do if a recorded log-prob is exactly 0.0, the reference is
            not sure of the token, and no policy can be asked: ``"raise"`` (the default), ``"warn"`` or
            ``"allow"``; see :class:`FromCollector`.
        deferred: inside an env: each step only submits the reference's work, and generation goes on
            meanwhile. ``True``: the collector fills the results in when a batch leaves it, and waits for the
            batch's last step. ``"buffer"``: batches leave without results, and you call
            :func:`vllm_kl.fill_deferred`, on a replay buffer or by hand. Until then results are missing and a
            reward that the KL will change is NaN. See :mod:`vllm_kl.transforms.deferred`.
        mask_recorded: ``True`` sets the log-probs that the policy recorded to NaN outside the mask, in every
            batch with ``"next"``: TorchRL's losses then leave these tokens out; see
            :func:`vllm_kl.mask_recorded`. ``False`` leaves them as they are, so that the batch can be scored
            again with a larger mask. Without ``mask_key`` they stay, too.
        ref_entropy_key: where the entropy of the reference's distribution at each token is written, such as
            ``("ref_entropy", "full")``, in the layout of the log-probs; ``None``: it is not computed.
        num_cpus, num_gpus: as in ``service_backend_options``.

    Writes log-probs and KL as ``[B, T]`` float32, nats (or B ragged rows), and the reward as ``[B, T, 1]``.
    Outside the mask log-probs and KL are exactly 0.0 and the KL changes no reward. Beside a history that is
    tokenized here masks are written, as by :class:`RetrieveLogProb`. ``metrics`` holds figures of the last
    batch.

    Raises:
        ValueError: a model generates, the models disagree on ``pad_output``, or a model cannot tell the
            assistant's tokens.
        OptionError: the service ``actor_name`` serves another reference than ``ref_model_factory`` makes. Or
            the reference returns no entropy, as in :class:`RetrieveLogProb`. Or
            when called: with ``from_collector``, reference and policy are one engine with the same
            adapter, or with none.
        DriftError: when called: the audit measured a larger difference than ``audit_tolerance``.
        CollectorError: when called: ``from_collector`` has no log-probs to reuse and no policy to ask.
        InputError, MissingLogProbError: when called: as :class:`RetrieveLogProb`.
        StaleError: when called: ``on_stale="raise"``, and the policy's weights are not known to have sampled
            the tokens.
        WeightsError: in the collector: ``on_two_references="raise"``, and a batch has scores of two versions
            of the reference. An error ends the thread of a collector that was started:
            :func:`~vllm_kl.check_collector`, and the next push or refresh, raise and tell it.

    >>> td = TensorDict(
    ...     tokens=TensorDict(prompt=[[5, 6]], full=[[5, 6, 7, 8]], batch_size=1),
    ...     log_probs=TensorDict(full=[[float("nan"), float("nan"), -1.0, -2.0]], batch_size=1),  # as sampled
    ...     batch_size=1,
    ... )
    >>> td = RetrieveKL("from_collector", reference)(td)
    >>> kl = td["log_probs", "full"].nan_to_num() - td["ref_log_probs", "full"]
    >>> torch.equal(td["kl_penalty"], kl), td["kl_penalty"][0, :2].tolist()
    (True, [0.0, 0.0])
    """

    def __init__(
        self,
        gen_model: Any = "from_collector",
        ref_model: Any = None,
        *,
        gen_model_factory: Callable[[], Any] | None = None,
        ref_model_factory: Callable[[], Any] | None = None,
        assistant_only: bool = True,
        gen_log_probs_full_key: NestedKey = ("log_probs", "full"),
        ref_log_probs_full_key: NestedKey = ("ref_log_probs", "full"),
        history_key: NestedKey = "history",
        tokenizer_kwargs: dict[str, Any] | None = None,
        detach: bool = True,
        device: torch.device | None = None,
        tokenizer: Any = None,
        padding_side: PaddingSide = "left",
        kl_key: NestedKey = "kl_penalty",
        add_to_reward: bool = True,
        coeff: Any = 1.0,
        service_backend: Literal["direct", "ray"] | None = None,
        service_backend_options: Mapping[str, Any] | None = None,
        use_ray_service: bool = False,
        actor_name: str | None = None,
        estimator: Estimator = "k1",
        gen_log_probs: GenLogProbs = "auto",
        extra_estimators: Sequence[Estimator] = (),
        clamp_log_ratio: float | None = 20.0,
        clamp_output: float | None = None,
        direction: Direction = "reverse",
        mask_key: NestedKey | None = "kl_mask",
        on_stale: OnStale = "raise",
        on_two_references: OnStale = "raise",
        ref_version_key: NestedKey | None = "ref_version",
        audit: float | None = None,
        audit_tolerance: float | None = None,
        on_drift: OnDrift | None = None,
        on_zero: OnZero | None = None,
        deferred: Deferred = False,
        mask_recorded: bool = True,
        ref_entropy_key: NestedKey | None = None,
        **kwargs: Any,
    ) -> None:
        gen = gen_model, gen_model_factory, gen_log_probs, audit, audit_tolerance, on_drift, on_zero
        service = service_of(service_backend, service_backend_options, use_ray_service, actor_name, kwargs)
        keys = gen_log_probs_full_key, ref_log_probs_full_key, ref_version_key, ref_entropy_key
        estimation = estimator, extra_estimators, clamp_log_ratio, clamp_output, direction
        tokens = assistant_only, tokenizer, tokenizer_kwargs, detach, padding_side, on_stale, mask_recorded
        sides = assistant_only, device, gen_log_probs_full_key, ref_entropy_key is not None
        super().__init__(  # in this order: what is wrong is refused before an engine starts
            options=TokenOptions(*tokens),
            written=Written(*keys, on_two_references),
            penalty=Penalty(Estimation(*estimation), kl_key, mask_key, add_to_reward, coeff),
            sides=two_sides(
                gen_model_of(*gen),
                ref_model_of(ref_model, ref_model_factory, service, device),
                *sides,
            ),
            history_key=history_key,
        )
        self._defer(deferred)

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the last batch: those of :attr:`Penalty.metrics`, and

        - ``gen_rescored_samples``: with ``"from_collector"``, how many samples were scored again instead of
          reused;
        - ``audit_...``: figures of the last audit. ``audit_skipped_samples`` were drawn but not compared,
          because the policy had new weights since they were sampled;
        - ``policy_version_min``, ``policy_version_max``: the versions that the samples carry, if they do.
          They differ if weights were updated while the batch was collected. ``ref_version``: the version of
          the reference's weights. In an env these describe the last batch that left the collector, see
          :func:`~vllm_kl.check_versions`;
        - ``template_...``: if a History was tokenized here. The chat template did not render ``cut_chars`` of
          the ``content_chars``, in ``cut_messages`` of the ``messages``. It rendered ``moved_messages`` at
          another place of the dialog. It marked ``inserted_chars`` as the assistant's although no message has
          them, and left ``unmarked_chars`` of the assistant's messages unmarked.
        """
        audit = self._gen.audit.metrics if isinstance(self._gen, FromCollector) else {}
        return {**self.penalty.metrics, **self._rescored, **audit, **self._versions, **self._texts.metrics}

    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        collector = self._collector()
        if isinstance(self._gen, FromCollector) and (policy := self._gen.policy(collector)) is not None:
            check_two_models(policy, self.ref_model)
            warn_of_two_lengths(policy, self.ref_model)
        batch = self._read(td)
        temperature = self._ref.temperature
        how: dict[str, Any] = {"temperature": temperature, "detach": self.detach}
        gen = side_log_probs(self._gen, batch, td, collector, **how)
        sampled = self._sampled(td)
        is_counted = isinstance(self._gen, FromCollector) or gen.origin.version is not None
        if is_counted and not gen.is_recorded:
            check_stale(sampled, gen.origin, self.on_stale)
        if self._is_step and not (gen.is_recorded and has_zeros(gen.values, batch.packed_keep)):
            self._close_step()  # the policy is done: its weights may be replaced while the reference scores
        ref = None if self._deferral is not None else side_log_probs(self._ref, batch, td, collector, **how)
        are_zeros_settled, num_rescored = True, len(batch)
        if isinstance(self._gen, FromCollector) and gen.is_recorded:
            of_ref = None if ref is None else ref.values
            gen, rescored = self._gen.settle_zeros(gen.values, of_ref, batch, collector, temperature)
            are_zeros_settled, num_rescored = rescored is not None, len(rescored or ())
            if rescored and sampled:
                check_stale([sampled[i] for i in rescored], gen.origin, self.on_stale)
        if isinstance(self._gen, FromCollector):
            self._rescored = {"gen_rescored_samples": float(num_rescored)}
        # The versions of a collector's batch are read when the batch leaves the collector.
        versions = None if self._is_step and collector is not None else policy_range(sampled)
        keeps_recorded = gen.is_recorded and next_td is td
        write = partial(
            self._write_kl, batch, gen.values, versions, td.device, keeps_recorded, are_zeros_settled
        )
        if ref is not None:
            written = write(next_td, ref)
            self._write_masks(written if next_td is td else td, batch)
            return written
        assert self._deferral is not None, "the reference was not asked"
        return self._deferral.submit(
            self,
            next_td,
            self._ref,
            batch,
            temperature=temperature,
            expected_version=getattr(self.ref_model, "weight_version", None),
            reward_waits=self.penalty.add_to_reward,
            write=write,
        )

    @property
    def _written_mask(self) -> NestedKey | None:
        return self.penalty.mask_key

    def _defer(self, deferred: Deferred) -> None:
        key = self.penalty.mask_key
        self._deferral = Deferral.of(
            deferred,
            self.ref_model,
            detach=self.detach,
            on_two_references=self.on_two_references,
            finish=partial(mask_recorded_log_probs, mask_key=key)
            if self.mask_recorded and key is not None
            else None,
        )
        if self._deferral is not None:
            self.out_keys: list[NestedKey] = []  # a step writes handles, no results

    def _write_kl(
        self,
        batch: TokenBatch,
        gen: torch.Tensor,
        versions: dict[str, float] | None,
        device: torch.device | None,
        keeps_recorded: bool,
        are_zeros_settled: bool,
        next_td: TensorDictBase,
        scored: Scored,
    ) -> TensorDictBase:
        """Write all results, or none; return the tensordict that has them."""
        ref = scored.values
        ref_version: Any = scored.origin.version
        if not are_zeros_settled:
            assert isinstance(self._gen, FromCollector), "no other side has recorded log-probs"
            self._gen.check_zeros(gen, ref, batch, self._ref.temperature)

        def to_rows(values: torch.Tensor) -> Rows:
            return self._to_rows(values, batch, device)

        log_probs = {self.ref_log_probs_full_key: to_rows(ref)}
        if not keeps_recorded:
            # Recorded log-probs stay: a later call must not take our zeros outside the mask for them.
            log_probs[self.gen_log_probs_full_key] = to_rows(gen)
        written = self.penalty.write(
            next_td, gen, ref, batch.packed_keep, batch.lengths, to_rows, log_probs=log_probs
        )
        if scored.entropies is not None:
            written = set_rows(written, self.ref_entropy_key, to_rows(scored.entropies))
        if self.ref_version_key is not None:
            written.set(self.ref_version_key, torch.full((len(batch),), ref_version, device=device))
        if versions is not None:
            self._versions = versions | (
                {} if self.ref_version_key is None else {"ref_version": float(ref_version)}
            )
        return written

    def clone(self) -> Self:
        twin = super().clone()
        if self._deferral is not None:
            twin._deferral = copy.copy(self._deferral)
        return twin

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        if self._deferral is not None:
            return observation_spec
        declare(observation_spec, self.gen_log_probs_full_key, LogProbs)
        declare(observation_spec, self.ref_log_probs_full_key, LogProbs)
        if self.ref_entropy_key is not None:
            declare(observation_spec, self.ref_entropy_key)
        if self.ref_version_key is not None:
            declare(observation_spec, self.ref_version_key, trailing=(), dtype=torch.int64)
        return super().transform_observation_spec(observation_spec)

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        return super().transform_reward_spec(reward_spec) if self._deferral is None else reward_spec
