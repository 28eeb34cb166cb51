"""Estimates a KL and subtracts it from the reward, for ``KLComputation`` and ``RetrieveKL``.

``Penalty`` takes both sides' log-probs, writes the KL and the mask, subtracts the KL from the reward, and
computes figures for a logger. One pass over the log-probs gives the KL that is subtracted and those that are
only logged. The module does not know where the log-probs come from.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.data import Composite

from vllm_kl.batch.write_entries import check_distinct, declare, write_kl
from vllm_kl.errors import OptionError
from vllm_kl.kl import TOKEN_ESTIMATORS, Direction, Estimator, check_estimator, estimate, sums_of
from vllm_kl.transforms.base import NextTransform, per_token_reward
from vllm_kl.types import Rows


class Coefficient:
    """The factor of the KL that is subtracted from the reward.

    Args:
        coeff: a number; a schedule, called with the number of earlier batches (inside an env: of earlier
            steps); or a controller such as ``torchrl.data.AdaptiveKLController(init_kl_coef=0.1, target=6.0,
            horizon=10_000)``. A controller gets the KL of every batch, summed over each sequence, as PPO's
            target means it.

    Raises:
        OptionError: ``coeff`` is a negative, NaN or infinite number, or none of these.

    >>> warm_up = Coefficient(lambda batch: min(1.0, batch / 10))
    >>> warm_up.observe(torch.ones(4))
    >>> warm_up.value()
    0.1
    """

    def __init__(self, coeff: Any) -> None:
        self.given = coeff
        self._num_batches = 0
        self._is_controller = hasattr(coeff, "coef") and callable(getattr(coeff, "update", None))
        if self._is_controller and not self._checked(coeff.coef):
            raise OptionError("a controller multiplies its coefficient, so it cannot begin at 0")
        if not self._is_controller and not callable(coeff):
            self._checked(coeff)

    def value(self) -> float:
        """Return the coefficient of the next batch."""
        if self._is_controller:
            return self._checked(self.given.coef)
        return self._checked(self.given(self._num_batches) if callable(self.given) else self.given)

    def observe(self, kl_B: torch.Tensor) -> None:
        """Take the KL of a batch that was written, ``[B]``, nats per sequence."""
        self._num_batches += 1
        if self._is_controller and len(kl_B):
            # TorchRL's controllers (0.14) get the KL's share of the reward, and divide it by -coef.
            self.given.update((-self.given.coef * kl_B.double()).tolist())

    @property
    def state(self) -> dict[str, Any]:
        """The number of batches, and a controller's coefficient."""
        own = self.given.state_dict() if hasattr(self.given, "state_dict") else None
        return {
            "batches": self._num_batches,
            "coef": self.given.coef if self._is_controller else None,
            "own": own,
        }

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._num_batches = state["batches"]
        if self._is_controller and state["coef"] is not None:
            self.given.coef = state["coef"]
        if state["own"] is not None and hasattr(self.given, "load_state_dict"):
            self.given.load_state_dict(state["own"])

    def _checked(self, value: Any) -> float:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
            where = f" for batch {self._num_batches}" if callable(self.given) else ""
            raise OptionError(
                "coeff must be a number of at least 0, a schedule or a controller with .coef and .update; "
                f"got {value!r}{where}"
            )
        return float(value)


