"""``Audit`` lets the policy's engine score a few samples again, and compares with the recorded log-probs.

Three faults make a difference beyond rounding in every sample: new weights between sampling and scoring,
another temperature, and ids that do not belong to the log-probs. So a small fraction of the samples is
enough.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from vllm_kl.diagnostics import Mismatch, MismatchWarning, mismatch
from vllm_kl.errors import DriftError, MissingLogProbError, OptionError
from vllm_kl.types import Origin, Scored, TokenBatch
from vllm_kl.weights.versions import is_of_other_weights

OnDrift = Literal["raise", "warn"]


class Audit:
    """Compares recorded log-probs with those of an engine.

    Args:
        fraction: of the samples that are checked. The audit draws each sample with its own random generator,
            which gives the same numbers in every run and does not disturb other generators.
        tolerance: the largest healthy mean difference over the tokens of the drawn samples, nats. Rounding in
            bfloat16 makes 0.01 or 0.02, in float32 a millionth.
        on_drift: what to do beyond the tolerance: ``"raise"``, or ``"warn"`` for each such batch.

    Attributes:
        found: the last comparison, or ``None``; see :func:`vllm_kl.mismatch`.
        num_skipped: samples of the last audit that were drawn but not compared, because other weights sampled
            them.

    Raises:
        OptionError: an option has no valid value.
    """

    def __init__(self, fraction: float, *, tolerance: float = 0.05, on_drift: OnDrift = "raise") -> None:
        if not _is_number(fraction) or not 0 <= fraction <= 1:
            raise OptionError(f"audit must be a fraction of the samples, from 0 to 1; got {fraction!r}")
        if not _is_number(tolerance) or not 0 < tolerance < math.inf:
            raise OptionError(f"audit_tolerance must be a positive number of nats; got {tolerance!r}")
        if on_drift not in get_args(OnDrift):
            raise OptionError(
                f"on_drift={on_drift!r} does not exist; choose one of {', '.join(get_args(OnDrift))}"
            )
        self.fraction = float(fraction)
        self.tolerance = float(tolerance)
        self.on_drift = on_drift
        self.found: Mismatch | None = None
        self.num_skipped = 0
        self._generator = torch.Generator().manual_seed(0)

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the last audit."""
        found = (
            {}
            if self.found is None
            else {f"audit_{name}": value for name, value in self.found.metrics.items()}
        )
        return found | ({"audit_skipped_samples": float(self.num_skipped)} if self.fraction else {})

    @property
    def state(self) -> torch.Tensor:
        """State of the random generator: it determines which samples will be drawn next."""
        return self._generator.get_state()

    @state.setter
    def state(self, state: torch.Tensor) -> None:
        self._generator.set_state(state)

    def draw(self, batch: TokenBatch) -> list[int]:
        """Return the samples to check. A sample without a kept token is never drawn."""
        drawn = torch.rand(len(batch), generator=self._generator) < self.fraction
        return [i for i in drawn.nonzero()[:, 0].tolist() if batch.keep[i].any()]

    def check(
        self,
        recorded: torch.Tensor,
        batch: TokenBatch,
        sampled: list[Origin],
        score: Callable[[TokenBatch], Scored],
        tokenizer: Any = None,
    ) -> None:
        """Score the drawn samples again and compare. Samples of other weights are skipped and counted.

        Args:
            recorded: recorded log-probs, ``[N]``, nats.
            batch: the tokens of the log-probs.
            sampled: the weights that sampled each of the B samples, as far as they are known.
            score: returns the engine's log-probs of a batch, and the weights that made them.
            tokenizer: decodes the context of the worst token for the message.

        Raises:
            DriftError: the mean difference is beyond the tolerance, and ``on_drift="raise"``.
            MissingLogProbError: the engine returned no log-prob for a token.
        """
        self.num_skipped = 0
        drawn = self.draw(batch)
        if not drawn:
            return
        part = batch.select(drawn)
        try:
            scored = score(part)
            now = dict(zip(drawn, scored.values.split(part.lengths), strict=True))
            compared = [i for i in drawn if not is_of_other_weights(sampled[i], scored.origin)]
            self.num_skipped = len(drawn) - len(compared)
            if not compared:
                return
            part, rows = batch.select(compared), recorded.split(batch.lengths)
            sides = [rows[i] for i in compared], [now[i] for i in compared]
            found = mismatch(*sides, part.keep, token_ids=part.token_ids, tokenizer=tokenizer, limits={})
        except MissingLogProbError as error:
            raise MissingLogProbError(
                f"in the audit of samples {drawn}, counted from 0 in this list: {error}"
            ) from error
        # mismatch() counted the compared samples only.
        worst = [dataclasses.replace(token, sample=compared[token.sample]) for token in found.worst]
        self.found = dataclasses.replace(found, worst=worst)
        figures = found.metrics
        if figures["log_prob_diff_mean_nats"] <= self.tolerance:
            return
        message = (
            f"the recorded log-probs are not those of the policy's engine: over {int(figures['num_tokens'])} "
            f"tokens of {len(compared)} of {len(batch)} samples they differ by "
            f"{figures['log_prob_diff_mean_nats']:.4g} nats on average (tolerance {self.tolerance:g}), "
            f"{figures['log_prob_diff_max_nats']:.4g} at most. Worst: {worst[0]}.\nWere the engine's weights "
            "updated since the policy sampled, or did the policy sample at another temperature? "
            "gen_log_probs='rescore' takes the engine's log-probs."
        )
        self.complain(message)

    def complain(self, message: str) -> None:
        """Raise or warn, as ``on_drift`` says."""
        if self.on_drift == "raise":
            raise DriftError(message)
        warnings.warn(message, MismatchWarning, stacklevel=3)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real)
