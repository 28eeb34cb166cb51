"""Histories -> ids and assistant masks, by a chat template; and what the template made of the messages.

TorchRL chooses the template and turns a History into messages; the tokenizer renders and tokenizes. Then the text is compared with
the messages (:mod:`vllm_kl.rendered`) and the marks with what the assistant said. A template or a tokenizer that raises becomes
an InputError that names the sample.

One rule says which tokens of a turn count: those of what the assistant said, up to and with the token that ends its turn, because
the policy sampled that one too. It is the mask that ids have whose prompt is stored. Templates whose ``{% generation %}`` tags
close before that token, or after the newline behind it, give the same mask as others.
"""

from __future__ import annotations

import datetime
import itertools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from torchrl.data.llm import History

from vllm_kl.errors import InputError, OptionError
from vllm_kl.rendered import Rendered, Span, find_messages
from vllm_kl.texts import added_tokens
from vllm_kl.types import TextReport

_RENDERING = threading.Lock()


def _renew_lock() -> None:
    global _RENDERING
    _RENDERING = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # a fork may happen while another thread renders
_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()])
_CURE = (
    "What works: the ids that the policy saw, in ('tokens', 'full'); or a template that gives all of it: "
    "tokenizer_kwargs={'chat_template': ...}. Counted in metrics."
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dialog:
    """One rendered history of L tokens."""

    messages: list[dict[str, Any]]
    text: str
    token_ids: torch.Tensor  # [L] int64, CPU
    offsets: np.ndarray  # [L, 2]: where each token's characters begin and end in ``text``
    is_space: np.ndarray  # [L] bool: nothing but white space
    marked: np.ndarray  # [L] bool: between the template's generation tags

    @property
    def num_assistant(self) -> int:
        """How many messages are the assistant's."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def in_ids(self) -> Span:
        """The characters of ``text`` that are in the ids: all but white space around it, unless the tokenizer truncates."""
        start, stop = (int(self.offsets[0, 0]), int(self.offsets[:, 1].max())) if len(self.offsets) else (0, 0)
        return start if self.text[:start].strip() else 0, stop if self.text[stop:].strip() else len(self.text)

    @property
    def is_truncated(self) -> bool:
        return self.in_ids != (0, len(self.text))

    @property
    def speaks(self) -> bool:
        """Whether the assistant says anything."""
        return any(m.get("content") or m.get("tool_calls") for m in self.messages if m["role"] == "assistant")


def render(
    history: History, tokenizer: Any, options: dict[str, Any], *, whose: str
) -> tuple[list[Dialog], dict[str, str]]:
    """Return the dialogs of a batch of histories, and what to note of their template.

    Args:
        history: ``[B, messages]``.
        tokenizer: a tokenizer of transformers.
        options: of ``History.apply_chat_template``.
        whose: the template's owner, for messages.

    Raises:
        InputError: the template or the tokenizer raises.
        OptionError: a template's name that TorchRL does not know.
    """
    renderer = _Renderer(tokenizer, whose)
    try:
        history.apply_chat_template(tokenizer=renderer, **options)
    except KeyError as error:
        if options.get("chat_template") is None and error.args == (options.get("chat_template_name"),):
            raise OptionError(
                f"chat_template_name={error.args[0]!r}: TorchRL has no template of that name; pass the template itself, as "
                "chat_template"
            ) from None
        raise
    notes = {}
    if renderer.dates:
        notes["date"] = (
            f"{whose} writes the current date into the text (strftime_now gave {renderer.dates[0]!r}): the ids and the numbers "
            "of a History change with the day. Store the ids, or pass the date: tokenizer_kwargs={'date_string': ...} for "
            "templates that take one, or {'strftime_now': ...}."
        )
    begin, _ = added_tokens(tokenizer)
    bare = [i for i, dialog in enumerate(renderer.dialogs) if begin and dialog.token_ids[0] != begin[0]]
    if bare and begin[0] == getattr(tokenizer, "bos_token_id", None):
        notes["no_bos"] = (
            f"{whose} renders no BOS (first in sample {bare[0]}), though the tokenizer begins every text with "
            f"{tokenizer.bos_token!r}: the dialogs are scored without, as TorchRL's wrappers tokenize them"
        )
    return renderer.dialogs, notes


class _Renderer:
    """Stands for the tokenizer while TorchRL 0.14 turns a History into messages, and keeps the text, the ids and the mask.

    TorchRL renders a second time, without the template's arguments, to guess a mask from words in the text where the template gives
    an empty one; it does not when it is given no text.
    """

    def __init__(self, tokenizer: Any, whose: str) -> None:
        self._tokenizer = tokenizer
        self._whose = whose
        self.dialogs: list[Dialog] = []
        self.dates: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        if not options.get("tokenize"):
            return None
        options = {"strftime_now": self._strftime_now, **options}
        text = self._text(conversation, options)
        try:
            result = self._apply(conversation, options)
            offsets = np.array(result.encodings[0].offsets, dtype=np.int64).reshape(-1, 2)
        except Exception as error:
            raise InputError(
                f"sample {len(self.dialogs)}: the tokenizer ({type(self._tokenizer).__name__}) cannot turn what {self._whose} "
                f"rendered into ids: {type(error).__name__}: {error}"
            ) from error
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        self.dialogs.append(
            Dialog(
                messages=conversation,
                text=text,
                token_ids=torch.as_tensor(result["input_ids"]).flatten().long().cpu(),
                offsets=offsets,
                is_space=_overlap(~np.isin(codes, _SPACES), offsets) == 0,
                marked=_whole_chars(np.asarray(result["assistant_masks"]).reshape(-1).astype(bool), offsets),
            )
        )
        return result

    def _apply(self, conversation: list[dict[str, Any]], options: dict[str, Any]) -> Any:
        # transformers 5.19 keeps one list of marked spans per template: two threads would raise, or mark each other's text.
        with _RENDERING:
            return self._tokenizer.apply_chat_template(conversation, **options)

    def _text(self, conversation: list[dict[str, Any]], options: dict[str, Any]) -> str:
        as_text = {**options, "tokenize": False, "return_dict": False, "return_assistant_tokens_mask": False}
        try:
            return self._apply(conversation, as_text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{self._whose} is no valid Jinja: line {error.lineno}: {error.message}") from error
        except Exception as error:
            raise InputError(
                f"sample {len(self.dialogs)}{self._first_that_raises(conversation, as_text, error)}: {self._whose} raised "
                f"{type(error).__name__}: {error}. What works: messages that it takes; another template "
                "(tokenizer_kwargs={'chat_template': ...}); or the policy's ids in ('tokens', 'full')."
            ) from error

    def _first_that_raises(self, conversation: list[dict[str, Any]], options: dict[str, Any], error: Exception) -> str:
        """Return which message the template stumbled over: the last of the shortest beginning that raises the same."""
        for i, message in enumerate(conversation):
            try:
                self._apply(conversation[: i + 1], options)
            except Exception as of_beginning:
                if str(of_beginning) == str(error):
                    return f", message {i} (role {message.get('role')!r})"
        return ""

    def _strftime_now(self, form: str) -> str:
        self.dates.append(datetime.datetime.now().strftime(form))
        return self.dates[-1]


def _whole_chars(marked: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return marks that end behind a character: transformers 5.19 leaves out its last bytes where each is a token.

    >>> _whole_chars(np.array([True, True, False, False]), np.array([[0, 1], [1, 2], [1, 2], [2, 3]])).tolist()
    [True, True, True, False]
    """
    whole = marked.copy()
    for _, stop in _runs(marked):
        while stop < len(whole) and offsets[stop, 0] < offsets[stop - 1, 1] and not whole[stop]:
            whole[stop] = True
            stop += 1
    return whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """Which tokens end an assistant's turn."""

    ids: frozenset[int]  # EOS, and what the template puts behind answers: Gemma's is not its EOS
    # These too, right behind what is marked: special tokens that begin no message.
    behind: frozenset[int] = frozenset()


def end_turns(dialogs: Sequence[Dialog], ends: Ends) -> tuple[list[torch.Tensor], frozenset[int], TextReport]:
    """Return the masks, ``[L]`` bool, of what the assistant said and of the tokens that end its turns; and which tokens did.

    The report says where tags leave such a token out or run on after it, and where there is none, or two.
    """
    found, ends_behind = set(ends.ids), ends.ids | ends.behind
    report, masks = TextReport(), []
    for i, dialog in enumerate(dialogs):
        ids, mask, is_space = dialog.token_ids.tolist(), dialog.marked.copy(), dialog.is_space
        has_ends = True
        for start, stop in _runs(dialog.marked):
            first = stop
            while first > start and (ids[first - 1] in ends.ids or is_space[first - 1]):
                first -= 1
            end = next((t for t in range(first, stop) if ids[t] in ends.ids), None)
            if end is not None and end + 1 < stop:
                mask[end + 1 : stop] = False
                report.notes.setdefault(
                    "after_end", _AFTER_END.format(sample=i, text=_words(_slice(dialog, end + 1, stop)))
                )
            if end is None and stop < len(ids) and ids[stop] in ends_behind:
                end = stop
                mask[end] = True
                found.add(ids[end])
                report.notes.setdefault(
                    "end_outside", _OUTSIDE.format(sample=i, text=_words(_slice(dialog, end, end + 1)))
                )
            if end is not None and ids[end + 1 : end + 2] == [ids[end]]:
                report.warnings.setdefault(
                    "double_end", _TWICE.format(sample=i, text=_words(_slice(dialog, end, end + 1)))
                )
            has_ends &= end is not None
        if not has_ends and not dialog.is_truncated:
            report.warnings.setdefault("no_end", _NO_END.format(sample=i))
        if (blank := _unmarked_blank(dialog)) is not None:
            report.warnings.setdefault("blank", _BLANK.format(sample=i, message=blank))
        masks.append(torch.from_numpy(mask))
    return masks, frozenset(found), report


def _unmarked_blank(dialog: Dialog) -> int | None:
    """Return the first empty message of the assistant, where not one run of marks is there for each of its messages."""
    if dialog.is_truncated or len(_runs(dialog.marked)) >= dialog.num_assistant:
        return None
    messages = enumerate(dialog.messages)
    said = ((j, m.get("content"), m.get("tool_calls")) for j, m in messages if m["role"] == "assistant")
    return next((j for j, content, calls in said if not calls and not str(content or "").strip()), None)


_BLANK = (
    "the assistant's message {message} of sample {sample} is empty and the chat template's tags mark nothing there: the token that "
    "ends this turn does not count, as it would with ids from the policy. What works: those ids, in ('tokens', 'full'); or a "
    "template whose tags close behind that token."
)
_AFTER_END = (
    "the chat template's tags mark {text} after the token that ends a turn (first in sample {sample}): no policy samples it, so "
    "it does not count"
)
_OUTSIDE = (
    "the chat template's tags leave out {text}, which ends a turn (first in sample {sample}): the policy samples it, so it "
    "counts, as it does for ids"
)
_TWICE = (
    "{text} ends a turn twice in sample {sample}: the message ends with it and the chat template adds another. Both are in the "
    "ids, the first one counts. Take it from the message's content, or use a template that looks for it."
)
_NO_END = (
    "the chat template renders no token that ends the assistant's turn in sample {sample} (EOS, or a special token): the one "
    "that a policy samples there is not in the ids and does not count, as it would with ids from the policy."
)


_PROBE = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]
# How a batch is rendered, not how a turn ends.
_NOT_OF_A_TURN = ("truncation", "max_length", "add_generation_prompt", "continue_final_message", "tools", "documents")
_ENDS: weakref.WeakKeyDictionary[Any, dict[str, Ends]] = weakref.WeakKeyDictionary()


