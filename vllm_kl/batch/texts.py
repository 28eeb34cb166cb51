"""Texts -> ids; and what was found on the way, said once.

A :class:`~vllm_kl.types.TextReport` is of one batch and travels with it. A :class:`TextWatch` belongs to one transform or reference
and says each kind of finding the first time that it comes. Messages are in :mod:`vllm_kl.batch.chat_templates`.
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
    """Says each kind of finding once. It belongs to one transform or reference.

    Attributes:
        metrics: figures of the last batch, see :attr:`vllm_kl.RetrieveKL.metrics`.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._said: set[str] = set()

    def see(self, report: TextReport) -> None:
        """Take the figures of a batch, and say what was not said before: a warning each, or a line of the log."""
        self.metrics = report.metrics
        for kind, sentence in (report.warnings | report.notes).items():
            if kind in self._said:
                continue
            self._said.add(kind)
            if kind in report.warnings:
                warnings.warn(f"{sentence} Said once.", stacklevel=4)
            else:
                logger.warning("vllm_kl: %s", sentence)


def doubled_bos(ids_N: torch.Tensor, firsts: torch.Tensor, lengths: list[int], tokenizer: Any) -> TextReport:
    """Return what to say of samples whose ids begin with two BOS tokens; ``firsts``: where each sample begins."""
    bos = getattr(tokenizer, "bos_token_id", None)
    seconds = (firsts + 1).clamp(max=len(ids_N) - 1)
    is_doubled = (ids_N[firsts] == bos) & (ids_N[seconds] == bos) & (torch.tensor(lengths) > 1)
    doubled = [] if bos is None else is_doubled.nonzero()[:, 0].tolist()
    said = {}
    if doubled:
        said["double_bos"] = (
            f"the ids of {len(doubled)} of {len(lengths)} samples begin with two BOS tokens ({tokenizer.bos_token!r}, id {bos}); "
            f"the first is sample {doubled[0]}. They are scored as they are. A text that begins with BOS was tokenized with "
            "add_special_tokens=True, or a template's first message begins with it."
        )
    return TextReport(warnings=said)


def tokenize(
    texts: Sequence[str], tokenizer: Any, options: dict[str, Any]
) -> tuple[list[list[int]], TextReport]:
    """Return the ids of texts. What the tokenizer puts around every text (BOS, EOS) is there once where a text has it already.

    Args:
        texts: B of them. One that a chat template rendered begins with BOS and may end with EOS.
        tokenizer: a tokenizer of transformers.
        options: of its call. ``add_special_tokens``, if it is among them, is obeyed to the letter.

    Raises:
        InputError: the tokenizer raises; names the first sample for which it does.
    """
    rows, report = [list(ids) for ids in _call(tokenizer, texts, options)], TextReport()
    if "add_special_tokens" in options:
        return rows, report
    begin, end = added_tokens(tokenizer)
    bos = tokenizer.bos_token if begin and begin == [tokenizer.bos_token_id] else None
    late = [i for i, text in enumerate(texts) if bos and text[:1].isspace() and text.lstrip().startswith(bos)]
    if late:
        report.warnings["begins_late"] = (
            f"{len(late)} of {len(rows)} texts have white space before their own BOS, and the tokenizer adds another; the first is "
            f"sample {late[0]}: {shown(texts[late[0]])}. Both are scored. Strip the text"
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
                f"{len(found)} of {len(rows)} texts {verb} with the {name} {''.join(tokenizer.convert_ids_to_tokens(tokens))!r} "
                f"that the tokenizer adds too; the first is sample {found[0]}. It is there once in the ids that are scored. Where "
                "an engine tokenized such texts itself to sample from them, it saw two: store its ids, or give it texts without, "
                "or tokenizer_kwargs={'add_special_tokens': False} here and there."
            )
    return rows, report


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after every text."""
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
                    f"sample {i}: the tokenizer ({type(tokenizer).__name__}) cannot turn {shown(text)} into ids: "
                    f"{type(of_one).__name__}: {of_one}. Expected a text, and options that the tokenizer knows: {options}"
                ) from of_one
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot turn the texts into ids together, though it can one by one: "
            f"{type(error).__name__}: {error}"
        ) from error


def shown(text: Any) -> str:
    """Return a text for a message, not all of it if it is long."""
    return repr(text) if len(repr(text)) <= 60 else f"{repr(text)[:57]}..."
