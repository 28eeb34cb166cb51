"""Each sample of a collector carries the version of the weights that sampled it, whoever pushes weights."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torchrl.data import AdaptiveKLController, LazyStackStorage, ReplayBuffer
from torchrl.envs import Transform
from torchrl.modules.llm import vLLMWrapper
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.collectors import NUM_ENVS, EndFirst, check_kl
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import (
    EnginePolicyVersion,
    RetrieveKL,
    RetrieveLogProb,
    VLLMReference,
    VLLMScorer,
    VLLMSyncScheme,
    push_weights,
)
from vllm_kl.errors import WeightsError
from vllm_kl.weights.push import weights_of


@pytest.mark.parametrize("share_prefix", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("mode", ["reuse", "rescore"])
def test_three_updates_and_every_kl_is_that_of_the_versions_it_carries(
    make_collector,
    make_reference,
    ref_oracle,
    ref_scorer,
    steps,
    policy_engine,
    mode,
    share_prefix,
    monkeypatch,
):
    monkeypatch.setattr(ref_scorer, "share_prefix", share_prefix)
    transform = RetrieveKL("from_collector", make_reference(), gen_log_probs=mode)
    collector = make_collector(transform)
    for version, data in enumerate(collector):
        data = data.reshape(-1)
        assert data["next", "policy_version"].tolist() == [version] * NUM_ENVS
        assert data["next", "ref_version"].tolist() == [ref_scorer.weight_version] * NUM_ENVS
        assert transform.metrics["ref_version"] == ref_scorer.weight_version
        check_kl(data, Oracle(steps[version]), ref_oracle)
        if version < 3:
            collector.update_policy_weights_(AutoModelForCausalLM.from_pretrained(steps[version + 1]))
            assert collector.policy_version == weights_of(policy_engine).version == version + 1
    assert version == 3
    assert ref_scorer.check_frozen() == 0.0


@pytest.mark.parametrize("kind", ["schedule", "controller"])
def test_a_run_that_is_resumed_goes_on_where_it_was(
    make_collector, make_reference, ref_oracle, steps, policy_engine, kind, tmp_path
):
    def make_transform():
        coeff = {
            "schedule": lambda n: 0.1 * (1 + n),
            "controller": AdaptiveKLController(init_kl_coef=0.1, target=6.0, horizon=8),
        }
        return RetrieveKL(
            "from_collector", make_reference(), coeff=coeff[kind], audit=0.5, audit_tolerance=1.0
        )

    transform = make_transform()
    collector = make_collector(transform)
    batches = iter(collector)
    next(batches)
    collector.update_policy_weights_(AutoModelForCausalLM.from_pretrained(steps[1]))
    next(batches)
    torch.save(collector.state_dict(), tmp_path / "collector.pt")
    next(batches)  # what the run would have gone on to
    expected = transform.metrics["coeff"]

    # The engine is started again, on the last checkpoint.
    push_weights(policy_engine, AutoModelForCausalLM.from_pretrained(steps[1]))
    policy_engine.llm_engine.set_weight_version("0")
    transform = make_transform()
    collector = make_collector(transform)
    assert collector.policy_version == 0
    collector.load_state_dict(torch.load(tmp_path / "collector.pt", weights_only=False))
    assert collector.policy_version == weights_of(policy_engine).version == 1
    data = next(iter(collector)).reshape(-1)
    assert data["next", "policy_version"].tolist() == [1] * NUM_ENVS
    assert transform.metrics["coeff"] == pytest.approx(expected) != 0.1
    check_kl(data, Oracle(steps[1]), ref_oracle, coeff=expected)
    collector.update_policy_weights_(AutoModelForCausalLM.from_pretrained(steps[2]))
    assert collector.policy_version == 2


def test_a_version_is_not_taken_by_weights_that_nobody_knows(policy_engine, steps):
    tracker = EnginePolicyVersion(policy_engine)
    policy_engine.llm_engine.model_executor.driver_worker.worker.get_model().model.norm.weight.data.mul_(2)
    with pytest.raises(WeightsError, match="neither those of the last push nor those of the engine.s start"):
        tracker.version = 7
    push_weights(policy_engine, AutoModelForCausalLM.from_pretrained(steps[0]), version=9)
    with pytest.raises(WeightsError, match="expected an int above 9"):
        tracker.version = 7


@pytest.mark.parametrize("how", ["plain", "update", "call", "updater", "scheme"])
def test_whoever_pushes_samples_carry_the_version_of_the_engine(
    make_collector, steps, policy_engine, how, stamped
):
    model = AutoModelForCausalLM.from_pretrained(steps[1])
    push_weights(policy_engine, model, version=100)  # a run that is resumed
    collector = make_collector(num_batches=2)
    batches = iter(collector)
    assert stamped(batches, collector) == 100
    if how == "scheme":
        sender = VLLMSyncScheme(policy_engine).create_sender()
        sender.register_collector(collector)
    {
        "plain": lambda: push_weights(policy_engine, model),
        "update": lambda: collector.update_policy_weights_(model),
        "call": lambda: collector.weight_updater(model),
        "updater": lambda: collector.weight_updater.push_weights(model),
        "scheme": lambda: sender.update_weights(model),
    }[how]()
    assert stamped(batches, collector) == 101


def test_an_update_between_generation_and_step_does_not_name_the_new_weights(
    make_collector, steps, policy_engine
):
    class Push(Transform):
        def _step(self, td, next_td):
            push_weights(policy_engine, AutoModelForCausalLM.from_pretrained(steps[1]))
            VLLMScorer(policy_engine).score([[5, 6, 7]])
            return next_td

    data = next(iter(make_collector(Push(), num_batches=1)))
    assert weights_of(policy_engine).version == 1
    assert data.reshape(-1)["next", "policy_version"].tolist() == [0] * NUM_ENVS


def test_weights_stay_until_the_last_transform_has_scored_a_step_with_them(
    make_collector, make_reference, steps, policy_engine
):
    model = AutoModelForCausalLM.from_pretrained(steps[1])
    pushes = []
    with ThreadPoolExecutor(1) as pool:

        class PushElsewhere(Transform):
            def _step(self, td, next_td):
                pushes.append(pool.submit(push_weights, policy_engine, model))
                time.sleep(0.5)
                assert not pushes[0].done()
                return next_td

        again = {"gen_log_probs": "rescore", "add_to_reward": False}
        other = {
            "gen_log_probs_full_key": ("g2", "full"),
            "ref_log_probs_full_key": ("r2", "full"),
            "kl_key": "kl2",
        }
        first = RetrieveKL("from_collector", make_reference(), **again)
        last = RetrieveKL(
            "from_collector", make_reference(), **again, **other, mask_key=None, ref_version_key=None
        )
        data = next(iter(make_collector(first, PushElsewhere(), last, num_batches=1)))
        assert pushes[0].result(60) == 1
    for sample in data.reshape(-1).unbind(0):
        assert torch.equal(sample["next", "g2", "full"], sample["next", "log_probs", "full"])


class TestBackground:
    """``LLMCollector.start()``: one thread collects, another pushes."""

    @pytest.fixture
    def run(self, make_collector, steps, policy_engine):
        """Push the models in turn while a collector fills a buffer; return the samples.

        Version v has the weights of ``steps[v % len(steps)]``.
        """

        def run(*transforms, num_updates=6, then=lambda i: None, **options):
            buffer = ReplayBuffer(storage=LazyStackStorage(10_000))
            collector = make_collector(*transforms, num_batches=10_000, replay_buffer=buffer, **options)
            models = [AutoModelForCausalLM.from_pretrained(path) for path in steps]
            collector.start()
            for i in range(1, num_updates + 1):
                count = buffer.write_count
                while buffer.write_count == count and collector.is_running():
                    time.sleep(0.01)
                collector.update_policy_weights_(models[i % len(models)])
                assert collector.policy_version == i
                then(i)
            assert collector.is_running()
            collector.async_shutdown(timeout=60)
            return buffer[:]

        return run

    def check(self, data, steps, key):
        """Check that every sample's log-probs are those of its version's weights; return the versions."""
        oracles = [Oracle(path) for path in steps]
        versions = data["next", "policy_version"].tolist()
        assert data["generated_by", "version"].tolist() == versions == sorted(versions)
        for sample, version in zip(data.unbind(0), versions, strict=True):
            ids, prompt = sample["tokens", "full"], len(sample["tokens", "prompt"])
            want = torch.tensor(
                oracles[version % len(steps)].log_probs(ids.tolist())[prompt:], dtype=torch.float64
            )
            torch.testing.assert_close(sample[key][prompt:].double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)
        return set(versions)

    def test_every_sample_is_of_the_version_it_carries(self, run, steps):
        assert len(self.check(run(), steps, ("log_probs", "full"))) > 2

    @pytest.mark.parametrize(
        ("how", "return_log_probs"),
        [
            ({"gen_log_probs": "rescore"}, True),
            ({"gen_log_probs": "auto"}, False),
            ({"gen_log_probs": "reuse", "audit": 1.0}, True),
        ],
        ids=str,
    )
    def test_a_step_is_scored_again_by_the_weights_that_generated_it(
        self, run, make_reference, steps, how, return_log_probs
    ):
        kl = RetrieveKL("from_collector", make_reference(), assistant_only=False, **how)
        data = run(kl, num_updates=20, policy={"return_log_probs": return_log_probs})
        assert len(self.check(data, steps, ("next", "log_probs", "full"))) > 8
        assert kl.metrics.get("audit_skipped_samples", 0) == 0

    @pytest.mark.parametrize("as_gen_model", [False, True])
    def test_so_is_one_that_a_model_on_the_policys_engine_scores(
        self, run, make_reference, steps, policy_engine, tokenizer, as_gen_model
    ):
        kwargs = {"tokenizer": tokenizer, "input_mode": "history", "pad_output": False}
        policy = vLLMWrapper(policy_engine, generate=False, return_log_probs=True, **kwargs)
        if as_gen_model:
            transform = RetrieveKL(policy, make_reference(), assistant_only=False)
        else:
            transform = RetrieveLogProb(policy, assistant_only=False)
        data = run(transform, num_updates=10)
        assert len(self.check(data, steps, ("next", "log_probs", "full"))) > 3

    @pytest.mark.filterwarnings("ignore:.*its text was tokenized again")
    def test_a_reference_may_be_refreshed_while_it_scores_and_samples_carry_its_version(
        self, run, steps, tokenizer
    ):
        with VLLMScorer(str(steps[0]), **tiny.ENGINE_OPTIONS) as scorer:
            kl = RetrieveKL(
                "from_collector",
                VLLMReference(scorer, tokenizer),
                assistant_only=False,
                on_two_references="allow",
            )
            models = [AutoModelForCausalLM.from_pretrained(path) for path in steps]
            refresh = lambda i: scorer.refresh(models[i % len(models)])  # noqa: E731
            data = run(EndFirst(), kl, then=refresh, max_steps=2, yield_completed_trajectories=True)
        oracles = [Oracle(path) for path in steps]
        versions = data["next", "ref_version"].tolist()
        for sample, version in zip(data.unbind(0), versions, strict=True):
            want = torch.tensor(
                oracles[version % len(steps)].log_probs(sample["tokens", "full"].tolist())[1:]
            )
            found = sample["next", "ref_log_probs", "full"][1:].double()
            torch.testing.assert_close(found, want.double(), rtol=0, atol=LOG_PROB_TOLERANCE)
        assert len(set(versions)) > 2
        assert kl.metrics["ref_version"] in versions

    def test_a_scorer_on_the_policys_engine_neither_waits_for_itself_nor_claims_to_have_generated(
        self, run, policy_engine, tokenizer, steps, caplog
    ):
        shared = RetrieveLogProb(VLLMReference(VLLMScorer(policy_engine), tokenizer))
        data = run(shared, num_updates=3)
        # generated_by names the policy's weights.
        assert len(self.check(data, steps, ("log_probs", "full"))) > 1
        assert (data["generated_by", "adapter"] == 0).all()
        # No push waited until the lock gave up a step that the scorer had left open.
        assert "has not scored in" not in caplog.text
