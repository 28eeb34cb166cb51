"""The carriers between the stages. Frozen; every field states its shape.

B sequences, L tokens of one sequence, W columns of the row a sequence is stored in, N tokens of all sequences laid end to end.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

ReadoutName = Literal["auto", "pooling", "token_ids", "flat"]
Rows = torch.Tensor | list[torch.Tensor]  # a dense [B, W], or B rows [W] of any lengths


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
    can: frozenset[Literal["temperature", "ids", "top_k"]] = (
        frozenset()
    )  # what it can do beyond the tokens' log-probs
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
    num_cached_tokens: (
        int  # of those, not computed: read from the prefix cache, or of a sequence that came twice
    )
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
    warnings: dict[str, str] = field(
        default_factory=dict
    )  # by kind: what makes the numbers others than one may think
    notes: dict[str, str] = field(default_factory=dict)  # by kind: what is right, and good to know

    def joined(self, *others: TextReport) -> TextReport:
        """Return a report that has what all of them have."""
        all_of = [self, *others]
        return TextReport(
            metrics={name: value for report in all_of for name, value in report.metrics.items()},
            warnings={kind: text for report in all_of for kind, text in report.warnings.items()},
            notes={kind: text for report in all_of for kind, text in report.notes.items()},
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """A batch of real tokens, laid end to end, with the place of each in the row it is stored in.

    Made by :mod:`vllm_kl.batch.inputs`, consumed by :mod:`vllm_kl.batch.alignment`. Padding is gone; where it was is in
    ``places`` and ``widths``, so results can be put back exactly where the tokens are. Everything per token is one packed tensor
    ``[N]``, so a batch costs a few operations, not a few per sample; the properties give it sample by sample.
    """

    packed_ids: torch.Tensor  # [N] int64, CPU
    packed_keep: torch.Tensor  # [N] bool, CPU: tokens whose log-prob is wanted; never token 0
    packed_assistant: torch.Tensor | None  # [N] bool, CPU; None: not known
    lengths: list[int]  # B: real tokens of each sample, together N
    places: (
        torch.Tensor | None
    )  # [N] int64: index in the stored rows laid end to end; None: they have no padding
    widths: list[int]  # B: columns of the stored row
    stored: bool  # the ids were read from the tensordict, not tokenized here
    report: TextReport = field(
        default_factory=TextReport
    )  # what was found in the texts, or at the ids' beginning

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def token_ids(self) -> list[torch.Tensor]:
        """Ids, B x ``[L]``."""
        return list(self.packed_ids.split(self.lengths))

    @cached_property
    def keep(self) -> list[torch.Tensor]:
        """The mask of the tokens that are wanted, B x ``[L]``."""
        return list(self.packed_keep.split(self.lengths))

    @cached_property
    def assistant(self) -> list[torch.Tensor] | None:
        """The mask of the assistant's tokens, B x ``[L]``, if it is known."""
        return None if self.packed_assistant is None else list(self.packed_assistant.split(self.lengths))

    @cached_property
    def columns(self) -> list[torch.Tensor]:
        """The column of each token in its stored row, B x ``[L]``."""
        return columns_of(self.places, self.lengths, self.widths)

    def select(self, samples: list[int]) -> TokenBatch:
        """Return a batch of some of the samples."""
        assistant = None if self.assistant is None else [self.assistant[i] for i in samples]
        return TokenBatch.of(
            [self.token_ids[i] for i in samples],
            [self.keep[i] for i in samples],
            assistant=assistant,
            columns=[self.columns[i] for i in samples],
            widths=[self.widths[i] for i in samples],
            stored=self.stored,
            report=self.report,
        )

    @classmethod
    def of(
        cls,
        token_ids: list[torch.Tensor],
        keep: list[torch.Tensor],
        *,
        assistant: list[torch.Tensor] | None = None,
        columns: list[torch.Tensor] | None = None,
        widths: list[int] | None = None,
        stored: bool,
        report: TextReport | None = None,
    ) -> TokenBatch:
        """Return the batch of samples that are given one by one; without ``columns`` their rows have no padding."""
        lengths = [len(ids) for ids in token_ids]
        widths = lengths if widths is None else widths
        places = None
        if widths != lengths:
            begins = itertools.accumulate(widths, initial=0)
            places = torch.cat([row + begin for row, begin in zip(columns, begins, strict=False)])
        return cls(
            packed_ids=torch.cat(token_ids),
            packed_keep=torch.cat(keep),
            packed_assistant=None if assistant is None else torch.cat(assistant),
            lengths=lengths,
            places=places,
            widths=widths,
            stored=stored,
            report=TextReport() if report is None else report,
        )


