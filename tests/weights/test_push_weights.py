"""A push: every log-prob comes from the weights of the version that it claims."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from tensordict import TensorDict
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.compat import since
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from tests.weights.helpers import IDS, NORM, error_of, generated, scorer_on
from vllm_kl import VLLMScorer
from vllm_kl.errors import WeightsError
from vllm_kl.weights import checkpoint
from vllm_kl.weights.live_weights import lock_of
from vllm_kl.weights.push import push_weights, weights_of

pytestmark = pytest.mark.compat


def test_after_a_push_every_log_prob_is_that_of_the_new_weights_cached_and_uncached(engine, states, oracles):
    version = weights_of(engine).version
    for step, which in enumerate([1, 2, 0, 1], start=1):
        assert push_weights(engine, states[which]) == version + step == weights_of(engine).version
        for share_prefix in (True, True, False):
            assert error_of(engine, oracles[which], share_prefix=share_prefix) < LOG_PROB_TOLERANCE
        assert all(error_of(engine, oracles[other]) > 0.1 for other in range(3) if other != which)


@since("0.32", "versions in vLLM's outputs")
def test_what_the_policy_generates_after_a_push_comes_from_the_new_weights(llm, folders, states):
    for which in (0, 1, 2):
        version = push_weights(llm, states[which])
        response, log_probs, output = generated(llm)
        truth = Oracle(folders[which]).log_probs(IDS + response)[len(IDS) :]
        assert log_probs == pytest.approx(truth, abs=2e-5)
        assert [span.version for span in output.outputs[0].weight_versions] == [str(version)]
    lock_of(llm.llm_engine).close_step()  # nobody scores what was generated here


def test_scores_carry_the_version_that_made_them(engine, states):
    scorer = scorer_on(engine)
    version = push_weights(engine, states[1], version=weights_of(engine).version + 5)
    assert scorer.weight_version == version
    scorer.score([IDS])
    assert scorer.stats.weight_version == version


@pytest.mark.parametrize("as_what", ["module", "tensordict", "untied", "half", "wrapper"])
def test_any_form_of_the_weights_will_do(llm, folders, states, oracles, tokenizer, as_what):
    from torchrl.modules.llm import TransformersWrapper

    model = AutoModelForCausalLM.from_pretrained(folders[1])
    source = {
        "module": model,
        "tensordict": TensorDict.from_module(model),
        "untied": {name: t for name, t in states[1].items() if name != "lm_head.weight"},
        "half": {name: t.double() for name, t in states[1].items()},
        "wrapper": TransformersWrapper(model, tokenizer=tokenizer, generate=False, input_mode="tokens"),
    }[as_what]
    push_weights(llm, states[0])
    push_weights(llm, source)
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


@pytest.mark.parametrize("version", [0, -1, True, "7"])
def test_a_version_that_is_not_above_the_serving_one_is_refused(llm, states, version):
    with pytest.raises(WeightsError, match="expected an int above"):
        push_weights(llm, states[0], version=version)


@pytest.fixture
def two_at_once(monkeypatch):
    """Let two threads push; neither loads before both have chosen what to ask for."""
    barrier = threading.Barrier(2)
    write = checkpoint.Skeleton.write

    def wait_and_write(self, state):
        barrier.wait(60)
        return write(self, state)

    monkeypatch.setattr(checkpoint.Skeleton, "write", wait_and_write)

    def push(engine, states, **kwargs):
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(push_weights, engine, state, **kwargs) for state in states]
            return [future.exception() or future.result() for future in futures]

    return push


def test_two_pushes_at_once_get_a_version_each(engine, states, oracles, two_at_once):
    before = weights_of(engine).version
    versions = two_at_once(engine, [states[1], states[2]])
    assert sorted(versions) == [before + 1, before + 2]
    assert weights_of(engine).version == before + 2
    assert error_of(engine, oracles[1 + versions.index(before + 2)]) < LOG_PROB_TOLERANCE


def test_a_version_that_was_taken_in_the_meantime_is_refused(engine, states, oracles, two_at_once):
    wanted = weights_of(engine).version + 3
    results = two_at_once(engine, [states[1], states[2]], version=wanted)
    (refusal,) = [result for result in results if isinstance(result, WeightsError)]
    assert f"expected an int above {wanted}" in str(refusal)
    assert error_of(engine, oracles[1 + results.index(wanted)]) < LOG_PROB_TOLERANCE


def test_scores_of_two_versions_never_meet_in_one_batch(owned, states, oracles):
    """Calls and pushes from many threads: each call's numbers are all of the version that it reports."""
    push_weights(owned, states[0], version=1000 * (1 + owned.weight_version // 1000))
    first = owned.weight_version
    stop = threading.Event()

    def score():
        seen = set()
        while not stop.is_set():
            results = owned._engine.score(requests(), share_prefix=True)
            versions = {r.weight_version for r in results}
            assert len(versions) == 1
            which = (versions.pop() - first) % 3
            seen.add(which)
            for result in results:
                error = np.abs(result.values[:, 0] - oracles[which].numpy()).max()
                assert error < LOG_PROB_TOLERANCE
        return seen

    with ThreadPoolExecutor(3) as pool:
        scoring = [pool.submit(score) for _ in range(3)]
        try:
            for step in range(1, 7):
                push_weights(owned, states[step % 3])
        finally:
            stop.set()
        assert set().union(*(future.result() for future in scoring)) == {0, 1, 2}


def requests():
    from vllm_kl.types import ScoreRequest

    return [ScoreRequest(token_ids=np.array(IDS, np.int32), start=1) for _ in range(4)]


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_an_engine_that_cannot_take_weights_over_is_started_anew_on_them(
    folders, states, oracles, tmp_path, monkeypatch, caplog
):
    """As one that is compiled on a CPU cannot. Calls of other threads go on, each with one version."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'vllm_kl.engines._child' in ' '.join(sys.orig_argv):\n"
        "    from vllm_kl.plugin import load_weights\n"
        "    load_weights._is_compiled = lambda worker: True\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with VLLMScorer(str(folders[0]), **tiny.ENGINE_OPTIONS) as scorer, ThreadPoolExecutor(1) as pool:
        first, is_over = scorer._engine.pid, threading.Event()

        def score_on():
            while not is_over.is_set():
                values = scorer.score([IDS])[0].double()
                assert min(float((values - oracle).abs().max()) for oracle in oracles) < LOG_PROB_TOLERANCE

        scoring = pool.submit(score_on)
        for n, which in enumerate([1, 2], start=1):
            assert push_weights(scorer, states[which]) == scorer.weight_version == n
            assert error_of(scorer, oracles[which]) < LOG_PROB_TOLERANCE
        is_over.set()
        scoring.result(timeout=60)
        assert scorer._engine.pid != first
        assert "served by a new engine" in caplog.text
        assert "compiled code holds values that can only be replaced, not copied" in caplog.text
        wrong = {**states[1], NORM: torch.full_like(states[1][NORM], torch.nan)}
        with pytest.raises(WeightsError, match="not finite"):
            push_weights(scorer, wrong)
        assert error_of(scorer, oracles[2]) < LOG_PROB_TOLERANCE
    assert not psutil.pid_exists(first)


def test_an_engine_with_unfinished_requests_is_not_pushed_to(llm, states):
    from vllm import SamplingParams

    llm.llm_engine.add_request("0", {"prompt_token_ids": IDS}, SamplingParams(max_tokens=2))
    try:
        with pytest.raises(WeightsError, match="unfinished requests"):
            push_weights(llm, states[1])
    finally:
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()


def test_an_engine_that_nccl_does_not_reach_is_refused_with_what_works(engine, states):
    before = weights_of(engine).version
    with pytest.raises(WeightsError, match="AsyncVLLM only, and this is a .* files reach every engine"):
        push_weights(engine, states[1], transport="nccl")
    assert weights_of(engine).version == before


def test_an_engine_of_another_kind_is_refused_with_what_works():
    with pytest.raises(WeightsError, match="expected a vllm.LLM, .* or a VLLMScorer, got object"):
        push_weights(object(), {})