def ends_of(tokenizer: Any, options: dict[str, Any]) -> Ends:
    """Return the tokens that end turns of a template.

    They are those of a dialog of plain words, whatever a batch holds: special tokens inside an answer end nothing.
    """
    options = {name: value for name, value in options.items() if name not in _NOT_OF_A_TURN}
    known = _ENDS.setdefault(tokenizer, {})
    of_tokenizer = (getattr(tokenizer, "chat_template", None), getattr(tokenizer, "eos_token_id", None), len(tokenizer))
    if (key := repr((sorted(options.items()), of_tokenizer))) not in known:
        known[key] = _ends_of_a_probe(tokenizer, options)
    return known[key]


def _ends_of_a_probe(tokenizer: Any, options: dict[str, Any]) -> Ends:
    eos = {getattr(tokenizer, "eos_token_id", None)} - {None}
    renderer = _Renderer(tokenizer, "the chat template")
    try:
        History.from_chats([_PROBE]).apply_chat_template(tokenizer=renderer, add_generation_prompt=False, **options)
    except Exception:  # a template of its own rules: EOS is all that is known of it
        return Ends(ids=frozenset(eos))
    (dialog,) = renderer.dialogs
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*getattr(tokenizer, "all_special_ids", ()), *(i for i, token in added.items() if token.special)}
    ids, (starts, stops) = dialog.token_ids.numpy(), dialog.offsets.T
    is_special = np.isin(ids, list(special))
    at = [dialog.text.find(message["content"]) for message in _PROBE]
    if -1 in at:  # it changes what is said
        return Ends(ids=frozenset(eos))
    behind = [
        np.flatnonzero((starts >= at[n] + len(_PROBE[n]["content"])) & ~dialog.is_space) for n in range(len(_PROBE))
    ]
    follows = {int(ids[t]) for n in (1, 3) for t in behind[n][:1] if is_special[t]}
    # What stands last before both questions begins a message: some templates have nothing that ends a turn.
    before = [np.flatnonzero((stops <= at[n]) & is_special)[-1:] for n in (0, 2)]
    begins = set(ids[before[0]].tolist()) & set(ids[before[1]].tolist())
    ends = eos | (follows - begins if all(is_special[behind[n][:1]].any() for n in (1, 3)) else set())
    # What the template writes around plain words begins a message, unless it ends one.
    return Ends(ids=frozenset(ends), behind=frozenset(special - set(ids.tolist())))


