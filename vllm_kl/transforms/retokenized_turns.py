"""Finds turns of a dialog that do not begin with the ids that the earlier turns generated.

A policy in history mode renders and tokenizes the whole dialog again at every turn. Generated text need not
come back as the ids that were sampled (different merges give the same letters; some bytes are no text). Then
the policy sampled later turns after other tokens than the earlier turns generated. Each log-prob is right,
because every turn is scored on the ids that it saw. But whoever trains on the dialog as one sequence should
know.

The module compares ids only; it renders and tokenizes nothing.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from vllm_kl.batch.read_tokens import InputKeys, check_shapes, nested, rows_of
from vllm_kl.transforms.next_transform import NextTransform


@dataclass(frozen=True, kw_only=True, slots=True)
class Retokenized:
    """A turn that does not begin with all tokens of the turn before it."""

    dialog: int
    turn: int  # the later of the two
    position: int  # of the first token that differs, among the real tokens
    was: int | None  # the token in the earlier turn; None: the earlier turn is shorter
    now: int | None  # the token in the later turn; None: the later turn is shorter

    def __str__(self) -> str:
        return f"dialog {self.dialog}, turn {self.turn}, token {self.position}: {self.was} became {self.now}"


def find_retokenized(td: TensorDictBase, keys: InputKeys) -> list[Retokenized]:
    """Return the turns of a batch ``[dialogs, turns]`` that do not begin with the ids of the turn before.

    Args:
        td: a batch from a collector, with the ids and attention masks of every turn, and with ``("next",
            "done")``, which tells where a dialog ended. Without ``done`` the rows may be anything (a group's
            responses), and nothing is reported.
        keys: where the ids and masks are.

    Raises:
        InputError: an attention mask does not fit its ids, or only some turns have an entry.
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
            if not done[last].any():  # else the next row begins a new dialog
                found += _difference(i, t, ids[last], ids[last + 1])
    return found


class RetokenizedTurns(NextTransform):
    """Counts the turns that do not begin with the ids of the turn before; changes nothing.

    Append it to an env, where it warns once. Or use it as a collector's ``postproc``, on a replay buffer or
    on a batch, where it warns of each batch ``[dialogs, turns]`` that has such turns.

    Keyword Args:
        tokens_key, masks_key: where ``"full"`` and ``"all_attention_mask"`` are.

    Attributes:
        metrics: ``retokenized_turns`` of the last batch or step. In an env also ``retokenized_turns_total``
            and ``later_turns_total``, the number of all turns but each dialog's first. ``state_dict()`` has
            the totals.

    Raises:
        InputError: when called: as :func:`find_retokenized`.

    >>> turns = TensorDict(full=torch.tensor([[[5, 6, 7], [5, 6, 7], [5, 6, 7]]]), batch_size=(1, 3))
    >>> done = TensorDict(done=torch.tensor([[[False], [False], [True]]]), batch_size=(1, 3))  # one dialog
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
        # For each row of the env: the number and the ids [L] of its last turn.
        self._last: list[tuple[int, torch.Tensor] | None] = []
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
        """Compare one step of an env with the step before, row by row."""
        rows = _real_ids(td, self._keys)
        if rows is None:  # the policy generated no ids to compare
            self._last, self.metrics = [], {}
            return next_td
        # If only some rows of the env were stepped, torchrl 0.14 does not tell which.
        last = self._last if len(self._last) == len(rows) else [None] * len(rows)
        turns = [0 if before is None else before[0] + 1 for before in last]
        pairs = [(i, before[1], rows[i]) for i, before in enumerate(last) if before is not None]
        # Copies: others may change their batch afterwards.
        self._last = [(turn, ids.clone()) for turn, ids in zip(turns, rows, strict=True)]
        found = [one for i, before, now in pairs for one in _difference(i, turns[i], before, now)]
        if found and not self._num_retokenized:
            what = f"{len(found)} of the {len(pairs)} later turns of this step do not begin"
            _warn(what, found[0], " This warning comes once; the metrics count all such turns.")
        self._num_later += len(pairs)
        self._num_retokenized += len(found)
        self.metrics = {
            "retokenized_turns": float(len(found)),
            "retokenized_turns_total": float(self._num_retokenized),
            "later_turns_total": float(self._num_later),
        }
        return next_td

    def _reset_env_preprocess(self, tensordict: TensorDictBase | None) -> TensorDictBase | None:
        # Not in _reset: before it, a data loader's primer removes the mask of a partial reset (torchrl 0.14).
        mask: Any = None if tensordict is None else tensordict.get("_reset", default=None)
        is_partial = mask is not None and mask.numel() == len(self._last)
        begins = mask.flatten().tolist() if is_partial else [True] * len(self._last)
        self._last = [None if begun else last for begun, last in zip(begins, self._last, strict=True)]
        return super()._reset_env_preprocess(tensordict)

    def set_container(self, container: Any) -> None:
        self._last = []  # another env has other dialogs
        super().set_container(container)

    def counts(self) -> dict[str, Any]:
        return {**super().counts(), "turns": (self._num_later, self._num_retokenized)}

    def set_counts(self, counts: dict[str, Any]) -> None:
        super().set_counts(counts)
        self._num_later, self._num_retokenized = counts["turns"]


def _warn(what: str, first: Retokenized, note: str = "") -> None:
    warnings.warn(
        f"{what} with the ids of the turn before them: its text was tokenized again, to other ids. The "
        f"first: {first}.{note}\nEach turn is scored on the ids that it saw: train on the turns one by one, "
        "not on a dialog's last ids as one sequence.",
        stacklevel=4,
    )


def _difference(dialog: int, turn: int, before: torch.Tensor, after: torch.Tensor) -> list[Retokenized]:
    """Return the first difference of two turns, ``[L]``; empty: ``after`` begins with all of ``before``."""
    n = min(len(before), len(after))
    if n == len(before) and torch.equal(before, after[:n]):
        return []
    differs = (before[:n] != after[:n]).nonzero()
    position = int(differs[0]) if len(differs) else n
    was, now = (int(ids[position]) if position < len(ids) else None for ids in (before, after))
    return [Retokenized(dialog=dialog, turn=turn, position=position, was=was, now=now)]


def _real_ids(samples: TensorDictBase, keys: InputKeys) -> list[torch.Tensor] | None:
    """Return the ids of each sample without padding, ``[L]``, on the CPU; ``None``: there are no ids."""
    ids = rows_of(samples, nested(keys.tokens_key, "full"))
    name = nested(keys.masks_key, "all_attention_mask")
    attention = None if ids is None else rows_of(samples, name)
    if ids is None or attention is None:
        return ids and [row.cpu() for row in ids]
    check_shapes(attention, ids, name)
    return [row[mask.bool()].cpu() for row, mask in zip(ids, attention, strict=True)]
