"""Texts -> ids; and what was found on the way, said once.

A :class:`~vllm_kl.types.TextReport` is of one batch and travels with it. A :class:`TextWatch` belongs to one transform or reference
and says each kind of finding the first time that it comes. Messages are in :mod:`vllm_kl.templates`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from vllm_kl.errors import InputError
from vllm_kl.types import TextReport

logger = logging.getLogger("vllm_kl")


class TextWatch:
    """Says each kind of finding once.

    It belongs to one transform or reference: copied by :meth:`clone` or unpickled it begins anew.

    Attributes:
        metrics: figures of the last batch, see :attr:`vllm_kl.RetrieveKL.metrics`.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[type[TextWatch], tuple[()]]:
        return TextWatch, ()

    def see(self, report: TextReport) -> None:
        """Take the figures of a batch, and say what was not said before: a warning each, or a line of the log."""
        self.metrics = report.metrics
        for kind, sentence in report.warnings.items():
            if kind not in self._said:
                self._said.add(kind)
                warnings.warn(f"{sentence} Said once.", stacklevel=4)
        for kind, sentence in report.notes.items():
            if kind not in self._said:
                self._said.add(kind)
                logger.warning("vllm_kl: %s", sentence)


def doubled_bos(rows: Sequence[Any], tokenizer: Any) -> dict[str, str]:
    """Return what to say of ids ``[L]`` that begin with two BOS tokens, if some do."""
    bos = getattr(tokenizer, "bos_token_id", None)
    doubled = [i for i, ids in enumerate(rows) if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos]
    if not doubled:
        return {}
    return {
        "double_bos": f"the ids of {len(doubled)} of {len(rows)} samples begin with two BOS tokens "
        f"({tokenizer.bos_token!r}, id {bos}); the first is sample {doubled[0]}. They are scored as they are. A text that "
        "begins with BOS was tokenized with add_special_tokens=True, or a template's first message begins with it."
    }


def tokenize(texts: Sequence[str], tokenizer: Any, options: dict[str, Any]) -> tuple[list[list[int]], TextReport]:
    """Return the ids of texts. What the tokenizer puts around every text (BOS, EOS) is there once where a text has it already.

    Args:
        texts: B of them. One that a chat template rendered begins with BOS and may end with EOS.
        tokenizer: a tokenizer of transformers.
        options: of its call. ``add_special_tokens``, if it is among them, is obeyed to the letter.

    Raises:
        InputError: the tokenizer raises; names the first sample for which it does.
    """
    rows = [list(ids) for ids in _call(tokenizer, texts, options)]
    report = TextReport(warnings=doubled_bos(rows, tokenizer) if "add_special_tokens" in options else {})
    if "add_special_tokens" in options:
        return rows, report
    begin, end = added_tokens(tokenizer)
    num_begin, num_end = len(begin), len(end)
    begun = [i for i, ids in enumerate(rows) if begin and ids[: 2 * num_begin] == begin + begin]
    if late := [i for i, text in enumerate(texts) if begin and _begins_late(text, begin, tokenizer)]:
        report.warnings["begins_late"] = (
            f"{len(late)} of {len(rows)} texts have white space before their own BOS, and the tokenizer adds another; the first is "
            f"sample {late[0]}: {_shown(texts[late[0]])}. Both are scored. Strip the text"
        )
    ended = [i for i, ids in enumerate(rows) if end and ids[-2 * num_end :] == end + end]
    for i in begun:
        rows[i] = rows[i][num_begin:]
    for i in ended:
        rows[i] = rows[i][:-num_end]
    for kind, found, tokens, verb in (("text_begins", begun, begin, "begin"), ("text_ends", ended, end, "end")):
        if found:
            name = "BOS" if tokens == [getattr(tokenizer, "bos_token_id", None)] else "tokens"
            name = "EOS" if tokens == [getattr(tokenizer, "eos_token_id", None)] and kind == "text_ends" else name
            report.warnings[kind] = (
                f"{len(found)} of {len(rows)} texts {verb} with the {name} {''.join(tokenizer.convert_ids_to_tokens(tokens))!r} "
                f"that the tokenizer adds too; the first is sample {found[0]}. It is there once in the ids that are scored. Where "
                "an engine tokenized such texts itself to sample from them, it saw two: store its ids, or give it texts without, "
                "or tokenizer_kwargs={'add_special_tokens': False} here and there."
            )
    report.warnings.update(doubled_bos(rows, tokenizer))
    return rows, report


def _begins_late(text: Any, begin: list[int], tokenizer: Any) -> bool:
    bos = getattr(tokenizer, "bos_token", None)
    is_added = begin == [getattr(tokenizer, "bos_token_id", None)]
    return is_added and isinstance(text, str) and text[:1].isspace() and text.lstrip().startswith(bos)


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
                    f"sample {i}: the tokenizer ({type(tokenizer).__name__}) cannot turn {_shown(text)} into ids: "
                    f"{type(of_one).__name__}: {of_one}. Expected a text, and options that the tokenizer knows: {options}"
                ) from of_one
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot turn the texts into ids together, though it can one by one: "
            f"{type(error).__name__}: {error}"
        ) from error


def _shown(text: Any) -> str:
    return repr(text) if len(repr(text)) <= 60 else f"{repr(text)[:57]}..."
