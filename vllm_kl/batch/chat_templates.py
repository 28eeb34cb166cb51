"""Histories -> ids and assistant masks, by a chat template; and what the template made of the messages.

TorchRL chooses the template and turns a History into messages; the tokenizer renders and tokenizes. Then the text is compared with
the messages (:mod:`vllm_kl.batch.rendered`) and the marks with what the assistant said. A template or a tokenizer that raises
becomes an InputError that names the sample.

One rule says which tokens of a turn count: those of what the assistant said, up to and with the token that ends its turn, because
the policy sampled that one too. It is the mask that ids have whose prompt is stored. Templates whose ``{% generation %}`` tags
close before that token, or after the newline behind it, give the same mask as others.
"""

from __future__ import annotations

import datetime
import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from torchrl.data.llm import History

from vllm_kl.batch.rendered import Rendered, Span, find_messages
from vllm_kl.batch.texts import added_tokens, shown
from vllm_kl.errors import InputError, OptionError
from vllm_kl.types import TextReport

_RENDERING = threading.Lock()


def _renew_lock() -> None:
    global _RENDERING
    _RENDERING = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # a fork may happen while another thread renders
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
    def of_assistant(self) -> list[tuple[int, dict[str, Any]]]:
        """The assistant's messages, and which they are."""
        return [(j, message) for j, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def in_ids(self) -> Span:
        """The characters of ``text`` that are in the ids: all but white space around it, unless the tokenizer truncates."""
        start, stop = (
            (int(self.offsets[0, 0]), int(self.offsets[:, 1].max())) if len(self.offsets) else (0, 0)
        )
        return start if self.text[:start].strip() else 0, stop if self.text[stop:].strip() else len(self.text)

    @property
    def is_truncated(self) -> bool:
        return self.in_ids != (0, len(self.text))

    def part(self, start: int, stop: int) -> str:
        """Return the text of some tokens."""
        return self.text[self.offsets[start, 0] : self.offsets[stop - 1, 1]]

    @property
    def speaks(self) -> bool:
        """Whether the assistant says anything."""
        return any(message.get("content") or message.get("tool_calls") for _, message in self.of_assistant)


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
        marked = np.asarray(result["assistant_masks"]).reshape(-1).astype(bool)
        # transformers 5.19 leaves out the last bytes of a last character where each is a token.
        marked |= _overlap(_chars(marked, offsets, len(text)), offsets) > 0
        self.dialogs.append(
            Dialog(
                messages=conversation,
                text=text,
                token_ids=torch.as_tensor(result["input_ids"]).flatten().long().cpu(),
                offsets=offsets,
                is_space=np.array(
                    [not text[start:stop].strip() for start, stop in offsets.tolist()], dtype=bool
                ),
                marked=marked,
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
            raise InputError(
                f"{self._whose} is no valid Jinja: line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:
            raise InputError(
                f"sample {len(self.dialogs)}{self._first_that_raises(conversation, as_text, error)}: {self._whose} raised "
                f"{type(error).__name__}: {error}. What works: messages that it takes; another template "
                "(tokenizer_kwargs={'chat_template': ...}); or the policy's ids in ('tokens', 'full')."
            ) from error

    def _first_that_raises(
        self, conversation: list[dict[str, Any]], options: dict[str, Any], error: Exception
    ) -> str:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """Which tokens end an assistant's turn."""

    ids: frozenset[int]  # EOS, and what the template puts behind answers: Gemma's is not its EOS
    # These too, right behind what is marked: special tokens that begin no message.
    behind: frozenset[int] = frozenset()


def end_turns(dialogs: Sequence[Dialog], ends: Ends) -> tuple[list[torch.Tensor], TextReport]:
    """Return the masks, ``[L]`` bool, of what the assistant said and of the tokens that end its turns.

    The report says where tags leave such a token out or run on after it, and where there is none, or two.
    """
    report, masks = TextReport(), []
    for i, dialog in enumerate(dialogs):
        mask = dialog.marked.copy()
        for kind, what in _end_runs(dialog, mask, ends):
            where = report.notes if kind in ("after_end", "end_outside") else report.warnings
            where.setdefault(kind, _OF_ENDS[kind].format(sample=i, what=what))
        masks.append(torch.from_numpy(mask))
    return masks, report


def _end_runs(dialog: Dialog, mask: np.ndarray, ends: Ends) -> Iterator[tuple[str, Any]]:
    """Make every run of a mask end with the token that ends its turn; yield the kinds of what is to be told, and of what."""
    ids, runs = dialog.token_ids.tolist(), _runs(dialog.marked)
    has_ends = True
    for start, stop in runs:
        first = stop
        while first > start and (ids[first - 1] in ends.ids or dialog.is_space[first - 1]):
            first -= 1
        end = next((t for t in range(first, stop) if ids[t] in ends.ids), None)
        if end is not None and end + 1 < stop:
            mask[end + 1 : stop] = False
            yield "after_end", shown(dialog.part(end + 1, stop))
        if end is None and stop < len(ids) and ids[stop] in ends.ids | ends.behind:
            end = stop
            mask[end] = True
            yield "end_outside", shown(dialog.part(end, end + 1))
        if end is not None and ids[end + 1 : end + 2] == [ids[end]]:
            yield "double_end", shown(dialog.part(end, end + 1))
        has_ends &= end is not None
    if dialog.is_truncated:
        return
    if not has_ends:
        yield "no_end", None
    blank = [
        j for j, m in dialog.of_assistant if not (m.get("tool_calls") or str(m.get("content") or "").strip())
    ]
    if blank and len(runs) < len(dialog.of_assistant):
        yield "blank", blank[0]


_OF_ENDS = {
    "after_end": "the chat template's tags mark {what} after the token that ends a turn (first in sample {sample}): no policy "
    "samples it, so it does not count",
    "end_outside": "the chat template's tags leave out {what}, which ends a turn (first in sample {sample}): the policy samples "
    "it, so it counts, as it does for ids",
    "double_end": "{what} ends a turn twice in sample {sample}: the message ends with it and the chat template adds another. Both "
    "are in the ids, the first one counts. Take it from the message's content, or use a template that looks for it.",
    "no_end": "the chat template renders no token that ends the assistant's turn in sample {sample} (EOS, or a special token): "
    "the one that a policy samples there is not in the ids and does not count, as it would with ids from the policy.",
    "blank": "the assistant's message {what} of sample {sample} is empty and the chat template's tags mark nothing there: the "
    "token that ends this turn does not count, as it would with ids from the policy. What works: those ids, in ('tokens', "
    "'full'); or a template whose tags close behind that token.",
}

_PROBE = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]
# How a batch is rendered, not how a turn ends.
_NOT_OF_A_TURN = (
    "truncation",
    "max_length",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "documents",
)


def ends_of(tokenizer: Any, options: dict[str, Any]) -> Ends:
    """Return the tokens that end turns of a template.

    They are those of a dialog of plain words, whatever a batch holds: special tokens inside an answer end nothing.
    """
    options = {name: value for name, value in options.items() if name not in _NOT_OF_A_TURN}
    eos = {getattr(tokenizer, "eos_token_id", None)} - {None}
    renderer = _Renderer(tokenizer, "the chat template")
    try:
        History.from_chats([_PROBE]).apply_chat_template(
            tokenizer=renderer, add_generation_prompt=False, **options
        )
    except Exception:  # a template of its own rules: EOS is all that is known of it
        return Ends(ids=frozenset(eos))
    (dialog,) = renderer.dialogs
    at = [dialog.text.find(message["content"]) for message in _PROBE]
    if -1 in at:  # it changes what is said
        return Ends(ids=frozenset(eos))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {
        *getattr(tokenizer, "all_special_ids", ()),
        *(i for i, token in added.items() if token.special),
    }
    tokens = list(
        zip(dialog.token_ids.tolist(), dialog.offsets.tolist(), dialog.is_space.tolist(), strict=True)
    )

    def before(n: int) -> int | None:
        """Return the last special token before a message's words."""
        return next((t for t, (_, stop), _ in reversed(tokens) if stop <= at[n] and t in special), None)

    def behind(n: int) -> int | None:
        """Return the first token after a message's words that is not white space."""
        end = at[n] + len(_PROBE[n]["content"])
        return next((t for t, (start, _), is_space in tokens if start >= end and not is_space), None)

    # What stands last before both questions begins a message: some templates have nothing that ends a turn.
    begins, follows = {before(0)} & {before(2)}, {behind(1), behind(3)}
    ends = eos | (follows - begins if follows <= special else set())
    # What the template writes around plain words begins a message, unless it ends one.
    return Ends(ids=frozenset(ends), behind=frozenset(special - {t for t, _, _ in tokens}))


def compare(dialogs: Sequence[Dialog], masks: Sequence[torch.Tensor] | None, ends: Ends) -> TextReport:
    """Return what the template made of the messages: figures, and the first example of each kind.

    Args:
        dialogs: rendered histories.
        masks: their masks, ``[L]`` bool, where the template marks what the assistant said.
        ends: the tokens that end turns.
    """
    count: Counter[str] = Counter()
    first: dict[str, str] = {}
    for i, dialog in enumerate(dialogs):
        mask = dialog.marked if masks is None else masks[i].numpy()
        is_end = np.isin(dialog.token_ids.numpy(), sorted(ends.ids)) | (mask & ~dialog.marked)
        start, stop = dialog.in_ids
        runs = [] if masks is None else _said_runs(dialog, mask, is_end)
        found = find_messages("\0" * start + dialog.text[start:stop], dialog.messages, runs)
        count.update(messages=len(found), content_chars=sum(message.num_chars for message in found))
        count["truncated_dialogs"] += dialog.is_truncated
        marks = () if masks is None else _wrong_marks(dialog, mask, is_end, found)
        for kind, num_chars, example in itertools.chain(_losses(found, dialog.is_truncated), marks):
            counted = "cut" if kind in ("trimmed", "truncated") else kind
            count[f"{counted}_messages"] += 1
            count[f"{counted}_chars"] += num_chars
            first.setdefault(kind, f"sample {i}{example}")
    said = {
        kind: f"{_SAYS[kind].format_map(count)} The first: {example}. {_CURE}"
        for kind, example in first.items()
    }
    of_messages = [f"{kind}messages" for kind in ("", "cut_", "moved_")]
    of_chars = [f"{kind}_chars" for kind in ("content", "cut", "inserted", "unmarked")]
    metrics = {f"template_{name}": float(count[name]) for name in (*of_messages, *of_chars)}
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


def _losses(found: Sequence[Rendered], is_truncated: bool) -> Iterator[tuple[str, int, str]]:
    """Yield the kind, the number of characters and the example of what messages lost."""
    for j, message in enumerate(found):
        where = f", message {j} ({message.role}): "
        if num_lost := message.num_chars - message.num_found:
            is_trimmed = not message.missing.strip()  # said apart: most templates trim, few cut
            how = "white space was trimmed" if is_trimmed else f"missing: {shown(message.missing)}"
            kind = "truncated" if is_truncated else "trimmed" if is_trimmed else "cut"
            yield (
                kind,
                num_lost,
                f"{where}{message.num_found} of its {message.num_chars} characters came back; {how}",
            )
        if message.is_moved:
            what = f"its {message.num_chars} characters stand before an earlier message's, or after a later one's"
            yield "moved", 0, f"{where}{what}"
        if message.is_printed:
            yield "printed", 0, f"{where}its content is a list of parts, which the template takes for a text"


def _wrong_marks(
    dialog: Dialog, mask: np.ndarray, is_end: np.ndarray, found: Sequence[Rendered]
) -> Iterator[tuple[str, int, str]]:
    """Yield what is marked that the assistant did not say, and what it said that is not marked."""
    text = dialog.text
    in_tokens, in_mask = (_chars(tokens, dialog.offsets, len(text)) for tokens in (np.ones_like(mask), mask))
    said, of_calls = np.zeros_like(in_mask), np.zeros_like(in_mask)
    for message, rendered in zip(dialog.messages, found, strict=True):
        if rendered.role != "assistant":
            continue
        spans = list(rendered.spans)
        if message.get("tool_calls"):  # a template has its own way to write them, but not without their words
            window = slice(*rendered.window)
            of_calls[window] = True
            marked = "".join(itertools.compress(text[window], in_mask[window]))
            for word in rendered.calls:
                at = text.find(word, *rendered.window)
                if len(word) > 2 and word not in marked and at >= 0:  # shorter ones are in anything
                    spans.append((at, at + len(word)))
        for start, stop in spans:
            said[start:stop] = True
    added = mask & ~is_end & (_overlap(said | of_calls, dialog.offsets) == 0)
    # White space alone is no word that nobody said: " four" may be one token, or two.
    if inserted := [dialog.part(a, b) for a, b in _runs(added) if not dialog.is_space[a:b].all()]:
        yield "inserted", sum(map(len, inserted)), f": {shown(inserted[0])}"
    unmarked = said & in_tokens & ~in_mask
    if unmarked.any():
        yield "unmarked", int(unmarked.sum()), f": {shown(text[slice(*_runs(unmarked)[0])])}"


def _runs(mask: np.ndarray) -> list[Span]:
    """Return where a mask's runs begin and end.

    >>> _runs(np.array([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _said_runs(dialog: Dialog, mask: np.ndarray, is_end: np.ndarray) -> list[Span]:
    """Return the characters of what is marked, without the tokens that end turns.

    Where there is one run for each of the assistant's messages they stay whole: an answer of several channels holds such tokens.
    """
    runs = _runs(mask)
    if len(runs) != len(dialog.of_assistant):
        runs = _runs(mask & ~is_end)
    begins, ends = dialog.offsets.T.tolist()
    return [(begins[a], ends[b - 1 - is_end[b - 1]] if b - a > is_end[b - 1] else begins[a]) for a, b in runs]


def _chars(mask: np.ndarray, offsets: np.ndarray, length: int) -> np.ndarray:
    """Return which characters are in a mask's runs of tokens, ``[length]`` bool."""
    chars = np.zeros(length, dtype=bool)
    for start, stop in _runs(mask):
        chars[offsets[start, 0] : offsets[stop - 1, 1]] = True
    return chars


def _overlap(chars: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return how many of some characters each token has, ``[L]``."""
    before = np.concatenate([[0], np.cumsum(chars)])
    return before[offsets[:, 1]] - before[offsets[:, 0]]
