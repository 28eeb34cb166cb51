"""A policy on the replicas of TorchRL's AsyncVLLM, in a collector, with pushes. A real local Ray."""

from __future__ import annotations

import pytest
from torchrl.modules.llm import vLLMWrapper
from transformers import AutoModelForCausalLM

from tests import local_ray
from tests.collectors import NUM_ENVS, check_kl
from tests.oracle import Oracle
from vllm_kl import EnginePolicyVersion, RetrieveKL, VLLMSyncScheme, VLLMWeightUpdater, push_weights
from vllm_kl.errors import WeightsError
from vllm_kl.weights.push import weights_of

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = local_ray.MARKS


@pytest.fixture
def policy_engine(async_llm, steps):
    """For ``make_collector``: the replicas instead of a ``vllm.LLM``."""
    push_weights(async_llm, AutoModelForCausalLM.from_pretrained(steps[0]))
    return async_llm


@pytest.mark.parametrize("mode", ["reuse", "rescore"])
def test_two_updates_and_every_kl_is_that_of_the_versions_it_carries(
    make_collector, make_reference, ref_oracle, steps, policy_engine, mode
):
    first = weights_of(policy_engine).version
    collector = make_collector(
        RetrieveKL("from_collector", make_reference(), gen_log_probs=mode), num_batches=3
    )
    for n, data in enumerate(collector):
        data = data.reshape(-1)
        assert data["next", "policy_version"].tolist() == [first + n] * NUM_ENVS
        check_kl(data, Oracle(steps[n]), ref_oracle)
        if n < 2:
            collector.update_policy_weights_(AutoModelForCausalLM.from_pretrained(steps[n + 1]))
            assert collector.policy_version == first + n + 1
    assert n == 2


def test_a_sync_scheme_pushes_to_all_replicas(policy_engine, steps):
    sender = VLLMSyncScheme(policy_engine).create_sender()
    sender.register_model(AutoModelForCausalLM.from_pretrained(steps[1]))
    version = sender.update_weights()
    assert EnginePolicyVersion(policy_engine).version == version


def test_the_version_goes_to_other_processes(policy_engine):
    sent = ray.cloudpickle.dumps(EnginePolicyVersion(policy_engine))  # as Ray sends it
    tracker = ray.cloudpickle.loads(sent)
    assert tracker.version == weights_of(policy_engine).version


def test_an_updater_refuses_what_it_cannot_push_to(policy_engine, tokenizer):
    VLLMWeightUpdater(policy_engine)
    VLLMWeightUpdater(vLLMWrapper(policy_engine, tokenizer=tokenizer))
    for engine in (object(), "my-policy"):
        with pytest.raises(WeightsError, match="expected a vllm.LLM"):
            VLLMWeightUpdater(engine)
