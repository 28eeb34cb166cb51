"""The carriers between the stages. Frozen; every field states its shape.

B sequences, L tokens of one sequence, W columns of the row a sequence is stored in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

ReadoutName = Literal["auto", "pooling", "token_ids", "flat"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreRequest:
    """One sequence for an engine. It holds plain values and arrays: it crosses process borders."""

    token_ids: np.ndarray  # [L] int32, L >= 2
    start: int  # index of the first token to score, 1 <= start < L
    temperature: float = 1.0  # log-probs are those of softmax(logits / temperature)
    ids: np.ndarray | None = None  # [L - start, K] int32: tokens to score beside the sequence's own
    top_k: int = 0  # best tokens to return per row

    @property
    def num_ids(self) -> int:
        """K, the chosen tokens of a row."""
        return 0 if self.ids is None else self.ids.shape[1]

    @property
    def num_columns(self) -> int:
        """Columns of :attr:`ScoreResult.values`."""
        return 1 + self.num_ids + 2 * self.top_k


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreResult:
    """What an engine returns for one request. R = L - start rows; row j is of token start + j."""

    # [R, 1 + K + 2 k] float32: the token's log-prob, those of ids, then ids and log-probs of the best; nats; NaN where the
    # engine gave none
    values: np.ndarray
    num_cached_tokens: int = 0  # tokens whose KV was read from the prefix cache
    rescored: bool = False  # sent twice, because the first cache hit reached past row start - 1
    weight_version: int | None = None  # of the weights that made the values; None: not known


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TopK:
    """The best tokens of every scored row of one sequence, best first."""

    token_ids: torch.Tensor  # [R, k] int64
    log_probs: torch.Tensor  # [R, k] float32, nats
    target_log_probs: torch.Tensor  # [R] float32: of the sequence's own tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What a scorer must know of an engine before it sends anything."""

    readout: Literal["pooling", "token_ids", "flat", "logits"]  # "logits": a transformers model
    vocab_size: int | None  # ids must be below; None: not known
    max_sequence_len: int | None  # longest sequence that can be scored, in tokens; None: not known
    can: frozenset[Literal["temperature", "ids", "top_k"]] = frozenset()  # what it can do beyond the tokens' log-probs
    max_ids: int | None = None  # most chosen ids per row; None: no limit
    # What makes it slower, or its numbers other, than expected; the scorer logs them as warnings.
    notes: tuple[str, ...] = ()
    # Ids that stand for an image, video or audio; for which.
    placeholders: Mapping[int, str] = field(default_factory=dict)
    # Which numbers a model has whose numbers depend on a length, see engines/lengths.py; None: of most models they do not
    length_side: Literal["short", "long", "row"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreStats:
    """Figures of one call of :class:`~vllm_kl.VLLMScorer`."""

    num_requests: int  # sequences with a token to score
    num_scored_tokens: int  # rows returned
    num_prompt_tokens: int  # tokens of those sequences
    num_cached_tokens: int  # of those, not computed: read from the prefix cache, or of a sequence that came twice
    num_rescored: int  # sequences sent twice for exactness
    readout: str
    wall_s: float
    weight_version: int | None = (
        None  # of the weights that made the log-probs; None: not known, or nothing was computed
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextReport:
    """What was found in the texts of one batch."""

    metrics: dict[str, float] = field(default_factory=dict)  # figures for a logger
    warnings: dict[str, str] = field(default_factory=dict)  # by kind: what makes the numbers others than one may think
    notes: dict[str, str] = field(default_factory=dict)  # by kind: what is right, and good to know

    def joined(self, *others: TextReport) -> TextReport:
        """Return a report that has what all of them have."""
        all_of = [self, *others]
        return TextReport(
            metrics={name: value for report in all_of for name, value in report.metrics.items()},
            warnings={kind: text for report in all_of for kind, text in report.warnings.items()},
            notes={kind: text for report in all_of for kind, text in report.notes.items()},
        )


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
    report: TextReport = field(default_factory=TextReport)  # what was found in the texts, or at the ids' beginning

    def __len__(self) -> int:
        return len(self.token_ids)

    def select(self, samples: list[int]) -> TokenBatch:
        """Return a batch of some of the samples."""
        pick = lambda rows: [rows[i] for i in samples]  # noqa: E731
        return TokenBatch(
            token_ids=pick(self.token_ids),
            keep=pick(self.keep),
            assistant=None if self.assistant is None else pick(self.assistant),
            columns=pick(self.columns),
            widths=pick(self.widths),
            stored=self.stored,
            report=self.report,
        )


class Scorer(Protocol):
    """Anything that turns token ids into log-probs: ``VLLMScorer`` and its stand-ins."""

    def score(self, token_ids: list[torch.Tensor], start: list[int]) -> list[torch.Tensor]:
        """Return B float32 tensors ``[L - start]``, nats."""
        ...
