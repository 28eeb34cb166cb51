"""Converts histories to ids and assistant masks by a chat template, and reports what the template changed.

TorchRL chooses the template and turns a History into messages; the tokenizer renders and tokenizes the
messages. Then this module compares the rendered text with the messages
(:mod:`vllm_kl.batch.rendered_content`), and the template's marks with the assistant's content. If a template
or a tokenizer raises, the module raises an InputError that names the sample.

One rule says which tokens of a turn count: the tokens of the assistant's content, and the token that ends the
turn, because the policy samples this token too. Stored ids with a stored prompt get the same mask. The mask
is also the same whether the ``{% generation %}`` tags of a template close before the token that ends the
turn, or after the newline behind it.
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

from vllm_kl.batch.rendered_content import Rendered, Span, find_messages
from vllm_kl.batch.tokenize_texts import added_tokens, shown
from vllm_kl.errors import InputError, OptionError
from vllm_kl.types import TextReport

_RENDERING = threading.Lock()


def _renew_lock() -> None:
    global _RENDERING
    _RENDERING = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # a fork may happen while another thread holds the lock
_CURE = (
    "\nStore the ids that the policy saw in ('tokens', 'full'), or pass a template that renders everything: "
    "tokenizer_kwargs={'chat_template': ...}. The metrics count such cases."
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dialog:
    """One rendered history of L tokens."""

    messages: list[dict[str, Any]]
    text: str
    token_ids: torch.Tensor  # [L] int64, CPU
    offsets: np.ndarray  # [L, 2]: begin and end of each token's characters in ``text``
    is_space: np.ndarray  # [L] bool: only white space
    marked: np.ndarray  # [L] bool: between the template's generation tags

    @property
    def of_assistant(self) -> list[tuple[int, dict[str, Any]]]:
        """The assistant's messages with their indices."""
        return [(j, message) for j, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def in_ids(self) -> Span:
        """The span of ``text`` that the ids hold: all of it, unless the tokenizer truncates.

        White space around the text that the tokenizer drops counts as held.
        """
        start, stop = (
            (int(self.offsets[0, 0]), int(self.offsets[:, 1].max())) if len(self.offsets) else (0, 0)
        )
        return start if self.text[:start].strip() else 0, stop if self.text[stop:].strip() else len(self.text)

    @property
    def is_truncated(self) -> bool:
        return self.in_ids != (0, len(self.text))

    def part(self, start: int, stop: int) -> str:
        """Return the text of the tokens ``start`` to ``stop - 1``."""
        return self.text[self.offsets[start, 0] : self.offsets[stop - 1, 1]]

    @property
    def speaks(self) -> bool:
        """Whether the assistant says anything."""
        return any(message.get("content") or message.get("tool_calls") for _, message in self.of_assistant)


def render(
    history: History | Sequence[Sequence[dict[str, Any]]],
    tokenizer: Any,
    options: dict[str, Any],
    *,
    whose: str,
) -> tuple[list[Dialog], dict[str, str]]:
    """Render a batch of histories; return the dialogs, and notes about the template by kind.

    Args:
        history: ``[B, messages]``; or B dialogs in plain messages.
        tokenizer: a tokenizer of transformers.
        options: options of ``History.apply_chat_template``.
        whose: name of the template in messages.

    Raises:
        InputError: the template or the tokenizer raises.
        OptionError: TorchRL does not know the template's name.
    """
    renderer = _Renderer(tokenizer, whose)
    try:
        if isinstance(history, History):
            history.apply_chat_template(tokenizer=renderer, **options)
        else:
            for messages in history:
                renderer.apply_chat_template(list(messages), **options)
    except KeyError as error:
        if options.get("chat_template") is None and error.args == (options.get("chat_template_name"),):
            raise OptionError(
                f"chat_template_name={error.args[0]!r}: TorchRL has no template of that name; pass the "
                "template itself, as chat_template"
            ) from None
        raise
    notes = {}
    if renderer.dates:
        notes["date"] = (
            f"{whose} writes the current date into the text (strftime_now gave {renderer.dates[0]!r}): the "
            "ids and the log-probs of a History change with the day.\n"
            "Store the ids, or pass the date: tokenizer_kwargs={'date_string': ...} for templates that take "
            "one, or {'strftime_now': ...}."
        )
    begin, _ = added_tokens(tokenizer)
    firsts = [dialog.token_ids[:1].tolist() for dialog in renderer.dialogs]  # [] if nothing was rendered
    bare = [i for i, first in enumerate(firsts) if first and first != begin[:1]] if begin else []
    if bare and begin[0] == getattr(tokenizer, "bos_token_id", None):
        notes["no_bos"] = (
            f"{whose} renders no BOS (first in sample {bare[0]}), though the tokenizer begins every text "
            f"with {tokenizer.bos_token!r}: the dialogs are scored without BOS, as TorchRL's wrappers "
            "tokenize them"
        )
    return renderer.dialogs, notes


class _Renderer:
    """Replaces the tokenizer while TorchRL 0.14 turns a History into messages; keeps text, ids and mask.

    TorchRL renders each dialog a second time, as text and without the template's arguments. If the mask is
    empty, TorchRL guesses one from words in this text. This object returns no text, so that TorchRL does not
    guess.
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
                f"sample {len(self.dialogs)}: the tokenizer ({type(self._tokenizer).__name__}) cannot turn "
                f"what {self._whose} rendered into ids: {type(error).__name__}: {error}"
            ) from error
        marked = np.asarray(result["assistant_masks"]).reshape(-1).astype(bool)
        # If the last character has a token per byte, transformers 5.19 does not mark its last bytes.
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
        # transformers 5.19 keeps one list of marked spans per template: without the lock, two threads would
        # raise, or mark each other's text.
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
                f"sample {len(self.dialogs)}{self._first_that_raises(conversation, as_text, error)}: "
                f"{self._whose} raised {type(error).__name__}: {error}. What works: messages that it "
                "takes; another template (tokenizer_kwargs={'chat_template': ...}); or the policy's ids "
                "in ('tokens', 'full')."
            ) from error

    def _first_that_raises(
        self, conversation: list[dict[str, Any]], options: dict[str, Any], error: Exception
    ) -> str:
        """Name the message that fails: the last of the shortest beginning of the dialog that raises so."""
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
    """The tokens that end an assistant's turn."""

    ids: frozenset[int]  # EOS, and the token that the template puts after answers: in Gemma, another than EOS
    # Special tokens that begin no message. They end a turn only directly after marked tokens.
    behind: frozenset[int] = frozenset()


def end_turns(dialogs: Sequence[Dialog], ends: Ends) -> tuple[list[torch.Tensor], TextReport]:
    """Return the masks, ``[L]`` bool, of the assistant's content and of the tokens that end its turns.

    The report tells where the template's tags close before or after the token that ends a turn, and where
    this token is missing or doubled.
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
    """Make each run of a mask end with the token that ends its turn; yield kind and value of each finding."""
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
    "after_end": (
        "the chat template's tags mark {what} after the token that ends a turn (first in sample "
        "{sample}): no policy samples this text, so it does not count"
    ),
    "end_outside": (
        "the chat template's tags leave out {what}, which ends a turn (first in sample {sample}): the "
        "policy samples this token, so it counts, as it does in stored ids"
    ),
    "double_end": (
        "{what} ends a turn twice in sample {sample}: the message ends with this token and the chat "
        "template adds another. Both are in the ids; only the first counts.\n"
        "Remove the token from the message's content, or use a template that adds it only where it is "
        "missing."
    ),
    "no_end": (
        "the chat template renders no token that ends the assistant's turn in sample {sample} (EOS, or a "
        "special token). The policy samples such a token. It would count in ids from the policy, but here "
        "the ids do not have it."
    ),
    "blank": (
        "the assistant's message {what} of sample {sample} is empty and the chat template's tags mark "
        "nothing there: the token that ends this turn does not count, but would count in ids from the "
        "policy.\n"
        "Store the policy's ids in ('tokens', 'full'), or pass a template whose tags close after that "
        "token."
    ),
}

_PROBE = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]
# These options do not change how a turn ends.
_NOT_OF_A_TURN = (
    "truncation",
    "max_length",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "documents",
)


def ends_of(tokenizer: Any, options: dict[str, Any]) -> Ends:
    """Return the tokens that end a template's turns.

    The function renders a probe of plain words, not the batch, because special tokens inside an answer end no
    turn.
    """
    options = {name: value for name, value in options.items() if name not in _NOT_OF_A_TURN}
    of_tokenizer: int | None = getattr(tokenizer, "eos_token_id", None)
    eos = set() if of_tokenizer is None else {of_tokenizer}
    renderer = _Renderer(tokenizer, "the chat template")
    try:
        History.from_chats([_PROBE]).apply_chat_template(
            tokenizer=renderer, add_generation_prompt=False, **options
        )
    except Exception:  # the template refuses the probe, so only EOS is known
        return Ends(ids=frozenset(eos))
    (dialog,) = renderer.dialogs
    at = [dialog.text.find(message["content"]) for message in _PROBE]
    if -1 in at:  # the template changes the contents
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
        """Return the last special token before the content of message n."""
        return next((t for t, (_, stop), _ in reversed(tokens) if stop <= at[n] and t in special), None)

    def behind(n: int) -> int | None:
        """Return the first token after the content of message n that is not white space."""
        end = at[n] + len(_PROBE[n]["content"])
        return next((t for t, (start, _), is_space in tokens if start >= end and not is_space), None)

    # The last special token before both questions begins a message. Some templates have no token that ends a
    # turn.
    begins, follows = {before(0)} & {before(2)}, {behind(1), behind(3)}
    ends = eos | ({t for t in follows - begins if t is not None} if follows <= special else set())
    # A special token of the rendered probe begins a message, unless it ends one.
    return Ends(ids=frozenset(ends), behind=frozenset(special - {t for t, _, _ in tokens}))


def report_changes(dialogs: Sequence[Dialog], masks: Sequence[torch.Tensor] | None, ends: Ends) -> TextReport:
    """Report what the template changed in the messages: metrics, and the first example of each kind.

    Args:
        dialogs: rendered histories.
        masks: masks of the dialogs, ``[L]`` bool, or ``None`` if the template marks nothing.
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
        kind: f"{_SAYS[kind].format_map(count)} The first: {example}.{_CURE}"
        for kind, example in first.items()
    }
    of_messages = [f"{kind}messages" for kind in ("", "cut_", "moved_")]
    of_chars = [f"{kind}_chars" for kind in ("content", "cut", "inserted", "unmarked")]
    metrics = {f"template_{name}": float(count[name]) for name in (*of_messages, *of_chars)}
    return TextReport(metrics=metrics, warnings=said)


