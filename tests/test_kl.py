"""The estimators, against closed forms in float64."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from vllm_kl import kl_estimate
from vllm_kl.errors import InputError, MissingLogProbError, OptionError
from vllm_kl.kl import ESTIMATORS, TOKEN_ESTIMATORS


def whole_vocabulary(seed=0, vocab=50):
    """Return two distributions, as one 'sequence' that has every token once, and their KL."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(1, vocab, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    return p, q, (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_over_the_vocabulary_is_the_closed_form_kl(estimator, direction):
    p, q, closed_form = whole_vocabulary()
    if direction == "forward":
        closed_form = (q.exp() * (q - p)).sum()
    values = kl_estimate(p, q, torch.ones_like(p, dtype=torch.bool), estimator=estimator, direction=direction)
    assert values.dtype == torch.float32
    torch.testing.assert_close((p.exp() * values).sum(), closed_form, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "abs"])
def test_forward_is_the_reverse_of_exchanged_sides_times_the_importance_weight(estimator):
    p, q, _ = whole_vocabulary()
    mask = torch.ones_like(p, dtype=torch.bool)
    got = kl_estimate(p, q, mask, estimator=estimator, direction="forward")
    torch.testing.assert_close(got, (q - p).exp().float() * kl_estimate(q, p, mask, estimator=estimator))


class TestTopK:
    @pytest.mark.parametrize("direction", ["reverse", "forward"])
    @pytest.mark.parametrize("k", [1, 5, 49])
    def test_it_is_the_closed_form_of_k_tokens_and_one_for_the_rest(self, k, direction):
        p, q, _ = whole_vocabulary()
        ids = p.topk(k).indices
        lumped = [
            torch.cat([side.gather(1, ids).exp(), 1 - side.gather(1, ids).exp().sum(1, True)], 1)
            for side in (p, q)
        ]
        a, b = lumped if direction == "reverse" else reversed(lumped)
        want = (a * (a / b).log()).sum(1, keepdim=True)
        best = [side.gather(1, ids)[:, None] for side in (p, q)]  # one sequence of one token, [1, 1, k]
        got = kl_estimate(*best, torch.tensor([[True]]), estimator="topk", direction=direction)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        (ragged,) = kl_estimate(
            *([side[0]] for side in best), [torch.tensor([True])], estimator="topk", direction=direction
        )
        assert torch.equal(ragged, got[0])

    def test_it_grows_to_the_kl_with_k(self):
        p, q, closed_form = whole_vocabulary()
        values = []
        for k in (1, 4, 16, 50):
            ids = p.topk(k).indices
            best = [side.gather(1, ids)[:, None] for side in (p, q)]
            values.append(kl_estimate(*best, torch.tensor([[True]]), estimator="topk").item())
        assert values == sorted(values)
        assert values[-1] == pytest.approx(closed_form.item(), rel=1e-5)

    def test_outside_the_mask_it_is_zero_and_nothing_is_read(self):
        side = torch.full((1, 2, 3), -2.0)
        side[0, 1] = torch.nan
        side.requires_grad_()
        kl = kl_estimate(side, torch.full((1, 2, 3), -3.0), torch.tensor([[True, False]]), estimator="topk")
        kl.sum().backward()
        assert kl[0, 0] > 0
        assert kl[0, 1] == 0
        assert side.grad[0, 1].tolist() == [0.0] * 3
        assert side.grad.isfinite().all()

    def test_shapes_that_do_not_fit_are_refused(self):
        with pytest.raises(InputError, match=r"log_probs \[1, 2\].*mask \[1, 2\] do not fit.*\[..., T, K\]"):
            kl_estimate(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), estimator="topk")
        ref = torch.full((1, 2, 3), -2.0)
        ref[0, 1, 2] = -torch.inf
        with pytest.raises(MissingLogProbError, match="ref_log_probs: sample 0, token 1 of 2"):
            kl_estimate(torch.full((1, 2, 3), -2.0), ref, torch.ones(1, 2), estimator="topk")


