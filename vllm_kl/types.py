"""Defines the frozen data classes that the modules pass to each other. Every field states its shape.

Letters in shapes: B sequences or samples; L tokens of one sequence; W columns of the stored row of a
sequence; N tokens of all sequences laid end to end.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

ReadoutName = Literal["auto", "pooling", "token_ids", "flat", "http-flat"]
Rows = torch.Tensor | list[torch.Tensor]  # a dense [B, W], or B rows [W] of any lengths


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreRequest:
    """One sequence for an engine to score. It holds plain values and arrays: it goes to another process."""

    token_ids: np.ndarray  # [L] int32, L >= 2
    start: int  # index of the first token to score, 1 <= start < L
    temperature: float = 1.0  # log-probs are those of softmax(logits / temperature)
    ids: np.ndarray | None = None  # [L - start, K] int32: tokens to score beside the sequence's own
    top_k: int = 0  # how many of the most likely tokens to return per row
    entropy: bool = False  # whether to return the entropy of the distribution of each row
    hidden_size: int = 0  # H, the features of the hidden state to return per row; 0: return none

    @property
    def num_ids(self) -> int:
        """K, the number of chosen tokens of a row."""
        return 0 if self.ids is None else self.ids.shape[1]

    @property
    def asked(self) -> tuple[int, int, bool, int]:
        """What a row is asked for: the arguments of :func:`vllm_kl.columns.num_columns`."""
        return self.num_ids, self.top_k, self.entropy, self.hidden_size


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreResult:
    """The answer of an engine to one request. R = L - start rows; row j belongs to token start + j."""

    # [R, num_columns(*request.asked)] float32, with the columns of columns.py. NaN: the engine returned no
    # number.
    values: np.ndarray
    num_cached_tokens: int = 0  # tokens whose KV came from the prefix cache
    rescored: bool = False  # sent twice, because the first cache hit reached past row start - 1
    weight_version: int | None = None  # version of the weights that made the values; None: not known


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TopK:
    """The k most likely tokens of every scored row of one sequence, most likely first."""

    token_ids: torch.Tensor  # [R, k] int64
    log_probs: torch.Tensor  # [R, k] float32, nats
    target_log_probs: torch.Tensor  # [R] float32, nats: of the sequence's own tokens
    entropy: torch.Tensor | None = None  # [R] float32, nats: of each row's distribution; None: not asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """The properties of an engine that a scorer must know before it sends requests."""

    readout: Literal["pooling", "token_ids", "flat", "http-flat", "logits"]  # "logits": transformers
    vocab_size: int | None  # every id must be below it; None: not known
    max_sequence_len: int | None  # longest sequence that can be scored, in tokens; None: not known
    # Features beyond the log-probs of the sequence's own tokens at temperature 1.
    can: frozenset[Literal["temperature", "ids", "top_k", "entropy"]] = frozenset()
    max_ids: int | None = None  # largest number of chosen ids per row; None: no limit
    # Why the engine is slower than expected, or its log-probs are different. The scorer logs each note as a
    # warning.
    notes: tuple[str, ...] = ()
    # Ids that stand for an image, a video or audio -> the name of what they stand for.
    placeholders: Mapping[int, str] = field(default_factory=dict)
    # Only for models whose log-probs depend on a length (engines/length_dependence.py); None: all others.
    length_side: Literal["short", "long", "row"] | None = None
    dtype: str | None = None  # of the model, such as "bfloat16"; None: not known
    hidden_size: int | None = None  # features of a hidden state; None: the engine returns none


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreStats:
    """Figures of one call of :class:`~vllm_kl.VLLMScorer`."""

    num_requests: int  # sequences with at least one token to score
    num_scored_tokens: int  # rows returned
    num_prompt_tokens: int  # all tokens of these sequences
    # Those of the prompt tokens that were not computed: the prefix cache or an equal sequence had them.
    num_cached_tokens: int
    num_rescored: int  # sequences sent twice, because the first cache hit reached too far
    readout: str
    wall_s: float
    # Version of the weights that made the log-probs; None: not known, or nothing was computed.
    weight_version: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextReport:
    """Findings about the texts of one batch."""

    metrics: dict[str, float] = field(default_factory=dict)  # figures for a logger
    # Kind of finding -> message: the log-probs are probably not those that the user expects.
    warnings: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # kind of finding -> message: correct, good to know

    def joined(self, *others: TextReport) -> TextReport:
        """Return one report with the findings of this and all other reports."""
        all_of = [self, *others]
        return TextReport(
            metrics={name: value for report in all_of for name, value in report.metrics.items()},
            warnings={kind: text for report in all_of for kind, text in report.warnings.items()},
            notes={kind: text for report in all_of for kind, text in report.notes.items()},
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """The tokens of a batch without padding, laid end to end, with the place of each token in its stored row.

    :mod:`vllm_kl.batch.read_tokens` makes it, and :mod:`vllm_kl.batch.alignment` uses it. ``places`` and
    ``widths`` tell where the padding was, so that results can be written exactly where the tokens are. Each
    value per token is in one packed tensor ``[N]``: a batch costs a few operations, not a few per sample. The
    properties give the values sample by sample.
    """

    packed_ids: torch.Tensor  # [N] int64, CPU
    packed_keep: torch.Tensor  # [N] bool, CPU: tokens whose log-prob is wanted; never token 0 of a sample
    packed_assistant: torch.Tensor | None  # [N] bool, CPU: the assistant's tokens; None: not known
    lengths: list[int]  # B: tokens of each sample without padding; the sum is N
    # [N] int64: index in the stored rows laid end to end; None: the rows have no padding.
    places: torch.Tensor | None
    widths: list[int]  # B: columns of the stored row
    stored: bool  # True: the ids come from the tensordict; False: a text was tokenized
    report: TextReport = field(default_factory=TextReport)  # findings about the texts, or about the first ids

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def token_ids(self) -> list[torch.Tensor]:
        """The ids of each sample, B x ``[L]``."""
        return list(self.packed_ids.split(self.lengths))

    @cached_property
    def keep(self) -> list[torch.Tensor]:
        """For each sample the mask of the tokens whose log-prob is wanted, B x ``[L]``."""
        return list(self.packed_keep.split(self.lengths))

    @cached_property
    def assistant(self) -> list[torch.Tensor] | None:
        """For each sample the mask of the assistant's tokens, B x ``[L]``; ``None``: not known."""
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
        """Return the batch of the given samples; without ``widths`` their stored rows have no padding."""
        lengths = [len(ids) for ids in token_ids]
        widths = lengths if widths is None else widths
        places = None
        if widths != lengths:
            assert columns is not None, "padded rows need the columns of their tokens"
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
    """Return the length of each row.

    >>> widths_of(torch.zeros(2, 3)), widths_of([torch.zeros(1), torch.zeros(2)])
    ([3, 3], [1, 2])
    """
    return [rows.shape[1]] * len(rows) if isinstance(rows, torch.Tensor) else [len(row) for row in rows]


