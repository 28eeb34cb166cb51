"""Tokenizes texts, and reports what is suspicious about them, such as a doubled BOS.

A :class:`~vllm_kl.types.TextReport` holds the findings of one batch. A :class:`TextWatch` belongs to one
transform or reference, and reports each kind of finding once. The messages about chat templates are in
:mod:`vllm_kl.batch.chat_templates`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from vllm_kl.errors import InputError
from vllm_kl.types import TextReport

logger = logging.getLogger("vllm_kl")


class TextWatch:
    """Reports each kind of finding once, for one transform or reference.

    Attributes:
        metrics: figures of the last batch, see :attr:`vllm_kl.RetrieveKL.metrics`.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._said: set[str] = set()

    def see(self, report: TextReport) -> None:
        """Store the metrics of a batch, and report new kinds of findings, as warnings or in the log."""
        self.metrics = report.metrics
        for kind, sentence in (report.warnings | report.notes).items():
            if kind in self._said:
                continue
            self._said.add(kind)
            if kind in report.warnings:
                warnings.warn(f"{sentence} Reported once.", stacklevel=4)
            else:
                logger.warning("vllm_kl: %s", sentence)


def doubled_bos(ids_N: torch.Tensor, firsts: torch.Tensor, lengths: list[int], tokenizer: Any) -> TextReport:
    """Report the samples whose ids begin with two BOS tokens; ``firsts``: first index of each sample."""
    bos = getattr(tokenizer, "bos_token_id", None)
    seconds = (firsts + 1).clamp(max=len(ids_N) - 1)
    is_doubled = (ids_N[firsts] == bos) & (ids_N[seconds] == bos) & (torch.tensor(lengths) > 1)
    doubled = [] if bos is None else is_doubled.nonzero()[:, 0].tolist()
    said = {}
    if doubled:
        said["double_bos"] = (
            f"the ids of {len(doubled)} of {len(lengths)} samples begin with two BOS tokens "
            f"({tokenizer.bos_token!r}, id {bos}); the first is sample {doubled[0]}. Both tokens are "
            "scored.\n"
            "Causes: a text that begins with BOS was tokenized with add_special_tokens=True, or the first "
            "message of a dialog begins with BOS."
        )
    return TextReport(warnings=said)


def tokenize(
    texts: Sequence[str], tokenizer: Any, options: dict[str, Any]
) -> tuple[list[list[int]], TextReport]:
    """Return the ids of texts, and a report. BOS or EOS of the text are not added a second time.

    Args:
        texts: B texts. A text that a chat template rendered begins with BOS and may end with EOS.
        tokenizer: a tokenizer of transformers.
        options: options of the tokenizer's call. If ``add_special_tokens`` is among them, the ids stay as the
            tokenizer returns them.

    Raises:
        InputError: the tokenizer raises; the message names the first sample for which it does.
    """
    rows, report = [list(ids) for ids in _call(tokenizer, texts, options)], TextReport()
    if "add_special_tokens" in options:
        return rows, report
    begin, end = added_tokens(tokenizer)
    bos = tokenizer.bos_token if begin and begin == [tokenizer.bos_token_id] else None
    late = [i for i, text in enumerate(texts) if bos and text[:1].isspace() and text.lstrip().startswith(bos)]
    if late:
        report.warnings["begins_late"] = (
            f"{len(late)} of {len(rows)} texts have white space before their own BOS, and the tokenizer "
            f"adds another BOS; the first is sample {late[0]}: {shown(texts[late[0]])}. Both are scored. "
            "Strip the text."
        )
    for verb, tokens, special in (("begin", begin, "bos"), ("end", end, "eos")):
        num, is_begin = len(tokens), verb == "begin"
        found = [
            i
            for i, ids in enumerate(rows)
            if num and 2 * tokens == (ids[: 2 * num] if is_begin else ids[-2 * num :])
        ]
        for i in found:
            rows[i] = rows[i][num:] if is_begin else rows[i][:-num]
        if found:
            name = (
                special.upper() if tokens == [getattr(tokenizer, f"{special}_token_id", None)] else "tokens"
            )
            report.warnings[f"text_{verb}s"] = (
                f"{len(found)} of {len(rows)} texts {verb} with the {name} "
                f"{''.join(tokenizer.convert_ids_to_tokens(tokens))!r} that the tokenizer adds too; the "
                f"first is sample {found[0]}. The scored ids have the {name} once. An engine that "
                "tokenizes such a text itself sees it twice.\n"
                f"Store the engine's ids; or give the engine texts without the {name}; or pass "
                "tokenizer_kwargs={'add_special_tokens': False} here and to the policy."
            )
    return rows, report


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and after every text."""
    own, whole = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (False, True))
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return whole[:start], whole[start + len(own) :]
    return [], []


def _call(tokenizer: Any, texts: Sequence[str], options: dict[str, Any]) -> Any:
    try:
        return tokenizer(list(texts), **options)["input_ids"]
    except Exception as error:
        for i, text in enumerate(texts):
            try:
                tokenizer([text], **options)
            except Exception as of_one:
                raise InputError(
                    f"sample {i}: the tokenizer ({type(tokenizer).__name__}) cannot turn {shown(text)} "
                    f"into ids: {type(of_one).__name__}: {of_one}. Expected a text, and options that the "
                    f"tokenizer knows: {options}"
                ) from of_one
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__}) can turn each text into ids, but not all texts in "
            f"one call: {type(error).__name__}: {error}"
        ) from error


def shown(text: Any) -> str:
    """Return a text for a message, shortened if it is long."""
    return repr(text) if len(repr(text)) <= 60 else f"{repr(text)[:57]}..."
