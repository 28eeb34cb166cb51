"""vLLM seeds every engine with 0: collectors that are made alike sample the same tokens."""

from __future__ import annotations

import pytest
from torchrl.modules.llm import vLLMWrapper
from vllm import LLM

from tests import tiny
from tests.collectors import GROUP, NUM_ENVS, collect

ENGINES = []  # they live for the whole run, because an engine that ends destroys vLLM's process groups


@pytest.fixture
def sampled(make_env, policy_path, tokenizer):
    """Make an engine and a collector; return the responses of two batches."""

    def sampled(sampling_seed=None, **options):
        llm = LLM(
            str(policy_path), enforce_eager=True, use_tqdm_on_load=False, **tiny.ENGINE_OPTIONS, **options
        )
        ENGINES.append(llm)
        kwargs = {"generate_kwargs": {"max_new_tokens": 10, "temperature": 1.0}}
        policy = vLLMWrapper(llm, tokenizer=tokenizer, input_mode="history", **kwargs)
        policy.sampling_params.seed = sampling_seed
        return [
            row.tolist()
            for data in collect(make_env(), lambda: policy)
            for row in data.get(("tokens", "response"), as_list=True)
        ]

    return sampled


def test_collectors_made_alike_sample_the_same_unless_their_engines_have_seeds(sampled):
    first = sampled()
    assert len(first) == 2 * NUM_ENVS
    assert first[:NUM_ENVS] != first[NUM_ENVS:]
    assert sampled() == first
    assert sampled(seed=1) != first


def test_a_seed_of_the_requests_makes_a_group_one_answer(sampled):
    responses = sampled(sampling_seed=1)
    assert all(responses[i] == responses[i + 1] for i in range(0, 2 * NUM_ENVS, GROUP))
