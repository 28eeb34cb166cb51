"""Dialogs of several turns: do later turns still begin with the ids that earlier turns generated?

A batch ``[dialogs, turns]`` is compared as a whole (:func:`find_retokenized`); an env sees one turn of each dialog at a time, so
a :class:`TurnWatch` keeps the turn before.

A policy in history mode renders and tokenizes the whole dialog again at every turn. Text that was generated need not come
back as the ids that were sampled (two merges of the same letters, bytes that are no text), and then the later turns were
conditioned on other tokens than the earlier turns produced. Every turn is scored on the ids that it saw, so each log-prob is
right; but who trains on the dialog as one sequence should know.

It compares ids only. Nothing is rendered or tokenized here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase

from vllm_kl.inputs import InputKeys, nested, rows_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Retokenized:
    """A turn that does not begin with all tokens of the turn before it."""

    dialog: int
    turn: int  # the later of the two
    position: int  # of the first token that differs, among the real tokens
    was: int | None  # the token as it was generated or seen before; None: the turn is shorter
    now: int | None

    def __str__(self) -> str:
        return f"dialog {self.dialog}, turn {self.turn}, token {self.position}: {self.was} became {self.now}"


def find_retokenized(td: TensorDictBase, keys: InputKeys) -> list[Retokenized]:
    """Return the turns of a batch ``[dialogs, turns]`` that were tokenized to other ids than the turn before them had.

    Args:
        td: as a collector yields it: ids and attention masks of every turn, and ``("next", "done")``, which tells where a
            dialog ended; without it rows may be anything (a group's responses), and nothing is reported.
        keys: where they lie.
    """
    found: list[Retokenized] = []
    if not td.numel():
        return found
    for i, dialog in enumerate(td.unbind(0)):
        turns = _real_ids(dialog, keys)
        done = dialog.get(("next", "done"), default=None)
        if turns is None or done is None:
            return []
        ended = done.reshape(len(turns), -1).any(1).tolist()
        for t in range(1, len(turns)):
            if ended[t - 1]:
                continue  # a new dialog begins
            difference = _difference(i, t, turns[t - 1], turns[t])
            if difference is not None:
                found.append(difference)
    return found


class TurnWatch:
    """Counts the turns that were tokenized to other ids, in batches and, step by step, in one env.

    It belongs to one transform: copied or unpickled it begins anew, as it must in another env.

    Attributes:
        metrics: figures of the last batch or step, see :attr:`vllm_kl.RetrieveKL.metrics`.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._rows: list[tuple[int, torch.Tensor] | None] = []  # by row of the env: number and ids [L] of the last turn
        self._num_later = 0
        self._num_retokenized = 0

    def __reduce__(self) -> tuple[type[TurnWatch], tuple[()]]:
        return TurnWatch, ()

    @property
    def counts(self) -> tuple[int, int]:
        """All later turns that were seen in an env, and how many were tokenized to other ids."""
        return self._num_later, self._num_retokenized

    @counts.setter
    def counts(self, counts: tuple[int, int]) -> None:
        self._num_later, self._num_retokenized = counts

    def look_at_batch(self, td: TensorDictBase, keys: InputKeys) -> None:
        """See a whole batch: of turns, if it is ``[dialogs, turns]``."""
        self.metrics = {}
        if td.batch_dims != 2:
            return
        found = find_retokenized(td, keys)
        self.metrics = {"retokenized_turns": float(len(found))}
        if found:
            _warn(f"{len(found)} turns do not begin", found[0])

    def update(self, rows: Sequence[torch.Tensor] | None) -> None:
        """See one step of an env: row for row the turn after the one that was seen before, if there was one.

        Args:
            rows: ids, B x ``[L]``, which nobody changes later; ``None``: nothing was generated as ids, nothing could change.
        """
        if rows is None:
            self.forget()
            self.metrics = {}
            return
        if len(rows) != len(self._rows):
            # A part of the env's rows was stepped; which part, torchrl 0.14 does not say.
            self._rows = [None] * len(rows)
        found = []
        num_later = 0
        for i, ids in enumerate(rows):
            last = self._rows[i]
            turn = 0 if last is None else last[0] + 1
            if last is not None:
                num_later += 1
                difference = _difference(i, turn, last[1], ids)
                found += [] if difference is None else [difference]
            self._rows[i] = turn, ids
        is_first = not self._num_retokenized
        self._num_later += num_later
        self._num_retokenized += len(found)
        self.metrics = {
            "retokenized_turns": float(len(found)),
            "retokenized_turns_total": float(self._num_retokenized),
            "later_turns_total": float(self._num_later),
        }
        if found and is_first:
            _warn(
                f"{len(found)} of the {num_later} later turns of this step do not begin",
                found[0],
                " Said once; counted on.",
            )

    def forget(self, mask: torch.Tensor | None = None) -> None:
        """Begin new dialogs in the rows of a mask, ``[B]`` or ``[B, 1]``; in all rows without one."""
        if mask is None or mask.numel() != len(self._rows):
            self._rows = []
            return
        for i in mask.flatten().nonzero()[:, 0].tolist():
            self._rows[i] = None


def _warn(what: str, first: Retokenized, note: str = "") -> None:
    warnings.warn(
        f"{what} with the ids of the turn before them: its text was tokenized again, to other ids. Each turn is scored on the ids "
        f"that it saw; train on the turns one by one, not on a dialog's last ids as one sequence. The first: {first}.{note}",
        stacklevel=4,
    )


def _difference(dialog: int, turn: int, before: torch.Tensor, after: torch.Tensor) -> Retokenized | None:
    """Return where ``after`` does not begin with all of ``before``, both ``[L]``."""
    after = after[: len(before)]
    if torch.equal(before, after):
        return None
    n = min(len(before), len(after))
    differs = (before[:n] != after[:n]).nonzero()
    position = int(differs[0]) if len(differs) else n
    was, now = (int(ids[position]) if position < len(ids) else None for ids in (before, after))
    return Retokenized(dialog=dialog, turn=turn, position=position, was=was, now=now)


def _real_ids(dialog: TensorDictBase, keys: InputKeys) -> list[torch.Tensor] | None:
    ids = rows_of(dialog, nested(keys.tokens_key, "full"))
    if ids is None:
        return None
    attention = rows_of(dialog, nested(keys.masks_key, "all_attention_mask"))
    if attention is None:
        return [row.cpu() for row in ids]
    if any(row.shape != mask.shape for row, mask in zip(ids, attention, strict=True)):
        return None  # read_batch refuses it, and says how
    return [row[mask.bool()].cpu() for row, mask in zip(ids, attention, strict=True)]
