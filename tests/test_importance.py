"""``importance_weights``: weights and figures equal those of plain float64 loops."""

from __future__ import annotations

import dataclasses
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from vllm_kl import importance_weights
from vllm_kl.errors import InputError, MissingLogProbError, OptionError
from vllm_kl.importance import Importance

LEVELS, MODES = ("token", "sequence", "geometric"), ("truncate", "mask")
BOUNDS = [(None, 2.0), (0.5, 2.0), (0.9, None), (0.999, 1.002), (1.0, 1.0)]
OPTIONS = [
    {"level": level, "mode": mode, "low": low, "high": high}
    for level in LEVELS
    for mode in MODES
    for low, high in BOUNDS
] + [{"level": level, "mode": "truncate", "low": None, "high": None} for level in LEVELS]


def sides(spread=0.1, seed=0, lengths=(7, 1, 12, 4, 9)):
    """Ragged log-probs of trainer and sampler, and masks; outside a mask there is NaN. One keeps nothing."""
    generator = torch.Generator().manual_seed(seed)
    trained, sampled, masks = [], [], []
    for i, n in enumerate(lengths):
        a = -3 * torch.rand(n, generator=generator) - 1
        b = a - spread * torch.randn(n, generator=generator)
        mask = torch.rand(n, generator=generator) < (0.0 if i == 3 else 0.7)
        mask[-1] |= i != 3
        trained.append(torch.where(mask, a, torch.nan))
        sampled.append(torch.where(mask, b, torch.nan))
        masks.append(mask)
    return trained, sampled, masks


def kept(row, mask):
    return [x for x, k in zip(row.tolist(), mask.tolist(), strict=True) if k]


def bounded(ratio, *, mode, low, high):
    above, below = high is not None and ratio > high, low is not None and ratio < low
    if mode == "mask":
        return 0.0 if above or below else ratio
    return high if above else low if below else ratio


def ratios_of(a, b, level):
    """The ratio of each kept token of one sample, before the bounds."""
    r = [x - y for x, y in zip(a, b, strict=True)]
    if level == "token":
        return [math.exp(x) for x in r]
    total = math.fsum(r)
    return [math.exp(total if level == "sequence" else total / len(r))] * len(r)


def weights_in_plain_loops(trained, sampled, masks, *, level, **how):
    rows = []
    for a, b, mask in zip(trained, sampled, masks, strict=True):
        found = iter(ratios_of(kept(a, mask), kept(b, mask), level) if mask.any() else [])
        rows.append([bounded(next(found), **how) if k else 0.0 for k in mask.tolist()])
    return rows


def outside(ratio, low, high):
    return (high is not None and ratio > high) or (low is not None and ratio < low)


def ess(weights):
    squares = sum(w * w for w in weights)
    return sum(weights) ** 2 / (len(weights) * squares) if squares else 0.0


