"""An error that ends a collector's thread is raised where weights are pushed or refreshed."""

from __future__ import annotations

import pytest
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.envs import Transform
from transformers import AutoModelForCausalLM

from vllm_kl import RetrieveKL, check_collector, push_weights
from vllm_kl.errors import CollectorError
from vllm_kl.weights.push import weights_of


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ends_the_collectors_thread_is_raised_where_weights_are_pushed_or_refreshed(
    make_collector, make_reference, ref_scorer, ref_model, policy_engine, steps
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
