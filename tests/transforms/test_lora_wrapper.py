"""The KL of a policy that is an adapter: its reference is the base model or an adapter on the same engine."""

from __future__ import annotations

import functools

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import StepCounter
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import vLLMWrapper

from tests import oracle
from tests.collectors import check_kl
from tests.lora import error_of
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl import FromCollector, LoRAWrapper, RetrieveKL, VLLMReference, VLLMScorer

pytestmark = pytest.mark.compat

DIFFERENCE = 2 * LOG_PROB_TOLERANCE  # of two log-probs; in 320 dialogs at most 4.8e-6 was seen


@pytest.fixture
def collect(lora_llm, tokenizer):
    def run(reference, mode, policy_type=LoRAWrapper, **policy_options):
        queries = DataLoader(
            [{"query": "What is one and one?"}, {"query": "Why?"}],
            collate_fn=lambda items: lazy_stack([TensorDict(i) for i in items]),
        )
        env = ChatEnv.from_dataloader(
            queries, batch_size=(2,), repeats=2, input_mode="history", tokenizer=tokenizer
        )
        env = env.append_transform(StepCounter(max_steps=1))
        env = env.append_transform(RetrieveKL("from_collector", reference, gen_log_probs=mode))
        policy = functools.partial(
            policy_type,
            lora_llm,
            tokenizer=tokenizer,
            generate_kwargs={"max_new_tokens": 10, "temperature": 1.0, "ignore_eos": True},
            **policy_options,
        )
        collector = LLMCollector(env, policy_factory=policy, dialog_turns_per_batch=2, total_dialog_turns=4)
        try:
            return [data.reshape(-1) for data in collector]
        finally:
            collector.shutdown()

    return run


def check_all(batches, policy_oracle, ref_oracle):
    assert batches
    for data in batches:
        check_kl(data, policy_oracle, ref_oracle, coeff=None, tolerance=DIFFERENCE)


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
@pytest.mark.parametrize("mode", ["reuse", "rescore"])
def test_kl_of_an_adapter_against_its_base_on_one_engine_agrees_with_float64(
    lora_llm, collect, tokenizer, lora_requests, lora_oracles, mode, pad_output
):
    reference = VLLMReference(VLLMScorer(lora_llm), tokenizer, pad_output=pad_output)
    batches = collect(reference, mode, lora_request=lora_requests[1], pad_output=pad_output)
    check_all(batches, lora_oracles[1], lora_oracles[0])


def test_a_policy_that_is_given_follows_its_adapter(lora_llm, tokenizer, lora_requests, lora_oracles):
    policy = LoRAWrapper(
        lora_llm, lora_request=lora_requests[1], tokenizer=tokenizer, input_mode="tokens", generate=False
    )
    reference = VLLMReference(VLLMScorer(lora_llm), tokenizer, input_mode="tokens")
    transform = RetrieveKL(policy, reference, assistant_only=False, add_to_reward=False, on_stale="allow")
    ids = list(range(5, 45))
    for which in (1, 2, 1):
        policy.lora_request = lora_requests[which]
        td = transform(TensorDict(tokens=TensorDict(full=torch.tensor([ids]), batch_size=1), batch_size=1))
        want = oracle.kl(lora_oracles[which], lora_oracles[0], ids, [False] + [True] * (len(ids) - 1))
        got = td.get("kl_penalty", as_list=True)[0].double()
        torch.testing.assert_close(got, want, rtol=0, atol=DIFFERENCE)


def test_the_reference_may_be_an_adapter_too(lora_llm, collect, tokenizer, lora_requests, lora_oracles):
    reference = VLLMReference(lora_llm, tokenizer, lora_request=lora_requests[2])
    check_all(collect(reference, "rescore", lora_request=lora_requests[1]), lora_oracles[1], lora_oracles[2])
    check_all(collect(reference, "reuse", lora_request=None), lora_oracles[0], lora_oracles[2])


def test_a_policy_class_of_the_users_own_is_scored_with_the_adapter_that_it_names(
    lora_llm, collect, tokenizer, lora_requests, lora_oracles
):
    class Mine(vLLMWrapper):
        def _call_generate(self, *args, **kwargs):
            return super()._call_generate(*args, lora_request=lora_requests[2], **kwargs)

    reference = VLLMReference(lora_llm, tokenizer)
    check_all(collect(reference, "rescore", policy_type=Mine), lora_oracles[2], lora_oracles[0])


def test_an_adapter_that_is_replaced_is_followed(lora_llm, tokenizer, lora_requests, lora_oracles):
    policy = LoRAWrapper(
        lora_llm, tokenizer=tokenizer, input_mode="tokens", generate=False, lora_request=lora_requests[1]
    )
    side = FromCollector("rescore")
    assert error_of(side._scorer_of(policy), lora_oracles[1]) < LOG_PROB_TOLERANCE
    assert side._scorer_of(policy) is side._scorer_of(policy)
    policy.lora_request = lora_requests[2]
    assert error_of(side._scorer_of(policy), lora_oracles[2]) < LOG_PROB_TOLERANCE
    twin = policy.get_new_version(pad_output=True)
    assert twin.lora_request is lora_requests[2]
    assert policy.get_new_version(lora_request=None).lora_request is None


def test_torchrls_wrapper_still_drops_the_adapter(lora_llm, tokenizer, lora_requests, monkeypatch):
    """When this fails, TorchRL names adapters itself: read how, then sides.scorer_for."""
    asked = []
    monkeypatch.setattr(
        lora_llm, "generate", lambda *_, **kwargs: asked.append(kwargs) or pytest.skip.Exception
    )
    kwargs = {"max_new_tokens": 4, "lora_request": lora_requests[1]}
    policy = vLLMWrapper(lora_llm, tokenizer=tokenizer, input_mode="tokens", generate_kwargs=kwargs)
    policy._call_generate(sampling_params=policy.sampling_params)
    assert asked == [{"sampling_params": policy.sampling_params}]
    assert "lora_request" not in vars(policy)
