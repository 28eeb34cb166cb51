"""``Penalty`` estimates the KL, writes it, and subtracts it from the reward.

``Penalty`` takes both sides' log-probs, writes the KL and the mask, subtracts the KL from the reward, and
computes figures for a logger. One pass over the log-probs gives the KL that is subtracted and those that are
only logged. The module does not know where the log-probs come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from vllm_kl.batch.write_entries import check_distinct, write_kl
from vllm_kl.errors import OptionError
from vllm_kl.kl import sums_of
from vllm_kl.transforms.coefficient import Coefficient
from vllm_kl.transforms.estimation import Estimation
from vllm_kl.types import Rows


class Penalty:
    """Estimates the KL, writes it, and subtracts it from the reward.

    Args:
        estimation: the estimators.
        kl_key, mask_key, add_to_reward, coeff: as in :class:`~vllm_kl.RetrieveKL`.

    Attributes:
        metrics: figures of the last batch; the last word of a name is its unit. For each estimator the mean
            over tokens and the mean over the sequences' sums, the coefficient, and the number of tokens.
            Empty before the first batch.
    """

    def __init__(
        self,
        estimation: Estimation,
        kl_key: NestedKey,
        mask_key: NestedKey | None,
        add_to_reward: bool,
        coeff: Any,
    ) -> None:
        names = [
            (kl_key, estimation.estimator),
            *((_beside(kl_key, f"kl_{name}"), name) for name in estimation.extra_estimators),
        ]
        check_distinct([key for key, _ in names])
        self._estimators = dict(names)
        self.kl_key = kl_key
        self.mask_key = mask_key
        if not add_to_reward and (callable(coeff) or hasattr(coeff, "update")):
            raise OptionError("a schedule or a controller of coeff has no effect with add_to_reward=False")
        self.add_to_reward = add_to_reward
        self.coefficient = Coefficient(coeff)
        self.metrics: dict[str, float] = {}
        self._estimation = estimation

    @property
    def keys(self) -> list[NestedKey]:
        """The keys of the KL and the mask."""
        return [*self._estimators, *([] if self.mask_key is None else [self.mask_key])]

    def write(
        self,
        next_td: TensorDictBase,
        gen: torch.Tensor,
        ref: torch.Tensor,
        keep: torch.Tensor,
        lengths: list[int],
        to_rows: Callable[[torch.Tensor], Rows],
        *,
        log_probs: dict[NestedKey, Rows] | None = None,
        is_mask_known: bool = True,
    ) -> TensorDictBase:
        """Write all entries, or none if there is an error; return the tensordict that has them.

        Args:
            next_td: the tensordict to write into; its reward is read, if there is one.
            gen, ref: log-probs of both sides, of all samples laid end to end, ``[N]``: 0.0 outside the mask.
            keep: the mask, ``[N]`` bool.
            lengths: of the samples.
            to_rows: turns a packed tensor ``[N]`` into the layout of the entries.
            log_probs: entries to write beside the KL, in that layout.
            is_mask_known: ``keep`` is the mask, and not only the positions that have values. Then tokens can
                be counted.
        """
        kl = {
            key: self._estimation.estimate(name, gen, ref, lengths) for key, name in self._estimators.items()
        }
        coeff = self.coefficient.value() if self.add_to_reward else None
        sums = {self._estimators[key]: sums_of(values.detach(), lengths).cpu() for key, values in kl.items()}
        entries = {key: to_rows(values) for key, values in kl.items()}
        if self.mask_key is not None:
            entries[self.mask_key] = to_rows(keep.to(gen.device))
        written = write_kl(next_td, entries, kl_key=self.kl_key, coeff=coeff, log_probs=log_probs)
        num_tokens = int(keep.sum())
        self.metrics = {"num_tokens": float(num_tokens)} if is_mask_known else {}
        for name, per_sequence in sums.items():
            total = float(per_sequence.double().sum())
            if is_mask_known:
                self.metrics[f"kl_{name}_token_mean_nats"] = total / max(1, num_tokens)
            self.metrics[f"kl_{name}_sequence_mean_nats"] = total / max(1, len(per_sequence))
        if coeff is not None:
            self.metrics["coeff"] = coeff
            self.coefficient.observe(next(iter(sums.values())))
        return written


def _beside(key: NestedKey, name: str) -> NestedKey:
    """Return ``key`` with its last part replaced by ``name``.

    >>> _beside("kl_penalty", "kl_k3"), _beside(("kl", "full"), "kl_k3")
    ('kl_k3', ('kl', 'kl_k3'))
    """
    return (*key[:-1], name) if isinstance(key, tuple) else name
