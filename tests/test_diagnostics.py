"""``mismatch``: every metric equals that of plain float64 loops, and the warning is readable."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from vllm_kl import mismatch
from vllm_kl.diagnostics import MismatchWarning
from vllm_kl.errors import InputError, MissingLogProbError, OptionError


def sides(spread=0.1, num_samples=5, length=40, seed=0):
    """Ragged log-probs of both sides, and masks; what lies outside a mask is NaN."""
    generator = torch.Generator().manual_seed(seed)
    sampled, scored, masks = [], [], []
    for i in range(num_samples):
        n = length + 3 * i
        a = -3 * torch.rand(n, generator=generator) - 1
        b = a + spread * torch.randn(n, generator=generator)
        mask = torch.rand(n, generator=generator) < 0.7
        sampled.append(torch.where(mask, a, torch.nan))
        scored.append(torch.where(mask, b, torch.nan))
        masks.append(mask)
    return sampled, scored, masks


def in_plain_loops(sampled, scored, masks):
    r, per_sample = [], []
    for a, b, mask in zip(sampled, scored, masks, strict=True):
        row = [y - x for x, y, kept in zip(a.tolist(), b.tolist(), mask.tolist(), strict=True) if kept]
        r += row
        per_sample.append(-sum(row) / len(row))
    n, ratios = len(r), sorted(math.exp(x) for x in r)
    return {
        "num_tokens": n,
        "kl_sampler_scorer_nats": sum(math.exp(x) - 1 - x for x in r) / n,
        "kl_scorer_sampler_nats": sum(math.exp(x) * x - math.exp(x) + 1 for x in r) / n,
        "kl_k1_nats": -sum(r) / n,
        "log_prob_diff_mean_nats": sum(abs(x) for x in r) / n,
        "log_prob_diff_max_nats": max(abs(x) for x in r),
        "token_mult_prob_error": sum(math.exp(abs(x)) for x in r) / n,
        "ratio_min": ratios[0],
        "ratio_mean": sum(ratios) / n,
        "ratio_max": ratios[-1],
        "ratio_p99": ratios[math.ceil(0.99 * n) - 1],
        "outside_0.9_1.1_fraction": sum(not 0.9 <= w <= 1.1 for w in ratios) / n,
        "effective_sample_size_fraction": sum(ratios) ** 2 / (n * sum(w * w for w in ratios)),
        "log_perplexity_diff_nats": sum(per_sample) / len(per_sample),
    }


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
def test_every_figure_agrees_with_plain_loops(spread):
    found = mismatch(*sides(spread), limits={})
    want = in_plain_loops(*sides(spread))
    assert found.metrics == pytest.approx(want, rel=1e-9)
    assert list(found.metrics) == list(want)


@pytest.mark.parametrize("r", [-35.0, 35.0, -2000.0, 2000.0])
def test_far_log_probs_have_finite_figures_and_only_exponentials_are_bounded(r):
    sides = (torch.tensor([[x]]) for x in (min(0.0, -r), min(0.0, r)))
    got = mismatch(*sides, torch.ones(1, 1), limits={}).metrics
    high = min(r, 20.0)
    assert got["kl_sampler_scorer_nats"] == pytest.approx(math.exp(high) - 1 - high)
    assert got["kl_scorer_sampler_nats"] == pytest.approx(math.exp(high) * high - math.exp(high) + 1)
    assert got["token_mult_prob_error"] == pytest.approx(math.exp(20))
    assert got["kl_k1_nats"] == -r
    assert all(map(math.isfinite, got.values()))


def test_dense_and_ragged_agree():
    ragged = sides()
    dense = [torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in ragged]
    assert mismatch(*dense, limits={}) == mismatch(*ragged, limits={})


def test_the_same_numbers_are_no_mismatch():
    sampled, _, masks = sides()
    metrics = mismatch(sampled, sampled, masks).metrics
    ones = {
        "token_mult_prob_error",
        "ratio_min",
        "ratio_mean",
        "ratio_max",
        "ratio_p99",
        "effective_sample_size_fraction",
    }
    assert {name for name, value in metrics.items() if value == 1} == ones
    assert {value for name, value in metrics.items() if name not in {*ones, "num_tokens"}} == {0.0}


def test_both_kls_are_those_of_the_distributions():
    """Tokens in the sampler's proportions: every token of a small vocabulary as often as it is drawn."""
    counts = torch.tensor([500, 300, 150, 50])
    p = (counts / 1000).double().log()
    q = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()
    drawn = torch.arange(4).repeat_interleave(counts)
    metrics = mismatch([p[drawn]], [q[drawn]], [torch.ones(1000)], limits={}).metrics
    assert metrics["kl_sampler_scorer_nats"] == pytest.approx((p.exp() * (p - q)).sum().item())
    assert metrics["kl_scorer_sampler_nats"] == pytest.approx((q.exp() * (q - p)).sum().item(), rel=1e-6)
    assert metrics["ratio_mean"] == pytest.approx(1.0)


