"""The carriers between the stages. Frozen; every field states its shape.

B sequences, L tokens of one sequence, W columns of the row a sequence is stored in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

Readout = Literal["auto", "pooling", "token_ids", "flat"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRequest:
    """One sequence for an engine. It carries plain ints: it crosses process borders."""

    token_ids: list[int]  # [L], L >= 2
    start: int  # index of the first token to score, 1 <= start < L


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreResult:
    """What an engine returns for one request."""

    log_probs: torch.Tensor  # [L - start] float32 on the CPU, nats; NaN where the engine gave none
    num_cached_tokens: int = 0  # tokens whose KV was read from the prefix cache
    rescored: bool = False  # sent twice, because the first cache hit reached past row start - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What a scorer must know of an engine before it sends anything."""

    readout: Literal["pooling", "token_ids", "flat", "logits"]  # "logits": a transformers model
    vocab_size: int | None  # ids must be below; None: not known
    max_sequence_len: int | None  # longest sequence that can be scored, in tokens; None: not known


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreStats:
    """Figures of one :meth:`~vllm_kl.VLLMScorer.score` call."""

    num_requests: int  # sequences sent to the engine
    num_scored_tokens: int  # log-probs returned
    num_prompt_tokens: int  # tokens of the sequences sent
    num_cached_tokens: int  # of those, read from the prefix cache
    num_rescored: int  # sequences sent twice for exactness
    readout: str
    wall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """A batch of real tokens, with the place of each in the row it is stored in.

    Made by :mod:`vllm_kl.inputs`, consumed by :mod:`vllm_kl.alignment`. Padding is gone; where it was
    is in ``columns`` and ``widths``, so results can be put back exactly where the tokens are.
    """

    token_ids: list[torch.Tensor]  # B x [L] int64, CPU
    keep: list[torch.Tensor]  # B x [L] bool, CPU: tokens whose log-prob is wanted; never token 0
    assistant: list[torch.Tensor] | None  # B x [L] bool, CPU; None: not known
    columns: list[torch.Tensor]  # B x [L] int64: column of each token in its stored row
    widths: list[int]  # B: columns of the stored row
    stored: bool  # the ids were read from the tensordict, not tokenized here

    def __len__(self) -> int:
        return len(self.token_ids)


class Scorer(Protocol):
    """Anything that turns token ids into log-probs: ``VLLMScorer`` and its stand-ins."""

    def score(self, token_ids: list[torch.Tensor], start: list[int]) -> list[torch.Tensor]:
        """Return B float32 tensors ``[L - start]``, nats."""
        ...
