"""Scores the rows of a table: :class:`ScoreRows` is the stage of the pipeline that owns an engine.

All sequences of a block go to the scorer in one call, so a group shares its prompt, and neighbours that begin
alike share their beginning. A row that cannot be scored gets the text of its error, and nulls.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from vllm_kl.diagnostics import mismatch
from vllm_kl.errors import EngineError, InputError, MissingLogProbError
from vllm_kl.kl import kl_estimate
from vllm_kl.offline.columns import (
    IDS,
    MASKS,
    NUM_CACHED,
    NUM_PROMPT,
    POLICY,
    REFERENCE,
    ROW,
    STARTS,
    Columns,
    Layout,
)
from vllm_kl.scorer import VLLMScorer
from vllm_kl.types import TopK

logger = logging.getLogger("vllm_kl")

MAX_STARTS = 4  # of an engine by one actor


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to score with, as the user named it."""

    path: str
    temperature: float = 1.0
    engine_options: dict[str, Any] = field(default_factory=dict)


class _Sequence(NamedTuple):
    """One sequence of L tokens that can be scored."""

    token_ids: np.ndarray  # [L] int
    start: int
    num_cut: int  # tokens that are not sent, at the left
    keep: np.ndarray | None  # [L - start] bool: the tokens that count; None: all

    @property
    def mask(self) -> np.ndarray:
        """The tokens that count, [L] bool."""
        return np.concatenate([np.zeros(self.start, bool), self.keep])

    def kept(self, values: np.ndarray) -> np.ndarray:
        """Return the values of the tokens that count, of values ``[L - start, ...]``."""
        return values if self.keep is None else values[self.keep]


class _Values(NamedTuple):
    """What the engine returned for one sequence."""

    log_probs: torch.Tensor  # [L - start] float32
    entropy: torch.Tensor | None = None  # the same shape
    best: TopK | None = None


