"""Weighs tokens by how much more probable the trainer finds them than the sampler that drew them.

An engine samples the tokens; a trainer with other kernels, another precision or newer weights learns from
them. An expectation over the trainer's own samples is that over the sampler's samples, each weighted with

    ratio = p_trainer / p_sampler,    r_t = log_prob_t - sampler_log_prob_t    (nats)

| ``level`` | ratio of token t in a sequence with the kept tokens 1..T | |
|---|---|---|
| ``token`` | ``exp(r_t)`` | low variance; biased: it leaves out how the ratio changes the earlier tokens |
| ``sequence`` | ``exp(r_1 + ... + r_T)`` | unbiased; its variance grows exponentially with T |
| ``geometric`` | ``exp((r_1 + ... + r_T) / T)`` | a mean per token, so one bound fits all lengths; biased |

| ``mode`` | weight | |
|---|---|---|
| ``truncate`` | the ratio, or the bound that it passes | keeps every token |
| ``mask`` | the ratio if it is inside the bounds, else 0.0 | leaves outliers out: samples may be broken |

Sources:

- truncated ratios: Ionides (2008), "Truncated Importance Sampling";
- ``token`` and ``truncate`` (TIS): Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You
  Off-Policy RL Training", https://fengyao.notion.site/off-policy-rl;
- ``token``, ``mask`` and two bounds (IcePop): Ling Team (2025), arXiv:2510.18855;
- ``sequence`` and ``truncate`` or ``mask`` (MIS), and ``geometric`` and ``mask``: Liu, Li et al. (2025),
  "When Speed Kills Stability", https://richardli.xyz/rl-collapse;
- ``geometric`` is also the ratio of GSPO: Zheng et al. (2025), arXiv:2507.18071.

CISPO (MiniMax, 2025, arXiv:2506.13585) truncates the ratio of the policy in training to the one that sampled.
It is a loss, TorchRL's ``CISPOLoss``, and not a weight of a batch.

This module handles tensors only, no engines and no tensordicts. All sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from vllm_kl.errors import OptionError
from vllm_kl.kl import is_bound, k3_of, packed_sides

Level = Literal["token", "sequence", "geometric"]
Mode = Literal["truncate", "mask"]
# Bound of a log-ratio before an exponential, in nats: exp(20) is 5e8. verl has the same (SAFETY_BOUND).
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Importance:
    """The result of :func:`importance_weights`."""

    weights: torch.Tensor | list[torch.Tensor]  # [B, T], or B rows [T]; float32; 0.0 outside the mask
    metrics: dict[str, float]  # for a logger, under this package's names
    # "trl", "verl" or "nemo_rl" -> the figures that this trainer prints, under its own names. Those of the
    # weights are there only if the trainer can weigh like this: see docs/mismatch.md.
    as_printed_by: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighting:
    """How a log-ratio becomes a weight: the options of :func:`importance_weights`.

    Raises:
        OptionError: an option does not exist, a bound is on the wrong side of 1, or ``mode`` has no effect.
    """

    level: Level = "token"
    mode: Mode = "truncate"
    low: float | None = None
    high: float | None = 2.0
    normalize: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("level", self.level, Level), ("mode", self.mode, Mode)):
            if value not in get_args(known):
                raise OptionError(
                    f"{name}={value!r} does not exist; choose one of {', '.join(get_args(known))}"
                )
        _check_bound("low", self.low, 0.0, 1.0)
        _check_bound("high", self.high, 1.0, math.inf)
        for name, bound in (("low", self.low), ("high", self.high)):
            object.__setattr__(self, name, None if bound is None else float(bound))  # torch takes no fraction
        if self.mode == "mask" and self.low is None and self.high is None:
            raise OptionError("mode='mask' without bounds masks nothing: pass high=, low= or both")
        if not isinstance(self.normalize, bool):
            raise OptionError(f"normalize must be True or False; got {str(self.normalize)[:60]}")

    def outside(self, log_ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tell which log-ratios are above the upper bound, and which are below the lower one."""
        above = log_ratio > (math.inf if self.high is None else math.log(self.high))
        below = log_ratio < (-math.inf if self.low is None else math.log(self.low))
        return above, below

    def weights(self, log_ratio: torch.Tensor, most: float = MAX_LOG_RATIO) -> torch.Tensor:
        """Return the weights of log-ratios, nats, of which no absolute value is taken above ``most``."""
        ratio = _exp(log_ratio, most)
        if self.low is not None or self.high is not None:
            ratio = ratio.clamp(self.low, self.high)
        if self.mode == "truncate":
            return ratio
        above, below = self.outside(log_ratio)
        return ratio.where(~(above | below), 0.0)

    def divisor(self, log_ratio_of_units: torch.Tensor) -> float:
        """Return what the weights are divided by: their mean over tokens or samples, or 1.0.

        It is 1.0 without ``normalize``, and where nothing has a weight: verl divides by no mean below 1e-8.
        """
        if not self.normalize or not len(log_ratio_of_units):
            return 1.0
        mean = float(self.weights(log_ratio_of_units).mean())
        return mean if mean > 1e-8 else 1.0


