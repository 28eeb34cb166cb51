"""Dialogs of several turns: do later turns still begin with the ids that earlier turns generated?

A policy in history mode renders and tokenizes the whole dialog again at every turn. Text that was generated need not come
back as the ids that were sampled (two merges of the same letters, bytes that are no text), and then the later turns were
conditioned on other tokens than the earlier turns produced. Every turn is scored on the ids that it saw, so each log-prob is
right; but who trains on the dialog as one sequence should know.

It compares ids only. Nothing is rendered or tokenized here.
"""

from __future__ import annotations

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
            before, after = turns[t - 1], turns[t][: len(turns[t - 1])]
            if torch.equal(before, after):
                continue
            n = min(len(before), len(after))
            differs = (before[:n] != after[:n]).nonzero()
            position = int(differs[0]) if len(differs) else n
            token = lambda ids, p=position: int(ids[p]) if p < len(ids) else None  # noqa: E731
            found.append(Retokenized(dialog=i, turn=t, position=position, was=token(before), now=token(after)))
    return found


def _real_ids(dialog: TensorDictBase, keys: InputKeys) -> list[torch.Tensor] | None:
    ids = rows_of(dialog, nested(keys.tokens_key, "full"))
    if ids is None:
        return None
    attention = rows_of(dialog, nested(keys.masks_key, "all_attention_mask"))
    if attention is None:
        return [row.cpu() for row in ids]
    return [row[mask.bool()].cpu() for row, mask in zip(ids, attention, strict=True)]
