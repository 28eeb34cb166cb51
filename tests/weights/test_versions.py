"""A real collector whose policy is updated: the versions that sampled and scored each sample."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensordict import NonTensorData
from torchrl.collectors.llm import LLMCollector
from torchrl.data import AdaptiveKLController, LazyStackStorage, ReplayBuffer
from torchrl.envs import Transform
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest

from tests import tiny
from tests.batches import ids_batch
from tests.collectors import NUM_ENVS, EndFirst, check_kl
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import (
    EnginePolicyVersion,
    LoRAWrapper,
    RetrieveKL,
    RetrieveLogProb,
    VLLMReference,
    VLLMScorer,
    VLLMSyncScheme,
    check_collector,
    check_versions,
    push_weights,
)
from vllm_kl.errors import CollectorError, StaleError, WeightsError
from vllm_kl.weights.push import weights_of
from vllm_kl.weights.versions import StaleWarning


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


@pytest.fixture
def stamped(policy_engine):
    """Collect a batch; return its version, which is the engine's and the collector's."""

    def stamped(batches, collector):
        (version,) = set(next(batches).reshape(-1)["next", "policy_version"].tolist())
        assert collector.policy_version == weights_of(policy_engine).version == version
        return version

    return stamped


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


def test_collectors_that_share_an_engine_carry_one_version(make_collector, steps, stamped):
    collectors = [make_collector(), make_collector()]
    collectors[0].weight_updater.register_collector(collectors[1])
    collectors[0].update_policy_weights_(AutoModelForCausalLM.from_pretrained(steps[1]))
    assert [stamped(iter(collector), collector) for collector in collectors] == [1, 1]


@pytest.mark.parametrize("how", ["update", "updater", "scheme"])
def test_a_tracker_that_counts_for_itself_is_kept_in_step(make_collector, steps, policy_engine, how, stamped):
    collector = make_collector(num_batches=1, track_policy_version=True)
    model = AutoModelForCausalLM.from_pretrained(steps[1])
    push_weights(policy_engine, model, version=6)
    if how == "update":
        collector.update_policy_weights_(model)
    elif how == "updater":
        collector.weight_updater.push_weights(model)
    else:
        sender = VLLMSyncScheme(policy_engine).create_sender()
        sender.register_model(model)
        sender.register_collector(collector)
        assert collector.policy_version == 6
        sender.update_weights()
    assert stamped(iter(collector), collector) == 7


def test_two_batches_of_one_version_agree_and_a_failed_update_moves_no_version(
    make_collector, make_reference, ref_oracle, steps, policy_engine
):
    collector = make_collector(RetrieveKL("from_collector", make_reference()), num_batches=2)
    batches = iter(collector)
    check_kl(next(batches).reshape(-1), Oracle(steps[0]), ref_oracle)
    state = AutoModelForCausalLM.from_pretrained(steps[1]).state_dict()
    state["model.norm.weight"] = state["model.norm.weight"] * float("nan")
    with pytest.raises(RuntimeError, match="Training has diverged"):
        collector.update_policy_weights_(state)
    assert collector.policy_version == weights_of(policy_engine).version == 0
    data = next(batches).reshape(-1)
    check_kl(data, Oracle(steps[0]), ref_oracle)
    assert data["next", "policy_version"].tolist() == [0] * NUM_ENVS


@pytest.fixture
def old_batch(make_collector, steps, policy_engine):
    """A batch of version 0, and an engine that serves version 1."""
    data = next(iter(make_collector(num_batches=1))).reshape(-1)
    push_weights(policy_engine, AutoModelForCausalLM.from_pretrained(steps[1]))
    return data


@pytest.fixture
def as_scorer(policy_engine, tokenizer):
    return vLLMWrapper(policy_engine, tokenizer=tokenizer, input_mode="history", generate=False)


@pytest.fixture(params=["RetrieveKL", "RetrieveLogProb"])
def rescore(request, as_scorer, make_reference):
    """The two ways to score a batch with a policy again."""
    return {
        "RetrieveKL": lambda **kwargs: RetrieveKL(as_scorer, make_reference(), **kwargs),
        "RetrieveLogProb": lambda **kwargs: RetrieveLogProb(as_scorer, **kwargs),
    }[request.param]


def test_old_tokens_are_never_scored_with_new_weights_unless_told(old_batch, rescore, steps):
    before = old_batch.clone()
    message = "4 of 4 samples .* sample 0 was sampled by version 0, scored by version 1"
    with pytest.raises(StaleError, match=message):
        rescore()(old_batch)
    assert set(old_batch.keys(True, True)) == set(before.keys(True, True))  # as it was
    with pytest.warns(StaleWarning, match=message):
        check_policy(rescore(on_stale="warn")(old_batch), Oracle(steps[1]))
    check_policy(rescore(on_stale="allow")(before), Oracle(steps[1]))


def check_policy(data, oracle):
    for sample in data.unbind(0):
        ids, mask = sample["tokens", "full"], sample["next", "kl_mask"]
        want = torch.tensor(oracle.log_probs(ids.tolist()), dtype=torch.float64)
        got = sample["next", "log_probs", "full"].double()
        torch.testing.assert_close(got[mask], want[mask], rtol=0, atol=LOG_PROB_TOLERANCE)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "1 of 4 .*sample 2 was sampled by an unknown version, scored by version 1"),
        ("6f1c", "1 of 4 .*sample 2 was sampled by version 6f1c, scored by version 1"),
        (5, "1 of 4 .*sample 2 was sampled by version 5, scored by version 1"),
    ],
)
def test_a_version_that_is_missing_or_another_is_refused(old_batch, rescore, version, message):
    for i, sample in enumerate(old_batch.unbind(0)):
        del sample["generated_by"]  # a policy that does not tell
        sample["next", "policy_version"] = torch.tensor(1)
        if i == 2:
            del sample["policy_version"], sample["next", "policy_version"]
            if version is not None:
                sample["next", "policy_version"] = (
                    NonTensorData(version) if version == "6f1c" else torch.tensor(version)
                )
    with pytest.raises(StaleError, match=message):
        rescore()(old_batch)


def test_weights_that_were_never_replaced_are_compared_too(make_collector, rescore):
    data = next(iter(make_collector(num_batches=1))).reshape(-1)
    rescore()(data.clone())
    for sample in data.unbind(0):
        sample["next", "policy_version"] = torch.tensor(5)  # its engine says 0
    with pytest.raises(StaleError, match="sampled by versions 5 and 0, scored by version 0"):
        rescore()(data)


def test_a_model_whose_weights_nobody_counts_is_asked_freely(old_batch, steps, tokenizer):
    model = TransformersWrapper(
        AutoModelForCausalLM.from_pretrained(steps[0]), tokenizer=tokenizer, generate=False
    )
    check_policy(RetrieveLogProb(model)(old_batch), Oracle(steps[0]))


def test_a_second_opinion_under_a_key_of_its_own_is_not_stale(old_batch, as_scorer):
    """A trainer's log-probs beside the sampler's, or a frozen model's: they replace nothing."""
    with pytest.raises(StaleError, match="sampled by version 0, scored by version 1"):
        RetrieveLogProb(as_scorer)(old_batch)
    RetrieveLogProb(as_scorer, log_probs_full_key=("other_log_probs", "full"))(old_batch)


