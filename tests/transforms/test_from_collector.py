"""``from_collector`` in a real ``LLMCollector``, where TorchRL's own class fails."""

from __future__ import annotations

import functools

import pytest
from torchrl.envs.llm.transforms import kl as torchrl_kl
from torchrl.modules.llm import TransformersWrapper

from tests.collectors import NUM_ENVS, check_kl, collect
from vllm_kl import FromCollector, RetrieveKL, VLLMReference, VLLMScorer
from vllm_kl.errors import CollectorError
from vllm_kl.transforms.choose_scorer import ScorerOf

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
@pytest.mark.parametrize("mode", ["auto", "reuse", "rescore"])
class TestModes:
    def test_kl_agrees_with_float64_on_the_ids_that_were_generated(
        self, make_env, make_policy, make_reference, policy_oracle, ref_oracle, mode, pad_output
    ):
        transform = RetrieveKL(
            "from_collector", make_reference(pad_output=pad_output), gen_log_probs=mode, coeff=0.1
        )
        batches = collect(make_env().append_transform(transform), make_policy(pad_output=pad_output))
        assert len(batches) == 2
        for data in batches:
            check_kl(data, policy_oracle, ref_oracle, coeff=0.1)


def test_auto_does_not_ask_the_engine_where_log_probs_were_recorded(
    make_env, make_policy, make_reference, monkeypatch
):
    env = make_env().append_transform(RetrieveKL("from_collector", make_reference()))
    monkeypatch.setattr(
        ScorerOf, "__call__", lambda self, model: getattr(model, "scorer", None) or pytest.fail("asked")
    )
    collect(env, make_policy())


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
def test_ids_and_masks_are_read_where_the_policy_writes_them(
    make_env, make_policy, make_reference, policy_oracle, ref_oracle, pad_output
):
    env = make_env().append_transform(RetrieveKL("from_collector", make_reference(pad_output=pad_output)))
    policy = make_policy(pad_output=pad_output, masks_key="policy_masks", log_probs_key="policy_log_probs")
    for data in collect(env, policy):
        data["masks"] = data["policy_masks"]
        check_kl(data, policy_oracle, ref_oracle)


# The policy samples its pad id now and then, and a padded prompt of the next turn drops it.
@pytest.mark.filterwarnings("ignore:sample .* the attention mask leaves out tokens:UserWarning")
@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
def test_two_turns_score_what_each_turn_generated(
    make_env, make_policy, make_reference, policy_oracle, ref_oracle, pad_output
):
    transform = RetrieveKL("from_collector", make_reference(pad_output=pad_output))
    env = make_env(max_steps=2).append_transform(transform)
    for data in collect(env, make_policy(pad_output=pad_output), turns=4 * NUM_ENVS):
        check_kl(data, policy_oracle, ref_oracle)


def test_auto_rescores_where_the_policy_recorded_nothing(
    make_env, make_policy, make_reference, policy_oracle, ref_oracle, caplog
):
    transform = RetrieveKL(FromCollector(), make_reference())
    for data in collect(make_env().append_transform(transform), make_policy(return_log_probs=False)):
        check_kl(data, policy_oracle, ref_oracle)
    assert transform.metrics["gen_rescored_samples"] == NUM_ENVS
    (note,) = [record.getMessage() for record in caplog.records if "nothing is reused" in record.getMessage()]
    assert "the policy records no log-probs (return_log_probs=False)" in note
    assert "costs another pass over every sample" in note


def test_what_is_reused_is_counted_as_such(make_env, make_policy, make_reference):
    transform = RetrieveKL("from_collector", make_reference())
    collect(make_env().append_transform(transform), make_policy())
    assert transform.metrics["gen_rescored_samples"] == 0


def test_reuse_says_that_the_policy_recorded_nothing(make_env, make_policy, make_reference):
    env = make_env().append_transform(RetrieveKL(FromCollector("reuse"), make_reference()))
    with pytest.raises(CollectorError, match="records no log-probs .*return_log_probs=True"):
        collect(env, make_policy(return_log_probs=False))


@pytest.fixture
def transformers_run(make_env, policy_model, ref_model, tokenizer):
    """Collect with transformers models on both sides."""

    def run(mode):
        ref = TransformersWrapper(
            ref_model, tokenizer=tokenizer, generate=False, log_probs_key="ref_log_probs"
        )
        policy = functools.partial(
            TransformersWrapper,
            policy_model,
            tokenizer=tokenizer,
            generate=True,
            generate_kwargs={"max_new_tokens": 6},
        )
        env = make_env().append_transform(RetrieveKL("from_collector", ref, gen_log_probs=mode))
        return collect(env, policy, turns=NUM_ENVS)

    return run


def test_transformers_models_work_alike(transformers_run, policy_oracle, ref_oracle):
    for data in transformers_run("auto"):
        check_kl(data, policy_oracle, ref_oracle)


def test_the_zero_that_torchrl_records_for_a_first_token_is_never_reused(transformers_run):
    (data,) = transformers_run("rescore")
    assert (data["log_probs", "response"][:, 0] == 0).all()  # what TransformersWrapper 0.14 records
    with pytest.raises(CollectorError, match="'reuse', but the batch has no"):
        transformers_run("reuse")


def test_pad_output_mismatch_is_refused_when_the_policy_is_resolved(make_env, make_policy, make_reference):
    env = make_env().append_transform(RetrieveKL("from_collector", make_reference(pad_output=True)))
    with pytest.raises(ValueError, match="pad_output mismatch: the collector's policy has pad_output=False"):
        collect(env, make_policy(pad_output=False))


@pytest.mark.parametrize("mode", ["auto", "rescore"])
def test_a_reference_that_is_the_policys_engine_is_refused(
    make_env, make_policy, policy_llm, tokenizer, mode
):
    reference = VLLMReference(VLLMScorer(policy_llm), tokenizer)
    message = "both sides are one LLMEngine: the KL would be 0 at every update. Give the reference an engine"
    with pytest.raises(TypeError, match=message):
        collect(
            make_env().append_transform(RetrieveKL("from_collector", reference, gen_log_probs=mode)),
            make_policy(),
        )


def test_as_a_postproc_it_reuses_what_was_recorded(
    make_env, make_policy, make_reference, policy_oracle, ref_oracle
):
    transform = RetrieveKL("from_collector", make_reference())
    for data in collect(make_env(), make_policy(), postproc=transform):
        check_kl(data, policy_oracle, ref_oracle)


def test_a_rollout_without_a_collector_follows_its_specs(make_env, make_policy, make_reference):
    env = make_env().append_transform(RetrieveKL("from_collector", make_reference()))
    data = env.rollout(1, make_policy()(), return_contiguous=False)
    for key in (("next", "kl_penalty"), ("next", "ref_log_probs", "full"), ("next", "log_probs", "full")):
        assert key in data.keys(True)
    assert {"kl_penalty", ("ref_log_probs", "full"), ("log_probs", "full")} <= set(
        env.observation_spec.keys(True, True)
    )


def test_torchrls_own_class_still_fails_here(make_env, make_policy, make_reference):
    """When this fails, TorchRL has moved: read its class again, then TORCHRL in README's limits."""
    env = make_env().append_transform(torchrl_kl.RetrieveKL("from_collector", make_reference()))
    with pytest.raises(ValueError, match="collector is not set"):
        collect(env, make_policy())
