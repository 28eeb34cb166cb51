"""``KLComputation`` on entries that the batch already has: missing ones, zeros, masks and temperatures."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.envs import Compose

from tests import batches
from tests.transforms.helpers import assert_rows, compute, recorded_batch, rows, step
from vllm_kl import KLComputation, RetrieveLogProb
from vllm_kl.diagnostics import MismatchWarning
from vllm_kl.errors import InputError, MissingLogProbError, OptionError


class TestEntries:
    def data(self, gen, ref, **extra):
        full = {"gen": TensorDict(full=gen, batch_size=2), "ref": TensorDict(full=ref, batch_size=2)}
        return TensorDict(next=TensorDict(**full, **extra, batch_size=2), batch_size=2)

    def transform(self, **kwargs):
        return KLComputation(("gen", "full"), ("ref", "full"), **kwargs)

    def test_dense(self):
        gen, ref = -torch.rand(2, 3), -torch.rand(2, 3)
        td = self.transform(coeff=2.0)(self.data(gen, ref, reward=torch.ones(2, 1)))
        torch.testing.assert_close(td["next", "kl_penalty"], gen - ref)
        torch.testing.assert_close(td["next", "reward"], 1 - 2 * (gen - ref)[..., None])

    def test_missing_on_one_side_only_is_an_error(self):
        gen, ref = -torch.ones(2, 3), -torch.ones(2, 3) * 2
        gen[:, 0] = float("nan")
        ref[0, 0], ref[1, 0] = float("nan"), 0.0  # 0.0: what RetrieveLogProb writes outside its mask
        assert self.transform()(self.data(gen, ref))["next", "kl_penalty"].tolist() == [[0, 1, 1]] * 2
        ref[1, 2] = float("nan")
        with pytest.raises(MissingLogProbError, match="ref_log_probs: sample 1, token 2 of 3"):
            self.transform()(self.data(gen, ref))

    def test_it_follows_a_retrieve_log_prob(self, make_reference, policy_oracle, truth):
        td = recorded_batch(policy_oracle).exclude("next")
        td = KLComputation()(RetrieveLogProb(make_reference())(td))
        assert_rows(rows(td, "kl_penalty"), truth)

    def test_missing_entries_are_named(self):
        td = TensorDict(next=TensorDict(x=torch.zeros(2), batch_size=2), batch_size=2)
        with pytest.raises(
            InputError, match=r"Log-probs not found: expected \('gen', 'full'\) and \('ref', 'full'\)"
        ):
            self.transform()(td)

    def test_sides_of_different_lengths_are_refused_by_sample(self):
        with pytest.raises(InputError, match="Sample 0 has different shapes"):
            self.transform()(self.data(torch.zeros(2, 3), torch.zeros(2, 4)))

    def test_a_last_dimension_of_one_is_refused(self):
        side = -torch.ones(2, 3, 1)
        rows = TensorDict(gen=TensorDict(full=side[0]), ref=TensorDict(full=side[0]))
        ragged = lazy_stack([TensorDict(next=rows.clone()), TensorDict(next=rows.clone())])
        for td in (self.data(side, side), ragged):
            with pytest.raises(InputError, match=r"'gen', 'full'\): sample 0 has the shape \[3, 1\]"):
                self.transform(mask_key=None)(td)


class TestZeros:
    def data(self, gen, ref):
        return batches.ids_batch(
            [[5, 6, 7]],
            [1],
            extra={("gen", "full"): [torch.tensor(gen)], ("ref", "full"): [torch.tensor(ref)]},
        )

    def transform(self, **options):
        return KLComputation(("gen", "full"), ("ref", "full"), **options)

    @pytest.mark.parametrize("side", ["gen", "ref"])
    def test_a_zero_that_the_other_side_is_not_sure_of_is_refused(self, side):
        sides = [[0.0, -1.0, 0.0], [0.0, -1.2, -3.0]]
        td = self.data(*(sides if side == "gen" else sides[::-1]))
        other = "ref" if side == "gen" else "gen"
        message = (
            rf"(?s)\('{side}', 'full'\): sample 0, token 2 is exactly 0.0"
            rf".*\('{other}', 'full'\) gives it -3.0000.*on_zero"
        )
        with pytest.raises(MissingLogProbError, match=message):
            self.transform()(td)
        with pytest.warns(MismatchWarning, match="sample 0, token 2"):
            self.transform(on_zero="warn")(td)
        assert self.transform(on_zero="allow")(td)["kl_penalty"].abs().max() == 3

    def test_zeros_of_both_sides_are_outside_the_mask_or_sure(self):
        assert self.transform()(self.data([0.0, -1.0, 0.0], [0.0, -1.2, -0.01]))["kl_penalty"][
            0, 2
        ] == pytest.approx(0.01)

    def test_what_a_transform_of_the_same_composition_scored_is_believed(
        self, make_gen, make_reference, monkeypatch
    ):
        gen, ref = RetrieveLogProb(make_gen("vllm")), RetrieveLogProb(make_reference())
        monkeypatch.setattr(
            gen._side._scorer_of(gen.model),
            "score_and_tell",
            lambda ids, start: ([torch.zeros(len(i) - s) for i, s in zip(ids, start, strict=True)], None),
        )
        td = batches.ids_batch([[5, 6, 7]], [1])
        td = Compose(gen, ref, KLComputation())(td)
        assert (td["kl_penalty"][0, 1:] > 0).all()
        with pytest.raises(MissingLogProbError, match="sample 0, token 1 is exactly 0.0"):
            KLComputation()(td)

    def test_logits_are_refused(self):
        with pytest.raises(
            MissingLogProbError,
            match=r"\('ref', 'full'\): sample 0, token 1 of 3 is 2.0, which is no log-prob",
        ):
            self.transform()(self.data([0.0, -1.0, -1.0], [0.0, 2.0, -3.0]))


class TestMask:
    def test_a_mask_that_keeps_a_token_without_a_log_prob_is_refused(self):
        batch = step()
        batch[0]["ref", "full"] = torch.tensor([0.0, -1.5, float("nan"), -3.0])
        with pytest.raises(MissingLogProbError, match="ref_log_probs: sample 0, token 2 of 4"):
            compute()(batch)
        assert "kl_penalty" not in batch.keys()

    def test_a_mask_that_keeps_token_0_is_refused(self):
        batch = step()
        batch[1]["kl_mask"] = torch.tensor([True, False, True])
        batch[0]["kl_mask"] = torch.tensor([False, True, True, True])
        with pytest.raises(InputError, match="sample 1: kl_mask keeps token 0, which has no log-prob"):
            compute()(batch)

    def test_a_mask_of_other_log_probs_is_refused(self):
        batch = step()
        batch[0]["kl_mask"] = torch.tensor([False, True, False, True])
        with pytest.raises(
            InputError,
            match="sample 0, token 2: both sides have a log-prob, but kl_mask leaves the token out",
        ):
            compute()(batch)
        assert compute(mask_key=None)(batch).get("kl_penalty", as_list=True)[0][2] == -1.0
        batch = step()
        batch[1]["kl_mask"] = torch.tensor([True])
        with pytest.raises(
            InputError, match=r"sample 1: kl_mask has shape \[1\], but its log-probs have shape \[3\]"
        ):
            compute()(batch)

    def test_no_key_no_mask(self):
        batch = step().exclude("kl_mask")
        assert "kl_mask" not in compute(mask_key=None)(batch).keys()


def test_the_entries_of_two_transforms_are_of_one_temperature(make_gen, half, ref_scorer):
    transform = Compose(RetrieveLogProb(make_gen("vllm")), RetrieveLogProb(half), KLComputation())
    with pytest.raises(
        OptionError,
        match=r"'log_probs', 'full'\) of softmax\(logits / 1\) and .* of softmax\(logits / 0.5\)",
    ):
        transform(batches.ids_batch([[5, 6, 7]], [2]))
    ref_scorer.temperature = 1.0
    assert "kl_penalty" in transform(batches.ids_batch([[5, 6, 7]], [2]))