def test_a_reference_scores_every_version_and_says_its_own(old_batch, make_reference, ref_scorer):
    data = RetrieveLogProb(make_reference())(old_batch)
    assert data["next", "ref_version"].tolist() == [ref_scorer.weight_version] * NUM_ENVS


def test_in_a_step_a_push_between_generation_and_score_is_stale(
    make_collector, make_reference, steps, policy_engine
):
    class Push(Transform):
        def _step(self, td, next_td):
            push_weights(policy_engine, AutoModelForCausalLM.from_pretrained(steps[1]))
            return next_td

    kl = functools.partial(RetrieveKL, "from_collector", make_reference(), gen_log_probs="rescore")
    next(iter(make_collector(kl(), num_batches=1, track_policy_version=False)))
    with pytest.raises(StaleError, match="4 of 4 .*sampled by version 0, scored by version 1"):
        next(iter(make_collector(Push(), kl(), num_batches=1)))


def test_another_adapter_is_other_weights(lora_llm, lora_paths, make_env, make_reference, tokenizer):
    adapters = [LoRARequest(f"step-{i}", 50 + i, str(path)) for i, path in enumerate(lora_paths)]
    policy = LoRAWrapper(
        lora_llm, lora_request=adapters[0], tokenizer=tokenizer, generate_kwargs={"max_new_tokens": 4}
    )
    collector = LLMCollector(
        make_env(),
        policy=policy,
        dialog_turns_per_batch=NUM_ENVS,
        total_dialog_turns=NUM_ENVS,
        track_policy_version=EnginePolicyVersion(policy),
    )
    data = next(iter(collector)).reshape(-1)
    collector.shutdown()
    assert data["next", "policy_adapter"].tolist() == [50] * NUM_ENVS
    RetrieveKL(policy.get_new_version(generate=False), make_reference())(data.clone())
    policy.lora_request = adapters[1]
    with pytest.raises(
        StaleError,
        match=r"sampled by version (\d+) with adapter 50, scored by version \1 with adapter 51",
    ):
        RetrieveKL(policy.get_new_version(generate=False), make_reference())(data)


