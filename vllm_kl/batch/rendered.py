"""A rendered dialog against its messages: how much of each message's content a chat template gave back, and where.

Templates cut content (earlier reasoning), trim it, move it (a system message into a later turn) and add words of their own. This
finds out by looking for the contents in the rendered text; it needs to know no template. Where a template marks what assistants
say, the i-th assistant's message belongs to the i-th run of marks, and the others' to what lies between: there each is looked for
first, because short sentences stand in many places. Contents that stand there in their order cost one search each. Where one does
not, the longest are placed first, at home before elsewhere, and what is left is looked for between its neighbours.

Spans are ``(start, end)``, in characters. It does not know tokens, tokenizers or TorchRL.
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
_SHORTEST = 4  # a part of a message that is shorter may be a part of anything


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """What became of one message."""

    role: str
    num_chars: int  # of its content, names and arguments of tool calls included
    num_found: int  # of those, in the rendered text
    missing: str  # the first part that is not there
    is_moved: bool  # some of it stands before an earlier message, or after a later one
    spans: list[Span]  # of its content in the rendered text; not of tool calls
    window: Span  # what lies between the contents of its neighbours
    is_printed: bool  # its content is a list, and is there as Python prints one
    calls: list[str]  # names and arguments of its tool calls


@dataclass(slots=True)
class _Piece:
    """A text of a message's content, and where it was found."""

    text: str
    home: Span  # where it belongs in the rendered text
    is_marked: bool  # an assistant's, which belongs into what is marked
    shortest: (
        int  # part that may be one of it, in what is marked: beside a tool call a letter may be the call's
    )
    parts: list[tuple[int, Span]] = field(
        default_factory=list
    )  # where each was found, and what it is of ``text``
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
    """Return where the messages' contents are in a rendered dialog.

    Args:
        text: what the template rendered.
        messages: its messages; content is a text, ``None`` or a list of parts.
        runs: what the template marks as the assistant's, in order.

    >>> said = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "<think>easy</think>four"}]
    >>> user, assistant = find_messages("user: 2 + 2? assistant: four", said, [(24, 28)])
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
    were_placed = [
        _place_in_order(text, group, runs) for group in at_home
    ]  # all of them, also after one that was not
    if not all(were_placed):
        _place_by_length(text, pieces)
        _mark_moved(pieces)
        _place_parts(text, pieces, runs)
    windows = _windows(by_message, len(text))
    return [
        _rendered(text, *of_message) for of_message in zip(messages, by_message, windows, homes, strict=True)
    ]


def _homes(messages: Sequence[dict[str, Any]], runs: Sequence[Span], length: int) -> list[Span]:
    """Return for each message where it belongs: all of the text where there is not one run of marks for each assistant's."""
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
    """Return the texts of a content that are not empty; pictures and the like have none."""
    if content is None:
        return []
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text if isinstance(text, str) else str(text) for text in texts if text not in (None, "")]


def _words_of_calls(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the texts of a message's tool calls and tool responses. Templates print them in any order and format.

    Beside each comes the JSON that it was given in, which a template may print as it is.
    """
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(function, dict):
            yield from _leaves([function.get("name"), function.get("arguments")], "")
    yield from _leaves(message.get("tool_responses"), "")


def _lost_words(text: str, words: list[tuple[str, str]]) -> list[str]:
    """Return the words that are not in a text, or not as often: of two calls a template may print one."""
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
        except ValueError:
            parsed = None
        if isinstance(parsed, (dict, list)):
            yield from _leaves(parsed, value)
        elif value:
            yield value, whole or value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item, whole)


def _forms(word: str) -> set[str]:
    """Return a text as it is, and as JSON writes it."""
    return {word, json.dumps(word)[1:-1], json.dumps(word, ensure_ascii=False)[1:-1]}


def _as_printed(content: str, text: str) -> str:
    """Return a content as a template printed it: some print tool results and system messages as JSON strings."""
    if content in text:
        return content
    forms = [*_forms(content), *(() if content.strip() in text else _forms(content.strip()))]
    return next((form for form in forms if form in text), content)


def _bounds(text: str) -> list[Span]:
    """Return the bounds of a text, and those without the white space around it."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    return (
        [(0, len(text))] if (start, end) == (0, len(text)) or start >= end else [(0, len(text)), (start, end)]
    )


def _next_run(runs: Sequence[Span], start: int, stop: int) -> list[Span]:
    """Return the next run of marks in ``text[start:stop]``, if there is one."""
    k = bisect.bisect(runs, start, key=lambda run: run[1])
    return [(max(a, start), min(b, stop)) for a, b in runs[k : k + 1] if a < stop]


def _place_in_order(text: str, pieces: list[_Piece], runs: Sequence[Span]) -> bool:
    """Place pieces of one home one after the other, some without the white space around them; or none, and return ``False``."""
    start, stop = pieces[0].home
    found: list[tuple[int, Span]] = []
    for piece in pieces:
        marked = _next_run(runs, start, stop) if piece.is_marked else []
        for place, bounds in itertools.product([*marked, (start, stop)], _bounds(piece.text)):
            part = piece.text[slice(*bounds)]
            # In what is marked at its end first: a word like "a" may be in what the template puts before it, too.
            is_last = place in marked and text.endswith(part, *place)
            if (at := place[1] - len(part) if is_last else text.find(part, *place)) >= 0:
                found.append((at, bounds))
                start = at + len(part)
                break
        else:
            return False
    for piece, part in zip(pieces, found, strict=True):
        piece.parts = [part]
    return True


def _place_by_length(text: str, pieces: list[_Piece]) -> None:
    """Place the pieces that are in the text and not placed yet, the longest first: at home, those that are not there elsewhere."""
    placed = [i for i, piece in enumerate(pieces) if piece.parts]  # sorted
    free = text
    for i in placed:
        free = _without(free, *pieces[i].found[0])
    by_length = sorted(set(range(len(pieces))) - set(placed), key=lambda i: -len(pieces[i].text))
    for i, is_home in ((i, is_home) for is_home in (True, False) for i in by_length):
        piece, k = pieces[i], bisect.bisect(placed, i)
        if piece.parts or not (is_home or piece.text.strip()):  # white space is elsewhere, always
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
    """Mark the fewest pieces without which all others stand in order: all but a longest increasing subsequence."""
    ends: list[int] = []  # by length of a subsequence: the smallest position that ends one
    chains: list[Any] = []  # and its pieces, the last first
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
    """Place what is left of the pieces that are not there as a whole, between their neighbours that stand in order."""
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
    """Return parts of a piece that are in ``text[start:stop]``, in order: where each begins, and its bounds in the piece.

    From the end of the piece that has more of it there, and then from the other, the longest part, and the longest of what is left
    as long as there is one; then whole lines between. A short part counts where nothing but white space lies before it.
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
    """Return the length of the longest beginning, or end, of a piece that is in ``text[start:stop]``."""

    def is_gone(length: int) -> bool:
        return text.find(piece[:length] if head else piece[len(piece) - length :], start, stop) < 0

    return bisect.bisect_left(range(1, len(piece) + 1), True, key=is_gone)


def _windows(by_message: list[list[_Piece]], length: int) -> list[Span]:
    """Return for each message what lies between the contents of the messages before and after it."""
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