class Figures:
    """What the figures are made of, in lists of samples that keep a token."""

    def __init__(self, trained, sampled, masks, *, level, mode, low, high):
        self.level, self.mode, self.low, self.high = level, mode, low, high
        samples = [i for i, mask in enumerate(masks) if mask.any()]
        self.a = [kept(trained[i], masks[i]) for i in samples]
        self.b = [kept(sampled[i], masks[i]) for i in samples]
        self.ratios = [ratios_of(a, b, level) for a, b in zip(self.a, self.b, strict=True)]
        self.w = [[bounded(x, mode=mode, low=low, high=high) for x in row] for row in self.ratios]
        self.r = [x - y for a, b in zip(self.a, self.b, strict=True) for x, y in zip(a, b, strict=True)]
        self.flat = [w for row in self.w for w in row]
        self.units = (
            [x for row in self.ratios for x in row] if level == "token" else [r[0] for r in self.ratios]
        )
        self.applied = self.flat if level == "token" else [row[0] for row in self.w]

    def ours(self):
        n, units = len(self.flat), self.units
        return {
            "num_tokens": n,
            "num_sequences": len(self.w),
            "weight_mean": sum(self.flat) / n,
            "weight_min": min(self.flat),
            "weight_max": max(self.flat),
            "weight_std": statistics.pstdev(self.flat),
            "ratio_mean": sum(units) / len(units),
            "ratio_min": min(units),
            "ratio_max": max(units),
            "above_high_fraction": sum(outside(x, None, self.high) for x in units) / len(units),
            "below_low_fraction": sum(outside(x, self.low, None) for x in units) / len(units),
            "effective_sample_size_fraction": ess(self.flat),
        }

    def trl(self):
        difference = [abs(x) for x in self.r]
        values = {
            "sampling/sampling_logp_difference/mean": sum(difference) / len(difference),
            "sampling/sampling_logp_difference/max": max(difference),
        }
        if self.is_geometric or (self.low, self.high) in ((None, None), (1.0, 1.0)):
            return values
        return values | {
            "sampling/importance_sampling_ratio/min": min(self.applied),
            "sampling/importance_sampling_ratio/mean": sum(self.applied) / len(self.applied),
            "sampling/importance_sampling_ratio/max": max(self.applied),
        }

    def verl(self):
        values = self.verl_difference()
        is_tis = self.mode == "truncate" and self.low is None and self.high is not None
        is_icepop = self.mode == "mask" and None not in (self.low, self.high)
        if not self.is_geometric and (is_tis or is_icepop):
            values |= self.verl_weights()
        return {f"rollout_corr/{name}": value for name, value in values.items()}

    def verl_weights(self):
        means, n = [sum(row) / len(row) for row in self.w], len(self.flat)
        raw_means = [sum(row) / len(row) for row in self.ratios]
        lower = 1 / self.high if self.low is None else self.low
        values = {
            "rollout_is_mean": sum(self.flat) / n,
            "rollout_is_max": max(self.flat if self.level == "token" else self.units),
            "rollout_is_min": min(self.flat if self.level == "token" else self.units),
            "rollout_is_std": statistics.pstdev(self.flat),
            "rollout_is_eff_sample_size": ess(self.flat),
            "rollout_is_seq_mean": sum(means) / len(means),
            "rollout_is_seq_std": statistics.stdev(means),
            "rollout_is_seq_max": max(means),
            "rollout_is_seq_min": min(means),
            "rollout_is_seq_max_deviation": max(abs(x - 1) for x in means),
        }
        values |= {
            "rollout_is_ratio_fraction_high": sum(x > self.high for x in self.units) / len(self.units),
            "rollout_is_ratio_fraction_low": sum(x < lower for x in self.units) / len(self.units),
            "rollout_is_seq_fraction_high": sum(x > self.high for x in raw_means) / len(means),
            "rollout_is_seq_fraction_low": sum(x < lower for x in raw_means) / len(means),
        }
        if self.mode == "mask":
            out = [outside(x, self.low, self.high) for row in self.ratios for x in row]
            values["rollout_is_oob_ratio"] = sum(out) / len(out)
        return values

    @property
    def is_geometric(self):
        return self.level == "geometric"

    def verl_difference(self):
        trained, sampled = ([-sum(row) / len(row) for row in side] for side in (self.a, self.b))
        num, n = len(trained), len(self.r)
        apart = [x - y for x, y in zip(trained, sampled, strict=True)]
        sums = [math.fsum(a) - math.fsum(b) for a, b in zip(self.a, self.b, strict=True)]
        return {
            "training_ppl": sum(map(math.exp, trained)) / num,
            "training_log_ppl": sum(trained) / num,
            "rollout_ppl": sum(map(math.exp, sampled)) / num,
            "rollout_log_ppl": sum(sampled) / num,
            "kl": -sum(self.r) / n,
            "k3_kl": sum(math.exp(x) - x - 1 for x in self.r) / n,
            "log_ppl_diff": sum(apart) / num,
            "log_ppl_abs_diff": sum(map(abs, apart)) / num,
            "log_ppl_diff_max": max(apart),
            "log_ppl_diff_min": min(apart),
            "ppl_ratio": sum(map(math.exp, apart)) / num,
            "chi2_token": sum(math.exp(x) ** 2 for x in self.r) / n - 1,
            "chi2_seq": sum(math.exp(x) ** 2 for x in sums) / num - 1,
        }

    def nemo_rl(self):
        n, js = len(self.r), []
        for p, q in ((math.exp(x), math.exp(y)) for a, b in zip(self.a, self.b, strict=True)
                     for x, y in zip(a, b, strict=True)):  # fmt: skip
            m = (p + q) / 2
            js.append(sum(x / m - math.log(x / m) - 1 for x in (p, q)) / 2)
        of_samples = [
            sum(math.exp(abs(x - y)) for x, y in zip(a, b, strict=True)) / len(a)
            for a, b in zip(self.a, self.b, strict=True)
        ]
        values = {
            "token_mult_prob_error": sum(math.exp(abs(x)) for x in self.r) / n,
            "max_seq_mult_prob_error": max(of_samples),
            "mean_seq_mult_prob_error": sum(of_samples) / len(of_samples),
            "min_seq_mult_prob_error": min(of_samples),
            "gen_kl_error": sum(math.exp(x) - x - 1 for x in self.r) / n,
            "policy_kl_error": sum(math.exp(-x) + x - 1 for x in self.r) / n,
            "js_divergence_error": sum(js) / n,
        }
        is_plain = self.mode == "truncate" and self.low is None and self.high is None
        is_tis = self.mode == "truncate" and self.high is not None
        is_filter = self.mode == "mask" and None not in (self.low, self.high)  # icepop, seq-mask-tis
        if self.level == "token" and (is_plain or is_tis or is_filter):
            values["sampling_importance_ratio"] = sum(self.applied) / len(self.applied)
        if is_filter or (is_tis and not self.is_geometric):
            of = self.units if self.is_geometric else [x for row in self.ratios for x in row]
            values["is_oob_ratio"] = sum(outside(x, self.low, self.high) for x in of) / len(of)
        return values


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
class TestAgainstPlainLoops:
    def test_weights(self, options, spread):
        found = importance_weights(*sides(spread), **options)
        for got, want in zip(found.weights, weights_in_plain_loops(*sides(spread), **options), strict=True):
            assert got.dtype == torch.float32
            assert got.tolist() == pytest.approx(want, rel=1e-6, abs=0)

    def test_figures(self, options, spread):
        found, want = importance_weights(*sides(spread), **options), Figures(*sides(spread), **options)
        assert found.metrics == pytest.approx(want.ours(), rel=1e-9, abs=1e-9)
        for name, printed in found.as_printed_by.items():
            assert printed == pytest.approx(getattr(want, name)(), rel=1e-9, abs=1e-9)
        assert list(found.as_printed_by) == ["trl", "verl", "nemo_rl"]


