"""``Estimation`` holds the estimators of a transform's KL, and their options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_kl.errors import OptionError
from vllm_kl.kl import TOKEN_ESTIMATORS, Direction, Estimator, check_estimator, estimate


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
