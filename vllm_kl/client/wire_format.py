"""The bodies of ``POST /v1/logprobs`` in msgpack: maps, whose arrays are raw little-endian bytes.

The arrays of all sequences are laid end to end. B sequences, N scored rows, K chosen ids, k most likely ids.

    question   token_ids  int32, all tokens     lengths    int32 [B]    starts         int32 [B]
               ids        int32 [N, K]          num_ids    K            top_k          k
               temperature, entropy, share_prefix, alone, placeholders, allow_nan, stream
    answer     index      int32 [B], the sequences that these are       rows           int32 [B], sums to N
               log_probs  float32 [N]           chosen     float32 [N, K]
               top_ids    int32 [N, k]          top_log_probs  float32 [N, k]          entropy  float32 [N]
               num_cached_tokens, rescored      int32 [B]    num_ids    K    top_k    k    has_entropy
               model, weights, weight_version, timings

A question without ``ids``, with ``top_k`` 0 or without ``entropy`` gets an answer without them. A streamed
answer is one such map after the other. Python's own pickle is never used: a body comes from anyone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from vllm_kl.columns import Column, blocks, num_columns
from vllm_kl.errors import InputError

MSGPACK = "application/vnd.msgpack"
NDJSON = "application/x-ndjson"
_SETTINGS = (
    "temperature",
    "top_k",
    "entropy",
    "share_prefix",
    "alone",
    "placeholders",
    "allow_nan",
    "stream",
)
_INT, _FLOAT = np.dtype("<i4"), np.dtype("<f4")
_MOST_IDS = 1 << 24
_MOST_FIELDS = 64
_NONE = np.empty(0, _INT)


class TooLargeError(InputError):
    """A question exceeds a limit of the server."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """Sequences to score, and what is asked of each of their rows."""

    token_ids: Sequence[np.ndarray]  # B x [L] int32
    starts: Sequence[int]  # B indices of the first token to score
    temperature: float = 1.0
    ids: Sequence[np.ndarray] | None = None  # B x [L - start, K] int32: tokens to score beside the sequence's
    top_k: int = 0
    entropy: bool = False  # whether to return the entropy of the distribution of each row
    share_prefix: bool = True
    alone: bool = False  # in no batch with requests of other callers
    placeholders: str = "refuse"  # or "as_text": what to do with an id that stands for an image
    allow_nan: bool = False  # NaN, where the model gave no number, instead of an error
    stream: bool = False  # answer as the sequences finish

    @property
    def num_ids(self) -> int:
        """K, the number of chosen ids of a row."""
        return self.ids[0].shape[1] if self.ids else 0

    @property
    def num_columns(self) -> int:
        """The number of columns of an answer's values."""
        return num_columns(self.num_ids, self.top_k, self.entropy)

    def select(self, places: Sequence[int]) -> dict[str, Any]:
        """Return the fields of a question about some of the sequences, with the other fields as they are."""
        some = {"token_ids": self.token_ids, "starts": self.starts, "ids": self.ids}
        return vars(self) | {name: of and [of[place] for place in places] for name, of in some.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """The values of some sequences of a question."""

    index: Sequence[int]  # B: which sequences of the question
    # B x [R, 1 + K + 2 k + has_entropy] float32: the columns of :class:`vllm_kl.types.ScoreResult`.
    values: Sequence[np.ndarray]
    num_ids: int  # K
    top_k: int  # k
    has_entropy: bool
    num_cached_tokens: Sequence[int]  # B
    rescored: Sequence[bool]  # B
    origin: dict[str, Any] = field(default_factory=dict)  # model, weights, weight_version, timings


def pack_question(question: Question) -> bytes:
    """Return the body of a question.

    Raises:
        InputError: a setting, such as the temperature, is no number or text that can be sent.
    """
    body = {name: getattr(question, name) for name in _SETTINGS}
    body["token_ids"] = _raw(np.concatenate([_NONE, *question.token_ids]), _INT)
    body["lengths"] = _raw([len(ids) for ids in question.token_ids], _INT)
    body["starts"] = _raw(question.starts, _INT)
    if question.ids is not None:
        body["num_ids"] = question.ids[0].shape[1] if question.ids else 1
        body["ids"] = _raw(np.concatenate([_NONE, *(ids.ravel() for ids in question.ids)]), _INT)
    try:
        packed: bytes = msgpack.packb(body, default=np.generic.item)
    except (TypeError, ValueError, OverflowError) as error:
        settings = ", ".join(f"{name}={str(body[name])[:60]!r}" for name in _SETTINGS)
        raise InputError(f"a setting cannot be sent ({error}): {settings}") from error
    return packed


def unpack_question(data: bytes, *, most_sequences: int) -> dict[str, Any]:
    """Return the fields of a question: of its arrays only the sizes are checked, of the others nothing.

    Raises:
        InputError: the body is no msgpack map, or an array has not as many numbers as it must have.
    """
    maps = itertools.count()

    def only_map(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if next(maps):  # msgpack calls this at the end of each map, the inner ones first
            raise ValueError("a map in a map")
        return dict(pairs)

    try:
        # A question holds no lists: an empty one takes 1 byte in the body, and 64 in memory.
        body = msgpack.unpackb(data, object_pairs_hook=only_map, max_array_len=0, max_map_len=_MOST_FIELDS)
    except Exception as error:  # msgpack has no common class of what it raises
        raise InputError(
            "the body is not msgpack, or not one map without lists and maps in it: "
            f"{type(error).__name__} {error}"
        ) from None
    if not isinstance(body, dict):
        raise InputError(f"the body is a msgpack {type(body).__name__}, expected a map of names and values")
    lengths, starts = (_ints(body, name) for name in ("lengths", "starts"))
    if len(lengths) > most_sequences:  # checked here, because each sequence becomes an object
        raise TooLargeError(f"{len(lengths)} sequences, but this server takes at most {most_sequences}")
    if (lengths < 0).any():
        raise InputError("lengths has a number below 0")
    fields = body | {"starts": starts.tolist()}
    del fields["lengths"]
    fields["token_ids"] = _cut(_ints(body, "token_ids"), lengths, "token_ids", "the sum of lengths")
    if body.get("ids") is not None:
        num_ids = fields.pop("num_ids", None)
        if type(num_ids) is not int or not 1 <= num_ids <= _MOST_IDS:
            raise InputError(f"num_ids is {num_ids!r}, expected how many chosen ids a row has, at least 1")
        if len(starts) != len(lengths):
            raise InputError(f"starts has {len(starts)} numbers for {len(lengths)} sequences")
        rows = np.maximum(lengths.astype(np.int64) - starts, 0)
        rows = _cut(_ints(body, "ids"), rows * num_ids, "ids", "as many as scored rows times num_ids")
        fields["ids"] = [row.reshape(-1, num_ids) for row in rows]
    return fields


def fields_of(answer: Answer) -> dict[str, Any]:
    """Return an answer's map: its arrays are bytes."""
    width = num_columns(answer.num_ids, answer.top_k, answer.has_entropy)
    values = np.concatenate([np.empty((0, width), _FLOAT), *answer.values])
    arrays = {
        "index": (answer.index, _INT),
        "rows": ([len(rows) for rows in answer.values], _INT),
        "num_cached_tokens": (answer.num_cached_tokens, _INT),
        "rescored": (answer.rescored, _INT),
        **{column.name: (values[:, column.of], column.kind) for column in columns(answer)},
    }
    counts = {"num_ids": answer.num_ids, "top_k": answer.top_k, "has_entropy": answer.has_entropy}
    return counts | answer.origin | {name: _raw(array, kind) for name, (array, kind) in arrays.items()}


def columns(answer: Answer) -> list[Column]:
    """Return the blocks of columns that an answer has."""
    return blocks(answer.num_ids, answer.top_k, answer.has_entropy)


def pack_answer(answer: Answer) -> bytes:
    """Return the body of an answer."""
    packed: bytes = msgpack.packb(fields_of(answer))
    return packed


def answer_of(fields: dict[str, Any]) -> Answer:
    """Return the answer of a map that :func:`fields_of` made.

    Raises:
        ValueError, TypeError, KeyError: it did not make this map. No memory is taken for what is not there.
    """
    fields = dict(fields)
    index, rows, num_cached, rescored = (
        np.frombuffer(fields.pop(name), _INT) for name in ("index", "rows", "num_cached_tokens", "rescored")
    )
    num_rows = int(rows.sum())
    num_ids, top_k, has_entropy = (fields.pop(name) for name in ("num_ids", "top_k", "has_entropy"))
    if not len(index) == len(rows) == len(num_cached) == len(rescored) or (rows < 0).any():
        raise ValueError("index, rows, num_cached_tokens and rescored do not fit each other")
    if type(num_ids) is not int or type(top_k) is not int or min(num_ids, top_k) < 0:
        raise ValueError(f"num_ids is {num_ids!r} and top_k is {top_k!r}, expected two counts")
    for column in blocks(num_ids, top_k, bool(has_entropy)):  # before memory is taken for them
        num_bytes = 4 * num_rows * (column.of.stop - column.of.start)
        if len(fields[column.name]) != num_bytes:
            raise ValueError(f"{column.name} has {len(fields[column.name])} bytes, expected {num_bytes}")
    values = np.empty((num_rows, num_columns(num_ids, top_k, bool(has_entropy))), np.float32)
    answer = Answer(
        index=index.tolist(),
        values=np.split(values, np.cumsum(rows)[:-1]) if len(rows) else [],
        num_ids=num_ids,
        top_k=top_k,
        has_entropy=bool(has_entropy),
        num_cached_tokens=num_cached.tolist(),
        rescored=rescored.astype(bool).tolist(),
        origin=fields,
    )
    for column in columns(answer):
        width = column.of.stop - column.of.start
        values[:, column.of] = np.frombuffer(fields.pop(column.name), column.kind).reshape(num_rows, width)
    return answer


def _raw(numbers: Any, kind: np.dtype) -> bytes:
    return np.asarray(numbers, kind).tobytes()


def _ints(body: dict[str, Any], name: str) -> np.ndarray:
    data = body.get(name)
    if not isinstance(data, bytes) or len(data) % 4:
        found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise InputError(f"{name} is {found}, expected raw little-endian int32: 4 bytes for each number")
    return np.frombuffer(data, _INT)


def _cut(numbers: np.ndarray, lengths: np.ndarray, name: str, what: str) -> list[np.ndarray]:
    expected = sum(lengths.tolist())  # Python's ints do not overflow
    if len(numbers) != expected:
        raise InputError(f"{name} has {len(numbers)} numbers, expected {expected}: {what}")
    return np.split(numbers, np.cumsum(lengths, dtype=np.int64)[:-1]) if len(lengths) else []