@pytest.mark.parametrize(
    ("trainers", "options"),
    [
        ("trl verl nemo_rl", {}),
        ("trl verl nemo_rl", {"mode": "mask", "low": 0.5}),
        ("trl verl", {"level": "sequence"}),
        ("trl verl", {"level": "sequence", "mode": "mask", "low": 0.5}),
        ("trl nemo_rl", {"low": 0.5}),
        ("trl", {"mode": "mask"}),
        ("trl", {"low": 0.5, "high": None}),
        ("trl", {"mode": "mask", "low": 0.5, "high": None}),
        ("nemo_rl", {"high": None}),
        ("verl nemo_rl", {"mode": "mask", "low": 1.0, "high": 1.0}),
        ("", {"level": "geometric"}),
        ("", {"level": "geometric", "mode": "mask", "low": 0.9}),
    ],
)
def test_weights_have_the_names_of_the_trainers_that_can_weigh_so(trainers, options):
    printed = importance_weights(*sides(), **options).as_printed_by
    means = {
        "trl": "sampling/importance_sampling_ratio/mean",
        "verl": "rollout_corr/rollout_is_mean",
        "nemo_rl": "sampling_importance_ratio",
    }
    assert [name for name, mean in means.items() if mean in printed[name]] == trainers.split()
    assert {"sampling/sampling_logp_difference/mean"} <= printed["trl"].keys()
    assert {"rollout_corr/kl", "rollout_corr/chi2_seq"} <= printed["verl"].keys()
    assert {"gen_kl_error", "max_seq_mult_prob_error"} <= printed["nemo_rl"].keys()


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("level", LEVELS)
def test_dense_and_ragged_agree(level, padding_side):
    ragged = sides()
    dense = [pad_sequence(side, batch_first=True, padding_side=padding_side) for side in ragged]
    one, other = (importance_weights(*s, level=level, high=1.05) for s in (ragged, dense))
    want = pad_sequence(one.weights, batch_first=True, padding_side=padding_side)
    assert torch.equal(other.weights, want)
    assert (other.metrics, other.as_printed_by) == (one.metrics, one.as_printed_by)


