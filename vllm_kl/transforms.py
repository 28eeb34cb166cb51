"""TorchRL transforms: log-probs of one model, the KL of two, the whole way from tokens to a shaped reward.

Drop-in for the classes of the same names in ``torchrl.envs.llm.transforms`` (0.14): the same arguments, the same
defaults, the same keys. The data's way through a step:

    inputs.read_batch -> one side, or two (resolver) -> kl.kl_estimate -> alignment.to_layout -> outputs.set_rows

Nothing is written before everything is computed: after an error the tensordict is as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase, lazy_stack, set_list_to_stack
from tensordict.utils import NestedKey
from torchrl.data import Composite
from torchrl.envs import Transform
from torchrl.modules.llm.policies import LogProbs

from vllm_kl.alignment import PaddingSide, to_layout
from vllm_kl.errors import CollectorError, InputError, OptionError
from vllm_kl.inputs import InputKeys, read_batch, rows_of
from vllm_kl.kl import Estimator, check_estimator, kl_estimate
from vllm_kl.outputs import declare, set_rows
from vllm_kl.reference import remote_reference
from vllm_kl.resolver import FromCollector, GenLogProbs, ModelSide, Side
from vllm_kl.types import TokenBatch

Rows = torch.Tensor | list[torch.Tensor]


class _NextTransform(Transform):
    """A transform that reads a step's root tensordict and writes into its ``next`` (or into the root without one)."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        next_td = tensordict.get("next", default=None)
        if next_td is None:
            return self._step(tensordict, tensordict)
        return tensordict.set("next", self._step(tensordict, next_td))

    @set_list_to_stack(True)
    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        shape = tensordict.batch_size
        if len(shape) == 1:
            return self._write(tensordict, next_tensordict)
        same = next_tensordict is tensordict
        flat = tensordict.reshape(-1) if len(shape) else lazy_stack([tensordict])
        flat_next = flat if same else (next_tensordict.reshape(-1) if len(shape) else lazy_stack([next_tensordict]))
        written = self._write(flat, flat_next)
        return written.view(shape) if len(shape) else written[0]

    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        """Do the work on a one-dimensional batch; return the tensordict that holds the results."""
        raise NotImplementedError

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        # A replay buffer with invert=True comes here with the whole batch (torchrl 0.14: _InvertTransform._inv_call).
        return self.forward(next_tensordict)

    def _collector(self) -> Any:
        """The collector of the env this belongs to, or ``None``."""
        try:
            container = self.container
        except AttributeError:  # not appended to anything
            return None
        return None if container is None else container.collector


