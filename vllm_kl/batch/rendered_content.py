"""Finds in a rendered dialog how much of each message's content the chat template kept, and where.

A chat template may cut content (earlier reasoning), trim it, move it (a system message into a later turn), or
add words of its own. This module searches the rendered text for the contents, and needs no knowledge of the
template.

Each message has a home in the text. If the template marks the assistant's content, the i-th assistant message
has its home in the i-th run of marks, and other messages have their home between the runs. The search begins
at home, because a short content may occur in many places. Contents that stand at home in their order cost one
search each. If a content is not found so, the search places whole contents, the longest first, at home before
elsewhere, and then parts of the remaining contents between their neighbours.

Spans are ``(start, end)`` in characters. The module knows no tokens, tokenizers or TorchRL.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Span = tuple[int, int]
_SHORTEST = 4  # a shorter part of a message may occur anywhere by chance


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """One message in the rendered text."""

    role: str
    num_chars: int  # characters of the content, and of names and arguments of tool calls
    num_found: int  # those of num_chars that are in the rendered text
    missing: str  # the first part that is not in the rendered text
    is_moved: bool  # a part stands before an earlier message, or after a later one
    spans: list[Span]  # places of the content in the rendered text, without tool calls
    window: Span  # the text between the contents of the messages before and after
    is_printed: bool  # the content is a list, and the text has it as Python prints a list
    calls: list[str]  # names and arguments of the tool calls


@dataclass(slots=True)
class _Piece:
    """One text of a message's content, and the places where it was found."""

    text: str
    home: Span  # its expected place in the rendered text
    is_marked: bool  # it is the assistant's, so the template should mark it
    # Shortest part to look for inside marks. Beside a tool call, a single letter may belong to the call.
    shortest: int
    # Each found part: its position in the rendered text, and its bounds in ``text``.
    parts: list[tuple[int, Span]] = field(default_factory=list)
    is_moved: bool = False

    @property
    def found(self) -> list[Span]:
        return [(at, at + stop - start) for at, (start, stop) in self.parts]

    def missing(self) -> str:
        """Return the first part that was not found."""
        end = 0
        for start, stop in sorted(kept for _, kept in self.parts):
            if start > end:
                return self.text[end:start]
            end = stop
        return self.text[end:]


def find_messages(text: str, messages: Sequence[dict[str, Any]], runs: Sequence[Span] = ()) -> list[Rendered]:
    """Find the contents of messages in a rendered dialog.

    Args:
        text: the rendered dialog.
        messages: the messages of the dialog; a content is a text, ``None`` or a list of parts.
        runs: spans that the template marks as the assistant's, in order.

    >>> question = {"role": "user", "content": "2 + 2?"}
    >>> answer = {"role": "assistant", "content": "<think>easy</think>four"}
    >>> user, assistant = find_messages("user: 2 + 2? assistant: four", [question, answer], [(24, 28)])
    >>> (user.num_found, user.num_chars), (assistant.num_found, assistant.num_chars), assistant.missing
    ((6, 6), (4, 23), '<think>easy</think>')
    """
    homes = _homes(messages, runs, len(text))
    by_message = []
    for message, home in zip(messages, homes, strict=True):
        is_marked, shortest = (
            message.get("role") == "assistant",
            _SHORTEST if message.get("tool_calls") else 1,
        )
        texts = (_as_printed(part, text) for part in _texts_of(message.get("content")))
        by_message.append([_Piece(part, home, is_marked, shortest) for part in texts])
    pieces = list(itertools.chain(*by_message))
    at_home = [list(group) for _, group in itertools.groupby(pieces, key=lambda piece: piece.home)]
    # No short circuit: place every group.
    were_placed = [_place_in_order(text, group, runs) for group in at_home]
    if not all(were_placed):
        _place_by_length(text, pieces)
        _mark_moved(pieces)
        _place_parts(text, pieces, runs)
    windows = _windows(by_message, len(text))
    return [
        _rendered(text, *of_message) for of_message in zip(messages, by_message, windows, homes, strict=True)
    ]


def _homes(messages: Sequence[dict[str, Any]], runs: Sequence[Span], length: int) -> list[Span]:
    """Return each message's home: the whole text, unless each assistant message has one run of marks."""
    ours = [message.get("role") == "assistant" for message in messages]
    if sum(ours) != len(runs):
        return [(0, length)] * len(messages)
    edges = [0, *itertools.chain(*runs), length]
    before = itertools.accumulate(ours, initial=0)
    return [
        (edges[2 * k + is_ours], edges[2 * k + is_ours + 1]) for k, is_ours in zip(before, ours, strict=False)
    ]