def test_a_token_that_the_trainer_finds_more_probable_weighs_more():
    """The sign: the trainer's probability is above the fraction line."""
    (row,) = importance_weights([torch.tensor([-1.0])], [torch.tensor([-1.5])], [torch.ones(1)]).weights
    assert row.item() == pytest.approx(math.exp(0.5))


def test_weighted_samples_of_the_sampler_have_the_mean_of_the_trainer():
    """Tokens in the sampler's proportions, with a value each: the weighted mean is that of the trainer."""
    counts = torch.tensor([500, 300, 150, 50])
    q = (counts / 1000).double().log()
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()
    value = torch.tensor([1.0, -2.0, 3.0, 5.0])
    drawn = torch.arange(4).repeat_interleave(counts)
    (weights,) = importance_weights([p[drawn]], [q[drawn]], [torch.ones(1000)], high=None).weights
    assert (weights * value[drawn]).mean().item() == pytest.approx((p.exp() * value).sum().item(), rel=1e-6)


def test_whole_sequences_of_the_sampler_have_the_mean_of_the_trainer():
    """All sequences of two tokens, each as often as it is drawn: only ``"sequence"`` has no bias."""
    q, p = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
    after = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    pairs = [(i, j) for i in range(2) for j in range(2)]
    drawn = [pair for pair in pairs for _ in range(int(q[pair[0]] * after[0][pair] * 8))]
    rows = lambda first, then: [torch.tensor([first[i], then[i, j]]).log() for i, j in drawn]  # noqa: E731
    masks = [torch.ones(2)] * len(drawn)
    value = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    want = sum(p[i] * after[1][i, j] * value[i, j] for i, j in pairs).item()
    for level, is_unbiased in (("sequence", True), ("geometric", False)):
        weights = importance_weights(
            rows(p, after[1]), rows(q, after[0]), masks, level=level, high=None
        ).weights
        got = sum(w[0] * value[pair] for w, pair in zip(weights, drawn, strict=True)).item() / len(drawn)
        assert (got == pytest.approx(want, rel=1e-6)) == is_unbiased


def test_weights_are_constants():
    trained, sampled, masks = sides()
    trained = [row.requires_grad_() for row in trained]
    assert not any(row.requires_grad for row in importance_weights(trained, sampled, masks).weights)


def test_long_sequences_neither_overflow_nor_lose_digits():
    n = 20_000
    a, mask = torch.full((n,), -1.0), torch.ones(n)
    (row,) = importance_weights([a], [a - 1e-4], [mask], level="sequence", high=None).weights
    want = math.exp(math.fsum((a.double() - (a - 1e-4).double()).tolist()))
    assert row[0].item() == pytest.approx(want, rel=1e-6)
    for shift in (1.0, -1.0):
        found = importance_weights([a], [a + shift], [mask], level="sequence", high=None)
        assert found.weights[0].unique().item() == pytest.approx(math.exp(-20 * shift), rel=1e-6)
        assert all(map(math.isfinite, found.metrics.values()))
    (row,) = importance_weights([a], [a + 1], [mask], level="sequence", mode="mask", low=1e-12).weights
    assert row.unique().item() == 0.0


@pytest.mark.parametrize("r", [35.0, -35.0])
def test_other_trainers_figures_are_bounded_only_where_they_bound_them(r):
    """verl bounds its weights and chi2, TRL and NeMo RL bound nothing."""
    a, b = (-0.01, -0.01 - r) if r > 0 else (-0.01 + r, -0.01)
    sides = [torch.tensor([[x]], dtype=torch.float64) for x in (a, b)]
    found = importance_weights(*sides, torch.ones(1, 1), high=1e20).as_printed_by
    m = math.log((math.exp(a) + math.exp(b)) / 2)
    want = {
        "rollout_corr/kl": -r,
        "rollout_corr/k3_kl": math.exp(r) - r - 1,
        "rollout_corr/ppl_ratio": math.exp(-r),
        "rollout_corr/rollout_is_mean": math.exp(math.copysign(20, r)),
        "rollout_corr/chi2_token": math.exp(2 * math.copysign(20, r)) - 1,
        "rollout_corr/chi2_seq": math.exp(2 * math.copysign(20, r)) - 1,
        "token_mult_prob_error": math.exp(35),
        "gen_kl_error": math.exp(r) - r - 1,
        "policy_kl_error": math.exp(-r) + r - 1,
        "js_divergence_error": sum(math.exp(x - m) - (x - m) - 1 for x in (a, b)) / 2,
        "sampling_importance_ratio": math.exp(r),
        "sampling/importance_sampling_ratio/mean": math.exp(r),
    }
    printed = found["trl"] | found["verl"] | found["nemo_rl"]
    assert {name: printed[name] for name in want} == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("r", [2000.0, -2000.0])