def compare(dialogs: Sequence[Dialog], masks: Sequence[torch.Tensor] | None, ends: frozenset[int]) -> TextReport:
    """Return what the template made of the messages: figures, and the first example of each kind.

    Args:
        dialogs: rendered histories.
        masks: their masks, ``[L]`` bool, where the template marks what the assistant said.
        ends: the ids that end turns.
    """
    count: Counter[str] = Counter()
    first: dict[str, str] = {}
    for i, dialog in enumerate(dialogs):
        is_end = np.isin(dialog.token_ids.numpy(), sorted(ends))
        runs = [] if masks is None else _said_runs(dialog, masks[i].numpy(), is_end)
        start, stop = dialog.in_ids
        found = find_messages("\0" * start + dialog.text[start:stop], dialog.messages, runs)
        count["truncated_dialogs"] += dialog.is_truncated
        for j, message in enumerate(found):
            where = f"sample {i}, message {j} ({message.role})"
            for kind, num_chars, example in _losses(message):
                counted = "cut" if kind == "trimmed" else kind  # said apart: most templates trim, few cut
                count[f"{counted}_messages"] += 1
                count[f"{counted}_chars"] += num_chars
                is_truncated = dialog.is_truncated and counted == "cut"
                first.setdefault("truncated" if is_truncated else kind, f"{where}: {example}")
            count["messages"] += 1
            count["content_chars"] += message.num_chars
        if masks is not None:
            for kind, num_chars, example in _wrong_marks(dialog, masks[i].numpy(), is_end, found):
                count[f"{kind}_chars"] += num_chars
                first.setdefault(kind, f"sample {i}: {example}")
    names = (
        "messages",
        "content_chars",
        "cut_messages",
        "cut_chars",
        "moved_messages",
        "inserted_chars",
        "unmarked_chars",
    )
    metrics = {f"template_{name}": float(count[name]) for name in names}
    said = {kind: f"{_SAYS[kind].format_map(count)} The first: {example}. {_CURE}" for kind, example in first.items()}
    return TextReport(metrics=metrics, warnings=said)