class ScoreRows:
    """A stage for ``map_batches``: adds the log-probs of a model to a table that ``ReadRows`` made.

    Args:
        model: the model; this object starts its engine.
        layout: what the rows hold.
        columns: the names of the added columns.
        name: the column of the log-probs.
        top_k: also add the K most likely tokens of every scored position.
        entropy: also add the entropy of the model's distribution at every scored position.
        max_len_policy: what to do with a sequence that is too long for the engine.
        on_error: ``"stop"`` raises the first row's error.
    """

    def __init__(
        self,
        model: Model,
        layout: Layout,
        columns: Columns,
        *,
        name: str = REFERENCE,
        top_k: int = 0,
        entropy: bool = False,
        max_len_policy: Literal["reject", "left"] = "reject",
        on_error: Literal["mark", "stop"] = "mark",
    ) -> None:
        self._model, self._layout, self._columns, self._name = model, layout, columns, name
        self._top_k, self._entropy = top_k, entropy
        self._max_len_policy, self._on_error = max_len_policy, on_error
        self._num_starts = 0
        self._given_up: EngineError | None = None  # why no engine is started again
        self._scorer = self._start()

    def _start(self) -> VLLMScorer:
        self._num_starts += 1
        options = {"temperature": self._model.temperature, **self._model.engine_options}
        return VLLMScorer(self._model.path, **options)

    def close(self) -> None:
        """End the engine."""
        self._scorer.close()

    def __call__(self, table: pa.Table) -> pa.Table:
        error = self._columns.added("error")
        errors = table.column(error).to_pylist()
        sequences = self._sequences(table, errors)
        _stop_at_first(errors, table, self._on_error)
        values, figures = self._score(sequences, errors)
        _stop_at_first(errors, table, self._on_error)
        table = table.drop_columns([error])
        for name, column in self._output(sequences, values, table.num_rows).items():
            if not (name == "start" and self._layout.read.get("start") == self._columns.added("start")):
                table = table.append_column(self._columns.added(name), column)
        if self._name == REFERENCE:  # a policy scores the same tokens once more
            for name, figure in figures.items():
                table = table.append_column(name, _in_first_row(figure, table.num_rows))
        return _with_errors(table, errors, self._columns, self._layout)

    def _sequences(self, table: pa.Table, errors: list[str | None]) -> dict[int, list[_Sequence]]:
        """Return the sequences of each row that can be scored; write the errors of the others."""
        found = {}
        for i, (ids, starts) in enumerate(zip(table.column(IDS), table.column(STARTS), strict=True)):
            if errors[i] is not None:
                continue
            masks = table.column(MASKS)[i].values if MASKS in table.column_names else [None] * len(ids.values)
            try:
                found[i] = [
                    self._checked(n, one.values.to_numpy(), start, mask, already)
                    for n, (one, start, mask, already) in enumerate(
                        zip(ids.values, starts.as_py(), masks, self._cut_before(table, i), strict=True)
                    )
                ]
            except InputError as error:
                errors[i] = self._told(error)
        return found

    def _cut_before(self, table: pa.Table, i: int) -> Iterable[int | None]:
        """Return how many tokens the other model's stage cut off each sequence; ``None``: it did not run."""
        if self._name == REFERENCE or self._max_len_policy != "left":
            return itertools.repeat(None, len(table.column(IDS)[i].values))
        cut = table.column(self._columns.added("num_cut"))[i].as_py()
        return cut if self._layout.is_group else [cut]

    def _checked(self, n: int, ids: np.ndarray, start: int, mask: Any, already: int | None) -> _Sequence:
        keep = None if mask is None else mask.values.to_numpy(zero_copy_only=False)[start:]
        most, num_cut = self._scorer.info.max_sequence_len, 0
        if self._max_len_policy == "left" and most is not None and most < len(ids):
            num_cut = len(ids) - most
            if num_cut >= start:
                raise InputError(
                    f"sequence {n}: {len(ids) - start} tokens from its first scored one on, but the engine "
                    f"takes {most} tokens, and the first has no log-prob: nothing can be cut off at the left"
                )
        if already is not None:  # both models see the same tokens
            if num_cut > already:
                raise InputError(
                    f"sequence {n}: the model scored {len(ids) - already} tokens, but the policy's engine "
                    f"takes {most}. Give both engines the same max_model_len"
                )
            num_cut = already
        try:
            self._scorer.check([ids[num_cut:]], [start - num_cut])
        except InputError as error:
            raise InputError(str(error).replace("sequence 0", f"sequence {n}", 1)) from None
        return _Sequence(ids, start, num_cut, keep)

    def _told(self, error: Exception) -> str:
        """Return an error's text without the number that a sequence has in a call."""
        text = str(error)
        if self._layout.is_group:
            return text.replace("sequence", "response", 1)
        return text.replace("sequence 0", "the sequence", 1)

    def _score(
        self, sequences: dict[int, list[_Sequence]], errors: list[str | None]
    ) -> tuple[dict[int, list[_Values]], dict[str, int]]:
        """Return the values of each row's sequences, and the figures of the call."""
        flat = [one for row in sequences.values() for one in row]
        try:
            values, figures = self._asked(flat)
        except MissingLogProbError as error:
            if len(sequences) > 1:
                return self._score_alone(sequences, errors)
            ((i, _),) = sequences.items()
            errors[i] = self._told(error)
            sequences.clear()
            return {}, {NUM_PROMPT: 0, NUM_CACHED: 0}
        of_row = iter(values)
        return {i: [next(of_row) for _ in row] for i, row in sequences.items()}, figures

    def _score_alone(
        self, sequences: dict[int, list[_Sequence]], errors: list[str | None]
    ) -> tuple[dict[int, list[_Values]], dict[str, int]]:
        """Score each row in a call of its own: one of them has a token without a log-prob."""
        values: dict[int, list[_Values]] = {}
        sums: Counter[str] = Counter()
        for i in list(sequences):
            one = {i: sequences.pop(i)}
            found, figures = self._score(one, errors)
            sequences |= one
            values |= found
            sums.update(figures)
        return values, dict(sums)

    def _asked(self, flat: list[_Sequence]) -> tuple[list[_Values], dict[str, int]]:
        """Ask the engine; if it died, start it again, a few times in the life of this object.

        Ray has the next block in the queue already. Its error is the same, because either may be told.
        """
        if self._given_up is not None:
            raise self._given_up
        ids, starts = (
            [one.token_ids[one.num_cut :] for one in flat],
            [one.start - one.num_cut for one in flat],
        )
        while True:
            try:
                values = self._values(ids, starts)
                break
            except EngineError as error:
                self._scorer.close()
                if self._num_starts >= MAX_STARTS:
                    self._given_up = EngineError(f"the engine died {MAX_STARTS} times: {error}")
                    raise self._given_up from error
                logger.warning("vllm_kl: the engine died and is started again: %s", error)
                self._scorer = self._start()
        stats = self._scorer.stats
        return values, {NUM_PROMPT: stats.num_prompt_tokens, NUM_CACHED: stats.num_cached_tokens}

    def _values(self, ids: list[np.ndarray], starts: list[int]) -> list[_Values]:
        """Return what is wanted of each sequence, of one call of the engine."""
        if self._top_k:
            found = self._scorer.score_topk(ids, self._top_k, starts, entropy=self._entropy)
            return [_Values(best.target_log_probs, best.entropy, best) for best in found]
        if self._entropy:
            return list(map(_Values, *self._scorer.score(ids, starts, entropy=True)))
        return list(map(_Values, self._scorer.score(ids, starts)))

    def _output(
        self, sequences: dict[int, list[_Sequence]], values: dict[int, list[_Values]], num_rows: int
    ) -> dict[str, pa.Array]:
        """Return the columns to add, in the order of the output."""

        def column(of_sequence: Callable[[_Sequence, _Values], Any], type_: pa.DataType) -> pa.Array:
            found: list[Any] = [None] * num_rows
            for i, row in values.items():
                each = [of_sequence(one, value) for one, value in zip(sequences[i], row, strict=True)]
                found[i] = each if self._layout.is_group else each[0]
            return pa.array(found, pa.list_(type_) if self._layout.is_group else type_)

        def log_probs(one: _Sequence, value: _Values) -> np.ndarray:
            return one.kept(value.log_probs.numpy())

        columns = {self._name: column(log_probs, pa.list_(pa.float32()))}
        if self._top_k:
            columns |= {
                "topk_ids": column(
                    lambda one, value: list(one.kept(value.best.token_ids.numpy())),
                    pa.list_(pa.list_(pa.int32())),
                ),
                "topk_log_probs": column(
                    lambda one, value: list(one.kept(value.best.log_probs.numpy())),
                    pa.list_(pa.list_(pa.float32())),
                ),
            }
        if self._entropy:
            columns["entropy"] = column(
                lambda one, value: one.kept(value.entropy.numpy()), pa.list_(pa.float32())
            )
        if self._name != REFERENCE:
            return columns
        columns["start"] = column(lambda one, _: one.start, pa.int64())
        columns["num_tokens"] = column(lambda *of: len(log_probs(*of)), pa.int64())
        columns["sum"] = column(lambda *of: log_probs(*of).sum(dtype=np.float64), pa.float64())
        if self._max_len_policy == "left":
            columns["num_cut"] = column(lambda one, _: one.num_cut, pa.int64())
        if self._layout.has_texts:
            columns["token_ids"] = column(lambda one, _: one.token_ids, pa.list_(pa.int32()))
        if self._layout.kind == "messages":
            columns["mask"] = column(lambda one, _: one.mask, pa.list_(pa.bool_()))
        return columns


