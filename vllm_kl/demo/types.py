"""Defines the demo's settings and results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_kl.view.samples import Sample


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of the demo, with the defaults of the command."""

    batches: int = 8
    prompts: int = 8  # per batch
    group: int = 8  # responses per prompt
    coeff: float = 0.1  # coefficient of the KL in the reward, or in the loss
    pad_output: bool = False
    seed: int = 0
    out: Path = Path("demo_out")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DemoConfig):
    """Settings of the demo with ``--train``."""

    batches: int = 30  # one per update
    prompts: int = 16
    minibatch: int = 64  # responses per step of the optimizer
    learning_rate: float = 5e-5
    max_grad_norm: float = 1.0
    log: Literal["csv", "tensorboard", "wandb"] | None = None  # where the figures of each update go

    @property
    def batches_kept(self) -> int:
        """Batches in the replay buffer. Each update trains once on every response of the buffer."""
        return 1 if self.pad_output else 2  # GRPOLoss (TorchRL 0.14) takes no dense rows of two widths


@dataclass(frozen=True, kw_only=True)
class Rollout(Sample):
    """One scored response. The reward is the task's, without the KL; the KL is RetrieveKL's k1."""

    batch: int
    group: int


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """Printed figures of one batch."""

    sequences: int
    response_tokens: int
    reward: float
    kl_k1: float  # mean per response token, nats
    kl_k3: float
    max_abs_err: float  # largest |KL - float64 KL| over the response tokens, nats
    tok_per_s: float  # tokens of the batch's sequences, generated and scored, per second


@dataclass(frozen=True, kw_only=True)
class UpdateRow:
    """Figures of one update."""

    policy_version: int  # of the weights that sampled
    ref_version: int
    collected: BatchRow  # the batch that was collected for this update
    # token_mult_prob_error - 1 of sampler (vLLM) and trainer (transformers), before the update.
    mismatch: float
    # Trained version minus sampling version, mean over the responses of the buffer.
    staleness: float
    loss: float  # mean over the optimizer's steps
    clip_fraction: float