def test_the_worst_tokens_come_with_their_context(tokenizer):
    text = "two and three are five"
    ids = torch.tensor(tokenizer(text)["input_ids"])
    sampled = [torch.full((4,), -1.0), torch.full((len(ids),), -1.0)]
    scored = [row.clone() for row in sampled]
    scored[1][10], scored[0][3], scored[1][0] = -4.0, -1.5, -9.0
    masks = [torch.ones(4), torch.ones(len(ids))]
    masks[1][0] = 0  # furthest apart, but it does not count
    worst = mismatch(
        sampled, scored, masks, token_ids=[torch.arange(4), ids], tokenizer=tokenizer, limits={}
    ).worst
    assert [(w.sample, w.position) for w in worst[:2]] == [(1, 10), (0, 3)]
    assert worst[0].token_id == ids[10]
    assert worst[0].context_ids == tuple(ids[2:15].tolist())
    assert worst[0].context == "o and th«r»ee a"
    assert str(worst[0]).startswith("sample 1, token 10 (id ")
    assert len(worst) == 10
    assert mismatch(sampled, scored, masks, num_worst=0, limits={}).worst == []


def test_what_passes_a_known_limit_is_said_with_numbers():
    with pytest.warns(
        MismatchWarning, match=r"token_mult_prob_error 1\.\d+, healthy is 1.0 to 1.05.*Worst: sample \d"
    ):
        found = mismatch(*sides(0.3))
    assert list(found.exceeded) == ["token_mult_prob_error"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not mismatch(*sides(0.01)).exceeded
    with pytest.warns(MismatchWarning, match="effective_sample_size_fraction"):
        mismatch(*sides(3.0))
    with pytest.warns(MismatchWarning, match="ratio_max"):
        mismatch(*sides(0.01), limits={"ratio_max": (1.0, 1.001)}, num_worst=0)


def test_rounding_is_no_mismatch():
    for n in range(1, 200):
        a = torch.full((1, n), -1.0)
        assert not mismatch(a, a + 0.01, torch.ones(1, n)).exceeded


def test_bad_input_is_refused_by_name():
    sampled, scored, masks = sides()
    with pytest.raises(InputError, match="the mask keeps no token"):
        mismatch(sampled, scored, [torch.zeros_like(mask) for mask in masks])
    with pytest.raises(InputError, match=r"sample 0: log_probs \[40\], scorer_log_probs \[39\] and mask"):
        mismatch(sampled, [scored[0][1:], *scored[1:]], masks)
    with pytest.raises(InputError, match=r"log_probs: sample 0 has the shape \[3, 1\], expected \[T\]"):
        mismatch(*[torch.ones(2, 3, 1)] * 3)
    with pytest.raises(InputError, match="5, 4 and 5 samples"):
        mismatch(sampled, scored[1:], masks)
    with pytest.raises(MissingLogProbError, match="scorer_log_probs: sample 2, token"):
        mismatch(sampled, [*scored[:2], scored[2] * torch.nan, *scored[3:]], masks)
    with pytest.raises(InputError, match=r"token_ids have lengths \[1, 1, 1, 1, 1\], the mask has \[40,"):
        mismatch(sampled, scored, masks, token_ids=[torch.zeros(1)] * 5)
    with pytest.raises(OptionError, match="limits on kl, but the metrics are num_tokens"):
        mismatch(sampled, scored, masks, limits={"kl": (0, 1)})
