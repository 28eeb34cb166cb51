"""A scorer on a shared ``vllm.LLM`` leaves no request in it, and refuses one with requests of others."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

from tests.oracle import LOG_PROB_TOLERANCE
from tests.weights.helpers import IDS, error_of, generated
from vllm_kl import VLLMScorer
from vllm_kl.errors import EngineError


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_call_that_is_interrupted_leaves_no_request_in_a_shared_engine(
    policy_llm, policy_oracle, monkeypatch, error
):
    """vllm.LLM would give their outputs to whoever generates next."""
    scorer, step, steps = VLLMScorer(policy_llm), policy_llm.llm_engine.step, []

    def interrupted_step():
        steps.append(1)
        if len(steps) == 2:
            raise error
        return step()

    monkeypatch.setattr(policy_llm.llm_engine, "step", interrupted_step)
    with pytest.raises(error):
        scorer.score([IDS + [5 + n % 90] * 60 for n in range(40)])
    monkeypatch.undo()
    assert policy_llm.llm_engine.get_num_unfinished_requests() == 0
    assert len(generated(policy_llm, n=3)[0]) == 3
    oracle = torch.tensor(policy_oracle.log_probs(IDS)[1:], dtype=torch.float64)
    assert error_of(policy_llm, oracle) < LOG_PROB_TOLERANCE


def test_requests_that_others_left_in_a_shared_engine_are_told_of(policy_llm):
    scorer = VLLMScorer(policy_llm)
    params = SamplingParams(max_tokens=3)
    policy_llm.llm_engine.add_request("left", {"prompt_token_ids": IDS}, params)
    try:
        with pytest.raises(EngineError, match="has 1 unfinished requests of an interrupted generate"):
            scorer.score([IDS])
    finally:
        policy_llm.llm_engine.abort_request(["left"])
    scorer.score([IDS])
