"""Keeps the best tokens of each row while the kernel walks over the vocabulary.

There are C candidates for each of N rows. C is above the number of tokens that were asked for, because
rounding may misplace a few: :mod:`vllm_kl.plugin.kernel` ranks the candidates again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    def add(self, logits_N_S: torch.Tensor, shift_N: torch.Tensor | None, first_id: int) -> None:
        """Add the tokens of a slice of the vocabulary. Each row stays sorted, best first.

        Args:
            logits_N_S: the logits of S tokens, minus the row's shift.
            shift_N: the shifts; ``None``: no shift.
            first_id: the id of the slice's first token.
        """
        worst_N_1 = self.values[:, -1:] if shift_N is None else self.values[:, -1:] - shift_N[:, None]
        (rows,) = torch.where(logits_N_S.amax(1).float() > worst_N_1[:, 0])
        if not len(rows):
            return
        logits = logits_N_S[rows]
        # After the first slices few tokens are among the best, and a small top-k is fast.
        most = int((logits > worst_N_1[rows]).sum(1, dtype=torch.int32).max())
        num_candidates = self.ids.shape[1]
        new, places = logits.topk(min(num_candidates, most), dim=1)
        new = new.float() if shift_N is None else new.float().add_(shift_N[rows, None])
        self.values[rows], order = torch.cat([self.values[rows], new], 1).topk(num_candidates, dim=1)
        self.ids[rows] = torch.cat([self.ids[rows], places + first_id], 1).gather(1, order)
