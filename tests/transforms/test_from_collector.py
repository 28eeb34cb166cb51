"""``from_collector`` in a real ``LLMCollector``, where TorchRL's own class fails."""

from __future__ import annotations

import functools

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Unbounded
from torchrl.envs import StepCounter, Transform
from torchrl.envs.llm import ChatEnv
from torchrl.envs.llm.transforms import kl as torchrl_kl
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper

from tests import oracle
from tests.oracle import KL_TOLERANCE
from vllm_kl import FromCollector, RetrieveKL, VLLMReference, VLLMScorer
from vllm_kl.errors import CollectorError
from vllm_kl.transforms.choose_scorer import ScorerOf

NUM_ENVS, GROUP = 4, 2


class OneReward(Transform):
    """A reward of 1 per sequence."""

    def __init__(self):
        super().__init__(out_keys=["reward"])

    def _step(self, tensordict, next_tensordict):
        return next_tensordict.set("reward", torch.ones(*tensordict.batch_size, 1, 1))

    def transform_reward_spec(self, reward_spec):
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1, 1))
        return reward_spec


@pytest.fixture
def make_env(tokenizer):
    def make(max_steps=1):
        queries = [
            {"query": "What is one and one?"},
            {"query": "Why?"},
            {"query": "Name a colour of the sea."},
        ]
        loader = DataLoader(
            queries, batch_size=1, collate_fn=lambda items: lazy_stack([TensorDict(i) for i in items])
        )
        env = ChatEnv.from_dataloader(
            loader, batch_size=(NUM_ENVS,), repeats=GROUP, input_mode="history", tokenizer=tokenizer
        )
        return env.append_transform(StepCounter(max_steps=max_steps)).append_transform(OneReward())

    return make


@pytest.fixture
def make_policy(policy_llm, tokenizer):
    def make(**kwargs):
        return functools.partial(
            vLLMWrapper,
            policy_llm,
            tokenizer=tokenizer,
            input_mode="history",
            **{"generate": True, "generate_kwargs": {"max_new_tokens": 10, "temperature": 1.0}, **kwargs},
        )

    return make


def collect(env, policy_factory, turns=2 * NUM_ENVS, **kwargs):
    collector = LLMCollector(
        env,
        policy_factory=policy_factory,
        dialog_turns_per_batch=NUM_ENVS,
        total_dialog_turns=turns,
        **kwargs,
    )
    try:
        return [data.reshape(-1) for data in collector]
    finally:
        collector.shutdown()


def check(data, policy_oracle, ref_oracle, coeff=1.0):
    """Compare every KL, log-prob and reward of a batch with float64, on the ids that were generated."""
    keys = {
        "ids": ("tokens", "full"),
        "real": ("masks", "all_attention_mask"),
        "prompt": ("tokens", "prompt"),
        "kl": ("next", "kl_penalty"),
        "gen": ("next", "log_probs", "full"),
        "ref": ("next", "ref_log_probs", "full"),
        "reward": ("next", "reward"),
    }
    columns = {name: data.get(key, as_list=True) for name, key in keys.items()}
    for i in range(len(data)):
        row = {name: column[i] for name, column in columns.items()}
        row["mask"] = row["real"] & (torch.arange(len(row["ids"])) >= len(row["prompt"]))
        assert row["kl"].shape == row["ids"].shape  # lines up with the ids and the masks beside it
        assert row["mask"].any()
        for name in ("kl", "gen", "ref"):
            assert (row[name][~row["mask"]] == 0).all()
        ids, keep = row["ids"][row["real"]], row["mask"][row["real"]].tolist()
        want = oracle.kl(policy_oracle, ref_oracle, ids, keep)
        assert want.abs().max() > 0.1
        torch.testing.assert_close(row["kl"][row["real"]].double(), want, rtol=0, atol=KL_TOLERANCE)
        torch.testing.assert_close(row["reward"], 1 - coeff * row["kl"][:, None])


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
            check(data, policy_oracle, ref_oracle, coeff=0.1)


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
        check(data, policy_oracle, ref_oracle)


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
def test_two_turns_score_what_each_turn_generated(
    make_env, make_policy, make_reference, policy_oracle, ref_oracle, pad_output
):
    transform = RetrieveKL("from_collector", make_reference(pad_output=pad_output))
    env = make_env(max_steps=2).append_transform(transform)
    for data in collect(env, make_policy(pad_output=pad_output), turns=4 * NUM_ENVS):
        check(data, policy_oracle, ref_oracle)


def test_auto_rescores_where_the_policy_recorded_nothing(
    make_env, make_policy, make_reference, policy_oracle, ref_oracle, caplog
):
    transform = RetrieveKL(FromCollector(), make_reference())
    for data in collect(make_env().append_transform(transform), make_policy(return_log_probs=False)):
        check(data, policy_oracle, ref_oracle)
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
        check(data, policy_oracle, ref_oracle)


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
        check(data, policy_oracle, ref_oracle)


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
