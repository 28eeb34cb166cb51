"""The estimators, against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_kl import kl_estimate
from vllm_kl.errors import InputError, MissingLogProbError, OptionError
from vllm_kl.kl import ESTIMATORS


def whole_vocabulary(seed=0, vocab=50):
    """Two distributions as one 'sequence' that visits every token once, and the weights that make a mean of it."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(1, vocab, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    return p, q, (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_over_the_vocabulary_is_the_closed_form_kl(estimator):
    p, q, closed_form = whole_vocabulary()
    values = kl_estimate(p, q, torch.ones_like(p, dtype=torch.bool), estimator=estimator)
    assert values.dtype == torch.float32
    torch.testing.assert_close((p.exp() * values).sum(), closed_form, rtol=1e-5, atol=1e-6)


def test_each_estimator_is_its_formula():
    policy, ref, mask = torch.tensor([[-1.0]]), torch.tensor([[-1.5]]), torch.tensor([[True]])
    got = {name: kl_estimate(policy, ref, mask, estimator=name) for name in ESTIMATORS}
    want = {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 1 + 0.5, "abs": 0.5}
    assert {name: value.item() for name, value in got.items()} == pytest.approx(want)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_identical_models_give_zero(estimator):
    p, _, _ = whole_vocabulary()
    assert (kl_estimate(p, p, torch.ones_like(p, dtype=torch.bool), estimator=estimator) == 0).all()


def test_k3_keeps_its_digits_where_models_are_close():
    kl = kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-1.0 + 2**-12]]), torch.tensor([[True]]), estimator="k3")
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
    policy, ref = [torch.tensor([-1.0]), torch.tensor([-1.0, -3.0])], [torch.tensor([-2.0]), torch.tensor([-2.0, -1.0])]
    got = kl_estimate(policy, ref, [torch.ones(1, dtype=torch.bool), torch.tensor([False, True])])
    assert [row.tolist() for row in got] == [[1.0], [0.0, -2.0]]


def test_bad_input_is_refused_by_name():
    one = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(InputError, match=r"log_probs \[2, 3\], ref_log_probs \[2, 4\].*share one pad_output"):
        kl_estimate(one, torch.zeros(2, 4), mask)
    with pytest.raises(InputError, match=r"sample 1: log_probs \[3\], ref_log_probs \[2\]"):
        kl_estimate(list(one), [one[0], one[1, :2]], list(mask))
    with pytest.raises(InputError, match="2, 1 and 2 samples"):
        kl_estimate(list(one), [one[0]], list(mask))
    with pytest.raises(MissingLogProbError, match="ref_log_probs: sample 1, token 2 of 3"):
        kl_estimate(one, torch.tensor([[0, 0, 0], [0, 0, float("nan")]]), mask)
    with pytest.raises(
        MissingLogProbError, match="KL k3: sample 0, token 0 of 1 is kept by the mask but its value is inf"
    ):
        kl_estimate(torch.tensor([[-120.0]]), torch.tensor([[-1.0]]), torch.tensor([[True]]), estimator="k3")
    with pytest.raises(OptionError, match="estimator='k4' does not exist; choose one of k1, k2, k3, abs"):
        kl_estimate(one, one, mask, estimator="k4")
