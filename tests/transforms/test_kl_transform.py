"""Where the KL goes: the coefficient, the estimates beside it, the mask's entry, the figures for a logger."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import AdaptiveKLController, ConstantKLController

from tests.batches import dense_batch, ids_batch
from tests.transforms.helpers import GEN, MASK, REF, compute, step
from vllm_kl import KLComputation, RetrieveKL, RetrieveLogProb, kl_estimate
from vllm_kl.errors import InputError, OptionError
from vllm_kl.transforms.coefficient import Coefficient


class TestCoefficient:
    def test_a_schedule_is_called_with_the_number_of_batches_before(self):
        transform = compute(coeff=lambda batch: 0.5 * batch)
        for n in range(3):
            rewards = transform(step()).get("reward", as_list=True)
            assert rewards[1][2].item() == pytest.approx(2.0 - 0.5 * n * 1.0)
            assert transform.metrics["coeff"] == 0.5 * n

    @pytest.mark.parametrize("target", [0.5, 0.24, 0.1], ids=["far below", "a little above", "far above"])
    def test_an_adaptive_controller_moves_towards_its_target(self, target):
        kl = 0.25  # -0.5 and 1.0 nats a sequence
        controller = AdaptiveKLController(init_kl_coef=0.2, target=target, horizon=10)
        transform = compute(coeff=controller)
        transform(step())
        # This batch has the old coefficient; the next batch gets the new one.
        assert transform.metrics["coeff"] == 0.2
        error = min(max(kl / target - 1, -0.2), 0.2)  # Ziegler et al. 2019, section 2.2
        assert float(controller.coef) == pytest.approx(0.2 * (1 + error * 2 / 10), rel=1e-6)
        assert (float(controller.coef) > 0.2) == (kl > target)
        transform(step())
        assert transform.metrics["coeff"] == pytest.approx(0.2 * (1 + error * 2 / 10), rel=1e-6)

    def test_a_constant_controller_is_a_number(self):
        rewards = [
            compute(coeff=c)(step()).get("reward", as_list=True)
            for c in (0.3, ConstantKLController(kl_coef=0.3))
        ]
        assert all(torch.equal(a, b) for a, b in zip(*rewards, strict=True))

    def test_it_can_be_changed(self):
        transform = compute(coeff=1.0)
        transform.coeff = 0.0
        assert transform(step()).get("reward", as_list=True)[0].unique().tolist() == [1.0]
        with pytest.raises(OptionError):
            transform.coeff = -1

    @pytest.mark.parametrize("coeff", [-0.1, float("nan"), float("inf"), "1", None])
    def test_what_is_no_coefficient_is_refused(self, coeff):
        with pytest.raises(
            OptionError, match="coeff must be a number of at least 0, a schedule or a controller"
        ):
            compute(coeff=coeff)

    def test_a_schedule_gone_wrong_leaves_the_batch_as_it_was(self):
        transform = compute(coeff=lambda batch: -1.0)
        batch = step()
        before = batch.clone()
        with pytest.raises(OptionError, match="got -1.0 for batch 0"):
            transform(batch)
        assert set(batch.keys(True, True)) == set(before.keys(True, True))
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                batch.get("reward", as_list=True), before.get("reward", as_list=True), strict=True
            )
        )

    def test_a_clone_has_a_coefficient_of_its_own(self):
        transform = compute(coeff=1.0)
        twin = transform.clone()
        twin.coeff = 0.5
        twin(step())
        assert (transform.coeff, twin.metrics["coeff"], transform.metrics) == (1.0, 0.5, {})

    def test_what_would_have_no_effect_is_refused(self):
        for coeff in (lambda batch: 1.0, AdaptiveKLController(init_kl_coef=0.1, target=1, horizon=10)):
            with pytest.raises(OptionError, match="no effect with add_to_reward=False"):
                compute(coeff=coeff, add_to_reward=False)
        with pytest.raises(OptionError, match="it cannot begin at 0"):
            compute(coeff=AdaptiveKLController(init_kl_coef=0.0, target=1, horizon=10))

    def test_batches_that_failed_do_not_count(self):
        coefficient = Coefficient(lambda batch: batch)
        assert [coefficient.value(), coefficient.value()] == [0, 0]
        coefficient.observe(torch.ones(1))
        assert coefficient.value() == 1


class TestExtraEstimators:
    def test_k1_goes_into_the_reward_and_k3_beside_it(self):
        batch = compute(extra_estimators=("k3",), coeff=0.5)(step())
        k1, k3 = kl_estimate(GEN, REF, MASK), kl_estimate(GEN, REF, MASK, estimator="k3")
        for i in range(2):
            assert torch.equal(batch.get("kl_penalty", as_list=True)[i], k1[i])
            assert torch.equal(batch.get("kl_k3", as_list=True)[i], k3[i])
            assert torch.equal(batch.get("reward", as_list=True)[i][:, 0], (1.0 + i) - 0.5 * k1[i])

    def test_two_results_under_one_key_are_refused(self):
        with pytest.raises(OptionError, match="two results would be written to one key"):
            compute(kl_key="kl_k3", extra_estimators=("k2", "k3"))
        with pytest.raises(OptionError, match="two results would be written to one key"):
            compute(extra_estimators=("k3", "k3"))
        with pytest.raises(OptionError, match=r"such as \('k3',\)"):
            compute(extra_estimators="k3")

    @pytest.mark.parametrize("estimator", ["topk", "k4"])
    def test_what_two_log_probs_are_not_enough_for_is_refused(self, estimator):
        with pytest.raises(
            OptionError, match=f"estimator='{estimator}' does not exist here; choose one of k1, k2, k3, abs"
        ):
            compute(extra_estimators=(estimator,))

    def test_clamps_and_direction_are_those_of_kl_estimate(self):
        options = {"estimator": "k3", "clamp_log_ratio": 0.4, "clamp_output": 0.05, "direction": "forward"}
        batch = compute(**options)(step())
        for got, want in zip(
            batch.get("kl_penalty", as_list=True), kl_estimate(GEN, REF, MASK, **options), strict=True
        ):
            assert torch.equal(got, want)
        with pytest.raises(OptionError, match="clamp_output must be a positive number"):
            compute(clamp_output=-1)


class TestMetrics:
    def test_means_divide_by_the_masks_count(self):
        transform = compute(extra_estimators=("abs",), coeff=0.1)
        assert transform.metrics == {}
        transform(step())
        assert transform.metrics == pytest.approx(
            {
                "num_tokens": 4,
                "kl_k1_token_mean_nats": (0.5 - 1.0 + 0.0 + 1.0) / 4,
                "kl_k1_sequence_mean_nats": (-0.5 + 1.0) / 2,
                "kl_abs_token_mean_nats": 2.5 / 4,
                "kl_abs_sequence_mean_nats": (1.5 + 1.0) / 2,
                "coeff": 0.1,
            }
        )

    def test_where_the_mask_is_not_known_tokens_are_not_counted(self):
        """RetrieveLogProb's zeros outside its mask look like values."""
        transform = compute()
        batch = transform(step().exclude("kl_mask"))
        assert sorted(transform.metrics) == ["coeff", "kl_k1_sequence_mean_nats"]
        assert "kl_mask" not in batch.keys()

    def test_without_a_reward_there_is_no_coefficient(self):
        transform = compute(add_to_reward=False)
        assert transform(step()).get("reward", as_list=True)[0].tolist() == [1.0]
        assert "coeff" not in transform.metrics


