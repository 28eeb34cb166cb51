"""Tests the pooling read-out with several processes, preempted requests and quantised weights."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import shm, tiny
from tests.engines.helpers import start_in_child
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import VLLMScorer
from vllm_kl.engines.base import drive
from vllm_kl.types import ScoreRequest

OPTIONS = {"max_model_len": tiny.MAX_MODEL_LEN, "kv_cache_memory_bytes": 32 << 20}
PROMPT = random.Random(1).choices(range(259), k=64)
SEQUENCES = [PROMPT + random.Random(seed).choices(range(259), k=200) for seed in range(2, 6)]


def assert_close_to(oracle, scored, start):
    for got, ids in zip(scored, SEQUENCES, strict=True):
        want = torch.tensor(oracle.log_probs(ids)[start:], dtype=torch.float64)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)


@pytest.mark.nightly
def test_front_end_engine_and_worker_in_three_processes_agree(monkeypatch, ref_path, ref_oracle, ref_scorer):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with VLLMScorer(str(ref_path), dtype="float32", **OPTIONS) as scorer:
        assert_close_to(ref_oracle, scorer.score(SEQUENCES, 64), 64)
        assert scorer.stats.num_cached_tokens == 3 * 32
        chosen = [[[1, 2, 3]] * 200] * len(SEQUENCES)
        for a, b in zip(
            scorer.score_ids(SEQUENCES, chosen, 64), ref_scorer.score_ids(SEQUENCES, chosen, 64), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=LOG_PROB_TOLERANCE)


@pytest.mark.nightly
def test_tensor_parallel_ranks_score_in_bfloat16_and_leave_nothing(ref_path, ref_oracle):
    with VLLMScorer(str(ref_path), dtype="bfloat16", tensor_parallel_size=2, **OPTIONS) as scorer:
        for got, ids in zip(scorer.score(SEQUENCES, 64), SEQUENCES, strict=True):
            want = torch.tensor(ref_oracle.log_probs(ids)[64:])
            assert (got.double() - want).abs().mean() < 0.1  # bfloat16 layers
        names = shm.names_of(scorer._engine.pid)
    assert any(name.startswith("psm_") for name in names)  # vLLM's queues
    assert not shm.left(names)


@pytest.mark.nightly
def test_tensor_parallel_ranks_share_a_head_that_is_more_than_a_matrix(tmp_path):
    """A soft cap: the model's own logits, which vLLM gathers on every rank."""
    path = tiny.build_architecture(tmp_path, "gemma2")
    oracle = Oracle(path)
    oracle._model.set_attn_implementation("eager")  # the others leave the soft cap out
    with VLLMScorer(str(path), dtype="float32", tensor_parallel_size=2, **OPTIONS) as scorer:
        assert_close_to(oracle, scorer.score(SEQUENCES, 64), 64)


def score_preempted(model: str) -> tuple[int, list[np.ndarray]]:
    """Preempt every request between its chunks; return how many were, and the values. Runs in a child."""
    options = {"dtype": "float32", "max_num_batched_tokens": 96, "block_size": 32, **OPTIONS}
    driver = start_in_child(model, "pooling", **options)
    for key, ids in enumerate(SEQUENCES):
        driver.submit(key, ScoreRequest(token_ids=np.array(ids, np.int32), start=64), share_prefix=True)
    finished = dict(driver.step() + driver.step())
    core = driver._core.engine_core
    assert core.reset_prefix_cache(reset_running_requests=True)
    num_preempted = sum(request.num_preemptions > 0 for request in core.scheduler.requests.values())
    while len(finished) < len(SEQUENCES):
        finished.update(driver.step())
    return num_preempted, [finished[key].values for key in range(len(SEQUENCES))]


def test_preempted_requests_lose_no_row(child, ref_path, ref_oracle):
    num_preempted, values = child(score_preempted, str(ref_path))
    assert num_preempted
    assert_close_to(ref_oracle, [torch.from_numpy(v[:, 0]) for v in values], 64)