def _stop_at_first(errors: list[str | None], table: pa.Table, on_error: Literal["mark", "stop"]) -> None:
    """Raise the first row's error, if there is one and the user wants to stop at it."""
    for i, told in enumerate(errors):
        if told is not None and on_error == "stop":
            is_numbered = ROW in table.column_names
            where = f"{table.column(ROW)[i]} of the data set" if is_numbered else f"{i} of its block"
            raise InputError(f"row {where}: {told}")


def _with_errors(table: pa.Table, errors: list[str | None], columns: Columns, layout: Layout) -> pa.Table:
    """Add the column of errors; what else was added is null where a row has one."""
    has_error = pa.array([told is not None for told in errors], pa.bool_())
    if any(told is not None for told in errors):
        added = set(columns.all_added) - set(layout.read.values())
        for i, name in enumerate(table.column_names):
            if name in added:
                field = table.schema.field(i)
                values = table.column(i).combine_chunks()
                kept = pc.if_else(has_error, pa.scalar(None, field.type), values)
                table = table.set_column(i, field, kept)
    return table.append_column(columns.added("error"), pa.array(errors, pa.string()))


def _in_first_row(figure: int, num_rows: int) -> pa.Array:
    """Return a column whose sum is a figure of the whole call."""
    return pa.array([figure, *[0] * (num_rows - 1)][:num_rows], pa.int64())


class CompareRows:
    """A function for ``map_batches``: adds the per-token KL of two models, and their mismatch."""

    def __init__(
        self, layout: Layout, columns: Columns, estimator: str, on_error: Literal["mark", "stop"]
    ) -> None:
        self._layout, self._columns = layout, columns
        self._estimator, self._on_error = estimator, on_error

    def __call__(self, table: pa.Table) -> pa.Table:
        policy, reference = (table.column(self._columns.added(name)) for name in (POLICY, REFERENCE))
        kl: list[Any] = [None] * table.num_rows
        figures: list[dict[str, float] | None] = [None] * table.num_rows
        name = self._columns.added("error")
        errors = table.column(name).to_pylist()
        for i in range(table.num_rows):
            if errors[i] is not None:
                continue
            try:
                kl[i], figures[i] = self._compared(policy[i], reference[i])
            except MissingLogProbError as error:  # a token of probability 0
                errors[i] = str(error).replace("sample 0", "the row", 1)
        _stop_at_first(errors, table, self._on_error)
        type_ = pa.list_(pa.float32())
        table = table.drop_columns([name]).append_column(
            self._columns.added("kl"), pa.array(kl, pa.list_(type_) if self._layout.is_group else type_)
        )
        table = table.append_column(self._columns.added("mismatch"), pa.array(figures, _mismatch_type()))
        return _with_errors(table, errors, self._columns, self._layout)

    def _compared(self, policy: pa.Scalar, reference: pa.Scalar) -> tuple[Any, dict[str, float] | None]:
        sides = [
            [
                torch.tensor(one.values.to_numpy())
                for one in (side.values if self._layout.is_group else [side])
            ]
            for side in (policy, reference)
        ]
        keep = [torch.ones(len(row), dtype=torch.bool) for row in sides[0]]
        kl = [row.numpy() for row in kl_estimate(*sides, keep, estimator=self._estimator)]
        scored = any(len(row) for row in keep)
        figures = mismatch(*sides, keep, num_worst=0, limits={}).metrics if scored else None
        return kl if self._layout.is_group else kl[0], figures


@functools.cache
def _mismatch_type() -> pa.DataType:
    one = [torch.zeros(1)]
    names = mismatch(one, one, [torch.ones(1, dtype=torch.bool)], num_worst=0, limits={}).metrics
    return pa.struct([(name, pa.float64()) for name in names])