def _rendered(text: str, message: dict[str, Any], pieces: list[_Piece], window: Span, home: Span) -> Rendered:
    words = list(_words_of_calls(message))
    lost = _lost_words(text[window[0] : max(window[1], home[1])], words)
    said = [*(piece.text for piece in pieces), *(word for word, _ in words)]
    spans = [span for piece in pieces for span in piece.found]
    content = message.get("content")
    return Rendered(
        role=str(message.get("role")),
        num_chars=sum(map(len, said)),
        num_found=sum(stop - start for start, stop in spans)
        + sum(len(word) for word, _ in words)
        - sum(map(len, lost)),
        missing=next(filter(None, [*(piece.missing() for piece in pieces), *lost]), ""),
        is_moved=any(piece.is_moved for piece in pieces),
        spans=spans,
        window=window,
        is_printed=isinstance(content, list) and bool(content) and str(content) in text,
        calls=[word for word, _ in words],
    )


def _texts_of(content: Any) -> list[str]:
    """Return the texts of a content that are not empty. Pictures and other media have no text."""
    if content is None:
        return []
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text if isinstance(text, str) else str(text) for text in texts if text not in (None, "")]


def _words_of_calls(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the texts of a message's tool calls and responses. Templates print them in any order and format.

    Each text comes with the JSON that holds it, because a template may print this JSON unchanged.
    """
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, (list, tuple)) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(function, dict):
            yield from _leaves([function.get("name"), function.get("arguments")], "")
    yield from _leaves(message.get("tool_responses"), "")


def _lost_words(text: str, words: list[tuple[str, str]]) -> list[str]:
    """Return the words that a text lacks or has too seldom: a template may print one of two calls."""
    needed: Counter[str] = Counter()
    lost = []
    for word, whole in words:
        needed[word] += 1
        is_whole = whole != word and any(form in text for form in _forms(whole))
        if not is_whole and sum(text.count(form) for form in _forms(word)) < needed[word]:
            lost.append(word)
    return lost


def _leaves(value: Any, whole: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, (dict, list)):
            yield from _leaves(parsed, value)
        elif value:
            yield value, whole or value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item, whole)


def _forms(word: str) -> set[str]:
    """Return a text unchanged, and in the forms that JSON gives it."""
    return {word, json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1]}


def _as_printed(content: str, text: str) -> str:
    """Return a content as the template printed it: some templates print tool results as JSON strings."""
    if content in text:
        return content
    forms = [*_forms(content), *(() if content.strip() in text else _forms(content.strip()))]
    return next((form for form in forms if form in text), content)


def _bounds(text: str) -> list[Span]:
    """Return the bounds of a text, and its bounds without the white space around it."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    return (
        [(0, len(text))] if (start, end) == (0, len(text)) or start >= end else [(0, len(text)), (start, end)]
    )


def _next_run(runs: Sequence[Span], start: int, stop: int) -> list[Span]:
    """Return the next run of marks in ``text[start:stop]``, if there is one."""
    k = bisect.bisect(runs, start, key=lambda run: run[1])
    return [(max(a, start), min(b, stop)) for a, b in runs[k : k + 1] if a < stop]


def _place_in_order(text: str, pieces: list[_Piece], runs: Sequence[Span]) -> bool:
    """Place all pieces of one home in order, or none; return whether they were placed.

    A piece may be placed without the white space around it.
    """
    start, stop = pieces[0].home
    found: list[tuple[int, Span]] = []
    for piece in pieces:
        marked = _next_run(runs, start, stop) if piece.is_marked else []
        for place, bounds in itertools.product([*marked, (start, stop)], _bounds(piece.text)):
            part = piece.text[slice(*bounds)]
            # Inside marks, look at the end first: the template's own words before a short content may contain
            # it.
            is_last = place in marked and text.endswith(part, *place)
            if (at := place[1] - len(part) if is_last else text.find(part, *place)) >= 0:
                found.append((at, bounds))
                start = at + len(part)
                break
        else:
            return False
    for piece, placed in zip(pieces, found, strict=True):
        piece.parts = [placed]
    return True


def _place_by_length(text: str, pieces: list[_Piece]) -> None:
    """Place whole pieces that are not placed yet, the longest first: at home if possible, else elsewhere."""
    placed = [i for i, piece in enumerate(pieces) if piece.parts]  # sorted
    free = text
    for i in placed:
        free = _without(free, *pieces[i].found[0])
    by_length = sorted(set(range(len(pieces))) - set(placed), key=lambda i: -len(pieces[i].text))
    for i, is_home in ((i, is_home) for is_home in (True, False) for i in by_length):
        piece, k = pieces[i], bisect.bisect(placed, i)
        if piece.parts or not (is_home or piece.text.strip()):  # white space occurs everywhere
            continue
        low, high = piece.home if is_home else (0, len(text))
        start = pieces[placed[k - 1]].found[-1][1] if k else 0
        stop = pieces[placed[k]].found[0][0] if k < len(placed) else len(text)
        for place, (a, b) in itertools.product(
            ((max(start, low), min(stop, high)), (low, high)), _bounds(piece.text)
        ):
            if (at := free.find(piece.text[a:b], *place)) >= 0:
                piece.parts = [(at, (a, b))]
                placed.insert(k, i)
                free = _without(free, *piece.found[0])
                break