_CUT = (
    "the chat template leaves out content of {cut_messages} of {messages} messages, {cut_chars} of {content_chars} "
    "characters: they are not in the ids that are scored."
)
_SAYS = {
    "cut": _CUT,
    "trimmed": _CUT,
    "truncated": "the tokenizer truncates {truncated_dialogs} dialogs; of {messages} messages {cut_messages} lack content, "
    "{cut_chars} of {content_chars} characters: they are not in the ids that are scored, nor are tokens that end turns there.",
    "moved": "the chat template moves {moved_messages} of {messages} messages to another place in the dialog.",
    "printed": "the chat template prints the content of {printed_messages} of {messages} messages as a Python list.",
    "inserted": "the chat template marks {inserted_chars} characters as the assistant's that are in no message's content: they "
    "count.",
    "unmarked": "the chat template leaves {unmarked_chars} characters that the assistant says outside its tags: they do not count.",
}


def _losses(message: Rendered) -> Iterator[tuple[str, int, str]]:
    """Yield the kind, the number of characters and the example of what a message lost."""
    num_lost = message.num_chars - message.num_found
    if num_lost:
        is_trimmed = not message.missing.strip()
        how = "white space was trimmed" if is_trimmed else f"missing: {_words(message.missing)}"
        yield (
            "trimmed" if is_trimmed else "cut",
            num_lost,
            f"{message.num_found} of its {message.num_chars} characters came back; {how}",
        )
    if message.is_moved:
        yield (
            "moved",
            0,
            f"its {message.num_chars} characters stand before an earlier message's, or after a later one's",
        )
    if message.is_printed:
        yield "printed", 0, "its content is a list of parts, which the template takes for a text"


