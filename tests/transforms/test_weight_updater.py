"""``VLLMWeightUpdater`` pushes weights, and the collector's version stays the engine's version."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from tests.collectors import NUM_ENVS, check_kl
from tests.oracle import Oracle
from vllm_kl import RetrieveKL, VLLMSyncScheme, VLLMWeightUpdater, push_weights
from vllm_kl.errors import OptionError
from vllm_kl.weights.push import weights_of


def test_the_weight_updater_needs_weights(tied_llm):
    with pytest.raises(OptionError, match="no weights"):
        VLLMWeightUpdater(tied_llm)()


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
