"""``VLLMSyncScheme``, TorchRL's weight sync scheme, pushes weights into a ``vllm.LLM``."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from tests.weights.helpers import IDS, error_of
from vllm_kl.errors import OptionError
from vllm_kl.transforms.sync_scheme import VLLMSyncScheme
from vllm_kl.weights.push import push_weights, weights_of


@pytest.fixture
def llm(tied_llm, tied_paths):
    """An engine with the weights of model 0."""
    push_weights(tied_llm, AutoModelForCausalLM.from_pretrained(tied_paths[0]))
    return tied_llm


def assert_serves(llm, folder):
    oracle = torch.tensor(Oracle(folder).log_probs(IDS)[1:], dtype=torch.float64)
    assert error_of(llm, oracle) < LOG_PROB_TOLERANCE


def test_the_sync_scheme_pushes_a_registered_model(llm, tied_paths):
    sender = VLLMSyncScheme(llm).create_sender()
    with pytest.raises(OptionError, match="no weights"):
        sender.update_weights()
    sender.register_model(AutoModelForCausalLM.from_pretrained(tied_paths[2]))
    assert sender.update_weights() == weights_of(llm).version
    assert_serves(llm, tied_paths[2])


def test_the_transport_of_the_sync_scheme_pushes_a_state_dict(llm, tied_paths):
    state = AutoModelForCausalLM.from_pretrained(tied_paths[1]).state_dict()
    VLLMSyncScheme(llm).create_transport().send_weights(state)
    assert_serves(llm, tied_paths[1])
