"""Limits the prefix-cache hits of a scoring request, so that vLLM computes every row that must be scored.

A row whose KV came from the cache has no hidden state, so it has no log-prob. vLLM limits a hit to the
request's length minus one token, so that it always computes the last row. For scoring requests the limit is
``start - 1`` tokens: vLLM always computes row ``start - 1``, which scores the first token, and all later
rows. So no request must be sent twice.

A KV connector (LMCache, KV offloading) adds its own hits after this limit, and may know neither the request's
salt nor the adapter or the weights that made its KV. Its hits are not used for scoring requests.

Requests that are not from this package keep vLLM's limit and the connector's hits.

Source: ``KVCacheManager.get_computed_blocks``, ``v1/core/kv_cache_manager.py``, vLLM 0.26 to 0.33;
``Scheduler.schedule``, ``v1/core/sched/scheduler.py``, vLLM 0.26 to 0.33.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm_kl.plugin.readout_request import unpack


class _Shortened:
    """A request with another ``num_tokens``. All other attributes are the original request's."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def first_scored_token(request: Any) -> int | None:
    """Return ``start`` of a scheduler's request; ``None``: it is not a scoring request."""
    pooling, sampling = request.pooling_params, request.sampling_params
    readout = (
        unpack(pooling.extra_kwargs) if pooling is not None else unpack(getattr(sampling, "extra_args", None))
    )
    return None if readout is None else readout.start


def capped(get_computed_blocks: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's cache lookup with a lower limit for scoring requests."""

    @functools.wraps(get_computed_blocks)
    def lookup(self: Any, request: Any, *limit: Any, **kwargs: Any) -> Any:
        start = first_scored_token(request)
        if start is not None:
            # Without a limit from the caller, vLLM looks for a hit of at most num_tokens - 1 tokens.
            request = _Shortened(request, start)
            # vLLM 0.33: the caller may pass a limit.
            limit = tuple(n if n is None else min(n, start - 1) for n in limit)
            if kwargs.get("max_cache_hit_length") is not None:
                kwargs["max_cache_hit_length"] = min(kwargs["max_cache_hit_length"], start - 1)
        return get_computed_blocks(self, request, *limit, **kwargs)

    return lookup


def reconciled(lookup_for_connector: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's cache lookup beside a connector, which takes the capped lookup for scoring requests.

    For a hybrid (Mamba) model, vLLM's own uses the hits of attention alone: the connector brings the state.
    """

    @functools.wraps(lookup_for_connector)
    def lookup(self: Any, request: Any, *limit: Any, **kwargs: Any) -> Any:
        if first_scored_token(request) is None:
            return lookup_for_connector(self, request, *limit, **kwargs)
        return *self.get_computed_blocks(request, *limit, **kwargs), False  # False: no group is behind

    return lookup


def without_its_hits(create_connector: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's factory of KV connectors. Its connectors give scoring requests no tokens."""

    @functools.wraps(create_connector)
    def create(*args: Any, **kwargs: Any) -> Any:
        connector = create_connector(*args, **kwargs)
        matched = connector.get_num_new_matched_tokens

        def matched_unless_ours(request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
            found = matched(request, num_computed_tokens)  # connectors keep an account of all requests
            return found if first_scored_token(request) is None else (0, False)

        connector.get_num_new_matched_tokens = matched_unless_ours
        return connector

    return create


def install() -> None:
    """Install the cap in this process. Idempotent."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    if not is_installed():
        KVCacheManager.get_computed_blocks = capped(KVCacheManager.get_computed_blocks)
        if hasattr(KVCacheManager, "get_computed_blocks_for_connector"):  # since vLLM 0.27 or later
            KVCacheManager.get_computed_blocks_for_connector = reconciled(
                KVCacheManager.get_computed_blocks_for_connector
            )
        KVConnectorFactory.create_connector = staticmethod(
            without_its_hits(KVConnectorFactory.create_connector)
        )


def is_installed() -> bool:
    """Whether the cap is installed in this process."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    return inspect.unwrap(KVCacheManager.get_computed_blocks) is not KVCacheManager.get_computed_blocks