class TestClamps:
    FAR = torch.tensor([[-120.0]]), torch.tensor([[-1.0]]), torch.tensor([[True]])  # a log-ratio of 119

    def test_an_impossible_token_overflows_neither_k3_nor_its_gradient(self):
        policy = self.FAR[0].clone().requires_grad_()
        kl = kl_estimate(policy, *self.FAR[1:], estimator="k3")
        kl.sum().backward()
        assert kl.item() == pytest.approx(math.exp(20) - 21)
        assert policy.grad.item() == 0
        assert kl_estimate(*self.FAR, estimator="k3", clamp_log_ratio=3).item() == pytest.approx(
            math.exp(3) - 4
        )

    def test_it_spares_what_has_no_exponential_to_overflow(self):
        far = [side.clone() for side in (self.FAR[1], self.FAR[0], self.FAR[2])]
        got = {name: kl_estimate(*far, estimator=name).item() for name in ("k1", "k2", "k3", "abs")}
        assert got == pytest.approx({"k1": 119, "k2": 119**2 / 2, "k3": 118, "abs": 119})

    @pytest.mark.parametrize(("r", "slope"), [(-35.0, 1.0), (-5.0, 1 - math.exp(-5)), (35.0, 0.0)])
    def test_k3_never_pulls_the_policy_away_from_the_reference(self, r, slope):
        """The slope of k3 along the policy's log-prob has the sign of the policy's excess, or is 0."""
        policy = torch.tensor([[-40.0]], requires_grad=True)
        kl = kl_estimate(policy, policy.detach() + r, torch.tensor([[True]]), estimator="k3")
        kl.sum().backward()
        assert kl.item() == pytest.approx(math.exp(min(r, 20)) - 1 - min(r, 20), rel=1e-6)
        assert policy.grad.item() == pytest.approx(slope, rel=1e-6)

    def test_forwards_weight_is_clamped_too(self):
        assert kl_estimate(*self.FAR, direction="forward").item() == pytest.approx(119 * math.exp(20))

    @pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
    def test_the_output_has_a_bound_if_asked_for(self, estimator):
        assert abs(kl_estimate(*self.FAR, estimator=estimator, clamp_output=10.0).item()) == 10.0

    @pytest.mark.parametrize("bound", [10, 10**20, Fraction(21, 2), np.float32(10.5), np.int64(10), math.inf])
    def test_a_bound_may_be_any_real_number(self, bound):
        unbounded = kl_estimate(*self.FAR, clamp_log_ratio=None, clamp_output=None).item()
        found = kl_estimate(*self.FAR, clamp_log_ratio=bound, clamp_output=bound).item()
        assert found == max(-float(bound), min(float(bound), unbounded))

    @pytest.mark.parametrize("bound", [0, -1.0, float("nan"), "20", True])
    def test_a_bound_that_is_none_is_refused(self, bound):
        with pytest.raises(OptionError, match="clamp_log_ratio must be a positive number"):
            kl_estimate(*self.FAR, clamp_log_ratio=bound)
        with pytest.raises(OptionError, match="clamp_output must be a positive number"):
            kl_estimate(*self.FAR, clamp_output=bound)


def test_each_estimator_is_its_formula():
    policy, ref, mask = torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]])
    got = {name: kl_estimate(policy, ref, mask, estimator=name) for name in TOKEN_ESTIMATORS}
    want = {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 1 + 0.5, "abs": 0.5}
    assert {name: value.item() for name, value in got.items()} == pytest.approx(want)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_identical_models_give_zero_and_others_do_not(estimator, direction):
    p, q, _ = whole_vocabulary()
    mask = torch.ones_like(p, dtype=torch.bool)
    if estimator == "topk":
        p, q, mask = p[..., :8].unsqueeze(0), q[..., :8].unsqueeze(0), torch.ones(1, 1, dtype=torch.bool)
    options = {"estimator": estimator, "direction": direction}
    assert (kl_estimate(p, p, mask, **options) == 0).all()
    assert (kl_estimate(p, q, mask, **options) != 0).all()


def test_k3_keeps_its_digits_where_models_are_close():
    kl = kl_estimate(
        torch.tensor([[-1.0]]), torch.tensor([[-1.0 + 2**-12]]), torch.tensor([[True]]), estimator="k3"
    )
    assert kl.item() == pytest.approx(2**-25, rel=1e-3)


def test_outside_the_mask_it_is_exactly_zero_and_has_no_gradient():
    policy = torch.tensor([[-1.0, float("nan"), float("inf")]], requires_grad=True)
    mask = torch.tensor([[True, False, False]])
    kl = kl_estimate(policy, torch.full((1, 3), -2.0), mask, estimator="k3")
    kl.sum().backward()
    assert kl[0, 1:].tolist() == [0.0, 0.0]
    assert policy.grad[0, 1:].tolist() == [0.0, 0.0]
    assert policy.grad[0, 0] != 0


def test_ragged_lists_give_a_ragged_list():
    policy, ref = (
        [torch.tensor([-1.0]), torch.tensor([-1.0, -3.0])],
        [torch.tensor([-2.0]), torch.tensor([-2.0, -1.0])],
    )
    got = kl_estimate(policy, ref, [torch.ones(1, dtype=torch.bool), torch.tensor([False, True])])
    assert [row.tolist() for row in got] == [[1.0], [0.0, -2.0]]


