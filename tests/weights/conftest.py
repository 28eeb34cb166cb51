"""Fixtures of the tests that load new weights into live engines. The engines start once for the folder."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.oracle import Oracle
from tests.weights.helpers import IDS
from vllm_kl import VLLMScorer
from vllm_kl.weights.live_weights import lock_of
from vllm_kl.weights.push import push_weights


@pytest.fixture(scope="package")
def folders(tied_paths):
    return tied_paths[:3]


@pytest.fixture(scope="package")
def oracles(folders):
    """The float64 log-probs of ``IDS``, from the second token on, of each model."""
    return [torch.tensor(Oracle(folder).log_probs(IDS)[1:], dtype=torch.float64) for folder in folders]


@pytest.fixture(scope="package")
def states(folders):
    return [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]


@pytest.fixture(scope="package")
def llm(tied_llm):
    """A vllm.LLM in this process. It has the weights of the last test: each test pushes first."""
    lock_of(tied_llm.llm_engine).close_step()  # what other tests generated in this thread waits for nobody
    return tied_llm


@pytest.fixture(scope="package")
def owned(folders):
    """A scorer that owns its engine. It has the weights of the last test: each test pushes first."""
    with VLLMScorer(str(folders[0]), **tiny.ENGINE_OPTIONS) as scorer:
        yield scorer


@pytest.fixture(params=["shared", "owned"])
def engine(request, states):
    """An engine with the weights of model 0: a vllm.LLM in this process, or a scorer that owns one."""
    engine = request.getfixturevalue({"shared": "llm", "owned": "owned"}[request.param])
    push_weights(engine, states[0])
    return engine


@pytest.fixture
def owned_fresh(owned, states):
    """The scorer with the weights of model 0, whose canary remembers these weights and no others."""
    owned._canary._known.clear()
    owned.refresh(states[0])
    return owned