_CUT = (
    "the chat template leaves out content of {cut_messages} of {messages} messages, {cut_chars} of "
    "{content_chars} characters: the scored ids do not have this content."
)
_SAYS = {
    "cut": _CUT,
    "trimmed": _CUT,
    "truncated": (
        "the tokenizer truncates {truncated_dialogs} dialogs; of {messages} messages {cut_messages} lack "
        "content, {cut_chars} of {content_chars} characters: the scored ids have neither this content nor "
        "the tokens that end its turns."
    ),
    "moved": (
        "the chat template moves {moved_messages} of {messages} messages to another place in the dialog."
    ),
    "printed": (
        "the chat template prints the content of {printed_messages} of {messages} messages as a Python list."
    ),
    "inserted": (
        "the chat template marks {inserted_chars} characters as the assistant's that are in no message's "
        "content: these characters count."
    ),
    "unmarked": (
        "the chat template leaves {unmarked_chars} characters of the assistant's content outside its "
        "tags: these characters do not count."
    ),
}


def _losses(found: Sequence[Rendered], is_truncated: bool) -> Iterator[tuple[str, int, str]]:
    """Yield kind, number of characters and example of each change to the messages' contents."""
    for j, message in enumerate(found):
        where = f", message {j} ({message.role}): "
        if num_lost := message.num_chars - message.num_found:
            is_trimmed = not message.missing.strip()  # a kind of its own: most templates trim, few cut
            how = "white space was trimmed" if is_trimmed else f"missing: {shown(message.missing)}"
            kind = "truncated" if is_truncated else "trimmed" if is_trimmed else "cut"
            yield (
                kind,
                num_lost,
                f"{where}{message.num_found} of its {message.num_chars} characters are in the rendered "
                f"text; {how}",
            )
        if message.is_moved:
            what = f"its {message.num_chars} characters stand before an earlier message, or after a later one"
            yield "moved", 0, f"{where}{what}"
        if message.is_printed:
            yield "printed", 0, f"{where}its content is a list of parts, but the template expects a text"


