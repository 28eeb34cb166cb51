"""What all transforms share: a step, or a batch, as a one-dimensional batch; its tokens; devices; the reward's spec."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, Self

import torch
from tensordict import TensorDictBase, lazy_stack, set_list_to_stack
from tensordict.utils import NestedKey
from torchrl.data import Composite
from torchrl.envs import Transform

from vllm_kl.batch.inputs import InputKeys, read_batch
from vllm_kl.batch.origins import generated_by, origins
from vllm_kl.batch.outputs import declare
from vllm_kl.batch.texts import TextWatch
from vllm_kl.transforms.from_collector import policy_of
from vllm_kl.transforms.sides import Side
from vllm_kl.transforms.watched_policy import engine_of, watch
from vllm_kl.types import Origin, Rows, Scored, TokenBatch
from vllm_kl.weights.collector_errors import follow
from vllm_kl.weights.live import lock_of


class NextTransform(Transform):
    """A transform that reads a step's root tensordict and writes into its ``next`` (or into the root without one)."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        next_td = tensordict.get("next", default=None)
        if next_td is None:
            return self._flat_write(tensordict, tensordict)
        return tensordict.set("next", self._flat_write(tensordict, next_td))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        # Only an env comes here; batches come through forward.
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
        """Do the work on a one-dimensional batch; return the tensordict that holds the results."""

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        # A replay buffer with invert=True comes here with the whole batch (torchrl 0.14: _InvertTransform._inv_call).
        return self.forward(next_tensordict)

    def _collector(self) -> Any:
        """The collector of the env this belongs to, or ``None``."""
        return collector_of(self)

    def counts(self) -> dict[str, Any]:
        """Return what this transform has counted, for a run that is resumed: part of its ``state_dict()``."""
        return {}

    def set_counts(self, counts: dict[str, Any]) -> None:
        """Go on from what :meth:`counts` returned."""

    def get_extra_state(self) -> dict[str, Any]:
        return self.counts()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.set_counts(state)

    def scored_at(self, key: NestedKey) -> float | None:
        """Return the temperature of the log-probs that this transform writes to ``key``; ``None``: it writes none there."""
        return None

    def _neighbours(self) -> list[NextTransform]:
        """Return this package's transforms of the same env, or of the same composition."""
        return [module for module in _outermost(self).modules() if isinstance(module, NextTransform)]


class TokensTransform(NextTransform):
    """A transform that reads tokens, tells what was found in their texts, and knows whether they were generated just now.

    Where it asks the policy's engine again for what that generated, weights stay until it has (:mod:`vllm_kl.weights.lock`).
    """

    assistant_only: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._texts = TextWatch()
        self._is_step = False  # what is written was generated just now, by the policy as it is

    @abstractmethod
    def _keys(self) -> InputKeys:
        """Return where ids and masks lie."""

    @abstractmethod
    def _policy_side(self) -> Side | None:
        """Return the side whose log-probs are taken for those that the samples were drawn with, if there is one."""

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
        watch(policy)  # so that it remembers what it samples with, from its first call on
        if (engine := self._asked_engine()) is not None:
            lock_of(engine).score_here()
        follow(collector, engine_of(policy), getattr(self._model(), "scorer", None))
        return super()._reset_env_preprocess(tensordict)

    def _asks_policy(self) -> bool:
        side = self._policy_side()
        return side is not None and side.asks(policy_of(self._collector()))

    def _asked_engine(self) -> Any:
        """Return the ``LLMEngine`` of the policy, where this asks it again; or ``None``."""
        return engine_of(policy_of(self._collector())) if self._asks_policy() else None

    def _close_step(self, is_last: bool = False) -> None:
        """Let the policy's weights be replaced, unless another transform of this env asks for them yet."""
        if (engine := self._asked_engine()) is None:
            return
        asking = [
            it
            for it in self._neighbours()
            if isinstance(it, TokensTransform) and it._asked_engine() is engine
        ]
        if is_last or asking[-1] is self:
            lock_of(engine).close_step()

    def _sampled(self, td: TensorDictBase) -> list[Origin]:
        """Return what sampled each row, as far as it is known; of a step only where the policy is asked again."""
        if not self._is_step:
            return origins(td)
        return (generated_by(td) or []) if self._asks_policy() else []

    def clone(self) -> Self:
        twin = super().clone()
        twin._texts = TextWatch()  # torchrl's copies are shallow
        return twin


def collector_of(transform: Transform) -> Any:
    """Return the collector of the env that a transform belongs to, or ``None``."""
    return getattr(_container(_outermost(transform)), "collector", None)


def _outermost(transform: Transform) -> Transform:
    """Return the composition that a transform belongs to, the outermost of several, or itself."""
    while isinstance(parent := _container(transform), Transform):
        transform = parent
    return transform


def _container(transform: Transform) -> Any:
    """Return what a transform is appended to, or ``None``. torchrl 0.14's own property raises where that is no env."""
    reference = transform.__dict__.get("_container")
    return None if reference is None else reference()


def scores(
    side: Side, batch: TokenBatch, td: TensorDictBase, collector: Any, *, temperature: float, detach: bool
) -> Scored:
    """Return a side's log-probs at a temperature."""
    with torch.set_grad_enabled(not detach and torch.is_grad_enabled()):
        scored = side.log_probs(batch, td, collector, temperature)
    return dataclasses.replace(scored, values=scored.values.detach()) if detach else scored


def to_device(rows: Rows, device: torch.device | None) -> Rows:
    """Move rows to a tensordict's device, if it has one."""
    if device is None:
        return rows
    return rows.to(device) if isinstance(rows, torch.Tensor) else [row.to(device) for row in rows]


def per_token_reward(reward_spec: Composite) -> Composite:
    """Announce a reward per token: ``[*batch, T, 1]``."""
    if "reward" in reward_spec.keys():
        declare(reward_spec, "reward", trailing=(-1, 1))
    return reward_spec