def score_after_cancelling(model: str) -> tuple[int, int, list[np.ndarray]]:
    """Cancel a call in the middle.

    Returns the requests that vLLM still has, the results that it still returns, and the next call's values.
    """
    driver = start_in_child(model, "pooling", dtype="float32", max_num_batched_tokens=96, **OPTIONS)
    requests = [ScoreRequest(token_ids=np.array(ids, np.int32), start=64) for ids in SEQUENCES]
    for key in range(400):  # more than the scheduler is given at once
        driver.submit(("gone", key), requests[key % len(requests)], share_prefix=False)
    driver.step()
    driver.cancel([("gone", key) for key in range(400)])
    left = driver._core.engine_core.scheduler.get_num_unfinished_requests()
    answered = len(driver.step())
    return left, answered, [result.values for result in drive(driver, requests, share_prefix=True)]


def test_cancelled_requests_leave_nothing_behind(child, ref_path, ref_oracle):
    left, answered, values = child(score_after_cancelling, str(ref_path))
    assert (left, answered) == (0, 0)
    assert_close_to(ref_oracle, [torch.from_numpy(v[:, 0]) for v in values], 64)


def peak_of_scoring(model: str, reads: bool) -> int:
    """Return the peak memory of this process in bytes in a call of 16k rows, with or without read-out."""
    from vllm_kl.engines.start_engine import start
    from vllm_kl.plugin import pooler

    class NoHead:
        def read(self, hidden_N_H, ids_N_K, *, top_k, temperature, entropy=False):
            return torch.zeros(len(ids_N_K), 1 + 2 * top_k)

    if not reads:
        pooler.find_head = lambda *_: NoHead()
    driver = start(model=model, readout="pooling", options={"dtype": "bfloat16", **OPTIONS})
    # The peak is what is used now: loading and warming up do not count.
    Path("/proc/self/clear_refs").write_text("5")
    rng = np.random.default_rng(0)
    for top_k in (0, 20):
        ids = rng.integers(0, 152_000, (80, 257), np.int32)
        requests = [ScoreRequest(token_ids=row, start=50, top_k=top_k) for row in ids]
        drive(driver, requests, share_prefix=True)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc: run it on Linux")
@pytest.mark.nightly
def test_the_read_out_adds_less_than_64_mib_to_an_engine(tmp_path):
    path = tiny.build_architecture(tmp_path, "qwen2", vocab_size=152_000, dtype=torch.bfloat16)
    peaks = {}
    for reads in (False, True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[reads] = pool.apply_async(peak_of_scoring, (str(path), reads)).get(timeout=250)
    assert peaks[True] - peaks[False] <= 64 << 20


@pytest.fixture(scope="module")
def quantized_path(ref_path, tmp_path_factory):
    """The reference with int8 weights and activations (compressed-tensors), and a bfloat16 LM head."""
    path = tmp_path_factory.mktemp("models") / "int8"
    path.mkdir()
    config = json.loads((ref_path / "config.json").read_text())
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**int8, "strategy": "channel", "dynamic": False},
                "input_activations": {**int8, "strategy": "token", "dynamic": True},
            }
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(ref_path / "model.safetensors").items():
        if "proj.weight" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[name.replace("weight", "weight_scale")] = scale.bfloat16()
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.nightly
def test_quantized_weights_score_as_in_vllms_own_read_out(quantized_path):
    scored = {}
    for readout in ("pooling", "flat"):
        with VLLMScorer(str(quantized_path), readout=readout, dtype="bfloat16", **OPTIONS) as scorer:
            assert scorer.readout == readout
            scored[readout] = torch.cat(scorer.score(SEQUENCES, 64))
    assert scored["flat"].std() > 0.5
    # vLLM's own rounds logits to bfloat16: near 8 in steps of 1/16.
    torch.testing.assert_close(scored["pooling"], scored["flat"], rtol=0, atol=0.1)
    assert (scored["pooling"] - scored["flat"]).abs().mean() < 0.02
