"""``NextTransform`` is the base class of this package's transforms; it writes into ``next``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from tensordict import TensorDictBase, lazy_stack, set_list_to_stack
from tensordict.utils import NestedKey
from torchrl.data import Composite
from torchrl.envs import Transform

from vllm_kl.batch.write_entries import declare


class NextTransform(Transform):
    """Reads the root tensordict of a step and writes into its ``next``, or into the root without one."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if _is_in_buffer(self):
            # A replay buffer's sample() passes the stored samples themselves (torchrl 0.14: lists, lazy
            # stacks). Written there, a KL would be subtracted again at the next sample().
            tensordict = tensordict.copy()
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
        if not same:
            for key in set(flat.keys()) - set(tensordict.keys()):
                tensordict.set(key, flat.get(key).reshape(shape))
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


def collector_of(transform: Transform) -> Any:
    """Return the collector whose env holds a transform, or ``None``."""
    env, collector = _container(_outermost(transform)), None
    while env is not None and collector is None:
        # A collector that appends a transform to an env without any makes a new env, which nobody told.
        collector, env = getattr(env, "collector", None), getattr(env, "base_env", None)
    return collector


def _outermost(transform: Transform) -> Transform:
    """Return the outermost composition that holds a transform, or the transform itself."""
    while isinstance(parent := _container(transform), Transform):
        transform = parent
    return transform


def _is_in_buffer(transform: Transform) -> bool:
    """Tell whether a replay buffer's composition, or another that no env holds, has this transform."""
    outermost = _outermost(transform)
    return outermost is not transform and _container(outermost) is None


def _container(transform: Transform) -> Any:
    """Return the env or composition that holds a transform, or ``None``.

    TorchRL 0.14's own property raises where that is no env.
    """
    reference = transform.__dict__.get("_container")
    return None if reference is None else reference()


def per_token_reward(reward_spec: Composite) -> Composite:
    """Declare in the spec a reward per token: ``[*batch, T, 1]``."""
    if "reward" in reward_spec.keys():
        declare(reward_spec, "reward", trailing=(-1, 1))
    return reward_spec
