"""Says which columns of a data set are read, what they hold, and which columns are added.

Ids win: the first kind of :data:`KINDS` whose columns are all there is the one that is read. A kind that does
not read every column that the user named is none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from vllm_kl.errors import InputError, OptionError

Kind = Literal["prompt_and_response_ids", "ids", "messages", "texts"]

# Columns that go from stage to stage and are not written.
PART, ROW, IDS, STARTS, MASKS = "__part", "__row", "__token_ids", "__starts", "__masks"
DIALOGS = "__dialogs"  # JSON: each dialog as its line of JSONL has it
# Figures of the engine's calls for a block: in its first row, and 0 in the others.
NUM_PROMPT, NUM_CACHED = "__num_prompt_tokens", "__num_cached_tokens"
OF_STAGES = (PART, ROW, IDS, STARTS, MASKS, DIALOGS, NUM_PROMPT, NUM_CACHED)

REFERENCE, POLICY = "ref_log_probs", "log_probs"  # the log-probs of the two sides
ADDED = (
    REFERENCE,
    "start",
    "topk_ids",
    "topk_log_probs",
    "entropy",
    "num_tokens",
    "sum",
    "num_cut",
    "token_ids",
    "mask",
    POLICY,
    "kl",
    "mismatch",
    "error",
)


_SETTING = "column."  # before the names of the columns, in the settings of a manifest


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of the columns to read, and the prefix of the names of those that are added."""

    messages: str = "messages"  # list of {"role": ..., "content": ...}
    prompt: str = "prompt"  # text
    response: str = "response"  # text, or a list of texts: a group
    responses: str = "responses"  # the same as ``response``
    prompt_ids: str = "prompt_ids"  # list of ints
    response_ids: str = "response_ids"  # list of ints, or a list of lists: a group
    ids: str = "ids"  # list of ints, prompt and response
    start: str = "start"  # int: index in ``ids`` of the first token to score; without the column 1
    prefix: str = ""  # of the added columns
    named: tuple[str, ...] = ()  # fields above whose columns the user named

    @classmethod
    def renamed(cls, names: Mapping[str, str], prefix: str = "") -> Columns:
        """Return the columns with other names.

        Raises:
            OptionError: a column of this name is not read.
        """
        for name in names:
            if name not in READ:
                raise OptionError(f"column {name!r} cannot be renamed: known are {', '.join(READ)}")
        return cls(**names, prefix=prefix, named=tuple(sorted(names)))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Columns:
        """Return the columns of an output, of the settings in its manifest."""
        found = {f.name: settings[_SETTING + f.name] for f in fields(cls)}
        return cls(**{**found, "named": tuple(found["named"])})

    @property
    def settings(self) -> dict[str, Any]:
        """The columns as settings of a manifest."""
        return {_SETTING + f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def role_of(self) -> dict[str, str]:
        """Name of a column that is read -> the field of this class."""
        return {getattr(self, name): name for name in READ}

    @property
    def all_added(self) -> list[str]:
        """The names in the output of all columns that may be added."""
        return [self.added(name) for name in ADDED]

    def added(self, name: str) -> str:
        """Return the name in the output of an added column."""
        return self.prefix + name


READ = tuple(f.name for f in fields(Columns) if f.name not in ("prefix", "named"))


class _Choice(NamedTuple):
    kind: Kind
    needed: tuple[str, ...]  # fields of Columns
    optional: tuple[str, ...] = ()

    def reads(self, columns: Columns, names: Collection[str]) -> dict[str, str] | None:
        """Return which columns are read, field -> name; ``None``: one is missing, or another was named."""
        read = {name: getattr(columns, name) for name in self.needed}
        optional = {name: getattr(columns, name) for name in self.optional}
        read |= {name: column for name, column in optional.items() if column in names}
        return read if set(read.values()) <= set(names) and set(columns.named) <= set(read) else None


KINDS = (
    _Choice("prompt_and_response_ids", ("prompt_ids", "response_ids")),
    _Choice("ids", ("ids",), ("start",)),
    _Choice("messages", ("messages",)),
    _Choice("texts", ("prompt", "responses")),
    _Choice("texts", ("prompt", "response")),
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the rows of one data set hold."""

    kind: Kind
    is_group: bool  # a row holds several responses, which share the prompt
    read: dict[str, str] = field(default_factory=dict)  # field of Columns -> name in the data set

    @property
    def has_texts(self) -> bool:
        """Whether the rows must be tokenized."""
        return self.kind in ("messages", "texts")


def layout_of(schema: pa.Schema, columns: Columns) -> Layout:
    """Return what the rows of a data set hold, by its columns and their types.

    Raises:
        InputError: the data set has no columns that can be scored, or one has the wrong type.
    """
    for choice in KINDS:
        read = choice.reads(columns, schema.names)
        if read is None:
            continue
        types = {name: schema.field(column).type for name, column in read.items()}
        for name, type_ in types.items():
            if not fits(name, type_):
                raise InputError(f"column {read[name]!r} holds {type_}, expected {_EXPECTED[name]}")
        return Layout(kind=choice.kind, is_group=any(_is_group(n, t) for n, t in types.items()), read=read)
    if missing := [name for name in columns.named if getattr(columns, name) not in schema.names]:
        raise InputError(
            f"there is no column {getattr(columns, missing[0])!r}, which was named for {missing[0]!r}; the "
            f"data set has {', '.join(map(repr, schema.names))}"
        )
    wanted = "; or ".join(
        " and ".join(repr(getattr(columns, name)) for name in choice.needed)
        for choice in KINDS
        if set(columns.named) <= {*choice.needed, *choice.optional}
    )
    if not wanted:
        raise InputError(
            f"columns were named for {' and '.join(map(repr, columns.named))}, which are never read together"
        )
    raise InputError(
        f"the data set has the columns {', '.join(map(repr, schema.names))}: nothing that can be scored.\n"
        f"Expected {wanted}. Rename with --column NAME=YOURS (columns={{'NAME': 'YOURS'}})"
    )


_EXPECTED = {
    "messages": "a list of messages with role and content",
    "prompt": "text",
    "response": "text, or a list of texts",
    "responses": "a list of texts, or text",
    "prompt_ids": "a list of ints",
    "response_ids": "a list of ints, or a list of such lists",
    "ids": "a list of ints",
    "start": "an int",
}


def fits(name: str, type_: pa.DataType) -> bool:
    """Whether a field of :class:`Columns` can be read from a column of this type."""
    if pa.types.is_null(type_):
        return True
    match name:
        case "prompt":
            return _is_text(type_)
        case "response" | "responses":
            return _is_text(type_) or (is_list(type_) and _is_text(type_.value_type))
        case "prompt_ids" | "ids":
            return is_list(type_) and _is_int(type_.value_type)
        case "response_ids":
            return is_list(type_) and (
                _is_int(type_.value_type)
                or (is_list(type_.value_type) and _is_int(type_.value_type.value_type))
            )
        case "start":
            return _is_int(type_)
        case _:
            return is_list(type_) or _is_text(type_)


def _is_group(name: str, type_: pa.DataType) -> bool:
    if name in ("response", "responses"):
        return is_list(type_)
    return name == "response_ids" and is_list(type_) and is_list(type_.value_type)


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_null(type_)


def _is_int(type_: pa.DataType) -> bool:
    return pa.types.is_integer(type_) or pa.types.is_null(type_)


def is_list(type_: pa.DataType) -> bool:
    """Whether a type is a list, of any of Arrow's kinds."""
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def visible(names: list[str]) -> list[str]:
    """Return the columns that are written: those of the stages are not."""
    return [name for name in names if name not in OF_STAGES]
