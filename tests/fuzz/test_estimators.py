"""KL estimates and importance weights of hostile numbers: those of float64, or an error with the token."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st

from tests.fuzz.strategies import FLOATS, NO_IDS, SCALARS, fuzz, told
from vllm_kl.importance import importance_weights
from vllm_kl.kl import TOKEN_ESTIMATORS, kl_estimate

MAX, EPS = float(np.finfo(np.float32).max), 2.0**-23
LOG_PROBS = st.one_of(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32), FLOATS)
PAIRS = st.lists(st.lists(st.tuples(LOG_PROBS, LOG_PROBS, st.booleans()), max_size=4), max_size=3)
TAME = st.floats(-40, 0, width=32)
TAME_PAIRS = st.lists(st.lists(st.tuples(TAME, TAME, st.booleans()), max_size=4), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16])
CLAMPS = st.sampled_from([None, 20.0, 1.0, 1e-3, math.inf, 500.0])


def rows_of(pairs, n, dtype):
    return [torch.tensor([one[n] for one in row], dtype=dtype) for row in pairs]


def expected(p, q, estimator, direction, clamp, clamp_output):
    """The estimate of one token in float64."""
    if direction == "forward":
        p, q = q, p
    r = q - p
    bound = math.inf if clamp is None else clamp
    with np.errstate(over="ignore", invalid="ignore"):
        e = np.minimum(np.float64(r), bound)  # in k3
        value = {
            "k1": np.float64(-r),
            "k2": np.float64(r) * r / 2,
            "k3": np.expm1(e) - e,
            "abs": np.float64(abs(r)),
        }[estimator]
        # The error of float32: of the difference, of the exponential, of the sum.
        slack = 4 * EPS * (abs(p) + abs(q) + abs(e)) * (1 + abs(r) * (estimator == "k2"))
        if estimator == "k3":
            slack = 4 * EPS * (np.exp(e) * (1 + abs(p) + abs(q)) + abs(p) + abs(q) + abs(e))
        if direction == "forward":
            w = np.exp(np.clip(np.float64(-r), -bound, bound))
            value, slack = w * value, w * (slack + 4 * EPS * abs(value) * (1 + abs(p) + abs(q)))
        if clamp_output is not None:
            value = np.clip(value, -clamp_output, clamp_output)
    return value, slack + 4 * EPS * abs(value) + 1e-37


@fuzz(
    pairs=PAIRS,
    dtype=DTYPES,
    estimator=st.sampled_from(TOKEN_ESTIMATORS),
    direction=st.sampled_from(["reverse", "forward"]),
    clamp=CLAMPS,
    clamp_output=CLAMPS,
    share=4.0,
    few=200,
)
def test_estimates_are_those_of_float64_or_refused(pairs, dtype, estimator, direction, clamp, clamp_output):
    policy, ref = (rows_of(pairs, n, dtype) for n in (0, 1))
    mask = [torch.tensor([one[2] for one in row], dtype=torch.bool) for row in pairs]
    found = told(
        lambda: kl_estimate(
            policy,
            ref,
            mask,
            estimator=estimator,
            direction=direction,
            clamp_log_ratio=clamp,
            clamp_output=clamp_output,
        ),
        names="sample",
    )
    of_32 = [
        (p.float().tolist(), q.float().tolist(), m.tolist())
        for p, q, m in zip(policy, ref, mask, strict=True)
    ]
    kept = [(p, q) for row in of_32 for p, q, is_kept in zip(*row, strict=True) if is_kept]
    wanted = [expected(p, q, estimator, direction, clamp, clamp_output)[0] for p, q in kept]
    are_fine = all(math.isfinite(p) and math.isfinite(q) for p, q in kept)
    if found is None:
        # A difference of 1e15 has a square and an exponential that float32 may not hold.
        is_huge = any(abs(one) > 1e15 for pair in kept for one in pair)
        assert not are_fine or is_huge or any(not abs(one) < MAX / 16 for one in wanted), "no reason"
        return
    for row, (p_row, q_row, mask_row) in zip(found, of_32, strict=True):
        assert row.dtype == torch.float32
        for value, p, q, is_kept in zip(row.tolist(), p_row, q_row, mask_row, strict=True):
            assert math.isfinite(value)
            if not is_kept:
                assert value == 0.0
            elif math.isfinite(p) and math.isfinite(q) and max(abs(p), abs(q)) < 1e18:
                want, slack = expected(p, q, estimator, direction, clamp, clamp_output)
                assert abs(value - want) <= slack, (value, want, slack)
                assert value >= 0 or estimator == "k1" or value > -slack


@fuzz(
    pairs=TAME_PAIRS,
    level=st.sampled_from(["token", "sequence", "geometric"]),
    mode=st.sampled_from(["truncate", "mask"]),
    low=st.sampled_from([None, 0.5, 0.999, 1.0]),
    high=st.sampled_from([None, 1.0, 1.002, 2.0, 1e6]),
    normalize=st.booleans(),
    share=3.0,
    few=100,
)
def test_weights_are_those_of_float64(pairs, level, mode, low, high, normalize):
    trained, sampled = (rows_of(pairs, n, torch.float32) for n in (0, 1))
    mask = [torch.tensor([one[2] for one in row], dtype=torch.bool) for row in pairs]
    bounds = {"level": level, "mode": mode, "low": low, "high": high}
    found = told(lambda: importance_weights(trained, sampled, mask, **bounds, normalize=normalize))
    if found is None:
        assert mode == "mask"
        assert low is None
        assert high is None
        return
    for printed in found.as_printed_by.values():
        assert all(math.isfinite(value) for value in printed.values()), printed
    if normalize:  # the weights are those without it, divided by one number
        plain = importance_weights(trained, sampled, mask, **bounds)
        units = [
            row[keep][: None if level == "token" else 1]
            for row, keep in zip(plain.weights, mask, strict=True)
        ]
        mean = float(torch.cat([torch.zeros(0), *units]).double().mean()) if any(map(len, units)) else 0.0
        for row, other in zip(found.weights, plain.weights, strict=True):
            want = other.double() / mean if mean > 1e-8 else other.double()
            torch.testing.assert_close(row.double(), want, rtol=1e-5, atol=1e-12)
        found = plain
    all_weights = []
    for row, weights in zip(pairs, found.weights, strict=True):
        r = [p - q for p, q, is_kept in row if is_kept]
        total = math.fsum(r) if level == "sequence" else math.fsum(r) / max(len(r), 1)
        for (p, q, is_kept), weight in zip(row, weights.tolist(), strict=True):
            log_ratio = p - q if level == "token" else total
            ratio = math.exp(min(max(log_ratio, -20.0), 20.0))
            want = min(max(ratio, low or 0.0), high or math.inf)
            edges = [abs(log_ratio - math.log(bound)) for bound in (low, high) if bound]
            if min(edges, default=1.0) < 1e-9:
                continue  # on the bound
            if mode == "mask" and want != ratio:
                want = 0.0
            want = want if is_kept else 0.0
            assert abs(weight - want) <= 1e-6 * want + 1e-12, (weight, want)
            all_weights += [weight] * is_kept
    assert found.metrics["num_tokens"] == sum(one[2] for row in pairs for one in row)
    if found.metrics["num_tokens"] and len(all_weights) == found.metrics["num_tokens"]:
        mean = math.fsum(all_weights) / len(all_weights)
        assert abs(found.metrics["weight_mean"] - mean) <= 1e-5 * mean + 1e-12


ODD_SIDES = st.one_of(
    NO_IDS,
    st.sampled_from(
        [
            torch.zeros(()),
            torch.zeros(2, 3),
            torch.zeros(0),
            [torch.zeros(2)],
            [[0.0, -1.0]],
            np.zeros((2, 3)),
            [np.zeros(2)],
            torch.zeros(2, 3, dtype=torch.int64),
            torch.ones(2, 3, dtype=torch.bool),
            torch.zeros(2, 3, 1),
            torch.ones(2, 3, 1),
            torch.ones(2, 2, 3),
            [],
            [torch.zeros(())],
            [torch.ones(2, 1)],
            [torch.ones(1, 2, 1)],
        ]
    ),
)


@fuzz(
    policy=ODD_SIDES,
    ref=st.one_of(st.none(), ODD_SIDES),
    mask=st.one_of(st.none(), ODD_SIDES),
    estimator=st.sampled_from(["k1", "topk", "k9", None]),
    clamp=st.one_of(CLAMPS, SCALARS),
    share=2.0,
    few=100,
)
def test_sides_of_any_kind_are_compared_or_refused(policy, ref, mask, estimator, clamp):
    ref, mask = policy if ref is None else ref, policy if mask is None else mask
    estimates = told(lambda: kl_estimate(policy, ref, mask, estimator=estimator, clamp_output=clamp))
    found = told(lambda: importance_weights(policy, ref, mask, high=clamp))
    for values in (estimates, None if found is None else found.weights):
        if values is not None:  # one number for each token
            assert [row.shape for row in values] == [row.shape for row in mask]
            assert isinstance(values, list) or values.dim() <= 2
            assert all(row.dim() <= 1 for row in values)


@fuzz(
    rows=st.lists(
        st.lists(st.tuples(st.floats(-9, -0.1), st.floats(-9, -0.1)), min_size=1, max_size=4), max_size=3
    ),
    k=st.integers(1, 3),
)
def test_the_lumped_estimate_is_that_of_float64_and_not_negative(rows, k):
    def side(n):
        one = [torch.tensor([pair[n] for pair in row]).expand(k, -1).T for row in rows]
        return [row - math.log(k) for row in one]

    policy, ref = side(0), side(1)
    mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    for row, p_row, q_row in zip(kl_estimate(policy, ref, mask, estimator="topk"), policy, ref, strict=True):
        for value, p, q in zip(row.tolist(), p_row.double().numpy(), q_row.double().numpy(), strict=True):
            tails = [max(1 - np.exp(one).sum(), EPS) for one in (p, q)]
            want = (np.exp(p) * (p - q)).sum() + tails[0] * math.log(tails[0] / tails[1])
            assert abs(value - want) <= 1e-5 * (1 + abs(p).max() + abs(q).max()), (value, want)
