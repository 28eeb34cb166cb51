"""Prefix-cache hits of a scoring request end before the first row it needs.

A row whose KV came from the cache has no hidden state, so it cannot be scored. vLLM bounds a hit by the request's length
less one token, so that the last row is always computed. Here the bound is ``start - 1`` tokens: row ``start - 1``, which
scores the first token, and all rows after it are always computed. Sharing is exact, and nothing is ever sent twice.

Requests that are not ours keep vLLM's bound.

Source: ``KVCacheManager.get_computed_blocks``, ``v1/core/kv_cache_manager.py``, vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm_kl.plugin.request import unpack


class _Shortened:
    """A request that claims to have ``num_tokens`` tokens, and is the original in everything else."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def first_scored_token(request: Any) -> int | None:
    """Return ``start`` of a scheduler's request, or ``None`` if it is not ours."""
    pooling, sampling = request.pooling_params, request.sampling_params
    readout = (
        unpack(pooling.extra_kwargs) if pooling is not None else unpack(getattr(sampling, "extra_args", None))
    )
    return None if readout is None else readout.start


def capped(get_computed_blocks: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's lookup with the bound of scoring requests lowered."""

    @functools.wraps(get_computed_blocks)
    def lookup(self: Any, request: Any, *bound: Any, **kwargs: Any) -> Any:
        start = first_scored_token(request)
        if start is not None:
            # Without a bound vLLM looks for a hit of at most num_tokens - 1 tokens.
            request = _Shortened(request, start)
            # vLLM 0.33: the caller may pass the bound.
            bound = tuple(b if b is None else min(b, start - 1) for b in bound)
            if kwargs.get("max_cache_hit_length") is not None:
                kwargs["max_cache_hit_length"] = min(kwargs["max_cache_hit_length"], start - 1)
        return get_computed_blocks(self, request, *bound, **kwargs)

    return lookup


def install() -> None:
    """Install the cap in this process. Idempotent."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    if not is_installed():
        KVCacheManager.get_computed_blocks = capped(KVCacheManager.get_computed_blocks)


def is_installed() -> bool:
    """Whether scheduling in this process is capped."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    return inspect.unwrap(KVCacheManager.get_computed_blocks) is not KVCacheManager.get_computed_blocks
