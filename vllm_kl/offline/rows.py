"""Turns the rows of a table into token ids and the places of the tokens to score, or into an error text.

A row holds one sequence, or a group: several responses to one prompt. Texts are tokenized, and dialogs
rendered, as :mod:`vllm_kl.batch` does it for TorchRL's batches. The module knows no engine and no Ray.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from vllm_kl.errors import InputError, OptionError
from vllm_kl.offline.columns import DIALOGS, IDS, MASKS, STARTS, Columns, Layout, is_list


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Row:
    """The S sequences of one row: one, or the responses of a group, each after the prompt."""

    token_ids: list[np.ndarray]  # S x [L] int
    starts: list[int]  # S: index of the first token to score
    masks: list[np.ndarray] | None = None  # S x [L] bool: the tokens to score; None: all from start on


@dataclass(frozen=True, kw_only=True)
class Texts:
    """How texts and dialogs become ids."""

    tokenizer: str | None = None  # path or name
    loading: dict[str, Any] = field(default_factory=dict)  # further arguments of from_pretrained()
    chat_template: str | None = None  # Jinja text; None: the tokenizer's own
    add_eos: bool = False  # put EOS after each response
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the chat template

    @property
    def template_options(self) -> dict[str, Any]:
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {**template, **self.options}


class ReadRows:
    """A stage for ``map_batches``: adds ids, starts, masks and ``error`` of every row to a table.

    Args:
        layout: what the rows hold.
        columns: the names of the added columns.
        texts: how texts and dialogs become ids.
    """

    def __init__(self, layout: Layout, columns: Columns, texts: Texts) -> None:
        self._layout, self._columns, self._texts = layout, columns, texts

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = self.read(table)
        error = self._columns.added("error")
        if error in table.column_names:  # the reader could not read the row's line
            found = table.column(error).to_pylist()
            rows = [row if told is None else told for row, told in zip(rows, found, strict=True)]
            table = table.drop_columns([error])
        added = {
            IDS: pa.array(
                [None if isinstance(row, str) else row.token_ids for row in rows],
                pa.list_(pa.list_(pa.int64())),
            ),
            STARTS: pa.array(
                [None if isinstance(row, str) else row.starts for row in rows], pa.list_(pa.int64())
            ),
        }
        if self._layout.kind == "messages":
            masks = [None if isinstance(row, str) else row.masks for row in rows]
            added[MASKS] = pa.array(masks, pa.list_(pa.list_(pa.bool_())))
        added[error] = pa.array([row if isinstance(row, str) else None for row in rows], pa.string())
        for name, values in added.items():
            table = table.append_column(name, values)
        return table.drop_columns([DIALOGS]) if DIALOGS in table.column_names else table

    def read(self, table: pa.Table) -> list[Row | str]:
        """Return each row, or the text of its error."""
        columns = {name: table.column(column) for name, column in self._layout.read.items()}
        if DIALOGS in table.column_names:
            texts = table.column(DIALOGS).to_pylist()
            return self._read_dialogs([None if text is None else json.loads(text) for text in texts])
        if self._layout.kind == "messages":
            return self._read_dialogs([as_python(value) for value in columns["messages"]])
        rows: list[Row | str] = []
        for i in range(table.num_rows):
            values = {name: column[i] for name, column in columns.items()}
            try:
                rows.append(self._texts_of(values) if self._layout.has_texts else self._ids_of(values))
            except InputError as error:
                rows.append(str(error))
        return rows

    def _ids_of(self, values: dict[str, pa.Scalar]) -> Row:
        names = self._layout.read
        if self._layout.kind == "ids":
            start = values["start"].as_py() if "start" in values else 1
            if start is None:
                raise InputError(f"column {names['start']!r} is null, expected an int")
            return Row(token_ids=[_ints(names["ids"], values["ids"])], starts=[start])
        prompt = _ints(names["prompt_ids"], values["prompt_ids"])
        responses = _each(names["response_ids"], values["response_ids"], self._layout.is_group)
        sequences = [
            np.concatenate([prompt, _ints(names["response_ids"], response)]) for response in responses
        ]
        return Row(token_ids=sequences, starts=[len(prompt)] * len(sequences))

    def _texts_of(self, values: dict[str, pa.Scalar]) -> Row:
        from vllm_kl.batch.tokenize_texts import tokenize

        names = self._layout.read
        role = "responses" if "responses" in values else "response"
        prompt = values["prompt"].as_py()
        if prompt is None:
            raise InputError(f"column {names['prompt']!r} is null, expected text")
        given = _each(names[role], values[role], self._layout.is_group)
        responses = [text.as_py() for text in given]
        if None in responses:
            raise InputError(f"column {names[role]!r} is null, expected text")
        tokenizer = self.tokenizer
        (prompt_ids,), _ = tokenize([prompt], tokenizer, {})
        begin = prompt_ids
        rows, _ = tokenize(responses, tokenizer, {"add_special_tokens": False}) if responses else ([], None)
        end = [tokenizer.eos_token_id] if self._texts.add_eos else []
        return Row(
            token_ids=[np.array([*begin, *ids, *end], dtype=np.int64) for ids in rows],
            starts=[len(begin)] * len(rows),
        )

    def _read_dialogs(self, dialogs: list[Any]) -> list[Row | str]:
        """Render all dialogs in one call; if one is bad, each in a call of its own."""
        try:
            return self._render(dialogs)
        except InputError as error:
            if len(dialogs) == 1:
                return [str(error).removeprefix("sample 0: ")]
        return [row for dialog in dialogs for row in self._read_dialogs([dialog])]

    def _render(self, dialogs: list[Any]) -> list[Row | str]:
        from vllm_kl.batch.read_messages import read_messages

        if not dialogs:
            return []
        batch = read_messages(dialogs, self.tokenizer, self._texts.template_options)
        rows: list[Row | str] = []
        for ids, keep in zip(batch.token_ids, batch.keep, strict=True):
            if not keep.any():
                rows.append("the dialog has no tokens of the assistant")
                continue
            start = int(keep.nonzero()[0])
            rows.append(Row(token_ids=[ids.numpy()], starts=[start], masks=[keep.numpy()]))
        return rows

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded once in a process."""
        tokenizer = _load_tokenizer(self._texts.tokenizer, **self._texts.loading)
        if self._texts.add_eos and tokenizer.eos_token_id is None:
            raise OptionError(f"add_eos=True, but the tokenizer {self._texts.tokenizer} has no EOS token")
        return tokenizer


@functools.cache
def _load_tokenizer(path: str | None, **options: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, **options)


def _each(name: str, value: pa.Scalar, is_group: bool) -> list[pa.Scalar]:
    """Return the responses of a row."""
    if not is_group:
        return [value]
    if not value.is_valid:
        raise InputError(f"column {name!r} is null, expected a list of responses")
    if not len(value.values):
        raise InputError(f"column {name!r} is empty, expected at least one response")
    return list(value.values)


def _ints(name: str, value: pa.Scalar) -> np.ndarray:
    if not value.is_valid:
        raise InputError(f"column {name!r} is null, expected a list of ints")
    ids = value.values
    if ids.null_count:
        raise InputError(f"column {name!r} has a null among its ids, expected ints")
    if not len(ids):
        return np.empty(0, np.int64)
    return ids.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)


def as_python(value: pa.Scalar) -> Any:
    """Return the messages of a row, without the keys that Arrow filled with nulls."""
    if not value.is_valid:
        return None
    if not is_list(value.type):
        try:  # messages that Arrow has no common type for are stored as JSON
            return json.loads(value.as_py())
        except ValueError:
            return value.as_py()
    return [_without_nulls(message) for message in value.as_py()]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