def test_bad_input_is_refused_by_name():
    one = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(InputError, match=r"log_probs \[2, 3\], ref_log_probs \[2, 4\].*share one pad_output"):
        kl_estimate(one, torch.zeros(2, 4), mask)
    with pytest.raises(InputError, match=r"sample 1: log_probs \[3\], ref_log_probs \[2\]"):
        kl_estimate(list(one), [one[0], one[1, :2]], list(mask))
    with pytest.raises(InputError, match="must all be tensors, or all be lists"):
        kl_estimate(one, list(one), mask)
    with pytest.raises(InputError, match="2, 1 and 2 samples"):
        kl_estimate(list(one), [one[0]], list(mask))
    with pytest.raises(MissingLogProbError, match="ref_log_probs: sample 1, token 2 of 3"):
        kl_estimate(one, torch.tensor([[0, 0, 0], [0, 0, float("nan")]]), mask)
    with pytest.raises(
        MissingLogProbError, match="KL k3: sample 0, token 0 of 1 is kept by the mask but its value is inf"
    ):
        kl_estimate(*TestClamps.FAR, estimator="k3", clamp_log_ratio=None)
    with pytest.raises(OptionError, match="direction='back' does not exist"):
        kl_estimate(one, one, mask, direction="back")
    with pytest.raises(
        OptionError, match="estimator='k4' does not exist here; choose one of k1, k2, k3, abs, topk"
    ):
        kl_estimate(one, one, mask, estimator="k4")


def test_a_kl_that_is_not_finite_says_nothing_of_log_probs():
    far = torch.tensor([[-1000.0]]), torch.tensor([[-1.0]]), torch.tensor([[True]])
    with pytest.raises(
        MissingLogProbError,
        match=r"its value is inf \(1 such tokens in this sample\)\.\nScore this batch again",
    ):
        kl_estimate(*far, estimator="k3", clamp_log_ratio=None)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (None, "log_probs is NoneType, expected a tensor"),
        (torch.tensor(-1.0), r"log_probs has the shape \[\], expected \[B, T\]"),
        ([[-1.0, -2.0]], r"log_probs: sample 0 is list, expected a tensor \[T\]"),
        ([torch.tensor(-1.0)], r"log_probs: sample 0 has the shape \[\], expected \[T\]"),
        (torch.zeros(2, 3, 1), r"log_probs has the shape \[2, 3, 1\], expected \[B, T\]\. .*\.squeeze\(-1\)"),
        (torch.zeros(2, 2, 3), r"log_probs has the shape \[2, 2, 3\], expected \[B, T\]$"),
        (
            [torch.zeros(2), torch.zeros(2, 1)],
            r"log_probs: sample 1 has the shape \[2, 1\], expected \[T\]\. .*\.squeeze\(-1\)",
        ),
        (torch.zeros(1, 2, device="meta"), "log_probs is on the meta device"),
        ([torch.zeros(2), torch.zeros(2, device="meta")], "log_probs: sample 1 is on the meta device"),
        (torch.zeros(2).to_sparse(), r"log_probs is a nested or sparse tensor \(torch.sparse_coo\)"),
        ([torch.zeros(2).to_sparse()], "log_probs: sample 0 is a nested or sparse tensor"),
        (
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
            r"log_probs is a nested .*unbind",
        ),
    ],
)
def test_what_is_no_tensor_of_rows_is_refused_by_name(side, message):
    with pytest.raises(InputError, match=message):
        kl_estimate(side, side, side)


def test_k_log_probs_per_token_are_one_dimension_more_than_the_mask():
    side, mask = torch.zeros(2, 3, 4), torch.ones(2, 3)
    for log_probs, keep, message in (
        (side[..., None], mask[..., None], r"log_probs has the shape \[2, 3, 4, 1\], expected \[B, T, K\]"),
        (side, mask[..., None], r"mask has the shape \[2, 3, 1\], expected \[B, T\]"),
        (list(side[..., 0]), list(mask), r"log_probs: sample 0 has the shape \[3\], expected \[T, K\]"),
        (list(side), list(mask[..., None]), r"mask: sample 0 has the shape \[3, 1\], expected \[T\]"),
    ):
        with pytest.raises(InputError, match=message):
            kl_estimate(log_probs, log_probs, keep, estimator="topk")


def test_a_bound_that_no_float_holds_is_refused():
    row = torch.zeros(1, 2)
    for name in ("clamp_log_ratio", "clamp_output"):
        with pytest.raises(OptionError, match=f"{name} must be a positive number of nats"):
            kl_estimate(row, row, row, **{name: 10**400})


def test_an_estimate_of_distributions_may_have_no_samples_and_sums_beyond_its_dtype():
    assert kl_estimate([], [], [], estimator="topk") == []
    half = torch.full((1, 2, 9), -60_000.0, dtype=torch.float16)  # their sum is no number of float16
    kept = torch.tensor([[True, True]])
    assert kl_estimate(half, half, kept, estimator="topk").tolist() == [[0.0, 0.0]]