def test_own_figures_stay_finite(r, level):
    sides = [torch.tensor([[min(0.0, r), -1.0]]), torch.tensor([[min(0.0, -r), -1.0]])]
    found = importance_weights(*sides, torch.ones(1, 2), level=level, high=None)
    assert all(map(math.isfinite, found.metrics.values()))
    assert found.weights.isfinite().all()


def test_where_nothing_is_kept_there_are_zeros_and_no_figures():
    found = importance_weights(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert found.weights.tolist() == [[0.0] * 3] * 2
    assert found.metrics == {"num_tokens": 0.0, "num_sequences": 0.0}
    assert found.as_printed_by == {"trl": {}, "verl": {}, "nemo_rl": {}}
    assert importance_weights([], [], []).weights == []


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_normalized_weights_have_the_mean_one_over_tokens_or_samples(options):
    plain = importance_weights(*sides(1.0), **options)
    found = importance_weights(*sides(1.0), **options, normalize=True)
    rows = [w[m] for w, m in zip(plain.weights, sides()[2], strict=True) if m.any()]
    units = torch.cat(rows) if options["level"] == "token" else torch.stack([row[0] for row in rows])
    factor = units.double().mean().item() or 1.0  # all may be masked
    for got, want in zip(found.weights, plain.weights, strict=True):
        torch.testing.assert_close(got, want / factor)
    of_weights = ("weight_mean", "weight_min", "weight_max", "weight_std")
    scaled = {name: x / factor if name in of_weights else x for name, x in plain.metrics.items()}
    assert found.metrics == pytest.approx(scaled, rel=1e-6)
    verl = plain.as_printed_by["verl"]  # of the weights before they are normalized
    if "rollout_corr/rollout_is_mean" in verl:
        verl = verl | {"rollout_corr/rollout_is_batch_norm_factor": pytest.approx(factor, rel=1e-6)}
    assert found.as_printed_by["verl"] == verl
    assert not [name for name in found.as_printed_by["trl"] if "importance" in name]
    assert not {"sampling_importance_ratio", "is_oob_ratio"} & found.as_printed_by["nemo_rl"].keys()


def test_weights_of_nothing_are_divided_by_nothing():
    a, mask = torch.full((1, 4), -1.0), torch.ones(1, 4)
    found = importance_weights(a, a - 3, mask, mode="mask", low=0.5, normalize=True)
    assert found.weights.count_nonzero() == 0
    assert found.as_printed_by["verl"]["rollout_corr/rollout_is_batch_norm_factor"] == 1.0
    assert importance_weights(a, a, mask * 0, normalize=True).weights.count_nonzero() == 0


def test_where_all_is_masked_the_figures_are_finite():
    a, mask = torch.full((1, 4), -1.0), torch.ones(1, 4)
    found = importance_weights(a, a - 3, mask, mode="mask")
    assert found.weights.count_nonzero() == 0
    assert found.metrics["effective_sample_size_fraction"] == 0.0
    assert found.metrics["above_high_fraction"] == 1.0
    assert all(math.isfinite(x) for printed in found.as_printed_by.values() for x in printed.values())


def test_a_missing_log_prob_names_the_sample_and_the_side():
    trained, sampled, masks = sides()
    broken = [*sampled[:2], sampled[2] * torch.nan, *sampled[3:]]
    with pytest.raises(MissingLogProbError, match="^sampler_log_probs: sample 2, token"):
        importance_weights(trained, broken, masks)
    broken = [trained[0] - torch.inf, *trained[1:]]
    with pytest.raises(MissingLogProbError, match="^log_probs: sample 0, token .* -inf"):
        importance_weights(broken, sampled, masks)


def test_sides_of_other_shapes_are_refused():
    trained, sampled, masks = sides()
    with pytest.raises(
        InputError, match=r"sample 0: log_probs \[7\], sampler_log_probs \[6\] and mask \[7\]"
    ):
        importance_weights(trained, [sampled[0][1:], *sampled[1:]], masks)
    with pytest.raises(InputError, match="must all be tensors, or all be lists"):
        importance_weights(trained, sampled, torch.ones(5, 12))


@pytest.mark.parametrize("level", LEVELS)
def test_a_last_dimension_of_one_is_not_taken_for_samples_of_one_token(level):
    dense = [torch.zeros(2, 3, 1), torch.ones(2, 3, 1), torch.ones(2, 3, 1, dtype=torch.bool)]
    with pytest.raises(InputError, match=r"^log_probs has the shape \[2, 3, 1\], .*squeeze"):
        importance_weights(*dense, level=level)
    with pytest.raises(InputError, match=r"^log_probs: sample 0 has the shape \[3, 1\], .*squeeze"):
        importance_weights(*map(list, dense), level=level)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "batch"}, "level='batch' does not exist; choose one of token, sequence, geometric"),
        ({"mode": "clip"}, "mode='clip' does not exist; choose one of truncate, mask"),
        ({"high": 0.9}, "high must be a finite number at least 1, or None for no bound; got 0.9"),
        ({"high": math.inf}, "high must be a finite number"),
        ({"high": math.nan}, "high must be a finite number"),
        ({"high": True}, "high must be a finite number"),
        ({"high": "2"}, "high must be a finite number"),
        ({"low": 0.0}, "low must be a finite number above 0 and at most 1, or None for no bound; got 0.0"),
        ({"low": 1.5}, "low must be a finite number above 0 and at most 1"),
        ({"low": -1}, "low must be a finite number above 0 and at most 1"),
        ({"mode": "mask", "high": None}, "mode='mask' without bounds masks nothing"),
        ({"normalize": 1}, "normalize must be True or False; got 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        importance_weights(*sides(), **options)


@pytest.mark.parametrize("high", [2, 10**20, Fraction(3, 2), np.float32(1.5)])
def test_a_bound_may_be_any_real_number(high):
    found, same = (importance_weights(*sides(), high=bound).weights for bound in (high, float(high)))
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


def test_the_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        importance_weights(*sides()).metrics = {}
    assert isinstance(importance_weights(*sides()), Importance)


LOG_PROB = st.floats(-50.0, 0.0, width=32)
SAMPLE = st.lists(st.tuples(LOG_PROB, LOG_PROB, st.booleans()), max_size=6)
HOW = st.sampled_from(OPTIONS)


@settings(max_examples=200, deadline=None)
@given(batch=st.lists(SAMPLE, max_size=4), options=HOW)
def test_weights_are_between_zero_and_the_bound(batch, options):
    columns = [[[token[k] for token in sample] for sample in batch] for k in range(3)]
    trained, sampled, masks = ([torch.tensor(row) for row in side] for side in columns)
    found = importance_weights(trained, sampled, masks, **options)
    high = torch.tensor(options["high"] or 1e9)
    for row, mask in zip(found.weights, masks, strict=True):
        mask = mask.bool()
        assert (row[~mask] == 0).all()
        assert ((row >= 0) & (row <= high)).all()
        if options["mode"] == "truncate":
            assert (row[mask] >= (options["low"] or 0.0) * (1 - 1e-6)).all()
        if options["level"] != "token":
            assert len(row[mask].unique()) <= 1
    assert 0 <= found.metrics.get("effective_sample_size_fraction", 0) <= 1


@settings(max_examples=100, deadline=None)
@given(batch=st.lists(SAMPLE, max_size=4), options=HOW)
def test_equal_log_probs_have_weight_one(batch, options):
    sides = [torch.tensor([token[0] for token in sample]) for sample in batch]
    masks = [torch.tensor([token[2] for token in sample], dtype=torch.bool) for sample in batch]
    found = importance_weights(sides, sides, masks, **options)
    for row, mask in zip(found.weights, masks, strict=True):
        assert torch.equal(row, mask.float())


def test_a_bound_that_no_float_holds_is_refused():
    with pytest.raises(OptionError, match="high must be a finite number at least 1"):
        importance_weights([torch.zeros(1)], [torch.zeros(1)], [torch.ones(1)], high=10**400)
