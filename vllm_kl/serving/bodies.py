"""Turns bodies in JSON or msgpack into a checked question, and answers into bodies.

``Content-Type`` says what a question is, ``Accept`` what its answer will be. JSON has lists, or with
``"encoding": "base64"`` the fields of :mod:`vllm_kl.client.wire_format`, their bytes in base64.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgpack
import numpy as np
import orjson
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kl.client.wire_format import (
    MSGPACK,
    NDJSON,
    Answer,
    Question,
    TooLargeError,
    columns,
    fields_of,
    pack_answer,
    unpack_question,
)
from vllm_kl.errors import InputError
from vllm_kl.serving.limits import Limits
from vllm_kl.serving.problems import Refusal

JSON = "application/json"
_MSGPACKS = (MSGPACK, "application/msgpack", "application/x-msgpack")
_JSONS = (JSON, NDJSON, "*/*", "application/*")
_ORJSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
_T = TypeVar("_T")
# After its first error: else a body of 32 MiB has 11 million of them, each an object.
_List = Annotated[list[_T], Field(fail_fast=True)]
_Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class Settings(BaseModel):
    """What a question says beside its sequences."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    model: str | None = Field(None, description="Refuse the question if the server serves another model.")
    temperature: float = Field(1.0, description="Log-probs of softmax(logits / temperature).")
    top_k: int = Field(0, ge=0, description="How many of the most likely tokens to return for each row.")
    entropy: bool = Field(False, description="Return the entropy of the distribution of each row, too.")
    stream: bool = Field(False, description="Answer as the sequences finish: NDJSON, or msgpack maps.")
    encoding: Literal["list", "base64"] = Field("list", description="Of the arrays in an answer in JSON.")
    share_prefix: bool = Field(True, description="Read the prefix cache.")
    alone: bool = Field(False, description="In no batch with other requests: equal calls give equal bits.")
    placeholders: Literal["refuse", "as_text"] = Field("refuse", description="Ids that stand for an image.")
    allow_nan: bool = Field(False, description="NaN where the model gives no number, instead of an error.")


class Body(Settings):
    """A question in JSON."""

    token_ids: _List[_List[_Int32]] = Field(description="B sequences of ids.")
    start: _Int32 | _List[_Int32] = Field(
        1, description="Index of the first token to score, 1 to the length."
    )
    ids: _List[_List[_List[_Int32]]] | None = Field(
        None, description="For each sequence the ids to score, [len - start, K]; K is the same for all."
    )


def read_question(data: bytes, content_type: str, limits: Limits) -> tuple[Question, Settings]:
    """Return the question in a body. It is well-formed; whether its ids can be scored is not checked.

    Raises:
        Refusal: ``content_type`` is neither JSON nor msgpack.
        InputError: the body is not what it must be.
    """
    kind = content_type.partition(";")[0].strip().lower()
    try:
        if kind == JSON:
            return _of_json(data, limits)
        if kind in _MSGPACKS:
            return _of_msgpack(data, limits)
    except ValidationError as error:
        raise InputError(_told(error)) from None
    raise Refusal(415, f"Content-Type is {kind or 'missing'!r}, expected {JSON} or {MSGPACK}")


def _of_json(data: bytes, limits: Limits) -> tuple[Question, Settings]:
    if data.count(b"[") + data.count(b"{") > limits.max_sequences + limits.max_tokens:  # each takes memory
        raise InputError("the body has more lists and objects than this server takes sequences and rows")
    most = limits.max_tokens + 2 * limits.max_sequences + len(Body.model_fields)
    if (found := data.count(b",")) > most:  # each number becomes an object of Python
        raise TooLargeError(
            f"about {found} numbers, but this server takes at most {limits.max_tokens} tokens in a request"
        )
    body = Body.model_validate_json(data)
    num_sequences = len(body.token_ids)
    starts = body.start if isinstance(body.start, list) else [body.start] * num_sequences
    ids = None
    if body.ids is not None:
        widths = {len(row) for rows in body.ids for row in rows}
        if len(widths) > 1:
            raise InputError(f"ids has rows of {min(widths)} to {max(widths)} ids, expected as many in each")
        if widths == {0}:
            raise InputError("ids has rows of 0 ids, expected at least one id to score in each")
        num_ids = widths.pop() if widths else 1
        ids = [np.array(rows, np.int32).reshape(-1, num_ids) for rows in body.ids]
    token_ids = [np.array(sequence, np.int32) for sequence in body.token_ids]
    return _question(body, token_ids, starts, ids), body