def _check_bound(name: str, value: float | None, least: float, most: float) -> None:
    if value is None:
        return
    if not (is_bound(value) and least <= value <= most and value != math.inf):
        between = "at least 1" if most == math.inf else "above 0 and at most 1"
        raise OptionError(
            f"{name} must be a finite number {between}, or None for no bound; got {str(value)[:60]}. The "
            "weight of equal log-probs is 1, so the bounds must have 1 between them"
        )


def importance_weights(
    log_probs: torch.Tensor | Sequence[torch.Tensor],
    sampler_log_probs: torch.Tensor | Sequence[torch.Tensor],
    mask: torch.Tensor | Sequence[torch.Tensor],
    *,
    level: Level = "token",
    mode: Mode = "truncate",
    low: float | None = None,
    high: float | None = 2.0,
    normalize: bool = False,
) -> Importance:
    """Return the importance weight of every token, ``p_trainer / p_sampler`` within bounds.

    Args:
        log_probs: of the trainer, which scored the tokens again: ``[B, T]`` or B tensors ``[T]``, nats.
        sampler_log_probs: of the engine that sampled the tokens, recorded while it did, same shapes. Both
            must be of the distribution that was sampled from: of the same temperature, above all.
        mask: tokens that count, same shapes, bool. Values outside the mask are never read.
        level: ``"token"``: the ratio of each token. ``"sequence"``: the product of the ratios of a sample's
            tokens, for each of its tokens. ``"geometric"``: their geometric mean. The formulas are at the top
            of :mod:`vllm_kl.importance`.
        mode: ``"truncate"`` (TIS): a ratio beyond a bound becomes the bound. ``"mask"`` (MIS): it becomes 0.
        low, high: the bounds of the ratio, ``0 < low <= 1 <= high``; ``None``: no bound. ``high=2.0`` is the
            default of verl (``rollout_is_threshold``); TRL's is 3.0, for its ``sequence_mask``. Bounds of
            ``"geometric"`` are near 1: NeMo RL's are 0.999 and 1.002. With ``mode="truncate"``, ``high=None``
            gives plain importance weights.
        normalize: divide the weights by their mean in this batch, over the kept tokens or, with another level
            than ``"token"``, over the samples that have kept tokens (verl's ``rollout_is_batch_normalize``).
            They then have the mean 1, and may be above ``high``. A mean of 1e-8 or less divides nothing.

    Returns:
        An :class:`Importance`. Its weights have no graph: they are constants of a loss. They are exactly 0.0
        outside the mask. A ratio uses r clamped to 20 nats. With n kept tokens, the *units* being the kept
        tokens, or with another level than ``"token"`` the samples that have kept tokens, its metrics are

        ====================================  ================================================================
        ``num_tokens``, ``num_sequences``     n, and the samples that have kept tokens
        ``weight_mean``, ``_min``, ``_max``   of the weights of the tokens, as returned
        ``weight_std``                        their standard deviation (divided by n)
        ``ratio_mean``, ``_min``, ``_max``    of the units' ratios before the bounds
        ``above_high_fraction``               the units whose ratio is above ``high``
        ``below_low_fraction``                the units whose ratio is below ``low``
        ``effective_sample_size_fraction``    ``(sum of w)^2 / (n * sum of w^2)`` of the tokens' weights w; 0
                                              if all are 0
        ====================================  ================================================================

        Without a kept token there are ``num_tokens`` and ``num_sequences`` only.

    Raises:
        InputError: the shapes differ, or have other dimensions than these.
        MissingLogProbError: a value inside the mask is not finite; the message names sample and token.
        OptionError: a level or mode does not exist, or a bound cannot work.

    >>> trainer, sampler = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.1, -3.0, float("nan")]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> importance_weights(trainer, sampler, mask).weights
    tensor([[1.1052, 2.0000, 0.0000]])
    >>> importance_weights(trainer, sampler, mask, mode="mask").weights
    tensor([[1.1052, 0.0000, 0.0000]])
    >>> found = importance_weights(trainer, sampler, mask, level="sequence", high=5.0)
    >>> found.weights
    tensor([[3.0042, 3.0042, 0.0000]])
    >>> found.metrics["ratio_mean"] == found.as_printed_by["trl"]["sampling/importance_sampling_ratio/mean"]
    True
    """
    weighting = Weighting(level=level, mode=mode, low=low, high=high, normalize=normalize)
    sides = {"log_probs": log_probs, "sampler_log_probs": sampler_log_probs, "mask": mask}
    trained_N, sampled_N, keep_N, lengths = packed_sides(sides)
    device = trained_N.device
    trained_N, sampled_N = (side.detach().to(device).double() for side in (trained_N, sampled_N))
    weights_N, ratios = _weigh(trained_N, sampled_N, keep_N.to(device), lengths, weighting)
    weights_N = weights_N.float()
    return Importance(
        weights=weights_N.reshape(mask.shape)
        if isinstance(mask, torch.Tensor)
        else [row.clone() for row in weights_N.split(lengths)],
        metrics=ratios.metrics(),
        as_printed_by={"trl": ratios.trl(), "verl": ratios.verl(), "nemo_rl": ratios.nemo_rl()},
    )


