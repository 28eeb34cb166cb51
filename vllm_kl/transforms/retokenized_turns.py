"""Dialogs of several turns: do later turns still begin with the ids that earlier turns generated?

A policy in history mode renders and tokenizes the whole dialog again at every turn. Text that was generated need not come
back as the ids that were sampled (two merges of the same letters, bytes that are no text), and then the later turns were
conditioned on other tokens than the earlier turns produced. Every turn is scored on the ids that it saw, so each log-prob is
right; but who trains on the dialog as one sequence should know.

It compares ids only. Nothing is rendered or tokenized here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from vllm_kl.batch.inputs import InputKeys, check_shapes, nested, rows_of
from vllm_kl.transforms.base import NextTransform


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

    Raises:
        InputError: an attention mask does not fit its ids, or some turns lack what others have.
    """
    if not td.numel():
        return []
    num_dialogs, num_turns = td.batch_size
    samples = td.reshape(-1)
    ids, done = _real_ids(samples, keys), rows_of(samples, ("next", "done"))
    if ids is None or done is None:
        return []
    found = []
    for i in range(num_dialogs):
        for t in range(1, num_turns):
            last = i * num_turns + t - 1
            if not done[last].any():  # else a new dialog begins
                found += _difference(i, t, ids[last], ids[last + 1])
    return found


class RetokenizedTurns(NextTransform):
    """Counts the turns that do not begin with the ids of the turn before them, and warns of the first. It changes nothing.

    Append it to an env, which tells once; or use it as a collector's ``postproc``, on a replay buffer or on a batch, where it
    tells of each batch ``[dialogs, turns]`` in which there are some.

    Keyword Args:
        tokens_key, masks_key: where ``"full"`` and ``"all_attention_mask"`` lie.

    Attributes:
        metrics: ``retokenized_turns`` of the last batch or step, and in an env ``retokenized_turns_total`` of
            ``later_turns_total``, all turns but each dialog's first. The totals are part of its ``state_dict()``.

    Raises:
        InputError: when called: as :func:`find_retokenized`.

    >>> turns = TensorDict(full=torch.tensor([[[5, 6, 7], [5, 6, 7], [5, 6, 7]]]), batch_size=(1, 3))  # of one dialog
    >>> done = TensorDict(done=torch.tensor([[[False], [False], [True]]]), batch_size=(1, 3))
    >>> transform = RetokenizedTurns()
    >>> td = transform(TensorDict(tokens=turns, next=done, batch_size=(1, 3)))
    >>> transform.metrics
    {'retokenized_turns': 0.0}
    """

    def __init__(self, *, tokens_key: NestedKey = "tokens", masks_key: NestedKey = "masks") -> None:
        full = nested(tokens_key, "full")
        super().__init__(in_keys=[full], out_keys=[])
        self.metrics: dict[str, float] = {}
        self._keys = InputKeys(input_mode="tokens", key=full, tokens_key=tokens_key, masks_key=masks_key)
        self._last: list[
            tuple[int, torch.Tensor] | None
        ] = []  # by row of the env: number and ids [L] of its last turn
        self._num_later = self._num_retokenized = 0

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.metrics = {}
        if tensordict.batch_dims == 2:
            found = find_retokenized(tensordict, self._keys)
            self.metrics = {"retokenized_turns": float(len(found))}
            if found:
                _warn(f"{len(found)} turns do not begin", found[0])
        return tensordict

    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        """See one step of an env: row for row the turn after the one that was seen before, if there was one."""
        rows = _real_ids(td, self._keys)
        if rows is None:  # nothing was generated as ids, nothing could change
            self._last, self.metrics = [], {}
            return next_td
        # Where a part of the env's rows was stepped, torchrl 0.14 does not say which part.
        last = self._last if len(self._last) == len(rows) else [None] * len(rows)
        turns = [0 if before is None else before[0] + 1 for before in last]
        # A copy: what others do to their batch afterwards does not count.
        self._last = [(turn, ids.clone()) for turn, ids in zip(turns, rows, strict=True)]
        later = [i for i, turn in enumerate(turns) if turn]
        found = [difference for i in later for difference in _difference(i, turns[i], last[i][1], rows[i])]
        if found and not self._num_retokenized:
            what = f"{len(found)} of the {len(later)} later turns of this step do not begin"
            _warn(what, found[0], " Said once; counted on.")
        self._num_later += len(later)
        self._num_retokenized += len(found)
        self.metrics = {
            "retokenized_turns": float(len(found)),
            "retokenized_turns_total": float(self._num_retokenized),
            "later_turns_total": float(self._num_later),
        }
        return next_td

    def _reset_env_preprocess(self, tensordict: TensorDictBase | None) -> TensorDictBase | None:
        # Not in _reset: a data loader's primer takes the mask of a partial reset away before (torchrl 0.14).
        mask = None if tensordict is None else tensordict.get("_reset", default=None)
        is_partial = mask is not None and mask.numel() == len(self._last)
        begins = mask.flatten().tolist() if is_partial else [True] * len(self._last)
        self._last = [None if begun else last for begun, last in zip(begins, self._last, strict=True)]
        return super()._reset_env_preprocess(tensordict)

    def set_container(self, container: Any) -> None:
        self._last = []  # a copy goes to another env, whose dialogs are others
        super().set_container(container)

    def counts(self) -> dict[str, Any]:
        return {**super().counts(), "turns": (self._num_later, self._num_retokenized)}

    def set_counts(self, counts: dict[str, Any]) -> None:
        super().set_counts(counts)
        self._num_later, self._num_retokenized = counts["turns"]


def _warn(what: str, first: Retokenized, note: str = "") -> None:
    warnings.warn(
        f"{what} with the ids of the turn before them: its text was tokenized again, to other ids. Each turn is scored on the ids "
        f"that it saw; train on the turns one by one, not on a dialog's last ids as one sequence. The first: {first}.{note}",
        stacklevel=4,
    )


def _difference(dialog: int, turn: int, before: torch.Tensor, after: torch.Tensor) -> list[Retokenized]:
    """Return where ``after`` does not begin with all of ``before``, both ``[L]``; nothing where it does."""
    n = min(len(before), len(after))
    if n == len(before) and torch.equal(before, after[:n]):
        return []
    differs = (before[:n] != after[:n]).nonzero()
    position = int(differs[0]) if len(differs) else n
    was, now = (int(ids[position]) if position < len(ids) else None for ids in (before, after))
    return [Retokenized(dialog=dialog, turn=turn, position=position, was=was, now=now)]


def _real_ids(samples: TensorDictBase, keys: InputKeys) -> list[torch.Tensor] | None:
    """Return the ids of each sample without padding, ``[L]`` on the CPU; ``None``: it has none."""
    ids = rows_of(samples, nested(keys.tokens_key, "full"))
    name = nested(keys.masks_key, "all_attention_mask")
    attention = None if ids is None else rows_of(samples, name)
    if attention is None:
        return ids and [row.cpu() for row in ids]
    check_shapes(attention, ids, name)
    return [row[mask.bool()].cpu() for row, mask in zip(ids, attention, strict=True)]