class TestMask:
    IDS, PROMPTS = [[5, 6, 7, 8], [5, 6, 9]], [2, 1]

    @pytest.mark.parametrize("pad_output", [False, True])
    def test_retrieve_kl_writes_the_mask_that_its_kl_has(self, make_reference, make_gen, pad_output):
        transform = RetrieveKL(make_gen("vllm", pad_output=pad_output), make_reference(pad_output=pad_output))
        batch = dense_batch(self.IDS, self.PROMPTS, 0) if pad_output else ids_batch(self.IDS, self.PROMPTS)
        got = transform(batch).get("kl_mask", as_list=True)
        want = [[0, 0, 1, 1], [0, 0, 1, 1]] if pad_output else [[0, 0, 1, 1], [0, 1, 1]]
        assert [row.int().tolist() for row in got] == want
        assert all(row.dtype == torch.bool for row in got)

    @pytest.mark.parametrize("pad_output", [False, True])
    def test_torchrls_pipeline_of_three_transforms_counts_what_one_does(
        self, make_reference, make_gen, pad_output
    ):
        gen, ref = make_gen("vllm", pad_output=pad_output), make_reference(pad_output=pad_output)
        one = RetrieveKL(gen, ref)
        three = [RetrieveLogProb(gen), RetrieveLogProb(ref), KLComputation()]
        batches = []
        for transforms in ([one], three):
            batch = (
                dense_batch(self.IDS, self.PROMPTS, 0) if pad_output else ids_batch(self.IDS, self.PROMPTS)
            )
            for transform in transforms:
                batch = transform(batch)
            batches.append(batch)
        for key in ("kl_penalty", "kl_mask"):
            for a, b in zip(*(batch.get(key, as_list=True) for batch in batches), strict=True):
                assert torch.equal(a, b)
        assert one.metrics == three[-1].metrics | {"ref_version": float(ref.scorer.weight_version)}
        assert one.metrics["num_tokens"] == 4

    @pytest.mark.parametrize("wider", ["policy", "reference"])
    def test_a_side_that_scored_other_tokens_is_refused_not_read_as_zero(
        self, make_reference, make_gen, wider
    ):
        """0.0 outside one side's mask would be taken for a log-prob inside the other's."""
        gen, ref = make_gen("vllm"), make_reference()
        first = RetrieveLogProb(gen, assistant_only=wider != "policy")
        second = RetrieveLogProb(ref, assistant_only=wider != "reference")
        batch = first(ids_batch(self.IDS, self.PROMPTS))
        verb = "leaves out" if wider == "reference" else "keeps"
        with pytest.raises(InputError, match=f"sample 0, token 1: the tensordict's kl_mask {verb} the token"):
            second(batch)
        assert "ref_log_probs" not in batch.keys()

    @pytest.mark.parametrize(
        "keys",
        [
            {"mask_key": ("log_probs", "full")},
            {"mask_key": "log_probs"},
            {"kl_key": ("ref_log_probs", "full")},
            {"kl_key": "reward"},
            {"kl_key": "reward", "add_to_reward": False},
            {"kl_key": "kl_k3", "extra_estimators": ("k3",)},
        ],
    )
    def test_two_results_under_one_key_are_refused(self, make_reference, keys):
        with pytest.raises(OptionError, match="two results would be written to one key"):
            RetrieveKL("from_collector", make_reference(), **keys)

    def test_two_entries_of_one_key_are_refused_by_every_transform(self, make_reference):
        with pytest.raises(OptionError, match="two results"):
            RetrieveLogProb(make_reference(), log_probs_full_key=("a", "full"), mask_key=("a", "full"))
        for keys in ({"kl_key": ("gen", "full")}, {"mask_key": ("ref", "full")}, {"kl_key": "kl_mask"}):
            with pytest.raises(OptionError, match="two results"):
                compute(**keys)
