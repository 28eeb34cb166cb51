"""What a call sends and what comes back, without sending: parts of a call, headers, errors, times to wait.

A call is cut as :mod:`vllm_kl.routing.shards` cuts it, with larger parts: sequences of one prompt stay
together, and go to the server that the prompt prefers. ``X-Session-ID`` is the key of that prompt, so that a
router between client and servers can do the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import httpx
import msgpack
import numpy as np

from vllm_kl import errors
from vllm_kl.arrays import chosen_of, listed, sequence_of, starts_of
from vllm_kl.client.wire_format import MSGPACK, Answer, Question, TooLargeError, answer_of, pack_question
from vllm_kl.errors import EngineError, InputError, OptionError, VLLMKLError, WeightsError
from vllm_kl.routing.affinity import order
from vllm_kl.routing.dialogs import Dialogs
from vllm_kl.routing.shards import Sizes, cut

SIZES = Sizes(per_replica=4, fewest_tokens=16384, most_tokens=131072)
_BUSY = (429, 502, 503, 504)  # another try may go better
_ORIGIN = ("model", "weights", "weight_version")  # of all answers of a call the same
_SHORTEST_SENTENCE = 10  # characters
_SEQUENCE = re.compile(r"\bsequence (\d+)\b")


class BusyError(EngineError):
    """A server cannot answer now."""

    retry_after_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some sequences of a call, in one request."""

    call: Question  # the question about all sequences
    places: Sequence[int]  # indices of the sequences in the call
    num_rows: Sequence[int]  # of each sequence: its scored tokens
    body: bytes
    headers: dict[str, str]
    addresses: Sequence[str]  # of the servers, the preferred one first

    def halves(self) -> list[Part]:
        """Return two parts with half of the sequences each: for a server that takes no more."""
        middle = len(self.places) // 2
        key, addresses = self.headers["X-Session-ID"], self.addresses
        return [
            _part(self.call, some, key, addresses) for some in (self.places[:middle], self.places[middle:])
        ]


class _Row(NamedTuple):
    token_ids: np.ndarray
    start: int


def parts_of(question: Question, addresses: Sequence[str], dialogs: Dialogs) -> Iterator[Part]:
    """Yield the parts of a call; ``dialogs`` gives the prompts their keys."""
    keys = [ids.tobytes() for ids in question.token_ids]
    places = sorted(range(len(keys)), key=keys.__getitem__)
    # The server refuses starts that cannot be; here they only must not break the cut.
    rows = [
        _Row(ids, max(1, min(start, len(ids))))
        for ids, start in ((question.token_ids[i], question.starts[i]) for i in places)
    ]
    for shard in cut(rows, addresses, dialogs, SIZES):
        of_part = [places[n] for n in shard.places]
        yield _part(question, of_part, shard.key.hex(), order(shard.key, addresses))


def _part(question: Question, places: Sequence[int], key: str, addresses: Sequence[str]) -> Part:
    return Part(
        call=question,
        places=places,
        num_rows=[max(0, len(question.token_ids[i]) - question.starts[i]) for i in places],
        body=pack_question(Question(**question.select(places))),
        headers={"Content-Type": MSGPACK, "Accept": MSGPACK, "X-Session-ID": key},
        addresses=addresses,
    )


def answer_in(fields: dict[str, Any], part: Part) -> Answer:
    """Return the answer of a msgpack map, with the indices of the call.

    Raises:
        VLLMKLError: the map has a problem document instead.
        EngineError: it is neither.
    """
    if isinstance(fields, dict) and isinstance(fields.get("problem"), dict):
        raise _error_in(fields["problem"], part)
    with _no_answer():
        answer = answer_of(fields)
        missing = [name for name in _ORIGIN if name not in answer.origin]
        if missing or len(set(answer.index)) != len(answer.index) or min(answer.index, default=0) < 0:
            raise ValueError(f"{missing or list(answer.index)}")
        for n, values in zip(answer.index, answer.values, strict=True):
            if len(values) != part.num_rows[n]:
                raise ValueError(
                    f"sequence {part.places[n]} has {len(values)} rows, expected {part.num_rows[n]}"
                )
        return dataclasses.replace(answer, index=[part.places[n] for n in answer.index])


def whole_answer(data: bytes, part: Part) -> Answer:
    """Return the answer of a body, which must have every sequence of the part.

    Raises:
        VLLMKLError: the body has a problem document instead.
        EngineError: it is neither, or sequences are missing.
    """
    with _no_answer():
        fields = msgpack.unpackb(data)
    answer = answer_in(fields, part)
    with _no_answer():
        if set(answer.index) != set(part.places):
            raise ValueError(f"{len(answer.index)} of {len(part.places)} sequences")
    return answer


def untold(answer: Answer, told: set[int]) -> Answer:
    """Return the answer without the sequences in ``told``, and add the others there."""
    new = [n for n, i in enumerate(answer.index) if i not in told]
    told.update(answer.index)
    return dataclasses.replace(
        answer,
        index=[answer.index[n] for n in new],
        values=[answer.values[n] for n in new],
        num_cached_tokens=[answer.num_cached_tokens[n] for n in new],
        rescored=[answer.rescored[n] for n in new],
    )


@contextlib.contextmanager
def _no_answer() -> Iterator[None]:
    """Say of what cannot be read that no server of ours wrote it."""
    try:
        yield
    except Exception as error:  # msgpack has no common class of what it raises
        raise EngineError(
            f"what came is no answer of vllm-kl serve ({type(error).__name__}: {error}): another server is "
            "at this address, or one of another version, or a proxy changed the answer"
        ) from error


