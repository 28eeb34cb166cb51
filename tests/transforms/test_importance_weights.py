"""``ImportanceWeights`` writes what ``importance_weights`` returns, wherever a transform can stand."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torch.nn.utils.rnn import pad_sequence
from torchrl.data import LazyStackStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import CISPOLoss, GRPOLoss

from tests.batches import dense_batch, ids_batch
from tests.collectors import NUM_ENVS, chat_env, collect
from tests.transforms.helpers import rows
from vllm_kl import (
    ImportanceWeights,
    LogMetrics,
    RetrieveLogProb,
    importance_weights,
)
from vllm_kl.diagnostics import MismatchWarning
from vllm_kl.errors import InputError, MissingLogProbError, OptionError

IDS, PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [4, 8, 15, 16, 23]], [2, 2, 1]
TRAINED = [[0.0, 0.0, -1.0, -2.0], [0.0, 0.0, -0.5], [0.0, -3.0, -1.0, -0.4, -2.5]]
SAMPLED = [[-9.0, -9.0, -1.3, -4.0], [-9.0, -9.0, -0.25], [-9.0, -2.9, -1.0, -0.5, -2.0]]
MASKS = [[False, False, True, True], [False, False, True], [False, True, True, False, True]]
WEIGHTS = ("importance_weights", "full")
TRAINER, SAMPLER = ("trainer_log_probs", "full"), ("log_probs", "full")


def tensors(side):
    return [torch.tensor(row) for row in side]


def batch(pad=None):
    """A batch as a trainer has it: recorded log-probs, NaN outside the mask, and scores under ``"next"``."""
    masks = tensors(MASKS)
    recorded = [torch.where(m, row, torch.nan) for row, m in zip(tensors(SAMPLED), masks, strict=True)]
    sides = {SAMPLER: recorded, TRAINER: tensors(TRAINED), "kl_mask": masks, "ids": tensors(IDS)}
    if pad is None:
        return lazy_stack(
            [
                TensorDict(
                    ids=sides["ids"][i],
                    log_probs=TensorDict(full=recorded[i]),
                    next=TensorDict(trainer_log_probs=TensorDict(full=sides[TRAINER][i]), kl_mask=masks[i]),
                )
                for i in range(len(IDS))
            ]
        )
    padded = {key: pad_sequence(side, batch_first=True, padding_side=pad) for key, side in sides.items()}
    td = TensorDict({SAMPLER: padded[SAMPLER], "ids": padded["ids"]}, batch_size=len(IDS))
    scores = {TRAINER: padded[TRAINER], "kl_mask": padded["kl_mask"]}
    return td.set("next", TensorDict(scores, batch_size=len(IDS)))


def want(**options):
    return importance_weights(tensors(TRAINED), tensors(SAMPLED), tensors(MASKS), **options)


@pytest.mark.parametrize(
    "options", [{}, {"level": "sequence", "mode": "mask", "low": 0.5}, {"normalize": True}]
)
class TestLayouts:
    def test_ragged(self, options):
        transform = ImportanceWeights(**options)
        td = transform(batch())
        for got, expected in zip(rows(td["next"], WEIGHTS), want(**options).weights, strict=True):
            assert got.dtype == torch.float32
            assert torch.equal(got, expected)
        assert transform.metrics == want(**options).metrics

    @pytest.mark.parametrize("pad", ["left", "right"])
    def test_dense(self, options, pad):
        transform = ImportanceWeights(**options)
        td = transform(batch(pad))
        expected = pad_sequence(want(**options).weights, batch_first=True, padding_side=pad)
        assert torch.equal(td["next"][WEIGHTS], expected)
        assert transform.metrics == want(**options).metrics

    def test_two_dimensions(self, options):
        td = batch("left")
        two = lazy_stack([td, td.clone()])
        written = ImportanceWeights(**options)(two)["next"][WEIGHTS]
        assert torch.equal(written[1], ImportanceWeights(**options)(td)["next"][WEIGHTS])

    def test_sides_of_two_layouts_but_one_shape(self, options):
        """A dense side and a list of rows of the same widths."""
        td = batch("left")
        dense = ImportanceWeights(**options)(td.copy())["next"][WEIGHTS]
        stack = lazy_stack(list(td.unbind(0)))
        assert torch.equal(
            torch.stack(list(rows(ImportanceWeights(**options)(stack)["next"], WEIGHTS))), dense
        )


@pytest.mark.parametrize("names", ["trl", "verl", "nemo_rl"])
def test_the_figures_have_the_names_of_another_trainer(names):
    transform = ImportanceWeights(names=names)
    assert transform.metrics == {}
    transform(batch())
    assert transform.metrics == want().as_printed_by[names]
    assert LogMetrics(transform, prefix="")() == transform.metrics


class TestWhereTheSidesAre:
    def test_of_one_key_the_recorded_ones_are_beside_next_and_the_scores_under_it(self):
        td = batch("left")
        td["next"].rename_key_("trainer_log_probs", "log_probs")
        written = ImportanceWeights(SAMPLER)(td)["next"][WEIGHTS]
        assert torch.equal(written, pad_sequence(want().weights, batch_first=True, padding_side="left"))

    def test_in_a_flat_batch_both_are_at_the_top(self):
        td = batch("left")
        flat = td.exclude("next").update(td["next"])
        assert torch.equal(ImportanceWeights()(flat)[WEIGHTS], ImportanceWeights()(td)["next"][WEIGHTS])

    def test_one_entry_for_both_sides_is_refused(self):
        td = batch("left")
        flat = td.exclude("next").update(td["next"])
        with pytest.raises(InputError, match="one entry, .*'log_probs', 'full'.*every weight would be 1"):
            ImportanceWeights(SAMPLER)(flat)

    @pytest.mark.parametrize("key", [TRAINER, SAMPLER, "kl_mask"])
    def test_an_entry_that_is_missing_is_named(self, key):
        td = batch("left").exclude(key, ("next", *key) if isinstance(key, tuple) else ("next", key))
        name = str(key).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(InputError, match=f"no {name} in the batch"):
            ImportanceWeights()(td)
        assert "importance_weights" not in td["next"].keys()


class TestRefused:
    def test_sides_of_other_widths(self):
        td = batch()
        td[1]["log_probs", "full"] = torch.tensor([-1.0])
        with pytest.raises(InputError, match=r"sample 1: .*trainer.* has shape \[3\], but .* shape \[1\]"):
            ImportanceWeights()(td)
        td = batch("left")
        td[SAMPLER] = td[SAMPLER][:, 1:]
        with pytest.raises(InputError, match=r"sample 0: .* \[5\], but \('log_probs', 'full'\) .* \[4\]"):
            ImportanceWeights()(td)

    @pytest.mark.parametrize("pad", [None, "left"])
    def test_a_last_dimension_of_one(self, pad):
        td, key = batch(pad), ("next", *TRAINER)
        for sample in td.unbind(0) if pad is None else [td]:
            for entry in (key, SAMPLER, ("next", "kl_mask")):
                sample[entry] = sample[entry].unsqueeze(-1)
        with pytest.raises(InputError, match=r"trainer.*: sample 0 has the shape \[\d, 1\], .*squeeze"):
            ImportanceWeights()(td)
        assert "importance_weights" not in td["next"].keys()

    @pytest.mark.parametrize("value", [torch.nan, -torch.inf])
    @pytest.mark.parametrize("pad", [None, "left"])
    def test_a_missing_log_prob(self, value, pad):
        td = batch(pad)
        td[2]["log_probs", "full"][4] = value
        with pytest.raises(MissingLogProbError, match=r"\('log_probs', 'full'\): sample 2, token 4 of 5"):
            ImportanceWeights()(td)
        assert "importance_weights" not in td["next"].keys()

    def test_a_zero_that_the_other_side_is_not_sure_of(self):
        td = batch()
        td[0]["log_probs", "full"][3] = 0.0
        with pytest.raises(MissingLogProbError, match=r"(?s)'log_probs', 'full'.*sample 0, token 3.*on_zero"):
            ImportanceWeights()(td)
        with pytest.warns(MismatchWarning, match="sample 0, token 3"):
            ImportanceWeights(on_zero="warn")(td)
        weights = rows(ImportanceWeights(on_zero="allow")(td)["next"], WEIGHTS)
        assert weights[0][3].item() == pytest.approx(torch.tensor(-2.0).exp().item())

    def test_logits(self):
        td = batch()
        td[0]["next", "trainer_log_probs", "full"][3] = 4.0
        with pytest.raises(MissingLogProbError, match="sample 0, token 3 of 4 is 4.0, which is no log-prob"):
            ImportanceWeights()(td)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"level": "word"}, "level='word' does not exist"),
            ({"mode": "mask", "high": None}, "masks nothing"),
            (
                {"names": "openrlhf"},
                "names='openrlhf' does not exist; choose one of vllm_kl, trl, verl, nemo_rl",
            ),
            ({"on_zero": "ignore"}, "on_zero='ignore' does not exist"),
            ({"weights_key": TRAINER}, "two results would be written to one key"),
            ({"weights_key": "kl_mask"}, "two results would be written to one key"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(OptionError, match=message):
            ImportanceWeights(**options)


class TestReplayBuffer:
    @pytest.fixture
    def buffer(self):
        return ReplayBuffer(
            storage=LazyStackStorage(8), batch_size=3, sampler=SamplerWithoutReplacement(shuffle=False)
        )

    def check(self, sampled):
        for got, expected in zip(rows(sampled["next"], WEIGHTS), want().weights, strict=True):
            assert torch.equal(got, expected)

    def test_at_each_sample_the_stored_samples_stay(self, buffer):
        buffer.append_transform(ImportanceWeights())
        buffer.extend(batch())
        for _ in range(2):
            self.check(buffer.sample())
        assert "importance_weights" not in buffer._storage[0]["next"].keys()

    def test_with_invert_the_weights_are_stored(self, buffer):
        buffer.append_transform(ImportanceWeights(), invert=True)
        buffer.extend(batch())
        self.check(buffer.sample())
        assert "importance_weights" in buffer._storage[0]["next"].keys()


@pytest.fixture
def trainer(policy_model):
    """The policy's model, moved a little."""
    model = copy.deepcopy(policy_model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    return model


@pytest.fixture
def wrapper(tokenizer):
    def wrapper(model, **options):
        return TransformersWrapper(model, tokenizer=tokenizer, generate=False, **options)

    return wrapper


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
class TestInAnEnv:
    def test_its_specs_declare_what_it_writes(self, trainer, wrapper, policy_model, tokenizer, pad_output):
        """Two models score each step; a third transform weighs it."""
        sampler = ("sampler_log_probs", "full")
        env = chat_env(tokenizer, 2)
        for model, key in ((trainer, TRAINER), (policy_model, sampler)):
            side = wrapper(model, pad_output=pad_output)
            env = env.append_transform(RetrieveLogProb(side, log_probs_full_key=key))
        transform = ImportanceWeights(TRAINER, sampler, level="geometric", high=None)
        env = env.append_transform(transform)
        assert WEIGHTS in env.observation_spec.keys(True, True)
        policy = TransformersWrapper(
            policy_model, tokenizer=tokenizer, pad_output=pad_output, generate_kwargs={"max_new_tokens": 6}
        )
        data = env.rollout(1, policy).reshape(-1)["next"]
        trained, sampled, masks, got = (rows(data, key) for key in (TRAINER, sampler, "kl_mask", WEIGHTS))
        for a, b, mask, row in zip(trained, sampled, masks, got, strict=True):
            ratio = (a - b)[mask].double().mean().exp()
            assert abs(ratio - 1) > 1e-4
            torch.testing.assert_close(row.double(), mask * ratio, rtol=1e-6, atol=0)
        assert transform.metrics["num_sequences"] == 2

    def test_it_weighs_what_a_vllm_policy_recorded(
        self, trainer, wrapper, make_env, make_policy, policy_oracle, pad_output
    ):
        """The recorded log-probs are beside ``"next"``; the trainer's scores are under it."""
        env = make_env().append_transform(
            RetrieveLogProb(wrapper(trainer, pad_output=pad_output), log_probs_full_key=TRAINER)
        )
        transform = ImportanceWeights(high=None, names="nemo_rl")
        (data,) = collect(env.append_transform(transform), make_policy(pad_output=pad_output), turns=NUM_ENVS)
        keys = ("tokens", "full"), ("masks", "all_attention_mask"), ("next", "kl_mask")
        sides = zip(
            *(rows(data, key) for key in (*keys, ("next", *TRAINER), ("next", *WEIGHTS))), strict=True
        )
        for ids, real, mask, trained, got in sides:
            assert (got[~mask] == 0).all()
            sampled = policy_oracle.masked(ids[real].tolist(), mask[real].tolist())
            want = torch.exp(trained[real].double() - sampled) * mask[real]
            torch.testing.assert_close(got[real].double(), want, rtol=1e-4, atol=0)
            assert abs(want[mask[real]] - 1).max() > 1e-3
        assert transform.metrics["token_mult_prob_error"] > 1


def grpo_loss(actor, kind=GRPOLoss, **kwargs):
    """A loss whose ratio is that of the trainer now to the trainer then, not to the sampler."""
    loss = kind(actor, masking_strategy="generic", entropy_bonus=False, **kwargs)
    loss.set_keys(sample_log_prob=("next", *TRAINER))
    return loss


def weighted(batch):
    """Multiply the advantages by the weights; pad on the left, as the loss pads its log-probs."""
    weights = batch.get(("next", *WEIGHTS), as_list=True)
    pairs = zip(weights, batch.get("advantage", as_list=True), strict=True)
    products = [weight[:, None] * advantage for weight, advantage in pairs]
    return batch.copy().set("advantage", pad_sequence(products, batch_first=True, padding_side="left"))


@pytest.fixture(params=[True, False], ids=["padded", "ragged"])
def learned(request, trainer, wrapper):
    """A batch that a trainer scored, with advantages per token, its loss's actor, and the loss per token."""
    sequences, prompts = [[5, 258, 9, 256, 7, 258], [258, 2, 3], [256, 8, 4, 258]], [2, 2, 1]
    td = dense_batch(sequences, prompts, 256) if request.param else ids_batch(sequences, prompts)
    td["masks"] = td["masks"] if request.param else lazy_stack(
        [
            TensorDict(
                all_attention_mask=torch.ones(len(s), dtype=torch.bool),
                all_assistant_mask=torch.arange(len(s)) >= p,
            )
            for s, p in zip(sequences, prompts, strict=True)
        ]
    )  # fmt: skip
    td = RetrieveLogProb(wrapper(trainer, pad_output=request.param), log_probs_full_key=TRAINER)(td)
    scores, masks = (rows(td, key) for key in (TRAINER, "kl_mask"))
    samples, generator = [], torch.Generator().manual_seed(0)
    for sample, score, mask in zip(td.unbind(0), scores, masks, strict=True):
        noise = 0.5 * torch.randn(score.shape, generator=generator)
        recorded = torch.where(mask, (score - noise).clamp(max=-0.01), torch.nan)
        then = torch.where(mask, score, torch.nan)  # NaN: the loss leaves the token out
        samples.append(
            TensorDict(
                tokens=sample["tokens"],
                masks=sample["masks"],
                log_probs=TensorDict(full=recorded),
                advantage=torch.randn(len(score), 1, generator=generator),
                next=TensorDict(trainer_log_probs=TensorDict(full=then), kl_mask=mask),
            )
        )
    batch = torch.stack(samples) if request.param else lazy_stack(samples)
    return batch, wrapper(trainer, input_mode="tokens", pad_output=request.param)


class TestInALoss:
    """The trainer is still the one that scored: the loss's own ratio of each token is 1."""

    def want(self, batch):
        """The mean over kept tokens of minus the weight times the advantage, in plain loops."""
        total, n = 0.0, 0
        keys = ("next", *WEIGHTS), "advantage", ("next", "kl_mask")
        for weight, advantage, mask in zip(*(rows(batch, key) for key in keys), strict=True):
            for w, a, k in zip(weight.tolist(), advantage[:, 0].tolist(), mask.tolist(), strict=True):
                total, n = total - w * a * k, n + k
        return total / n

    @pytest.mark.parametrize("kind", [GRPOLoss, CISPOLoss])
    @pytest.mark.parametrize("options", [{"high": 1.1}, {"level": "sequence", "mode": "mask", "high": 1.5}])
    def test_weighted_advantages_weigh_the_objective(self, learned, kind, options):
        batch, actor = learned
        batch = ImportanceWeights(**options)(batch)
        assert len(set(torch.cat([row[row != 0] for row in rows(batch, ("next", *WEIGHTS))]).tolist())) > 1
        loss = grpo_loss(actor, kind)(weighted(batch))
        assert loss.loss_objective.item() == pytest.approx(self.want(batch), abs=1e-6)
        assert loss.ESS.item() == pytest.approx(1.0, abs=1e-5)
        loss.loss_objective.backward()
        assert all(p.grad.isfinite().all() for p in actor.parameters() if p.grad is not None)

    def test_advantages_per_token_of_a_ragged_batch_are_misplaced_without_it(self, learned, request):
        """The trap itself: TorchRL 0.14.1 pads advantages on the right and log-probs on the left."""
        batch, actor = learned
        batch = ImportanceWeights(low=1.0, high=1.0)(batch)  # every weight is 1
        right = grpo_loss(actor)(weighted(batch)).loss_objective.item()
        as_it_is = grpo_loss(actor)(batch).loss_objective.item()
        assert right == pytest.approx(self.want(batch), abs=1e-6)
        assert (as_it_is == pytest.approx(right, abs=1e-6)) == ("padded" in request.node.name)
