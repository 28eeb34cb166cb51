"""Log-probs that are reused are trusted, but a few are checked: scored again by the engine that is said to have made them.

A policy that was updated between sampling and scoring, another temperature, ids that are not those of the log-probs: all of them
show as a difference beyond rounding, on any sample. So a small fraction of the samples is enough.
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
    """Checks recorded log-probs against those of an engine.

    Args:
        fraction: of the samples, drawn one by one from a generator of its own: the same in every run, and nobody else's random
            numbers change.
        tolerance: largest healthy mean difference over the tokens of the drawn samples, nats. Rounding in bfloat16 makes
            one hundredth or two, in float32 a millionth.
        on_drift: ``"raise"``, or ``"warn"`` of each such batch, beyond it.

    Attributes:
        found: the last comparison, or ``None``; see :func:`vllm_kl.mismatch`.
        num_skipped: samples that were drawn for the last audit and not compared: other weights had sampled them.
    """

    def __init__(self, fraction: float, *, tolerance: float = 0.05, on_drift: OnDrift = "raise") -> None:
        if not isinstance(fraction, numbers.Real) or not 0 <= fraction <= 1:
            raise OptionError(f"audit must be a fraction of the samples, from 0 to 1; got {fraction!r}")
        if not isinstance(tolerance, numbers.Real) or not 0 < tolerance < math.inf:
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
        """Figures of the last audit, for a logger."""
        found = (
            {}
            if self.found is None
            else {f"audit_{name}": value for name, value in self.found.metrics.items()}
        )
        return found | ({"audit_skipped_samples": float(self.num_skipped)} if self.fraction else {})

    @property
    def state(self) -> torch.Tensor:
        """Which samples will be drawn next."""
        return self._generator.get_state()

    @state.setter
    def state(self, state: torch.Tensor) -> None:
        self._generator.set_state(state)

    def draw(self, batch: TokenBatch) -> list[int]:
        """Return the samples to check: none that keeps no token."""
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
        """Score the drawn samples and compare. Those that are known to be of other weights are skipped, and counted.

        Args:
            recorded: ``[N]``, nats.
            batch: the tokens that they belong to.
            sampled: what sampled each of the B samples, as far as it is known.
            score: returns the engine's log-probs of a batch, and the weights that made them.
            tokenizer: gives the message a context.

        Raises:
            DriftError: the mean difference is beyond the tolerance and ``on_drift="raise"``.
            MissingLogProbError: the engine has no number for a token.
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
                f"in the audit of samples {drawn}, counted among these from 0: {error}"
            ) from error
        # Samples are counted as in the batch.
        worst = [dataclasses.replace(token, sample=compared[token.sample]) for token in found.worst]
        self.found = dataclasses.replace(found, worst=worst)
        figures = found.metrics
        if figures["log_prob_diff_mean_nats"] <= self.tolerance:
            return
        message = (
            f"the recorded log-probs are not those of the policy's engine: over {int(figures['num_tokens'])} tokens of "
            f"{len(compared)} of {len(batch)} samples they differ by {figures['log_prob_diff_mean_nats']:.4g} nats on average "
            f"(tolerance {self.tolerance:g}), {figures['log_prob_diff_max_nats']:.4g} at most. Worst: {worst[0]}. Were its weights "
            "updated since it sampled, or did it sample at a temperature? gen_log_probs='rescore' takes the engine's."
        )
        self.complain(message)

    def complain(self, message: str) -> None:
        """Raise or warn, as ``on_drift`` says."""
        if self.on_drift == "raise":
            raise DriftError(message)
        warnings.warn(message, MismatchWarning, stacklevel=3)