def _without(text: str, start: int, stop: int) -> str:
    return text[:start] + "\0" * (stop - start) + text[stop:]


def _mark_moved(pieces: list[_Piece]) -> None:
    """Mark the fewest pieces as moved; the others form a longest increasing subsequence."""
    ends: list[int] = []  # for each length of a subsequence: the smallest end position
    chains: list[Any] = []  # for each length: the pieces of that subsequence, the last first
    for piece in pieces:
        if piece.parts:
            piece.is_moved = True
            at = piece.parts[0][0]
            k = bisect.bisect_left(ends, at)
            ends[k : k + 1], chains[k : k + 1] = [at], [(piece, chains[k - 1] if k else None)]
    chain = chains[-1] if chains else None
    while chain:
        piece, chain = chain
        piece.is_moved = False


def _place_parts(text: str, pieces: list[_Piece], runs: Sequence[Span]) -> None:
    """Place parts of the pieces that the text does not have whole, between their neighbours in order."""
    start = 0
    for piece, (_, stop) in zip(pieces, _windows([[piece] for piece in pieces], len(text)), strict=True):
        if not piece.parts:
            place = max(start, piece.home[0]), min(stop, piece.home[1])
            marked = _next_run(runs, *place) if piece.is_marked else []
            shortest = piece.shortest if marked else _SHORTEST
            piece.parts = _common_parts(piece.text, text, *(*marked, place)[0], shortest)
        if piece.parts and not piece.is_moved:
            start = max(end for _, end in piece.found)


def _common_parts(piece: str, text: str, start: int, stop: int, shortest: int) -> list[tuple[int, Span]]:
    """Return the parts of a piece in ``text[start:stop]``: position in the text and bounds in the piece.

    The search takes the longest part at one end of the piece, then the longest part of the rest, and so on.
    It begins at the end of the piece of which the text has more, and then continues at the other end. Last,
    it looks for whole lines between. A short part counts only if nothing but white space separates it from
    the part before.
    """
    parts: list[tuple[int, Span]] = []
    low, high = 0, len(piece)
    is_head = _longest(piece, text, start, stop, True) >= _longest(piece, text, start, stop, False)
    for head in (is_head, not is_head):
        while (length := _longest(piece[low:high], text, start, stop, head)) > 0:
            bounds = (low, low + length) if head else (high - length, high)
            part = piece[slice(*bounds)]
            at = text.find(part, start, stop) if head else text.rfind(part, start, stop)
            between = text[start:at] if head else text[at + length : stop]
            is_next = bool(parts) and not between.strip()
            if length < (_SHORTEST if parts else shortest) and not is_next:
                break
            parts.append((at, bounds))
            if head:
                low, start = bounds[1], at + length
            else:
                high, stop = bounds[0], at
    position = low
    for line in piece[low:high].splitlines(keepends=True):
        core = line.strip()
        at = text.find(core, start, stop) if len(core) >= _SHORTEST else -1
        if at >= 0:
            begin = position + line.index(core)
            parts.append((at, (begin, begin + len(core))))
            start = at + len(core)
        position += len(line)
    return parts


def _longest(piece: str, text: str, start: int, stop: int, head: bool) -> int:
    """Return the length of the longest beginning (``head``) or end of a piece in ``text[start:stop]``."""

    def is_gone(length: int) -> bool:
        return text.find(piece[:length] if head else piece[len(piece) - length :], start, stop) < 0

    return bisect.bisect_left(range(1, len(piece) + 1), True, key=is_gone)


def _windows(by_message: list[list[_Piece]], length: int) -> list[Span]:
    """Return for each message the span between the contents of the messages before and after it."""
    spans = [
        [span for piece in pieces if not piece.is_moved for span in piece.found] for pieces in by_message
    ]
    ends = (max((end for _, end in own), default=0) for own in spans)
    begins = (min((begin for begin, _ in own), default=length) for own in reversed(spans))
    starts, stops = (
        itertools.accumulate(ends, max, initial=0),
        itertools.accumulate(begins, min, initial=length),
    )
    return list(zip(starts, reversed([*stops][:-1]), strict=False))
