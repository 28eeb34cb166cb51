"""Checks every KL that the trainer reads against float64, for the version of the weights that sampled it.

The policy's own log-probs are those that its engine recorded. While it is trained, single tokens get so
sensitive that float32 itself is off by 1e-5 and more, in transformers as in vLLM. So the log-probs of the
reference are compared by themselves, too.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase

from vllm_kl.demo.run import Float64KL
from vllm_kl.view.samples import Sample, samples_from_batch


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of the samples that one update was trained on."""

    reward: float  # mean
    kl: float  # mean of k1 per response token, nats
    versions: list[int]  # of the weights that sampled
    staleness: float  # mean of the trained version minus the sampling version
    error: float  # largest |KL - float64 KL|, nats
    reference_error: float  # largest |log-prob of the reference - float64|, nats

    def __str__(self) -> str:
        return (
            f"reward {self.reward:.3f}, KL {self.kl:+.5f} nats per token, sampled by versions "
            f"{', '.join(map(str, self.versions))}, staleness {self.staleness:.2f}, largest |KL - float64| "
            f"{self.error:.1e}, of the reference alone {self.reference_error:.1e}"
        )


class Check:
    """Keeps a checkpoint of every version, and compares each version's samples with it."""

    def __init__(self, folder: Path, reference: str) -> None:
        self._folder, self._reference = folder, Path(reference)
        self.version = -1  # the trained version

    def save(self, model: Any, version: int) -> None:
        """Save the weights that ``version`` serves."""
        model.save_pretrained(self._folder / str(version))
        self.version = version

    def figures(self, batch: TensorDictBase) -> Figures:
        """Return figures of a batch ``[B]`` as the buffer returns it.

        Raises:
            OSError: a sample carries a version that was never pushed.
        """
        samples = samples_from_batch(batch)
        by_version: dict[int, list[Sample]] = defaultdict(list)
        for sample in samples:
            by_version[int(sample.policy_version)].append(sample)
        errors = [self._errors(*item) for item in by_version.items()]
        return Figures(
            reward=statistics.fmean(sample.reward for sample in samples),
            kl=statistics.fmean(value for sample in samples for value in sample.kl),
            versions=sorted(by_version),
            staleness=self.version - statistics.fmean(int(sample.policy_version) for sample in samples),
            error=max(error for error, _ in errors),
            reference_error=max(error for _, error in errors),
        )

    def _errors(self, version: int, samples: list[Sample]) -> tuple[float, float]:
        """Return the largest error of the KL, and of the reference's log-probs."""
        policy, reference = Float64KL(self._folder / str(version), self._reference).log_probs(samples)
        k1, found = (
            torch.tensor([value for sample in samples for value in getattr(sample, name)]).double()
            for name in ("kl", "ref_log_probs")
        )
        return (k1 - (policy - reference)).abs().max().item(), (found - reference).abs().max().item()