def end_to_end(rows: Rows) -> torch.Tensor:
    """Return the values of all rows laid end to end. A dense tensor is not copied."""
    if isinstance(rows, torch.Tensor):
        return rows.reshape(-1)
    return torch.cat(rows) if rows else torch.empty(0)


def pack(rows: Rows, places_N: torch.Tensor | None = None) -> torch.Tensor:
    """Return a CPU copy of the values of all rows laid end to end, or only of the values at ``places_N``.

    >>> pack([torch.tensor([1, 2]), torch.tensor([3])])
    tensor([1, 2, 3])
    >>> pack(torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 3]))
    tensor([1, 4])
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
    """Return the sample of the first True in ``found_N``, and the index in that sample.

    >>> place_of(torch.tensor([False, False, True, True]), [1, 3])
    (1, 1)
    """
    return sample_at(int(found_N.nonzero()[0]), lengths)


def sample_at(n: int, lengths: Sequence[int]) -> tuple[int, int]:
    """Return the sample of token n of all samples laid end to end, and the index in that sample.

    >>> sample_at(2, [1, 3])
    (1, 1)
    """
    ends = torch.tensor(lengths).cumsum(0)
    i = int(torch.searchsorted(ends, n, right=True))
    return i, n - int(ends[i]) + lengths[i]


class Origin(NamedTuple):
    """The weights that sampled or scored a sample."""

    version: int | str | None  # None: not known
    adapter: int | None = 0  # the adapter's id on the engine; 0: the base model; None: not known
    # A second version: the weights were replaced while they sampled, or two records of the version disagree.
    last_version: int | str | None = None

    def __str__(self) -> str:
        version = "an unknown version" if self.version is None else f"version {self.version}"
        if self.last_version is not None:
            version = f"versions {self.version} and {self.last_version}"
        return version + (f" with adapter {self.adapter}" if self.adapter else "")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scored:
    """The log-probs of a batch from the policy or from the reference, and the weights that made them."""

    values: torch.Tensor  # [N] float32, nats: finite inside the batch's mask, 0.0 outside
    origin: Origin  # of log-probs that were scored now; recorded log-probs have the origin of their sample
    is_recorded: bool = False  # True: the policy recorded them when it sampled
    # [N] float32, nats, as the values: of the distribution of each kept token; None: not asked for
    entropies: torch.Tensor | None = None


class Scorer(Protocol):
    """Any object that returns the log-probs of token ids: ``VLLMScorer``, or an object that replaces it.

    A scorer whose weights have a version also has ``score_and_tell``, which returns the version with the
    log-probs. An attribute that the caller reads after the call may be of a later call.
    """

    def score(self, token_ids: list[torch.Tensor], start: list[int]) -> list[torch.Tensor]:
        """Return B float32 tensors ``[L - start]``, nats."""
        ...
