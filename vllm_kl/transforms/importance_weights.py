"""``ImportanceWeights`` writes the weight of each token, from two entries of log-probs that the batch has.

The class asks no engine and no model. A :class:`~vllm_kl.RetrieveLogProb` before it lets the trainer's model
score the tokens that the sampler drew.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.data import Composite

from vllm_kl.batch.alignment import check_rows, only_kept
from vllm_kl.batch.read_tokens import read_rows
from vllm_kl.batch.write_entries import check_distinct, declare, set_rows
from vllm_kl.errors import InputError, OptionError
from vllm_kl.importance import Level, Mode, Weighting, importance_weights
from vllm_kl.transforms.next_transform import NextTransform
from vllm_kl.transforms.recorded_zeros import OnZero, check_on_zero, check_recorded, check_zeros
from vllm_kl.types import Rows, pack, widths_of

Names = Literal["vllm_kl", "trl", "verl", "nemo_rl"]

_CURE = (
    "Let the sampler's engine score the batch again (RetrieveLogProb), leave the token out of the mask, or, "
    "if the model is that sure, pass on_zero='allow'"
)


class ImportanceWeights(NextTransform):
    """Writes the importance weight of each token: its probability by the trainer over that by the sampler.

    Args:
        log_probs_full_key: log-probs of the trainer, which scored the tokens again. Read under ``"next"``, or
            else beside it.
        sampler_log_probs_full_key: log-probs that the sampler recorded. Read beside ``"next"``, or else under
            it: :class:`RetrieveKL` and :class:`RetrieveLogProb` write scores under ``"next"``, and a policy
            records beside it. So one key for both sides is right after
            ``RetrieveKL(..., gen_log_probs="rescore")``.

    Keyword Args:
        level, mode, low, high, normalize: as in :func:`vllm_kl.importance_weights`.
        weights_key: where the weights are written, under ``"next"`` if there is one.
        mask_key: where :class:`RetrieveLogProb` or :class:`RetrieveKL` wrote the mask of kept tokens, bool.
            It is read under ``"next"`` or beside it, and never written.
        on_zero: what to do if one side's log-prob is exactly 0.0 (probability 1) and the other side is not
            sure of the token (probability below 0.9): ``"raise"`` (the default), ``"warn"`` or ``"allow"``.
            Many programs write 0.0 where a log-prob is missing.
        names: whose names and formulas ``metrics`` has: ``"vllm_kl"``, ``"trl"``, ``"verl"`` or
            ``"nemo_rl"``.

    The weights are float32, in the layout of the trainer's log-probs: ``[B, T]``, or B rows ``[T]``. They
    have no graph, and are exactly 0.0 outside the mask. The transform works in an env after the transforms
    that write both sides, on a replay buffer and on a batch.

    Log-probs do not tell their temperature: both sides must be of the distribution that was sampled from.

    Raises:
        InputError: when called: an entry is missing, both sides are one entry, or shapes differ or are not
            ``[B, T]`` or rows ``[T]``.
        MissingLogProbError: when called: a log-prob inside the mask is missing, is no log-prob, or is a
            doubtful 0.0 and ``on_zero="raise"``.
        OptionError: an option does not exist or cannot work, or two entries have one key.

    >>> td = TensorDict(
    ...     log_probs=TensorDict(full=[[float("nan"), -1.1, -3.0]], batch_size=1),  # as sampled
    ...     next=TensorDict(
    ...         trainer_log_probs=TensorDict(full=[[0.0, -1.0, -2.0]], batch_size=1),
    ...         kl_mask=[[False, True, True]],
    ...         batch_size=1,
    ...     ),
    ...     batch_size=1,
    ... )
    >>> transform = ImportanceWeights(high=2.0, names="trl")
    >>> transform(td)["next", "importance_weights", "full"]
    tensor([[0.0000, 1.1052, 2.0000]])
    >>> round(transform.metrics["sampling/importance_sampling_ratio/mean"], 4)
    1.5526
    """

    def __init__(
        self,
        log_probs_full_key: NestedKey = ("trainer_log_probs", "full"),
        sampler_log_probs_full_key: NestedKey = ("log_probs", "full"),
        *,
        level: Level = "token",
        mode: Mode = "truncate",
        low: float | None = None,
        high: float | None = 2.0,
        normalize: bool = False,
        weights_key: NestedKey = ("importance_weights", "full"),
        mask_key: NestedKey = "kl_mask",
        on_zero: OnZero = "raise",
        names: Names = "vllm_kl",
    ) -> None:
        # It refuses what cannot work.
        Weighting(level=level, mode=mode, low=low, high=high, normalize=normalize)
        check_on_zero(on_zero)
        if names not in get_args(Names):
            raise OptionError(f"names={names!r} does not exist; choose one of {', '.join(get_args(Names))}")
        for key in {log_probs_full_key, sampler_log_probs_full_key, mask_key}:
            check_distinct([weights_key, key])
        in_keys = list(dict.fromkeys([log_probs_full_key, sampler_log_probs_full_key, mask_key]))
        super().__init__(in_keys=in_keys, out_keys=[weights_key])
        self.log_probs_full_key = log_probs_full_key
        self.sampler_log_probs_full_key = sampler_log_probs_full_key
        self.level, self.mode, self.low, self.high, self.normalize = level, mode, low, high, normalize
        self.weights_key = weights_key
        self.mask_key = mask_key
        self.on_zero: OnZero = on_zero
        self.names: Names = names
        self._metrics: dict[str, float] = {}

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the last batch, by the names that ``names`` asks for: see docs/mismatch.md.

        Empty before the first batch. With the names of another trainer they are empty too after a batch
        without a kept token.
        """
        return self._metrics

    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        sides = self._sides(td, next_td)
        self._check(*sides)
        found = importance_weights(
            *sides,
            level=self.level,
            mode=self.mode,
            low=self.low,
            high=self.high,
            normalize=self.normalize,
        )
        written = set_rows(next_td, self.weights_key, found.weights)
        self._metrics = found.metrics if self.names == "vllm_kl" else found.as_printed_by[self.names]
        return written

    def _sides(self, td: TensorDictBase, next_td: TensorDictBase) -> tuple[Rows, Rows, Rows]:
        """Return the trainer's log-probs, the sampler's and the mask, in the layout of the first."""
        trained, of_next = self._find(self.log_probs_full_key, next_td, td)
        sampled, of_root = self._find(self.sampler_log_probs_full_key, td, next_td)
        mask, _ = self._find(self.mask_key, next_td, td)
        if self.log_probs_full_key == self.sampler_log_probs_full_key and of_next is of_root:
            raise InputError(
                f"the trainer's log-probs and the sampler's are one entry, {self.log_probs_full_key}: every "
                "weight would be 1. Let the trainer's model score the batch to a key of its own: "
                "RetrieveLogProb(trainer, log_probs_full_key=('trainer_log_probs', 'full'))"
            )
        sides = trained, sampled, mask
        self._check_shapes(*sides)
        if all(isinstance(side, torch.Tensor) for side in sides):
            return sides
        trained, sampled, mask = (list(side) for side in sides)
        return trained, sampled, mask

    def _find(
        self, key: NestedKey, first: TensorDictBase, second: TensorDictBase
    ) -> tuple[Rows, TensorDictBase]:
        """Return an entry and the tensordict that has it."""
        for place in (first, second):
            if (rows := read_rows(place, key)) is not None:
                return rows, place
        raise InputError(
            f"no {key} in the batch, neither under 'next' nor beside it: it has "
            f"{sorted({*map(str, first.keys()), *map(str, second.keys())})}. RetrieveLogProb writes the "
            "log-probs of a model, and the mask"
        )

    def _check_shapes(self, trained: Rows, sampled: Rows, mask: Rows) -> None:
        check_rows(trained, what=str(self.log_probs_full_key))
        keys = (self.sampler_log_probs_full_key, sampled), (self.mask_key, mask)
        for key, rows in keys:
            for i, (row, other) in enumerate(zip(trained, rows, strict=True)):
                if row.shape != other.shape:
                    raise InputError(
                        f"sample {i}: {self.log_probs_full_key} has shape {list(row.shape)}, but {key} has "
                        f"shape {list(other.shape)}. Give both sides one pad_output and one padding_side"
                    )

    def _check(self, trained: Rows, sampled: Rows, mask: Rows) -> None:
        """Refuse values that cannot be log-probs, and zeros that stand for missing ones."""
        lengths, keep = widths_of(trained), pack(mask).bool()
        keys = self.log_probs_full_key, self.sampler_log_probs_full_key
        sides = [
            only_kept(pack(side).detach().float(), keep, lengths, what=str(key))
            for key, side in zip(keys, (trained, sampled), strict=True)
        ]
        for key, other_key, side, other in ((*keys, *sides), (*keys[::-1], *sides[::-1])):
            check_recorded(side, lengths, what=str(key))
            names = {"what": str(key), "who": str(other_key), "cure": _CURE}
            check_zeros(side, other, keep, lengths, on_zero=self.on_zero, **names)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        declare(observation_spec, self.weights_key)
        return observation_spec
