"""A sample of other weights is not scored again, and the figures of a batch tell its versions."""

from __future__ import annotations

import functools

import pytest
import torch
from tensordict import NonTensorData
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import Transform
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest

from tests.batches import ids_batch
from tests.collectors import NUM_ENVS, EndFirst, check_kl
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import (
    EnginePolicyVersion,
    LoRAWrapper,
    RetrieveKL,
    RetrieveLogProb,
    check_versions,
    push_weights,
)
from vllm_kl.errors import StaleError, WeightsError
from vllm_kl.weights.versions import StaleWarning


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