def _weigh(
    trained_N: torch.Tensor,
    sampled_N: torch.Tensor,
    keep_N: torch.Tensor,
    lengths: list[int],
    weighting: Weighting,
) -> tuple[torch.Tensor, _Ratios]:
    """Return the weight of every token, ``[N]`` float64, and what the figures are made of.

    Args:
        trained_N, sampled_N: float64, 0.0 outside the mask.
        keep_N: the mask, bool.
        lengths: of the samples.
        weighting: the options.
    """
    counts = torch.tensor(lengths, dtype=torch.long, device=keep_N.device)
    sample_N = torch.repeat_interleave(counts)  # the sample of each token
    r_N = trained_N - sampled_N
    num_kept_B = _sums(keep_N.double(), sample_N, len(lengths))
    log_ratio_B = _sums(r_N, sample_N, len(lengths))
    if weighting.level == "geometric":
        log_ratio_B = log_ratio_B / num_kept_B.clamp(min=1)
    log_ratio_N = r_N if weighting.level == "token" else log_ratio_B[sample_N]
    weights_N = weighting.weights(log_ratio_N).where(keep_N, 0.0)
    has_tokens_B = num_kept_B > 0
    of = (has_tokens_B.cumsum(0) - 1)[sample_N[keep_N]]
    units = r_N[keep_N] if weighting.level == "token" else log_ratio_B[has_tokens_B]
    tokens = (trained_N[keep_N], sampled_N[keep_N], weights_N[keep_N], log_ratio_N[keep_N], of, units)
    ratios = _Ratios(weighting, *(values.cpu() for values in tokens))
    return weights_N / weighting.divisor(ratios.units), ratios


def _sums(values: torch.Tensor, of: torch.Tensor, num: int) -> torch.Tensor:
    """Return the sums of the values of each of ``num`` samples; ``of`` is the sample of each value."""
    return values.new_zeros(num).index_add(0, of, values)