def _wrong_marks(
    dialog: Dialog, mask: np.ndarray, is_end: np.ndarray, found: Sequence[Rendered]
) -> Iterator[tuple[str, int, str]]:
    """Yield marked text that the assistant did not say, and unmarked text that the assistant said."""
    text = dialog.text
    in_tokens, in_mask = (_chars(tokens, dialog.offsets, len(text)) for tokens in (np.ones_like(mask), mask))
    said, of_calls = np.zeros_like(in_mask), np.zeros_like(in_mask)
    for message, rendered in zip(dialog.messages, found, strict=True):
        if rendered.role != "assistant":
            continue
        spans = list(rendered.spans)
        if message.get("tool_calls"):  # templates differ in format, but all print names and arguments
            window = slice(*rendered.window)
            of_calls[window] = True
            marked = "".join(itertools.compress(text[window], in_mask[window]))
            for word in rendered.calls:
                at = text.find(word, *rendered.window)
                if len(word) > 2 and word not in marked and at >= 0:  # a shorter word may occur by chance
                    spans.append((at, at + len(word)))
        for start, stop in spans:
            said[start:stop] = True
    added = mask & ~is_end & (_overlap(said | of_calls, dialog.offsets) == 0)
    # Added white space does not count: " four" may be one token or two.
    if inserted := [dialog.part(a, b) for a, b in _runs(added) if not dialog.is_space[a:b].all()]:
        yield "inserted", sum(map(len, inserted)), f": {shown(inserted[0])}"
    unmarked = said & in_tokens & ~in_mask
    if unmarked.any():
        yield "unmarked", int(unmarked.sum()), f": {shown(text[slice(*_runs(unmarked)[0])])}"


