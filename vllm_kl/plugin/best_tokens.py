"""Keeps the best tokens of each row while the kernel walks over the vocabulary.

There are C candidates for each of N rows. C is above the number of tokens that were asked for, because
rounding may misplace a few: :mod:`vllm_kl.plugin.kernel` ranks the candidates again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The most neighbours of which one maximum is taken, and the fewest groups for each value that is wanted.
_GROUP, _GROUPS = 16, 3


@dataclass(frozen=True, slots=True)
class Best:
    """``C`` candidates per row, changed in place."""

    values: torch.Tensor  # [N, C] float32, logits; the function that fills it decides the order
    ids: torch.Tensor  # [N, C] int64

    @classmethod
    def of(cls, num_rows: int, num_candidates: int, device: torch.device) -> Best:
        shape = (num_rows, num_candidates)
        values = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
        return cls(values, torch.zeros(shape, dtype=torch.long, device=device))

    def __getitem__(self, rows: slice) -> Best:
        return Best(self.values[rows], self.ids[rows])

    def forget(self) -> None:
        """Forget all candidates."""
        self.values.fill_(-torch.inf)

    def add(self, logits_N_S: torch.Tensor, shift_N: torch.Tensor, first_id: int) -> None:
        """Add the tokens of a slice of the vocabulary. Each row stays sorted, best first.

        Args:
            logits_N_S: the logits of S tokens, minus the row's shift.
            shift_N: the shifts.
            first_id: the id of the slice's first token.
        """
        worst_N_1 = self.values[:, -1:] - shift_N[:, None]
        (rows,) = torch.where(logits_N_S.amax(1).float() > worst_N_1[:, 0])
        if not len(rows):
            return
        logits = logits_N_S[rows]
        # After the first slices few tokens are among the best, and a small top-k is fast.
        most = int((logits > worst_N_1[rows]).sum(1, dtype=torch.int32).max())
        num_candidates = self.ids.shape[1]
        new, places = logits.topk(min(num_candidates, most), dim=1)
        new = new.float().add_(shift_N[rows, None])
        self.values[rows], order = torch.cat([self.values[rows], new], 1).topk(num_candidates, dim=1)
        self.ids[rows] = torch.cat([self.ids[rows], places + first_id], 1).gather(1, order)

    def add_at_once(self, logits_N_S: torch.Tensor, first_id: int) -> None:
        """Add the tokens of a slice whose logits have no shift, as :meth:`add` does.

        Python waits for no number, so a GPU is never idle between two operations.
        """
        num_candidates = self.ids.shape[1]
        new, places = largest(logits_N_S, num_candidates)
        values, order = torch.cat([self.values, new], 1).topk(num_candidates, dim=1)
        self.ids.copy_(torch.cat([self.ids, places + first_id], 1).gather(1, order))
        self.values.copy_(values)


def largest(values_N_S: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest values of each row, and their places, ``[N, min(k, S)]``.

    The largest are in the k groups of neighbours with the largest maxima. So a row is read once for the
    maxima, and at most a third of it is sorted.

    >>> largest(torch.tensor([[3.0, 9.0, 5.0]]), 2)
    (tensor([[9., 5.]]), tensor([[1, 2]]))
    """
    width = values_N_S.shape[1]
    size = min(_GROUP, width // (_GROUPS * k))  # of a group
    if size < 2:
        values, places = values_N_S.topk(min(k, width), dim=1)
        return values, places
    end = width // size * size
    grouped = values_N_S[:, :end].unflatten(1, (-1, size))
    groups_N_k_1 = grouped.amax(2).topk(k, dim=1).indices[:, :, None]
    within = torch.arange(size, device=values_N_S.device)
    members = grouped.gather(1, groups_N_k_1.expand(-1, -1, size)).flatten(1)
    places = (groups_N_k_1 * size + within).flatten(1)
    if end < width:
        rest = torch.arange(end, width, device=values_N_S.device).expand(len(members), -1)
        members = torch.cat([members, values_N_S[:, end:]], 1)
        places = torch.cat([places, rest], 1)
    values, order = members.topk(k, dim=1)
    return values, places.gather(1, order)
