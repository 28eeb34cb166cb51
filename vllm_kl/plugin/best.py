"""The best tokens of each row over the slices of the vocabulary seen so far.

N rows, C candidates per row: more than are wanted, since rounding may misplace a few (:mod:`vllm_kl.plugin.kernel` ranks
them again).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Best:
    """``C`` candidates per row, changed in place."""

    values: (
        torch.Tensor
    )  # [N, C] float32, in the unit of the logits; the order is the business of whoever fills it
    ids: torch.Tensor  # [N, C] int64

    @classmethod
    def of(cls, num_rows: int, num_candidates: int, device: torch.device) -> Best:
        shape = (num_rows, num_candidates)
        values = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
        return cls(values, torch.zeros(shape, dtype=torch.long, device=device))

    def __getitem__(self, rows: slice) -> Best:
        return Best(self.values[rows], self.ids[rows])

    def forget(self) -> None:
        """Begin again."""
        self.values.fill_(-torch.inf)

    def take(self, logits_N_S: torch.Tensor, shift_N: torch.Tensor | None, first_id: int) -> None:
        """Take a slice of the vocabulary, from token ``first_id`` on: logits, less the row's shift if there is one.

        Keeps each row sorted, best first.
        """
        worst_N_1 = self.values[:, -1:] if shift_N is None else self.values[:, -1:] - shift_N[:, None]
        (rows,) = torch.where(logits_N_S.amax(1).float() > worst_N_1[:, 0])
        if not len(rows):
            return
        logits = logits_N_S[rows]
        # Few get in after the first slices, and few are quick to find.
        most = int((logits > worst_N_1[rows]).sum(1, dtype=torch.int32).max())
        num_candidates = self.ids.shape[1]
        new, places = logits.topk(min(num_candidates, most), dim=1)
        new = new.float() if shift_N is None else new.float().add_(shift_N[rows, None])
        self.values[rows], order = torch.cat([self.values[rows], new], 1).topk(num_candidates, dim=1)
        self.ids[rows] = torch.cat([self.ids[rows], places + first_id], 1).gather(1, order)
