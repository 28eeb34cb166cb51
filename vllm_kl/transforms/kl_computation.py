"""``KLComputation`` computes the KL of two entries of log-probs that the tensordict already has.

The class is a drop-in for TorchRL's ``KLComputation`` (``torchrl.envs.llm.transforms``, 0.14): it has the
same arguments, defaults and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from vllm_kl.batch.alignment import PaddingSide, check_rows, only_kept
from vllm_kl.batch.read_tokens import read_rows
from vllm_kl.batch.write_entries import check_distinct
from vllm_kl.errors import InputError, OptionError
from vllm_kl.kl import Direction, Estimator
from vllm_kl.transforms.choose_scorer import is_same_temperature
from vllm_kl.transforms.estimation import Estimation
from vllm_kl.transforms.kl_transform import KLTransform
from vllm_kl.transforms.penalty import Penalty
from vllm_kl.transforms.recorded_zeros import OnZero, check_on_zero, check_recorded, check_zeros
from vllm_kl.types import Rows, end_to_end, pack, place_of, widths_of

_CURE = (
    "Score the batch again (RetrieveLogProb), leave the token out of the mask, or, if the model is that "
    "sure, pass on_zero='allow'"
)


class KLComputation(KLTransform):
    """Computes the KL of each token from two entries of log-probs, and subtracts it from the reward.

    Args:
        gen_log_probs_full_key: log-probs of the model that generated.
        ref_log_probs_full_key: log-probs of the reference.

    Keyword Args:
        kl_key: where the KL is written.
        add_to_reward: ``True`` also writes ``reward - coeff * kl``; a reward per sequence becomes one per
            token.
        coeff, estimator, extra_estimators, clamp_log_ratio, clamp_output, direction: as in
            :class:`RetrieveKL`.
        padding_side: accepted as in TorchRL's class, without effect: rows are read and written as they are.
        mask_key: where :class:`RetrieveLogProb` or :class:`RetrieveKL` wrote the mask of kept tokens, bool.
            It is read and never written; without a mask ``metrics`` has no means over tokens.
        on_zero: what to do if one side's log-prob is exactly 0.0 (probability 1) and the other side is not
            sure of the token (probability below 0.9): ``"raise"`` (the default), ``"warn"`` or ``"allow"``.
            Many programs write 0.0 where a log-prob is missing. An entry that a :class:`RetrieveLogProb` or
            :class:`RetrieveKL` of the same env, or composition, writes is not checked.

    Log-probs do not tell their temperature: both entries must be those of one ``softmax(logits / T)``. This
    is checked if transforms of the same env, or composition, write both entries. Entries that a policy
    recorded, or that were stored, are not checked. Example: the policy's engine has
    ``logprobs_mode="processed_logprobs"`` and samples at ``temperature=0.5``, and the reference has equal
    weights at temperature 1. Then the KL is about one nat a token. ``RetrieveKL(FromCollector(policy=...),
    reference)`` knows the temperatures, and scores again or refuses.

    Without a stored mask NaN marks a position without a log-prob (TorchRL's generate path writes it on
    prompts). If the other side has none either (NaN, or the 0.0 that :class:`RetrieveLogProb` writes outside
    its mask), the KL is 0.0. If the other side has a log-prob, this side's is missing: that is an error and
    never 0.0.

    Raises:
        InputError: when called: an entry is missing, shapes differ or are not ``[B, T]`` or rows ``[T]``, or
            the mask does not fit the log-probs.
        MissingLogProbError: when called: a log-prob is missing, or is a doubtful 0.0 and ``on_zero="raise"``.
        OptionError: when called: the entries have different temperatures.

    >>> data = TensorDict(
    ...     next=TensorDict(
    ...         gen_log_probs=TensorDict(full=torch.full((2, 3), -1.0), batch_size=2),
    ...         ref_log_probs=TensorDict(full=torch.full((2, 3), -1.5), batch_size=2),
    ...         reward=torch.ones(2, 1, 1),
    ...         batch_size=2,
    ...     ),
    ...     batch_size=2,
    ... )
    >>> transform = KLComputation(("gen_log_probs", "full"), ("ref_log_probs", "full"), coeff=0.1)
    >>> data = transform(data)
    >>> data["next", "kl_penalty"]
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    >>> data["next", "reward"].shape, round(data["next", "reward"][0, 0].item(), 2)
    (torch.Size([2, 3, 1]), 0.95)
    """

    def __init__(
        self,
        gen_log_probs_full_key: NestedKey = ("log_probs", "full"),
        ref_log_probs_full_key: NestedKey = ("ref_log_probs", "full"),
        *,
        kl_key: NestedKey = "kl_penalty",
        add_to_reward: bool = True,
        coeff: Any = 1.0,
        padding_side: PaddingSide = "left",
        estimator: Estimator = "k1",
        extra_estimators: Sequence[Estimator] = (),
        clamp_log_ratio: float | None = 20.0,
        clamp_output: float | None = None,
        direction: Direction = "reverse",
        mask_key: NestedKey | None = "kl_mask",
        on_zero: OnZero = "raise",
    ) -> None:
        check_on_zero(on_zero)
        estimation = Estimation(estimator, extra_estimators, clamp_log_ratio, clamp_output, direction)
        penalty = Penalty(estimation, kl_key, None, add_to_reward, coeff)  # writes no mask
        sides = [gen_log_probs_full_key, ref_log_probs_full_key]
        check_distinct([*sides, *([] if mask_key is None else [mask_key]), *penalty.keys, "reward"])
        super().__init__(penalty, in_keys=sides, out_keys=[])
        self.mask_key = mask_key
        self.on_zero: OnZero = on_zero
        self.gen_log_probs_full_key = gen_log_probs_full_key
        self.ref_log_probs_full_key = ref_log_probs_full_key
        self.padding_side = padding_side

    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        of_gen, of_ref = (
            read_rows(next_td, key) for key in (self.gen_log_probs_full_key, self.ref_log_probs_full_key)
        )
        if of_gen is None or of_ref is None:
            raise InputError(
                f"Log-probs not found: expected {self.gen_log_probs_full_key} and "
                f"{self.ref_log_probs_full_key}, the tensordict has {sorted(map(str, next_td.keys()))}"
            )
        check_rows(of_gen, what=str(self.gen_log_probs_full_key))
        _check_shapes(of_gen, of_ref)
        lengths = widths_of(of_gen)
        gen, ref = end_to_end(of_gen), end_to_end(of_ref)
        mask = _default_mask(gen.detach().cpu(), ref.detach().cpu())
        stored = None if self.mask_key is None else read_rows(next_td, self.mask_key)
        if stored is not None:
            self._check_mask(of_gen, stored)
            has_values = mask & (gen != 0).cpu() & (ref != 0).cpu()
            mask = pack(stored).bool()
            self._check_hidden(has_values & ~mask, lengths)
        gen = only_kept(gen, mask, lengths, what="log_probs")
        ref = only_kept(ref, mask, lengths, what="ref_log_probs")
        self._check_sides(gen.detach().cpu(), ref.detach().cpu(), mask, lengths)

        def to_rows(values: torch.Tensor) -> Rows:
            if isinstance(of_gen, torch.Tensor):
                return values.view(of_gen.shape)
            return [row.clone() for row in values.split(lengths)]

        return self.penalty.write(next_td, gen, ref, mask, lengths, to_rows, is_mask_known=stored is not None)

    def _check_sides(
        self, gen: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor, lengths: list[int]
    ) -> None:
        """Refuse values that are no log-probs, and sides of different temperatures."""
        keys = (self.gen_log_probs_full_key, self.ref_log_probs_full_key)
        neighbours = self._neighbours()
        at = {
            key: next((t for n in neighbours if (t := n.temperature_at(key)) is not None), None)
            for key in keys
        }
        of_gen, of_ref = at.values()
        if of_gen is not None and of_ref is not None and not is_same_temperature(of_gen, of_ref):
            found = " and ".join(f"{key} of softmax(logits / {t:g})" for key, t in at.items())
            raise OptionError(
                f"{found}: the KL of equal weights would not be 0. Give both sides one temperature"
            )
        for key, other_key, side, other in ((*keys, gen, ref), (*keys[::-1], ref, gen)):
            if at[key] is None:
                names = {"what": str(key), "who": str(other_key), "cure": _CURE}
                check_recorded(side, lengths, what=str(key))
                check_zeros(side, other, mask, lengths, on_zero=self.on_zero, **names)

    def _check_mask(self, log_probs: Rows, masks: Rows) -> None:
        """Refuse a mask of another shape than its log-probs, or one that keeps token 0."""
        for i, (row, mask) in enumerate(zip(log_probs, masks, strict=True)):
            if mask.shape != row.shape:
                raise InputError(
                    f"sample {i}: {self.mask_key} has shape {list(mask.shape)}, but its log-probs have shape "
                    f"{list(row.shape)}"
                )
            if len(mask) and mask[0]:
                raise InputError(
                    f"sample {i}: {self.mask_key} keeps token 0, which has no log-prob. The rows of the "
                    f"log-probs and of {self.mask_key} must begin with the sequence's first token, or with "
                    "padding"
                )

    def _check_hidden(self, hidden: torch.Tensor, lengths: list[int]) -> None:
        """Refuse a mask that leaves out a token that both sides scored: it belongs to other log-probs."""
        if hidden.any():
            i, t = place_of(hidden, lengths)
            raise InputError(
                f"sample {i}, token {t}: both sides have a log-prob, but {self.mask_key} leaves the token "
                "out, so the mask belongs to other log-probs. Remove the mask, or pass mask_key=None."
            )


def _check_shapes(gen: Rows, ref: Rows) -> None:
    for i, (of_gen, of_ref) in enumerate(zip(gen, ref, strict=True)):
        if of_gen.shape != of_ref.shape:
            raise InputError(
                f"Sample {i} has different shapes: gen log-probs {list(of_gen.shape)}, ref log-probs "
                f"{list(of_ref.shape)}. Both sides of a KL must score the same tokens with the same "
                "pad_output."
            )


def _default_mask(gen: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Return the positions that count: both sides have a log-prob, or one side lacks the other's."""
    unscored = (torch.isnan(gen) & (torch.isnan(ref) | (ref == 0))) | (torch.isnan(ref) & (gen == 0))
    return ~unscored