class RetrieveLogProb(_NextTransform):
    """Writes the log-probs of one model: of the assistant's tokens, or of every token but the first.

    Args:
        model: a ``VLLMReference``, ``vLLMWrapper``, ``TransformersWrapper`` or another ``LLMWrapperBase`` with
            ``generate=False``.

    Keyword Args:
        log_probs_full_key: where to write; default ``(model.log_probs_key, "full")``.
        assistant_only: keep the assistant's tokens (needs ``input_mode="history"``).
        tokenizer_kwargs: passed to the chat template where a history must be tokenized (``chat_template_name``, ...).
        detach: no graph on the result.
        device: where to place the model. Results lie on the tensordict's device.
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
            _warn_unless_full(log_probs_full_key)
        super().__init__(in_keys=list(model.in_keys), out_keys=[log_probs_full_key])
        _check_model(model, assistant_only)
        self.log_probs_full_key = log_probs_full_key
        self.model = model if device is None else model.to(device)
        self.assistant_only = assistant_only
        self.detach = detach
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self._side = ModelSide(self.model)

    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        batch = read_batch(
            td, input_keys(self.model, self.tokenizer, self.tokenizer_kwargs), assistant_only=self.assistant_only
        )
        values = _scores(self._side, batch, td, None, detach=self.detach)
        rows = to_layout(values, batch, pad_output=self.model.pad_output, padding_side=self.padding_side)
        return set_rows(next_td, self.log_probs_full_key, _to_device(rows, td), LogProbs)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        declare(observation_spec, self.log_probs_full_key, LogProbs)
        return observation_spec


class KLComputation(_NextTransform):
    """Turns two entries of log-probs into a per-token KL, and subtracts it from the reward.

    Args:
        gen_log_probs_full_key: log-probs of the model that generated.
        ref_log_probs_full_key: log-probs of the reference.

    Keyword Args:
        kl_key: where to write the KL.
        add_to_reward: also write ``reward - coeff * kl``; a reward per sequence becomes one per token.
        coeff: the KL's coefficient.
        padding_side: where ragged rows are padded when only one side is ragged. Both are read as they are.
        estimator: ``"k1"``, ``"k2"``, ``"k3"`` or ``"abs"``; see :func:`vllm_kl.kl_estimate`.

    NaN on both sides marks a position without a score (TorchRL's generate path writes it on prompts) and is 0.0 in the
    KL; NaN on one side only is an error, never 0.0.

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
        check_estimator(estimator)
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
        return _per_token_reward(reward_spec) if self.add_to_reward else reward_spec


class RetrieveKL(_NextTransform):
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
        device: where to place the models. Results lie on the tensordict's device.
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
        check_estimator(estimator)
        for key in (gen_log_probs_full_key, ref_log_probs_full_key):
            _warn_unless_full(key)
        gen_model = _one_of("gen", None if _is_default(gen_model, gen_model_factory) else gen_model, gen_model_factory)
        if use_ray_service:
            ref_model = remote_reference(ref_model, ref_model_factory, actor_name=actor_name, **kwargs)
        elif actor_name is not None or kwargs:
            given = [*(["actor_name"] if actor_name is not None else []), *kwargs]
            raise OptionError(
                f"unknown argument, or one without effect unless use_ray_service=True: {', '.join(given)}"
            )
        else:
            ref_model = _one_of("ref", ref_model, ref_model_factory)
        models = {"ref_model": ref_model}
        if isinstance(gen_model, (str, FromCollector)):
            self_gen: Side = _from_collector(gen_model, gen_log_probs)
        else:
            if gen_log_probs == "reuse":
                raise OptionError(
                    "gen_log_probs='reuse' has no effect with a gen_model; pass gen_model='from_collector'"
                )
            models["gen_model"] = gen_model
        for name, model in models.items():
            _check_model(model, assistant_only, name)
        pads = {name: model.pad_output for name, model in models.items()}
        if len(set(pads.values())) > 1:
            raise InputError(
                "pad_output mismatch: "
                + ", ".join(f"{name}.pad_output={pad}" for name, pad in pads.items())
                + ". Both "
                "sides of a KL share one value."
            )
        if device is not None:
            models = {name: model.to(device) for name, model in models.items()}
        reward = ["reward"] if add_to_reward else []
        super().__init__(
            in_keys=list(dict.fromkeys(key for model in models.values() for key in model.in_keys)) + reward,
            out_keys=[gen_log_probs_full_key, ref_log_probs_full_key, kl_key, *reward],
        )
        self.ref_model = models["ref_model"]
        self.gen_model = models.get("gen_model", gen_model)
        self.pad_output = pads["ref_model"]
        self._ref: Side = ModelSide(self.ref_model)
        if "gen_model" in models:
            self._gen: Side = ModelSide(self.gen_model)
        else:
            self._gen = self_gen
            self._gen.expect(log_probs_full_key=gen_log_probs_full_key, pad_output=self.pad_output)
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
        keys = input_keys(self.ref_model, tokenizer, self.tokenizer_kwargs, history_key=self.history_key)
        batch = read_batch(td, keys, assistant_only=self.assistant_only)
        collector = self._collector()
        gen = _scores(self._gen, batch, td, collector, detach=self.detach)
        ref = _scores(self._ref, batch, td, collector, detach=self.detach)
        kl = kl_estimate(gen, ref, batch.keep, estimator=self.estimator)
        gen_rows, ref_rows, kl_rows = (
            _to_device(to_layout(rows, batch, pad_output=self.pad_output, padding_side=self.padding_side), td)
            for rows in (gen, ref, kl)
        )
        return write_kl(
            next_td,
            kl_rows,
            kl_key=self.kl_key,
            coeff=self.coeff if self.add_to_reward else None,
            log_probs={self.gen_log_probs_full_key: gen_rows, self.ref_log_probs_full_key: ref_rows},
        )

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        declare(observation_spec, self.gen_log_probs_full_key, LogProbs)
        declare(observation_spec, self.ref_log_probs_full_key, LogProbs)
        declare(observation_spec, self.kl_key)
        return observation_spec

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        return _per_token_reward(reward_spec) if self.add_to_reward else reward_spec


def write_kl(
    next_td: TensorDictBase,
    kl: Rows,
    *,
    kl_key: NestedKey,
    coeff: float | None,
    log_probs: dict[NestedKey, Rows] | None = None,
) -> TensorDictBase:
    """Write log-probs, KL and, where there is one and ``coeff`` is given, the reward; return the tensordict."""
    reward = None if coeff is None else rows_of(next_td, "reward")
    if reward is not None:
        shaped: Rows = [_shaped_reward(i, r, k, coeff) for i, (r, k) in enumerate(zip(reward, kl, strict=True))]
        if isinstance(kl, torch.Tensor):
            shaped = torch.stack(list(shaped))
    for key, rows in (log_probs or {}).items():
        next_td = set_rows(next_td, key, rows, LogProbs)
    next_td = set_rows(next_td, kl_key, kl)
    return next_td if reward is None else set_rows(next_td, "reward", shaped)


def _shaped_reward(i: int, reward: torch.Tensor, kl: torch.Tensor, coeff: float) -> torch.Tensor:
    """Return ``[T, 1]``: the reward of the sequence, or of each token, minus the KL's share."""
    if reward.numel() not in (1, len(kl)):
        raise InputError(
            f"sample {i}: its reward has shape {list(reward.shape)}, expected one value or one per token ({len(kl)})"
        )
    return reward.reshape(-1, 1).float() - coeff * kl.to(reward.device).unsqueeze(-1)


def input_keys(
    model: Any, tokenizer: Any, template_kwargs: dict[str, Any], history_key: NestedKey | None = None
) -> InputKeys:
    """Return where a wrapper's input lies, and how it is tokenized where there are no ids."""
    template = {name: getattr(model, name, None) for name in ("chat_template_name", "chat_template")}
    return InputKeys(
        input_mode=getattr(model, "input_mode", "history"),
        input_key=None if history_key not in (None, "history") else model.in_keys[0],
        history_key=history_key or getattr(model, "history_key", "history"),
        text_key=getattr(model, "text_key", "text"),
        tokens_key=getattr(model, "tokens_key", "tokens"),
        masks_key=getattr(model, "masks_key", "masks"),
        tokenizer=tokenizer or getattr(model, "tokenizer", None),
        template_kwargs={**{k: v for k, v in template.items() if v is not None}, **template_kwargs},
        tokenizer_kwargs=getattr(model, "tokenizer_kwargs", None) or {},
    )


def _scores(side: Side, batch: TokenBatch, td: TensorDictBase, collector: Any, *, detach: bool) -> list[torch.Tensor]:
    with torch.set_grad_enabled(not detach and torch.is_grad_enabled()):
        values = side.log_probs(batch, td, collector)
    return [value.detach() for value in values] if detach else values


def _to_device(rows: Rows, td: TensorDictBase) -> Rows:
    if td.device is None:
        return rows
    return rows.to(td.device) if isinstance(rows, torch.Tensor) else [row.to(td.device) for row in rows]


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
    return ~(torch.isnan(gen) & torch.isnan(ref)).cpu()


def _check_model(model: Any, assistant_only: bool, name: str = "model") -> None:
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


def _warn_unless_full(key: NestedKey) -> None:
    if not isinstance(key, tuple) or key[-1] != "full":
        warnings.warn(
            f"The log-probs key {key!r} is not a tuple that ends with 'full': TorchRL's losses will not find it by default.",
            stacklevel=3,
        )


def _is_default(model: Any, factory: Any) -> bool:
    return factory is not None and isinstance(model, str) and model == "from_collector"


def _one_of(side: str, model: Any, factory: Callable[[], Any] | None) -> Any:
    if (model is None) == (factory is None):
        raise InputError(
            f"Cannot build the {side} side: pass exactly one of '{side}_model' and '{side}_model_factory'."
        )
    return model if factory is None else factory()


def _from_collector(gen_model: str | FromCollector, gen_log_probs: GenLogProbs) -> FromCollector:
    if isinstance(gen_model, FromCollector):
        if gen_log_probs not in ("auto", gen_model.gen_log_probs):
            raise OptionError(f"gen_log_probs={gen_log_probs!r} contradicts {gen_model!r}; give it once")
        return gen_model
    if gen_model != "from_collector":
        raise CollectorError(f"gen_model must be a model or 'from_collector', got {gen_model!r}")
    return FromCollector(gen_log_probs)


def _per_token_reward(reward_spec: Composite) -> Composite:
    """Announce a reward per token: ``[*batch, T, 1]``."""
    if "reward" in reward_spec.keys():
        declare(reward_spec, "reward", trailing=(-1, 1))
    return reward_spec