@dataclass(frozen=True)
class Estimation:
    """The estimators of the KL and their options, as in :class:`~vllm_kl.RetrieveKL`.

    Raises:
        OptionError: an estimator does not exist, or an option does not fit it.
    """

    estimator: Estimator
    extra_estimators: Sequence[Estimator]
    clamp_log_ratio: float | None
    clamp_output: float | None
    direction: Direction

    def __post_init__(self) -> None:
        if isinstance(self.extra_estimators, str):
            raise OptionError(
                f"extra_estimators must be a sequence of names, such as ({self.extra_estimators!r},)"
            )
        for name in (self.estimator, *self.extra_estimators):
            check_estimator(
                name, self.direction, self.clamp_log_ratio, self.clamp_output, known=TOKEN_ESTIMATORS
            )

    def estimate(
        self, name: Estimator, gen: torch.Tensor, ref: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """Return the KL of each token by the named estimator, ``[N]``, nats."""
        return estimate(
            gen,
            ref,
            lengths,
            estimator=name,
            clamp_log_ratio=self.clamp_log_ratio,
            clamp_output=self.clamp_output,
            direction=self.direction,
        )


class Penalty:
    """Estimates the KL, writes it, and subtracts it from the reward.

    Args:
        estimation: the estimators.
        kl_key, mask_key, add_to_reward, coeff: as in :class:`~vllm_kl.RetrieveKL`.

    Attributes:
        metrics: figures of the last batch; the last word of a name is its unit. For each estimator the mean
            over tokens and the mean over the sequences' sums, the coefficient, and the number of tokens.
            Empty before the first batch.
    """

    def __init__(
        self,
        estimation: Estimation,
        kl_key: NestedKey,
        mask_key: NestedKey | None,
        add_to_reward: bool,
        coeff: Any,
    ) -> None:
        names = [
            (kl_key, estimation.estimator),
            *((_beside(kl_key, f"kl_{name}"), name) for name in estimation.extra_estimators),
        ]
        check_distinct([key for key, _ in names])
        self._estimators = dict(names)
        self.kl_key = kl_key
        self.mask_key = mask_key
        if not add_to_reward and (callable(coeff) or hasattr(coeff, "update")):
            raise OptionError("a schedule or a controller of coeff has no effect with add_to_reward=False")
        self.add_to_reward = add_to_reward
        self.coefficient = Coefficient(coeff)
        self.metrics: dict[str, float] = {}
        self._estimation = estimation

    @property
    def keys(self) -> list[NestedKey]:
        """The keys of the KL and the mask."""
        return [*self._estimators, *([] if self.mask_key is None else [self.mask_key])]

    def write(
        self,
        next_td: TensorDictBase,
        gen: torch.Tensor,
        ref: torch.Tensor,
        keep: torch.Tensor,
        lengths: list[int],
        to_rows: Callable[[torch.Tensor], Rows],
        *,
        log_probs: dict[NestedKey, Rows] | None = None,
        is_mask_known: bool = True,
    ) -> TensorDictBase:
        """Write all entries, or none if there is an error; return the tensordict that has them.

        Args:
            next_td: the tensordict to write into; its reward is read, if there is one.
            gen, ref: log-probs of both sides, of all samples laid end to end, ``[N]``: 0.0 outside the mask.
            keep: the mask, ``[N]`` bool.
            lengths: of the samples.
            to_rows: turns a packed tensor ``[N]`` into the layout of the entries.
            log_probs: entries to write beside the KL, in that layout.
            is_mask_known: ``keep`` is the mask, and not only the positions that have values. Then tokens can
                be counted.
        """
        kl = {
            key: self._estimation.estimate(name, gen, ref, lengths) for key, name in self._estimators.items()
        }
        coeff = self.coefficient.value() if self.add_to_reward else None
        sums = {self._estimators[key]: sums_of(values.detach(), lengths).cpu() for key, values in kl.items()}
        entries = {key: to_rows(values) for key, values in kl.items()}
        if self.mask_key is not None:
            entries[self.mask_key] = to_rows(keep.to(gen.device))
        written = write_kl(next_td, entries, kl_key=self.kl_key, coeff=coeff, log_probs=log_probs)
        num_tokens = int(keep.sum())
        self.metrics = {"num_tokens": float(num_tokens)} if is_mask_known else {}
        for name, per_sequence in sums.items():
            total = float(per_sequence.double().sum())
            if is_mask_known:
                self.metrics[f"kl_{name}_token_mean_nats"] = total / max(1, num_tokens)
            self.metrics[f"kl_{name}_sequence_mean_nats"] = total / max(1, len(per_sequence))
        if coeff is not None:
            self.metrics["coeff"] = coeff
            self.coefficient.observe(next(iter(sums.values())))
        return written


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


def _beside(key: NestedKey, name: str) -> NestedKey:
    """Return ``key`` with its last part replaced by ``name``.

    >>> _beside("kl_penalty", "kl_k3"), _beside(("kl", "full"), "kl_k3")
    ('kl_k3', ('kl', 'kl_k3'))
    """
    return (*key[:-1], name) if isinstance(key, tuple) else name
