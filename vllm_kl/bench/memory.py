"""Estimates how much memory a provider takes on a CPU, to decide how many may be in memory at a time.

Beside the libraries, the weights and the KV cache, the logits count: our read-out and the floor hold a tile
of them, vLLM's own ways those of a step of one request, and transformers those of a slice of sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_kl.bench.providers import LOGITS_OF_ONE, SLICE_BYTES
from vllm_kl.bench.traffic import Traffic
from vllm_kl.bench.types import Setup

_WITH_LOGITS = ("torchrl", "flat", "token_ids", "sglang")  # engines that hold those of a step
# Libraries, buffers of a step and oneDNN's products: measured 1.5 GiB of an engine.
_PROCESS_BYTES = 1.6 * 2**30
_CALLER_BYTES = 0.6 * 2**30  # the process that calls our engine, which is a child
_STEP_TOKENS = 4096
_KV_STEPS = 8  # of spare room in the KV cache (engines/memory.py)
# Of the logits in float32, with what glibc keeps of freed ones (environment.py). Measured with 151,936 tokens
# of vocabulary and 2,048 rows, five rounds, in float32 and bfloat16: 8.2 and 6.4 in TorchRL's way, 9.2 and
# 6.0 in vLLM's own, 7.9 and 3.9 in transformers. In the last two it grows with the rounds: two of them took
# 7.3 and 5.8, 6.1 and 2.6. Where nothing is kept it is about half.
_COPIES_OF_VLLM, _COPIES_OF_TRANSFORMERS = 9.6, {"float32": 8.2, "bfloat16": 4.3, "float16": 4.3}


def memory_bytes(kind: str, setup: Setup, facts: Mapping[str, Any], traffics: Sequence[Traffic]) -> float:
    """Return about the most memory of a provider's processes, in bytes.

    Args:
        kind: the provider's name; one of the user's own is taken for one like transformers.
        setup: what it runs.
        facts: what ``bench.truth`` tells; the ``size`` is known.
        traffics: what it scores.
    """
    size = facts["size"]
    engine = _PROCESS_BYTES + 4 * size["parameters"]  # 16-bit weights may be widened
    if kind in ("ours", "floor", *_WITH_LOGITS):
        num_tokens = setup.max_tokens + _KV_STEPS * _STEP_TOKENS
        engine += 4 * num_tokens * size["layers"] * size["kv"]
    if kind == "ours":
        return setup.replicas * engine + _CALLER_BYTES
    if kind == "floor":
        return engine
    row_bytes = 4 * facts["vocab_size"]
    if kind in _WITH_LOGITS:
        return engine + _COPIES_OF_VLLM * row_bytes * min(setup.max_tokens, LOGITS_OF_ONE)
    one = max(max(responses) for traffic in traffics for _, responses in traffic.groups) + 1
    most = max(one, SLICE_BYTES // row_bytes)
    num_rows = min(most, max(traffic.num_sequences for traffic in traffics) * one)
    return engine + _COPIES_OF_TRANSFORMERS[facts["dtype"]] * row_bytes * num_rows
