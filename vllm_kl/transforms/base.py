"""Holds the base classes: ``NextTransform`` writes into ``next``, ``TokensTransform`` also reads tokens."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, Self

import torch
from tensordict import TensorDictBase, lazy_stack, set_list_to_stack
from tensordict.utils import NestedKey
from torchrl.data import Composite
from torchrl.envs import Transform

from vllm_kl.batch.origins import generated_by, origins
from vllm_kl.batch.read_tokens import InputKeys, read_batch
from vllm_kl.batch.tokenize_texts import TextWatch
from vllm_kl.batch.write_entries import declare
from vllm_kl.transforms.from_collector import policy_of
from vllm_kl.transforms.sides import Side
from vllm_kl.transforms.watched_policy import engine_of, watch
from vllm_kl.types import Origin, Rows, Scored, TokenBatch
from vllm_kl.weights.collector_errors import follow
from vllm_kl.weights.live_weights import lock_of


class NextTransform(Transform):
    """Reads the root tensordict of a step and writes into its ``next``, or into the root without one."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        next_td = tensordict.get("next", default=None)
        if next_td is None:
            return self._flat_write(tensordict, tensordict)
        return tensordict.set("next", self._flat_write(tensordict, next_td))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        # Only an env calls _step; batches come through forward.
        return self._flat_write(tensordict, next_tensordict)

    @set_list_to_stack(True)
    def _flat_write(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        shape = tensordict.batch_size
        if len(shape) == 1:
            return self._write(tensordict, next_tensordict)
        same = next_tensordict is tensordict
        flat = tensordict.reshape(-1) if len(shape) else lazy_stack([tensordict])
        flat_next = (
            flat if same else (next_tensordict.reshape(-1) if len(shape) else lazy_stack([next_tensordict]))
        )
        written = self._write(flat, flat_next)
        return written.view(shape) if len(shape) else written[0]

    @abstractmethod
    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        """Read a one-dimensional batch and write the results; return the tensordict that holds them."""

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        # A replay buffer with invert=True passes its whole batch (torchrl 0.14: _InvertTransform._inv_call).
        return self.forward(next_tensordict)

    def _collector(self) -> Any:
        """The collector whose env holds this transform, or ``None``."""
        return collector_of(self)

    def counts(self) -> dict[str, Any]:
        """Return the counters that ``state_dict()`` saves, so that a resumed run continues them."""
        return {}

    def set_counts(self, counts: dict[str, Any]) -> None:
        """Continue from the counters that :meth:`counts` returned."""

    def get_extra_state(self) -> dict[str, Any]:
        return self.counts()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.set_counts(state)

    def temperature_at(self, key: NestedKey) -> float | None:
        """Return the temperature of the log-probs that this writes to ``key``; ``None``: it writes none."""
        return None

    def _neighbours(self) -> list[NextTransform]:
        """Return all transforms of this package in the same env, or in the same composition."""
        return [module for module in _outermost(self).modules() if isinstance(module, NextTransform)]


class TokensTransform(NextTransform):
    """Reads tokens and lets a model score them.

    The transform reports what it finds in the texts, and knows whether the policy generated the tokens just
    now. If it asks the policy's engine to score a step, the engine keeps its weights until the step is scored
    (:mod:`vllm_kl.weights.engine_lock`).
    """

    assistant_only: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._texts = TextWatch()
        self._is_step = False  # True while an env's step is written: the policy has just generated it

    @abstractmethod
    def _keys(self) -> InputKeys:
        """Return where the ids and masks are."""

    @abstractmethod
    def _policy_side(self) -> Side | None:
        """Return the side whose log-probs stand for those of the policy that sampled, if there is one."""

    @abstractmethod
    def _model(self) -> Any:
        """Return the model that scores beside the policy."""

    def _read(self, td: TensorDictBase) -> TokenBatch:
        """Return the tokens of a one-dimensional batch."""
        batch = read_batch(td, self._keys(), assistant_only=self.assistant_only)
        self._texts.see(batch.report)
        return batch

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self._is_step = True
        try:
            written = super()._step(tensordict, next_tensordict)
        except BaseException:
            self._close_step(is_last=True)
            raise
        finally:
            self._is_step = False
        self._close_step()
        return written

    def _reset_env_preprocess(self, tensordict: TensorDictBase | None) -> TensorDictBase | None:
        collector = self._collector()
        policy = policy_of(collector)
        watch(policy)  # remembers sampling parameters from the policy's first call on
        if (engine := self._policy_engine()) is not None:
            lock_of(engine).score_here()
        follow(collector, engine_of(policy), getattr(self._model(), "scorer", None))
        return super()._reset_env_preprocess(tensordict)

    def _scores_with_policy(self) -> bool:
        side = self._policy_side()
        return side is not None and side.scores_with(policy_of(self._collector()))

    def _policy_engine(self) -> Any:
        """Return the policy's ``LLMEngine`` if this transform asks it to score; else ``None``."""
        return engine_of(policy_of(self._collector())) if self._scores_with_policy() else None

    def _close_step(self, is_last: bool = False) -> None:
        """Allow new weights, unless a later transform of this env still asks the same engine."""
        if (engine := self._policy_engine()) is None:
            return
        asking = [
            it
            for it in self._neighbours()
            if isinstance(it, TokensTransform) and it._policy_engine() is engine
        ]
        if is_last or asking[-1] is self:
            lock_of(engine).close_step()

    def _sampled(self, td: TensorDictBase) -> list[Origin]:
        """Return the weights that sampled each row, as far as they are known.

        At an env's step they are only read if this transform scores with the policy's engine.
        """
        if not self._is_step:
            return origins(td)
        return (generated_by(td) or []) if self._scores_with_policy() else []

    def clone(self) -> Self:
        twin = super().clone()
        twin._texts = TextWatch()  # torchrl's copies are shallow
        return twin


def collector_of(transform: Transform) -> Any:
    """Return the collector whose env holds a transform, or ``None``."""
    return getattr(_container(_outermost(transform)), "collector", None)


def _outermost(transform: Transform) -> Transform:
    """Return the outermost composition that holds a transform, or the transform itself."""
    while isinstance(parent := _container(transform), Transform):
        transform = parent
    return transform


def _container(transform: Transform) -> Any:
    """Return the env or composition that holds a transform, or ``None``.

    TorchRL 0.14's own property raises where that is no env.
    """
    reference = transform.__dict__.get("_container")
    return None if reference is None else reference()


def side_log_probs(
    side: Side, batch: TokenBatch, td: TensorDictBase, collector: Any, *, temperature: float, detach: bool
) -> Scored:
    """Return a side's log-probs at a temperature."""
    with torch.set_grad_enabled(not detach and torch.is_grad_enabled()):
        scored = side.log_probs(batch, td, collector, temperature)
    return dataclasses.replace(scored, values=scored.values.detach()) if detach else scored


def to_device(rows: Rows, device: torch.device | None) -> Rows:
    """Move rows to the device of a tensordict, if it has one."""
    if device is None:
        return rows
    return rows.to(device) if isinstance(rows, torch.Tensor) else [row.to(device) for row in rows]


def per_token_reward(reward_spec: Composite) -> Composite:
    """Declare in the spec a reward per token: ``[*batch, T, 1]``."""
    if "reward" in reward_spec.keys():
        declare(reward_spec, "reward", trailing=(-1, 1))
    return reward_spec
