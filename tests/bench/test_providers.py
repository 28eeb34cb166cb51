"""How the ways to score are set up, so that none is handicapped. No engine is started."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from vllm import EngineArgs

from vllm_kl.bench.providers import peer_options, sglang_options, slices, with_kv_cache
from vllm_kl.bench.types import Setup
from vllm_kl.engines.memory import kv_cache_bytes
from vllm_kl.engines.start_engine import _defaults


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vllms_own_ways_have_the_mode_and_the_steps_of_our_engine(device):
    ours = _defaults(SimpleNamespace(is_hybrid=False, is_attention_free=False), is_cpu=device == "cpu")
    peers = peer_options(Setup(model="m", dtype="float32", device=device, max_tokens=3000))
    for name in ("enforce_eager", "compilation_config", "max_num_batched_tokens"):
        assert peers.get(name) == ours.get(name), name
    assert peers["max_model_len"] == 3001  # one token is sampled
    assert peers["long_prefill_token_threshold"] == 2048
    short = peer_options(Setup(model="m", dtype="float32", device=device, max_tokens=300))
    assert "long_prefill_token_threshold" not in short  # vLLM refuses more than the longest sequence


def test_vllms_own_ways_have_as_large_a_kv_cache_as_the_longest_sequence_needs(ref_path):
    """A fixed size made them fail where one sequence does not fit, and ours not."""
    setup = Setup(model=str(ref_path), dtype="float32", device="cpu", max_tokens=120)
    options = with_kv_cache(setup, peer_options(setup))
    config = EngineArgs(model=setup.model, **peer_options(setup)).create_model_config()
    assert options["kv_cache_memory_bytes"] == kv_cache_bytes(
        setup.model, config, peer_options(setup), is_cuda=False
    )
    given = replace(setup, engine={"kv_cache_memory_bytes": 1 << 20})
    assert with_kv_cache(given, peer_options(given))["kv_cache_memory_bytes"] == 1 << 20


def test_slices_of_mixed_lengths_hold_no_more_logits_than_they_may():
    rng = np.random.default_rng(0)
    starts = rng.integers(1, 900, 64).tolist()
    lengths = [start + int(more) for start, more in zip(starts, rng.integers(1, 300, 64), strict=True)]
    found = list(slices(lengths, starts, most_rows=2000))
    assert sorted(i for part in found for i in part) == list(range(64))
    assert len(found) < 64
    for part in found:
        kept = max(lengths[i] for i in part) - min(starts[i] for i in part) + 1
        assert len(part) * kept <= 2000 or len(part) == 1


def test_sglang_takes_the_longest_sequence_and_shares_prompts_inside_a_batch():
    engine = {"tensor_parallel_size": 2, "revision": "main", "block_size": 16}
    options = sglang_options(Setup(model="m", dtype="bfloat16", device="cuda", engine=engine, max_tokens=100))
    max_req_input_len = (options["context_length"] - 1) - 5  # of SGLang, which refuses as many tokens
    assert max_req_input_len > 100
    assert (options["schedule_policy"], options["tp_size"]) == ("lpm", 2)
    assert options["revision"] == "main"
    assert "block_size" not in options  # vLLM's