def _of_msgpack(data: bytes, limits: Limits) -> tuple[Question, Settings]:
    fields = unpack_question(data, most_sequences=limits.max_sequences)
    token_ids, starts, ids = (fields.pop(name, None) for name in ("token_ids", "starts", "ids"))
    settings = Settings.model_validate(fields)
    return _question(settings, token_ids, starts, ids), settings


def _question(settings: Settings, token_ids: list, starts: list[int], ids: list | None) -> Question:
    if len(starts) != len(token_ids):
        raise InputError(f"start has {len(starts)} entries for {len(token_ids)} sequences")
    if ids is not None and len(ids) != len(token_ids):
        raise InputError(f"ids has {len(ids)} entries for {len(token_ids)} sequences; give one per sequence")
    return Question(
        token_ids=token_ids,
        starts=starts,
        ids=ids,
        **settings.model_dump(exclude={"model", "encoding", "token_ids", "start", "ids"}),
    )


def _told(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = first["loc"]
    if len(place) > 1 and place[0] in ("token_ids", "ids"):
        names = ("sequence", "token" if place[0] == "token_ids" else "row", "id")
        where = ", ".join(f"{name} {n}" for name, n in zip(names, place[1:], strict=False))
        where = where if place[0] == "token_ids" else f"ids of {where}"
    else:
        where = ".".join(str(part) for part in place[:1]) or "the body"
    return f"{where}: {first['msg']}"


@dataclass(frozen=True)
class Writer:
    """Writes answers in one form."""

    media_type: str  # of the whole answer
    write: Callable[[Answer], bytes]  # a streamed answer is several
    write_problem: Callable[[Any], bytes]  # a problem document, at the end of a streamed answer


def writer_for(request: Request, settings: Settings) -> Writer:
    """Return the writer for what a request accepts.

    Raises:
        Refusal: the server writes nothing that it accepts.
    """
    accepted = request.headers.get("accept", "*/*").lower().split(",")
    kinds = [one.partition(";")[0].strip() for one in accepted]
    found = next((kind for kind in kinds if kind in _MSGPACKS or kind in _JSONS), None)
    if found is None:
        raise Refusal(406, f"this server answers in {JSON}, {NDJSON} or {MSGPACK}, as Accept asks")
    if found in _MSGPACKS:
        return Writer(MSGPACK, pack_answer, lambda problem: msgpack.packb({"problem": problem}))
    if settings.allow_nan and settings.encoding == "list":
        raise Refusal(
            422, "lists of JSON cannot tell NaN from -inf: with allow_nan ask for base64 or msgpack"
        )
    shape = _as_lists if settings.encoding == "list" else _as_base64
    return Writer(
        NDJSON if settings.stream else JSON,
        lambda answer: orjson.dumps(shape(answer), option=_ORJSON),
        lambda problem: orjson.dumps({"problem": problem}, option=_ORJSON),
    )


def _as_lists(answer: Answer) -> dict[str, Any]:
    """Return an answer with its arrays as lists, one for each sequence; -inf is null, as JSON has none."""
    lists = {}
    for name, of, kind in columns(answer):
        blocks = (
            rows[:, of.start] if name in ("log_probs", "entropy") else rows[:, of] for rows in answer.values
        )
        lists[name] = [np.ascontiguousarray(block, kind) for block in blocks]
    counts = {"index": list(answer.index), "num_cached_tokens": list(answer.num_cached_tokens)}
    return counts | lists | answer.origin


def _as_base64(answer: Answer) -> dict[str, Any]:
    return {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in fields_of(answer).items()
    }
