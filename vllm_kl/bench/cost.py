"""Counts what a call costs, before anything is measured: tokens, operations, bytes, and the bound.

Operations: two for each weight that a token is multiplied with, the products of attention, and the LM head on
the scored rows only. Bytes: each weight is read once, of an embedding that is not the head, too, the rows of
the tokens only; and the keys and values of each token are written once. An engine that works in steps reads
more. The bound is what the machine's own speeds make of the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_kl.bench.traffic import Traffic

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call costs at least."""

    sequences: int
    fed_tokens: int
    computed_tokens: int  # a prompt counts once, unless prompts are not shared
    scored_tokens: int
    flop: float | None  # None: the model's size is not known
    head_flop: float | None  # the LM head's share of them
    bytes: float | None
    least_s: float | None  # at the machine's measured speeds
    bound: str  # "compute", "memory" or ""


def cost_of(
    traffic: Traffic,
    size: Mapping[str, int] | None,
    dtype: str,
    limits: Any,
    *,
    share_prefix: bool = True,
    num_devices: int = 1,
) -> Cost:
    """Return the cost of one call. ``size`` and ``limits``, of one device, are what ``bench.truth`` tells."""
    computed = traffic.computed_tokens if share_prefix else traffic.fed_tokens
    flop = head_flop = size_bytes = least_s = None
    bound = ""
    if size is not None:
        head_flop = 2.0 * size["head"] * traffic.scored_tokens
        flop = 2.0 * size["body"] * computed + head_flop
        flop += 4.0 * size["layers"] * size["attention"] * attended(traffic, share_prefix)
        read = size["parameters"] - size["embedding"] + _rows_read(traffic, size) * size["hidden"]
        size_bytes = _BYTES[dtype] * (read + float(size["layers"] * size["kv"] * computed))
        compute_s, memory_s = flop / limits.flop_per_s, size_bytes / limits.bytes_per_s
        compute_s, memory_s = compute_s / num_devices, memory_s / num_devices
        least_s, bound = max((compute_s, "compute"), (memory_s, "memory"))
    return Cost(
        sequences=traffic.num_sequences,
        fed_tokens=traffic.fed_tokens,
        computed_tokens=computed,
        scored_tokens=traffic.scored_tokens,
        flop=flop,
        head_flop=head_flop,
        bytes=size_bytes,
        least_s=least_s,
        bound=bound,
    )


def _rows_read(traffic: Traffic, size: Mapping[str, int]) -> float:
    """Return how many rows of an embedding of its own a call reads: as many as it draws different ids."""
    vocab_size = size["embedding"] // size["hidden"]
    drawn = sum(prompt + sum(responses) for prompt, responses in traffic.groups)
    return -vocab_size * math.expm1(-drawn / vocab_size) if vocab_size else 0.0


def attended(traffic: Traffic, share_prefix: bool) -> float:
    """Return the pairs of a computed token and a token that it attends to."""
    return sum(
        (1 if share_prefix else len(responses)) * prompt * prompt / 2
        + sum(prompt * response + response * response / 2 for response in responses)
        for prompt, responses in traffic.groups
    )