def widths_of(rows: Rows) -> list[int]:
    """Return how long each row is.

    >>> widths_of(torch.zeros(2, 3)), widths_of([torch.zeros(1), torch.zeros(2)])
    ([3, 3], [1, 2])
    """
    return [rows.shape[1]] * len(rows) if isinstance(rows, torch.Tensor) else [len(row) for row in rows]


def end_to_end(rows: Rows) -> torch.Tensor:
    """Return the values of all rows laid end to end; of a dense tensor without a copy."""
    if isinstance(rows, torch.Tensor):
        return rows.reshape(-1)
    return torch.cat(rows) if rows else torch.empty(0)


def pack(rows: Rows, places_N: torch.Tensor | None = None) -> torch.Tensor:
    """Return a copy of the values of all rows laid end to end, or of those at ``places_N``, on the CPU.

    >>> pack([torch.tensor([1, 2]), torch.tensor([3])]), pack(torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 3]))
    (tensor([1, 2, 3]), tensor([1, 4]))
    """
    values = end_to_end(rows).cpu()
    if places_N is not None:
        return values.index_select(0, places_N)
    return values.clone() if isinstance(rows, torch.Tensor) else values


def columns_of(places_N: torch.Tensor | None, lengths: list[int], widths: list[int]) -> list[torch.Tensor]:
    """Return the column of each token in its stored row, B x ``[L]``."""
    if places_N is None:
        return [torch.arange(length) for length in lengths]
    begins = itertools.accumulate(widths, initial=0)
    return [row - begin for row, begin in zip(places_N.split(lengths), begins, strict=False)]


def place_of(found_N: torch.Tensor, lengths: Sequence[int]) -> tuple[int, int]:
    """Return the sample of the first token that is found, and its index there.

    >>> place_of(torch.tensor([False, False, True, True]), [1, 3])
    (1, 1)
    """
    return sample_at(int(found_N.nonzero()[0]), lengths)


def sample_at(n: int, lengths: Sequence[int]) -> tuple[int, int]:
    """Return the sample of token n of all samples laid end to end, and its index there.

    >>> sample_at(2, [1, 3])
    (1, 1)
    """
    ends = torch.tensor(lengths).cumsum(0)
    i = int(torch.searchsorted(ends, n, right=True))
    return i, n - int(ends[i]) + lengths[i]


class Origin(NamedTuple):
    """The weights that made something."""

    version: int | str | None  # None: not known
    adapter: int | None = 0  # its id on the engine; 0: the base model; None: not known
    last_version: int | None = None  # a second one: weights were replaced meanwhile, or two records disagree

    def __str__(self) -> str:
        version = "an unknown version" if self.version is None else f"version {self.version}"
        if self.last_version is not None:
            version = f"versions {self.version} and {self.last_version}"
        return version + (f" with adapter {self.adapter}" if self.adapter else "")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scored:
    """One side's log-probs of a batch, and where they come from."""

    values: torch.Tensor  # [N] float32, nats: finite inside the batch's mask, 0.0 outside
    origin: Origin  # of what was scored just now; of recorded log-probs their samples tell
    is_recorded: bool = False  # by the policy when it sampled, not scored now


class Scorer(Protocol):
    """Anything that turns token ids into log-probs: ``VLLMScorer`` and its stand-ins.

    One whose log-probs have a version also has ``score_and_tell``, which returns it beside them: an attribute that is read
    afterwards may be another call's.
    """

    def score(self, token_ids: list[torch.Tensor], start: list[int]) -> list[torch.Tensor]:
        """Return B float32 tensors ``[L - start]``, nats."""
        ...
