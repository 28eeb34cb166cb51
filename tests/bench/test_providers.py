"""How the ways to score are set up, so that none is handicapped. No engine is started."""

from __future__ import annotations

import numpy as np

from vllm_kl.bench.providers import sglang_options, slices
from vllm_kl.bench.types import Setup


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