def _runs(mask: np.ndarray) -> list[Span]:
    """Return begin and end of each run of a mask.

    >>> _runs(np.array([False, True, True, False, True]))
    [(1, 3), (4, 5)]
    """
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _said_runs(dialog: Dialog, mask: np.ndarray, is_end: np.ndarray) -> list[Span]:
    """Return the character spans of marked runs, without the tokens that end turns.

    Runs stay whole if there is one for each of the assistant's messages, because an answer of several
    channels holds tokens that end turns.
    """
    runs = _runs(mask)
    if len(runs) != len(dialog.of_assistant):
        runs = _runs(mask & ~is_end)
    begins, ends = dialog.offsets.T.tolist()
    return [(begins[a], ends[b - 1 - is_end[b - 1]] if b - a > is_end[b - 1] else begins[a]) for a, b in runs]


def _chars(mask: np.ndarray, offsets: np.ndarray, length: int) -> np.ndarray:
    """Return the mask of the characters in the runs of a mask of tokens, ``[length]`` bool."""
    chars = np.zeros(length, dtype=bool)
    for start, stop in _runs(mask):
        chars[offsets[start, 0] : offsets[stop - 1, 1]] = True
    return chars


def _overlap(chars: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return how many characters of a character mask each token has, ``[L]``."""
    before = np.concatenate([[0], np.cumsum(chars)])
    return before[offsets[:, 1]] - before[offsets[:, 0]]