def _wrong_marks(
    dialog: Dialog, mask: np.ndarray, is_end: np.ndarray, found: Sequence[Rendered]
) -> Iterator[tuple[str, int, str]]:
    """Yield what is marked that the assistant did not say, and what it said that is not marked."""
    said = np.zeros(len(dialog.text), dtype=bool)
    may_be_said = said.copy()
    in_tokens, in_mask = np.zeros_like(said), np.zeros_like(said)
    for chars, tokens in ((in_tokens, np.ones_like(mask)), (in_mask, mask)):
        for start, stop in _char_runs(dialog, tokens):
            chars[start:stop] = True
    for message, rendered in zip(dialog.messages, found, strict=True):
        if rendered.role == "assistant":
            for start, stop in rendered.spans:
                said[start:stop] = True
            if message.get("tool_calls"):  # a template has its own way to write them
                may_be_said[slice(*rendered.window)] = True
                for start, stop in _unmarked_calls(dialog.text, in_mask, rendered):
                    said[start:stop] = True
    may_be_said |= said
    added = mask & ~is_end & (_overlap(may_be_said, dialog.offsets) == 0)
    inserted = [(a, b) for a, b in _runs(added) if not dialog.is_space[a:b].all()]  # " four" may be one token, or two
    if inserted:
        num_chars = sum(len(_slice(dialog, *run)) for run in inserted)
        yield "inserted", num_chars, _words(_slice(dialog, *inserted[0]))
    unmarked = said & in_tokens & ~in_mask
    if unmarked.any():
        start, stop = _runs(unmarked)[0]
        yield "unmarked", int(unmarked.sum()), _words(dialog.text[start:stop])


def _unmarked_calls(text: str, in_mask: np.ndarray, message: Rendered) -> Iterator[Span]:
    """Yield where words of a message's tool calls stand that are nowhere in what is marked."""
    start, stop = message.window
    marked = "".join(itertools.compress(text[start:stop], in_mask[start:stop]))
    for word in message.calls:
        at = (
            text.find(word, start, stop) if len(word) > 2 and word not in marked else -1
        )  # shorter ones are in anything
        if at >= 0:
            yield at, at + len(word)


def _runs(mask: np.ndarray) -> list[Span]:
    """Return where a mask's runs begin and end.

    >>> _runs(np.array([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _char_runs(dialog: Dialog, mask: np.ndarray) -> list[Span]:
    """Return the characters of a mask's runs of tokens."""
    return [(int(dialog.offsets[a, 0]), int(dialog.offsets[b - 1, 1])) for a, b in _runs(mask)]


def _said_runs(dialog: Dialog, mask: np.ndarray, is_end: np.ndarray) -> list[Span]:
    """Return the characters of what is marked, without the tokens that end turns.

    Where there is one run for each of the assistant's messages they stay whole: an answer of several channels holds such tokens.
    """
    runs = _runs(mask)
    if len(runs) != dialog.num_assistant:
        return _char_runs(dialog, mask & ~is_end)
    said = []
    for start, stop in runs:
        while stop > start and is_end[stop - 1]:
            stop -= 1
        begin = int(dialog.offsets[start, 0])
        said.append((begin, int(dialog.offsets[stop - 1, 1]) if stop > start else begin))
    return said


def _overlap(chars: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return how many of some characters each token has, ``[L]``."""
    before = np.concatenate([[0], np.cumsum(chars)])
    return before[offsets[:, 1]] - before[offsets[:, 0]]


def _slice(dialog: Dialog, start: int, stop: int) -> str:
    """Return the text of some tokens."""
    return dialog.text[dialog.offsets[start, 0] : dialog.offsets[stop - 1, 1]]


def _words(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else f"{text[: limit - 3]}...")