def checked(response: httpx.Response, part: Part | None = None) -> httpx.Response:
    """Return a response that is no error; its body was read.

    Raises:
        BusyError: another try may go better.
        TooLargeError: the server, or a proxy before it, takes no request of this size.
        VLLMKLError: the error that the server had, under its own type.
    """
    if not_busy(response).is_success:
        return response
    problem = _problem_of(response)
    if response.status_code == 413:
        raise TooLargeError(f"{response.url.host}: {_detail(response, problem)}")
    if response.status_code in (401, 403):
        raise OptionError(f"{response.url}: {_detail(response, problem)}")
    if not isinstance(problem, dict) or not str(problem.get("type")).startswith("urn:vllm-kl:"):
        raise EngineError(
            f"{response.url} answered {response.status_code} {response.reason_phrase}: there is no vllm-kl "
            "server at this address, or a proxy before it failed"
        )
    raise _error_in(problem, part)


def not_busy(response: httpx.Response) -> httpx.Response:
    """Return a response that another try would not change; its body was read.

    Raises:
        BusyError: another try may go better.
    """
    if response.status_code in _BUSY or _is_of_serve(response):
        error = BusyError(f"{response.url.host} is busy: {_detail(response, _problem_of(response))}")
        after = response.headers.get("retry-after", "")
        error.retry_after_s = float(after) if after.isdecimal() else None
        raise error
    return response


def _is_of_serve(response: httpx.Response) -> bool:
    """Whether the proxy of Ray Serve 2.60 says that the door is not there yet, or any more, or died."""
    if response.status_code == 404:
        return "/-/routes" in response.text
    return response.status_code == 500 and response.text == "Internal Server Error"


def _problem_of(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _detail(response: httpx.Response, problem: Any) -> str:
    told = problem.get("detail") if isinstance(problem, dict) else None
    return told if _is_said(told) else f"{response.status_code} {response.reason_phrase}"


def _is_said(told: Any) -> TypeGuard[str]:
    return isinstance(told, str) and any(one.isprintable() and not one.isspace() for one in told)


def _error_in(problem: dict[str, Any], part: Part | None) -> VLLMKLError:
    name = str(problem.get("type")).rpartition(":")[2]
    kind = getattr(errors, name) if name in errors.__all__ else EngineError
    told = problem.get("detail")
    if _is_said(told) and len(told) > _SHORTEST_SENTENCE:
        message = told
    else:  # our servers send whole sentences
        message = f"a server failed and told no more than this: {problem}"
    if part is not None:  # the server counts the sequences of the part
        message = _SEQUENCE.sub(lambda found: f"sequence {_place(part, int(found[1]))}", message)
    return kind(message)


def _place(part: Part, n: int) -> int:
    return part.places[n] if n < len(part.places) else n


def rows_of(
    token_ids: Sequence[Any], start: int | Sequence[int] | None
) -> tuple[list[np.ndarray], list[int]]:
    """Return sequences and starts as a question has them. The server checks the rest.

    Raises:
        InputError: a sequence does not consist of whole numbers of 32 bits, or the starts are not as many.
    """
    each = listed("token_ids", token_ids)
    sequences = [_narrowed(f"sequence {i}", sequence_of(i, ids)) for i, ids in enumerate(each)]
    starts = starts_of(start, len(sequences))
    for i, one in enumerate(starts):
        if not -(2**31) <= one < 2**31:
            raise InputError(f"sequence {i}: start is outside 32 bits, expected 1 <= start <= its length")
    return sequences, starts


def ids_of(ids: Sequence[Any], sequences: Sequence[np.ndarray], starts: Sequence[int]) -> list[np.ndarray]:
    """Return chosen ids as a question has them: ``[len - start, K]`` for each sequence.

    Raises:
        InputError: they are no ids of 32 bits, or not K for each scored token.
    """
    num_rows = [max(0, len(one) - start) for one, start in zip(sequences, starts, strict=True)]
    chosen = chosen_of(ids, num_rows)
    return [_narrowed(f"ids of sequence {i}", rows) for i, rows in enumerate(chosen)]


def _narrowed(name: str, ids: np.ndarray) -> np.ndarray:
    bounds = np.iinfo(np.int32)
    if ids.size and not bounds.min <= ids.min() <= ids.max() <= bounds.max:
        raise InputError(f"{name} has an id that is outside any vocabulary: {ids.max()} or {ids.min()}")
    return ids.astype(np.int32, copy=False)


class Origin:
    """What made the answers of a call: all of them must agree."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def add(self, answer: Answer) -> None:
        """Take an answer in.

        Raises:
            WeightsError: other weights made it than the answers before.
        """
        origin = {name: answer.origin[name] for name in _ORIGIN}
        if self.found and origin != self.found:
            raise WeightsError(
                f"the servers' weights changed during the call, or the servers differ: {self.found} and "
                f"{origin}. Score again"
            )
        self.found = origin


def frames(data: msgpack.Unpacker, chunk: bytes) -> Iterator[dict[str, Any]]:
    """Yield the maps that a chunk of a streamed answer completes.

    Raises:
        EngineError: the chunk is no msgpack.
    """
    with _no_answer():
        data.feed(chunk)
        found = list(data)
    yield from found
