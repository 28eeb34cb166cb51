"""Pushes from a trainer's memory into two replicas' workers, through vLLM's own NCCL sender.

On a CPU gloo stands in for NCCL (tests/gloo.py): only the communicators, and CUDA's current stream, which
vLLM's sender asks for, are other than on GPUs. tests/test_gpu.py has the push by NCCL itself.
"""

from __future__ import annotations

import pytest
import torch

from tests import gloo, local_ray
from tests.compat import since
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from tests.weights.test_async_vllm import error_of, fail_at, generated, in_replica
from vllm_kl import VLLMScorer, VLLMSyncScheme, VLLMWeightUpdater, push_weights
from vllm_kl.errors import OptionError, WeightsError
from vllm_kl.weights import nccl
from vllm_kl.weights.push import weights_of

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = [*local_ray.MARKS, since("0.28", "a sender with a state of its own")]


@pytest.fixture(scope="module")
def oracles(folders):
    return [Oracle(folder) for folder in folders]


@pytest.fixture(scope="module")
def llm(async_llm, states):
    yield async_llm
    weights_of(async_llm)._transfer = None
    push_weights(async_llm, states[0])


@pytest.fixture
def by_gloo(monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine

    monkeypatch.setattr(nccl, "OPENER", "tests.gloo:open_in_worker")
    monkeypatch.setattr(nccl, "check", lambda state, gpus: torch.device("cpu"))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", gloo.open_in_trainer)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)


def assert_serves(llm, oracle, version):
    assert weights_of(llm).version == version
    for replica in range(2):
        for _ in range(2):  # the second time the prompt's KV is in the cache
            assert error_of(generated(llm, replica), oracle) < LOG_PROB_TOLERANCE


def test_both_replicas_serve_what_was_sent(llm, states, oracles, by_gloo):
    before = weights_of(llm).version
    assert push_weights(llm, states[1], transport="nccl") == before + 1
    assert_serves(llm, oracles[1], before + 1)
    sender = weights_of(llm)._transfer._sender
    assert VLLMSyncScheme(llm, transport="nccl").create_sender().update_weights(states[2]) == before + 2
    assert_serves(llm, oracles[2], before + 2)
    assert weights_of(llm)._transfer._sender is sender, "the group is opened once"
    assert push_weights(VLLMScorer(llm), states[1], transport="nccl") == before + 3
    assert push_weights(llm, states[0]) == before + 4  # by files
    assert_serves(llm, oracles[0], before + 4)


@pytest.mark.parametrize("step", ["prepare", "commit"])
def test_one_replica_that_fails_leaves_all_on_weights_that_no_file_has(llm, states, oracles, by_gloo, step):
    before = push_weights(llm, states[1], transport="nccl")
    in_replica(llm, 1, fail_at, step)
    try:
        with pytest.raises(WeightsError, match="(?s)replica 1 .*a worker died.*old weights"):
            push_weights(llm, states[2], transport="nccl" if step == "commit" else "files")
    finally:
        in_replica(llm, 1, fail_at, None)
    assert_serves(llm, oracles[1], before)
    assert push_weights(llm, states[2], transport="nccl") == before + 1
    assert_serves(llm, oracles[2], before + 1)


def test_weights_that_a_worker_refuses_leave_all_on_the_old_ones(llm, states, oracles, by_gloo, monkeypatch):
    before = push_weights(llm, states[1], transport="nccl")
    whole = weights_of(llm).skeleton.as_in_files(states[2])
    lacking = {name: tensor for name, tensor in whole.items() if "layers.1.mlp" not in name}
    with pytest.raises(WeightsError, match="no weights for model.layers.1.mlp"):
        weights_of(llm).send(lacking)
    assert_serves(llm, oracles[1], before)
    assert push_weights(llm, states[2], transport="nccl") == before + 1


def test_a_trainer_that_fails_in_the_middle_leaves_all_on_the_old_weights(
    llm, states, oracles, by_gloo, monkeypatch
):
    before = push_weights(llm, states[1], transport="nccl")
    sent = []

    class Failing(gloo.Gloo):
        def broadcast(self, tensor, src, stream=None):
            if len(sent) == 5:
                self.destroy()
                raise RuntimeError("out of memory")
            sent.append(tensor)
            super().broadcast(tensor, src)

    monkeypatch.setattr(gloo, "Gloo", Failing)
    weights_of(llm)._transfer.close()
    with pytest.raises(WeightsError, match="could not be sent by NCCL .out of memory"):
        push_weights(llm, states[2], transport="nccl")
    monkeypatch.undo()
    assert_serves(llm, oracles[1], before)


def test_what_needs_files_says_that_there_are_none(llm, states, by_gloo):
    push_weights(llm, states[1], transport="nccl")
    with pytest.raises(WeightsError, match="came by NCCL, so there are no files"):
        _ = weights_of(llm).source


def test_where_nccl_cannot_send_the_error_says_what_works(llm, states):
    before = weights_of(llm).version
    with pytest.raises(WeightsError, match="(?s)workers have no GPU.*files work everywhere"):
        push_weights(llm, states[1], transport="nccl")
    with pytest.raises(OptionError, match="'files' or 'nccl'"):
        VLLMWeightUpdater(llm, transport="gloo")
    assert weights_of(llm).version == before
