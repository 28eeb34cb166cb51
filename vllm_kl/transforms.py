"""TorchRL transforms: log-probs of one model, the KL of two, the whole way from tokens to a shaped reward.

Drop-in for the classes of the same names in ``torchrl.envs.llm.transforms`` (0.14): the same arguments, the same
defaults, the same keys. The data's way through a step:

    inputs.read_batch -> one side, or two (resolver) -> kl.kl_estimate -> alignment.to_layout -> outputs.set_rows

Nothing is written before everything is computed: after an error the tensordict is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.data import Composite
from torchrl.modules.llm.policies import LogProbs

from vllm_kl.alignment import PaddingSide, to_layout
from vllm_kl.errors import InputError, OptionError
from vllm_kl.inputs import keys_of, read_batch, rows_of
from vllm_kl.kl import TOKEN_ESTIMATORS, Estimator, check_estimator, kl_estimate
from vllm_kl.outputs import declare, set_rows, write_kl
from vllm_kl.reference import remote_reference
from vllm_kl.resolver import FromCollector, GenLogProbs, ModelSide, Side, check_side, one_of, warn_unless_full
from vllm_kl.steps import NextTransform, per_token_reward, scores, to_device


class RetrieveLogProb(NextTransform):
    """Writes the log-probs of one model: of the assistant's tokens, or of every token but the first.

    Args:
        model: a ``VLLMReference``, ``vLLMWrapper``, ``TransformersWrapper`` or another ``LLMWrapperBase`` with
            ``generate=False``.

    Keyword Args:
        log_probs_full_key: where to write; default ``(model.log_probs_key, "full")``.
        assistant_only: keep the assistant's tokens (needs ``input_mode="history"``).
        tokenizer_kwargs: passed to the chat template where a history must be tokenized (``chat_template_name``, ...).
        detach: no graph on the result.
        device: where to place a transformers model; a vLLM engine stays where it runs. Results lie on the tensordict's
            device.
        tokenizer: used where the tensordict has no ids; default the model's.
        padding_side: where rows of different length are padded when ``model.pad_output``.

    Writes ``[B, T]`` float32, nats (or B ragged rows ``[L]``): finite at kept tokens, exactly 0.0 elsewhere.

    Raises:
        ValueError: the model generates, records no log-probs, or cannot tell the assistant's tokens.
        InputError: when called: nothing to score, or masks that do not fit.
        MissingLogProbError: when called: a kept token has no finite log-prob.

    >>> td = TensorDict(tokens=TensorDict(prompt=[[5, 6]], full=[[5, 6, 7, 8]], batch_size=1), batch_size=1)
    >>> td = RetrieveLogProb(reference)(td)
    >>> (td["ref_log_probs", "full"] != 0).tolist()  # the two tokens after the prompt
    [[False, False, True, True]]
    """

    def __init__(
        self,
        model: Any,
        *,
        log_probs_full_key: NestedKey | None = None,
        assistant_only: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        detach: bool = True,
        device: torch.device | None = None,
        tokenizer: Any = None,
        padding_side: PaddingSide = "left",
    ) -> None:
        if log_probs_full_key is None:
            log_probs_full_key = (model.log_probs_key, "full")
        else:
            warn_unless_full(log_probs_full_key)
        super().__init__(in_keys=list(model.in_keys), out_keys=[log_probs_full_key])
        check_side(model, assistant_only)
        self.log_probs_full_key = log_probs_full_key
        self.model = model if device is None else model.to(device)
        self.assistant_only = assistant_only
        self.detach = detach
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self._side = ModelSide(self.model)

    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        keys = keys_of(self.model, tokenizer=self.tokenizer, template_kwargs=self.tokenizer_kwargs)
        batch = read_batch(td, keys, assistant_only=self.assistant_only)
        values, _ = scores(self._side, batch, td, None, detach=self.detach)
        rows = to_layout(values, batch, pad_output=self.model.pad_output, padding_side=self.padding_side)
        return set_rows(next_td, self.log_probs_full_key, to_device(rows, td), LogProbs)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        declare(observation_spec, self.log_probs_full_key, LogProbs)
        return observation_spec


class KLComputation(NextTransform):
    """Turns two entries of log-probs into a per-token KL, and subtracts it from the reward.

    Args:
        gen_log_probs_full_key: log-probs of the model that generated.
        ref_log_probs_full_key: log-probs of the reference.

    Keyword Args:
        kl_key: where to write the KL.
        add_to_reward: also write ``reward - coeff * kl``; a reward per sequence becomes one per token.
        coeff: the KL's coefficient.
        padding_side: accepted as TorchRL's class does; rows are read and written as they are.
        estimator: ``"k1"``, ``"k2"``, ``"k3"`` or ``"abs"``; see :func:`vllm_kl.kl_estimate`.

    NaN marks a position without a score (TorchRL's generate path writes it on prompts). Where the other side has none
    either (NaN, or the 0.0 that :class:`RetrieveLogProb` writes outside its mask) the KL is 0.0; where it has one, a
    log-prob is missing, which is an error and never 0.0.

    >>> data = TensorDict(
    ...     next=TensorDict(
    ...         gen_log_probs=TensorDict(full=torch.full((2, 3), -1.0), batch_size=2),
    ...         ref_log_probs=TensorDict(full=torch.full((2, 3), -1.5), batch_size=2),
    ...         reward=torch.ones(2, 1, 1),
    ...         batch_size=2,
    ...     ),
    ...     batch_size=2,
    ... )
    >>> transform = KLComputation(("gen_log_probs", "full"), ("ref_log_probs", "full"), coeff=0.1)
    >>> data = transform(data)
    >>> data["next", "kl_penalty"]
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    >>> data["next", "reward"].shape, round(data["next", "reward"][0, 0].item(), 2)
    (torch.Size([2, 3, 1]), 0.95)
    """

    def __init__(
        self,
        gen_log_probs_full_key: NestedKey = ("log_probs", "full"),
        ref_log_probs_full_key: NestedKey = ("ref_log_probs", "full"),
        *,
        kl_key: NestedKey = "kl_penalty",
        add_to_reward: bool = True,
        coeff: float = 1.0,
        padding_side: PaddingSide = "left",
        estimator: Estimator = "k1",
    ) -> None:
        check_estimator(estimator, known=TOKEN_ESTIMATORS)
        reward = ["reward"] if add_to_reward else []
        super().__init__(in_keys=[gen_log_probs_full_key, ref_log_probs_full_key, *reward], out_keys=[kl_key, *reward])
        self.gen_log_probs_full_key = gen_log_probs_full_key
        self.ref_log_probs_full_key = ref_log_probs_full_key
        self.kl_key = kl_key
        self.add_to_reward = add_to_reward
        self.coeff = coeff
        self.padding_side = padding_side
        self.estimator = estimator

    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        sides = [rows_of(next_td, key) for key in (self.gen_log_probs_full_key, self.ref_log_probs_full_key)]
        if sides[0] is None or sides[1] is None:
            raise InputError(
                f"Log-probs not found: expected {self.gen_log_probs_full_key} and {self.ref_log_probs_full_key}, the "
                f"tensordict has {sorted(map(str, next_td.keys()))}"
            )
        gen, ref = sides
        masks = [_scored(i, g, r) for i, (g, r) in enumerate(zip(gen, ref, strict=True))]
        kl = kl_estimate(gen, ref, masks, estimator=self.estimator)
        dense = _is_dense(next_td, self.gen_log_probs_full_key)
        return write_kl(
            next_td,
            torch.stack(kl) if dense else kl,
            kl_key=self.kl_key,
            coeff=self.coeff if self.add_to_reward else None,
        )

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        declare(observation_spec, self.kl_key)
        return observation_spec

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        return per_token_reward(reward_spec) if self.add_to_reward else reward_spec


class RetrieveKL(NextTransform):
    """Writes both sides' log-probs, their per-token KL, and the reward minus the KL.

    Args:
        gen_model: the model that generated, with ``generate=False``; or ``"from_collector"`` (or a
            :class:`FromCollector`): the policy of the collector, looked up at each step. The transform can be appended
            to an env before the collector exists.
        ref_model: the reference, with ``generate=False``: a ``VLLMReference``, ``vLLMWrapper``,
            ``TransformersWrapper`` or another ``LLMWrapperBase``.

    Keyword Args:
        gen_model_factory, ref_model_factory: called once instead of passing a model.
        assistant_only: keep the assistant's tokens (both sides need ``input_mode="history"``); else every token but
            the first.
        gen_log_probs_full_key, ref_log_probs_full_key: where log-probs are written.
        history_key: where the history lies, if there are no ids.
        tokenizer_kwargs: passed to the chat template where a history must be tokenized.
        detach: no graph on the results.
        device: where to place transformers models; vLLM engines stay where they run. Results lie on the tensordict's
            device.
        tokenizer: used where the tensordict has no ids; default the reference's, else the gen model's.
        padding_side: where rows of different length are padded.
        kl_key: where the KL is written.
        add_to_reward: also write ``reward - coeff * kl``; a reward per sequence becomes one per token.
        coeff: the KL's coefficient.
        use_ray_service: keep the reference in a Ray actor, made there by ``ref_model_factory``; everything else stays
            in the caller.
        actor_name: name of that actor; one that exists is used again.
        estimator: ``"k1"``, ``"k2"``, ``"k3"`` or ``"abs"``; see :func:`vllm_kl.kl_estimate`.
        gen_log_probs: with ``"from_collector"``: ``"reuse"``, ``"rescore"`` or ``"auto"``; see :class:`FromCollector`.
        num_cpus, num_gpus: resources of the Ray actor.

    Writes ``[B, T]`` float32, nats (or B ragged rows), and the reward as ``[B, T, 1]``. Outside the mask log-probs, KL
    and the KL's share of the reward are exactly 0.0.

    Raises:
        ValueError: models that generate, disagree on ``pad_output``, or cannot tell the assistant's tokens.
        CollectorError: when called: ``from_collector`` has nothing to reuse and nobody to ask.
        InputError, MissingLogProbError: when called: as :class:`RetrieveLogProb`.

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
        coeff: float = 1.0,
        use_ray_service: bool = False,
        actor_name: str | None = None,
        estimator: Estimator = "k1",
        gen_log_probs: GenLogProbs = "auto",
        **kwargs: Any,
    ) -> None:
        check_estimator(estimator, known=TOKEN_ESTIMATORS)
        for key in (gen_log_probs_full_key, ref_log_probs_full_key):
            warn_unless_full(key)
        if gen_model_factory is not None and gen_model == "from_collector":
            gen_model = None  # the default gives way to a factory
        gen_model = one_of("gen", gen_model, gen_model_factory)
        if use_ray_service:
            ref_model = remote_reference(ref_model, ref_model_factory, actor_name=actor_name, device=device, **kwargs)
        elif actor_name is not None or kwargs:
            given = [*(["actor_name"] if actor_name is not None else []), *kwargs]
            raise OptionError(
                f"unknown argument, or one without effect unless use_ray_service=True: {', '.join(given)}"
            )
        else:
            ref_model = one_of("ref", ref_model, ref_model_factory)
        models = {"ref_model": ref_model}
        if gen_log_probs_full_key == ref_log_probs_full_key:
            raise OptionError(f"both sides would be written to {gen_log_probs_full_key}: give each a key of its own")
        from_collector: FromCollector | None = None
        if isinstance(gen_model, (str, FromCollector)):
            from_collector = FromCollector.of(gen_model, gen_log_probs)
        else:
            if gen_log_probs == "reuse":
                raise OptionError(
                    "gen_log_probs='reuse' has no effect with a gen_model; pass gen_model='from_collector'"
                )
            models["gen_model"] = gen_model
        for name, model in models.items():
            check_side(model, assistant_only, name)
        pads = {name: model.pad_output for name, model in models.items()}
        if len(set(pads.values())) > 1:
            found = ", ".join(f"{name}.pad_output={pad}" for name, pad in pads.items())
            raise InputError(f"pad_output mismatch: {found}. Both sides of a KL share one value.")
        if device is not None:
            models = {name: model.to(device) for name, model in models.items()}
        reward = ["reward"] if add_to_reward else []
        in_keys = [keys_of(model, history_key=history_key).key for model in models.values()]
        super().__init__(
            in_keys=list(dict.fromkeys(in_keys)) + reward,
            out_keys=[gen_log_probs_full_key, ref_log_probs_full_key, kl_key, *reward],
        )
        self.ref_model = models["ref_model"]
        self.gen_model = models.get("gen_model", gen_model)
        self.pad_output = pads["ref_model"]
        self._ref: Side = ModelSide(self.ref_model)
        self._gen: Side = (
            ModelSide(self.gen_model)
            if from_collector is None
            else from_collector.expecting(log_probs_full_key=gen_log_probs_full_key, pad_output=self.pad_output)
        )
        self.assistant_only = assistant_only
        self.gen_log_probs_full_key = gen_log_probs_full_key
        self.ref_log_probs_full_key = ref_log_probs_full_key
        self.history_key = history_key
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self.detach = detach
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.kl_key = kl_key
        self.add_to_reward = add_to_reward
        self.coeff = coeff
        self.estimator = estimator

    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        tokenizer = self.tokenizer or self.ref_model.tokenizer or getattr(self.gen_model, "tokenizer", None)
        collector = self._collector()
        keys = keys_of(
            self.ref_model,
            tokenizer=tokenizer,
            template_kwargs=self.tokenizer_kwargs,
            history_key=self.history_key,
            ids_of=self._gen.policy(collector) if isinstance(self._gen, FromCollector) else None,
        )
        batch = read_batch(td, keys, assistant_only=self.assistant_only)
        gen, recorded = scores(self._gen, batch, td, collector, detach=self.detach)
        ref, _ = scores(self._ref, batch, td, collector, detach=self.detach)
        kl = kl_estimate(gen, ref, batch.keep, estimator=self.estimator)
        gen_rows, ref_rows, kl_rows = (
            to_device(to_layout(rows, batch, pad_output=self.pad_output, padding_side=self.padding_side), td)
            for rows in (gen, ref, kl)
        )
        log_probs = {self.gen_log_probs_full_key: gen_rows, self.ref_log_probs_full_key: ref_rows}
        if recorded and next_td is td:
            # What the policy recorded stays: our zeros outside the mask must not pass for its log-probs another time.
            del log_probs[self.gen_log_probs_full_key]
        return write_kl(
            next_td,
            kl_rows,
            kl_key=self.kl_key,
            coeff=self.coeff if self.add_to_reward else None,
            log_probs=log_probs,
        )

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        declare(observation_spec, self.gen_log_probs_full_key, LogProbs)
        declare(observation_spec, self.ref_log_probs_full_key, LogProbs)
        declare(observation_spec, self.kl_key)
        return observation_spec

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        return per_token_reward(reward_spec) if self.add_to_reward else reward_spec


def _is_dense(td: TensorDictBase, key: NestedKey) -> bool:
    """Whether an entry can be read as one ``[B, T]`` tensor."""
    try:
        return not td.get(key).is_nested
    except RuntimeError:  # a lazy stack of rows that differ in length
        return False


def _scored(i: int, gen: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    if gen.shape != ref.shape:
        raise InputError(
            f"Sample {i} has different shapes: gen log-probs {list(gen.shape)}, ref log-probs {list(ref.shape)}. Both "
            "sides of a KL must score the same tokens with the same pad_output."
        )
    gen, ref = gen.detach().cpu(), ref.detach().cpu()
    unscored = (torch.isnan(gen) & (torch.isnan(ref) | (ref == 0))) | (torch.isnan(ref) & (gen == 0))
    return ~unscored