@dataclass(frozen=True, slots=True, eq=False)
class _Ratios:
    """The figures of n kept tokens in S samples. All is float64, on the CPU."""

    weighting: Weighting
    trained: torch.Tensor  # [n] log-probs of the trainer, nats
    sampled: torch.Tensor  # [n] log-probs of the sampler, nats
    weights: torch.Tensor  # [n] before they are normalized
    log_ratio: torch.Tensor  # [n] of the level: one number for all tokens of a sample, but for "token"
    of: torch.Tensor  # [n] int64, the sample of each token: 0 to S - 1
    units: torch.Tensor  # [n] or [S] log-ratios, see importance_weights

    @property
    def _num_samples(self) -> int:
        return int(self.of[-1]) + 1 if len(self.of) else 0

    def _means(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of each sample's values, ``[S]``."""
        counts = _sums(torch.ones_like(values), self.of, self._num_samples)
        return _sums(values, self.of, self._num_samples) / counts

    def _effective(self) -> torch.Tensor:
        sum_of_squares = self.weights.square().sum()
        if sum_of_squares == 0:
            return sum_of_squares
        return self.weights.sum().square() / (len(self.weights) * sum_of_squares)

    def metrics(self) -> dict[str, float]:
        counts = {"num_tokens": float(len(self.weights)), "num_sequences": float(self._num_samples)}
        if not len(self.weights):
            return counts
        ratios, weights = _exp(self.units), self.weights / self.weighting.divisor(self.units)
        above, below = self.weighting.outside(self.units)
        values = {
            "weight_mean": weights.mean(),
            "weight_min": weights.min(),
            "weight_max": weights.max(),
            "weight_std": weights.std(correction=0),
            "ratio_mean": ratios.mean(),
            "ratio_min": ratios.min(),
            "ratio_max": ratios.max(),
            "above_high_fraction": above.double().mean(),
            "below_low_fraction": below.double().mean(),
            "effective_sample_size_fraction": self._effective().clamp(max=1),
        }
        return counts | _floats(values)

    def trl(self) -> dict[str, float]:
        """Return the figures of TRL's ``GRPOTrainer`` (``trl/trainer/grpo_trainer.py``, 1.16.0)."""
        if not len(self.weights):
            return {}
        difference = (self.trained - self.sampled).abs()
        values = {
            "sampling/sampling_logp_difference/mean": difference.mean(),
            "sampling/sampling_logp_difference/max": difference.max(),
        }
        if _is_of_trl(self.weighting):
            applied = self.weighting.weights(self.units, most=math.inf)
            values |= {
                "sampling/importance_sampling_ratio/min": applied.min(),
                "sampling/importance_sampling_ratio/mean": applied.mean(),
                "sampling/importance_sampling_ratio/max": applied.max(),
            }
        return _floats(values)

    def verl(self) -> dict[str, float]:
        """Return the figures of verl (``verl/trainer/ppo/rollout_corr_helper.py``, 1dda039)."""
        if not len(self.weights):
            return {}
        values = self._verl_difference()
        if _is_of_verl(self.weighting):
            values |= self._verl_weights() | self._verl_bounds()
        return _floats({f"rollout_corr/{name}": value for name, value in values.items()})

    def _verl_weights(self) -> dict[str, torch.Tensor]:
        weights, means = self.weights, self._means(self.weights)
        is_token = self.weighting.level == "token"
        values = {
            "rollout_is_mean": weights.mean(),
            "rollout_is_max": weights.max() if is_token else self.units.max().clamp(max=MAX_LOG_RATIO).exp(),
            "rollout_is_min": weights.min() if is_token else self.units.min().exp(),
            "rollout_is_std": weights.std(correction=0),
            "rollout_is_eff_sample_size": self._effective(),
            "rollout_is_seq_mean": means.mean(),
            "rollout_is_seq_std": means.std() if len(means) > 1 else torch.zeros(()),
            "rollout_is_seq_max": means.max(),
            "rollout_is_seq_min": means.min(),
            "rollout_is_seq_max_deviation": (means - 1).abs().max(),
        }
        if self.weighting.normalize:  # all figures above are of the weights before that
            values["rollout_is_batch_norm_factor"] = torch.tensor(self.weighting.divisor(self.units))
        return values

    def _verl_bounds(self) -> dict[str, torch.Tensor]:
        """Return the figures of the threshold. Without a lower one verl takes 1 / the upper one."""
        high, low = self.weighting.high, self.weighting.low
        assert high is not None, "verl has no weights without it"
        low_or_inverse = 1 / high if low is None else low
        raw_means = self._means(_exp(self.log_ratio))
        values = {
            "rollout_is_ratio_fraction_high": (self.units > math.log(high)).double().mean(),
            "rollout_is_ratio_fraction_low": (self.units < math.log(low_or_inverse)).double().mean(),
            "rollout_is_seq_fraction_high": (raw_means > high).double().mean(),
            "rollout_is_seq_fraction_low": (raw_means < low_or_inverse).double().mean(),
        }
        return values if low is None else values | {"rollout_is_oob_ratio": self._outside_fraction()}

    def _verl_difference(self) -> dict[str, torch.Tensor]:
        r = self.trained - self.sampled
        trained, sampled = self._means(self.trained), self._means(self.sampled)
        sums = _sums(r, self.of, self._num_samples)
        return {
            "training_ppl": trained.neg().exp().mean(),
            "training_log_ppl": -trained.mean(),
            "rollout_ppl": sampled.neg().exp().mean(),
            "rollout_log_ppl": -sampled.mean(),
            "kl": -r.mean(),
            "k3_kl": k3_of(r, None).mean(),
            "log_ppl_diff": (sampled - trained).mean(),
            "log_ppl_abs_diff": (sampled - trained).abs().mean(),
            "log_ppl_diff_max": (sampled - trained).max(),
            "log_ppl_diff_min": (sampled - trained).min(),
            "ppl_ratio": (sampled - trained).exp().mean(),
            "chi2_token": _exp(r).square().mean() - 1,
            "chi2_seq": _exp(sums).square().mean() - 1,
        }

    def nemo_rl(self) -> dict[str, float]:
        """Return the figures of NeMo RL (``loss/loss_functions.py`` and ``grpo.py``, 7ea279a)."""
        if not len(self.weights):
            return {}
        r = self.trained - self.sampled
        mixture = torch.logaddexp(self.trained, self.sampled) - math.log(2)
        js = (k3_of(self.trained - mixture, None) + k3_of(self.sampled - mixture, None)) / 2
        of_samples = self._means(r.abs().exp())
        values = {
            "token_mult_prob_error": r.abs().exp().mean(),
            "max_seq_mult_prob_error": of_samples.max(),
            "mean_seq_mult_prob_error": of_samples.mean(),
            "min_seq_mult_prob_error": of_samples.min(),
            "gen_kl_error": k3_of(r, None).mean(),
            "policy_kl_error": k3_of(-r, None).mean(),
            "js_divergence_error": js.mean(),
        }
        weighting = self.weighting
        if _is_of_nemo_rl(weighting):
            if weighting.level == "token":  # of sequences, NeMo RL's depends on the size of its microbatches
                values["sampling_importance_ratio"] = weighting.weights(r, most=math.inf).mean()
            if weighting.high is not None:
                values["is_oob_ratio"] = self._outside_fraction()
        return _floats(values)

    def _outside_fraction(self) -> torch.Tensor:
        """Return the fraction of tokens outside the bounds; for ``"geometric"`` that of samples."""
        of = self.units if self.weighting.level == "geometric" else self.log_ratio
        above, below = self.weighting.outside(of)
        return (above | below).double().mean()


def _is_of_trl(weighting: Weighting) -> bool:
    """Whether TRL can weigh like this: tokens or sequences, by one bound or two that differ."""
    has_bounds = weighting.low != weighting.high
    return weighting.level != "geometric" and has_bounds and not weighting.normalize


def _is_of_verl(weighting: Weighting) -> bool:
    """Whether verl can: tokens or sequences, truncated by an upper bound or masked by two."""
    needs_low = weighting.mode == "mask"
    has_bounds = weighting.high is not None and (weighting.low is not None) == needs_low
    return weighting.level != "geometric" and has_bounds


def _is_of_nemo_rl(weighting: Weighting) -> bool:
    """Whether NeMo RL can: truncated by an upper bound, or not at all; or masked by two bounds.

    A ``"geometric"`` mask is the filter of its ``seq-mask-tis``. The weights that this keeps are others.
    """
    if weighting.normalize:
        return False
    if weighting.mode == "mask":
        return weighting.low is not None and weighting.high is not None
    return weighting.level != "geometric" and (weighting.high is not None or weighting.low is None)


def _exp(log_ratio: torch.Tensor, most: float = MAX_LOG_RATIO) -> torch.Tensor:
    return log_ratio.clamp(-most, most).exp()


def _floats(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
