"""``KLTransform`` is the base class of ``RetrieveKL`` and ``KLComputation``, which have a ``Penalty``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tensordict.utils import NestedKey
from torchrl.data import Composite

from vllm_kl.batch.write_entries import check_distinct, declare
from vllm_kl.transforms.coefficient import Coefficient
from vllm_kl.transforms.next_transform import NextTransform, per_token_reward
from vllm_kl.transforms.penalty import Penalty


class KLTransform(NextTransform):
    """A transform with a :class:`Penalty`, whose keys it reads and writes beside its own."""

    def __init__(
        self, penalty: Penalty, *, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]
    ) -> None:
        reward = ["reward"] if penalty.add_to_reward else []
        check_distinct([*out_keys, *penalty.keys, "reward"])
        super().__init__(in_keys=[*in_keys, *reward], out_keys=[*out_keys, *penalty.keys, *reward])
        self.penalty = penalty

    def counts(self) -> dict[str, Any]:
        return {**super().counts(), "coeff": self.penalty.coefficient.state}

    def set_counts(self, counts: dict[str, Any]) -> None:
        super().set_counts(counts)
        self.penalty.coefficient.state = counts["coeff"]

    def clone(self) -> KLTransform:
        twin = super().clone()
        twin.penalty = copy.deepcopy(self.penalty)  # torchrl's copies are shallow
        return twin

    @property
    def coeff(self) -> Any:
        """The KL's coefficient, as it was given. Set it to change the coefficient."""
        return self.penalty.coefficient.given

    @coeff.setter
    def coeff(self, coeff: Any) -> None:
        self.penalty.coefficient = Coefficient(coeff)

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the last batch, see :class:`Penalty`."""
        return self.penalty.metrics

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        for key in self.penalty.keys:
            declare(
                observation_spec, key, dtype=torch.bool if key == self.penalty.mask_key else torch.float32
            )
        return observation_spec

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        return per_token_reward(reward_spec) if self.penalty.add_to_reward else reward_spec
