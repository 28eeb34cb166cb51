"""``Coefficient`` is the factor of the KL that is subtracted from the reward."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from vllm_kl.errors import OptionError


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
        if not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
            where = f" for batch {self._num_batches}" if callable(self.given) else ""
            raise OptionError(
                "coeff must be a number of at least 0, a schedule or a controller with .coef and .update; "
                f"got {value!r}{where}"
            )
        return float(value)