def test_log_probs_that_were_recorded_are_not_stale(old_batch, make_reference, ref_oracle, steps):
    check_kl(RetrieveKL("from_collector", make_reference())(old_batch), Oracle(steps[0]), ref_oracle)


def test_a_batch_that_straddles_an_update_says_so(old_batch, make_reference):
    versions = torch.arange(NUM_ENVS)
    for sample, version in zip(old_batch.unbind(0), versions, strict=True):
        sample["next", "policy_version"] = version
    transform = RetrieveKL("from_collector", make_reference())
    transform(old_batch)
    assert transform.metrics["policy_version_min"] == 0
    assert transform.metrics["policy_version_max"] == NUM_ENVS - 1


def test_a_batch_that_keeps_no_token_is_of_the_reference_that_serves(make_reference, ref_scorer, ref_model):
    kl = RetrieveKL("from_collector", make_reference())

    def scored_by(num_prompt):
        log_probs = [torch.tensor([0.0, 0.0, -1.0, -2.0])]
        td = ids_batch([[5, 6, 7, 8]], [num_prompt], extra={("log_probs", "full"): log_probs})
        return kl(td)["ref_version"].tolist()

    assert scored_by(2) == [ref_scorer.weight_version]
    version = ref_scorer.refresh(ref_model.state_dict())
    assert scored_by(4) == [version]


@pytest.fixture
def complete_dialogs(make_collector, make_reference):
    """A collector that yields complete dialogs, begun at different times; and its transform."""
    kl = RetrieveKL("from_collector", make_reference())
    kwargs = {"yield_completed_trajectories": True, "num_batches": 10}
    return iter(make_collector(EndFirst(), kl, max_steps=2, **kwargs)), kl


def test_in_an_env_too_a_batch_that_straddles_an_update_says_so(complete_dialogs, policy_engine, steps):
    batches, kl = complete_dialogs
    figures = []
    for _ in range(6):
        data = next(batches)
        versions = data["next", "policy_version"]
        assert kl.metrics["policy_version_min"] == versions.min()
        assert kl.metrics["policy_version_max"] == versions.max()
        assert check_versions(data).items() <= kl.metrics.items()
        figures.append(kl.metrics)
        push_weights(policy_engine, AutoModelForCausalLM.from_pretrained(steps[1]))
    assert any(f["policy_version_min"] < f["policy_version_max"] for f in figures)


def test_scores_of_two_reference_versions_never_leave_in_one_batch(complete_dialogs, ref_scorer, ref_model):
    batches, _ = complete_dialogs
    next(batches)
    ref_scorer.refresh(ref_model.state_dict())
    with pytest.raises(
        WeightsError, match="two versions of the reference (?s:.*)with no dialog half collected"
    ):
        list(batches)


def test_a_choice_that_does_not_exist_is_refused(make_reference):
    with pytest.raises(TypeError, match="on_stale='ignore' does not exist; choose one of raise, warn, allow"):
        RetrieveKL("from_collector", make_reference(), on_stale="ignore")


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

    def check_kl(self, data, steps, key):
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

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_what_ends_the_collectors_thread_is_raised_where_weights_are_pushed_or_refreshed(
        self, make_collector, make_reference, ref_scorer, ref_model, policy_engine, steps
    ):
        class Fail(Transform):
            def _step(self, td, next_td):
                raise ValueError("the judge is offline")

        model = AutoModelForCausalLM.from_pretrained(steps[1])
        for ask in (
            lambda collector: collector.update_policy_weights_(model),
            lambda collector: push_weights(policy_engine, model),
            lambda collector: ref_scorer.refresh(ref_model.state_dict()),
            check_collector,
        ):
            kl = RetrieveKL("from_collector", make_reference())
            collector = make_collector(Fail(), kl, replay_buffer=ReplayBuffer(storage=LazyStackStorage(100)))
            version = weights_of(policy_engine).version
            collector.start()
            collector._thread.join(60)
            with pytest.raises(
                CollectorError,
                match="ended the background thread of a collector.*ValueError: the judge is offline",
            ):
                ask(collector)
            assert weights_of(policy_engine).version == version
            push_weights(policy_engine, model)  # said once

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
