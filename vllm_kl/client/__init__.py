"""The client of ``vllm-kl serve``. It needs numpy, httpx, msgpack and tenacity: neither torch nor vLLM.

    from vllm_kl.client import score
    log_probs = score("http://127.0.0.1:8000", token_ids, start)

``ascore`` is its twin for a running event loop. A :class:`Client` or :class:`AsyncClient` keeps its
connections for many calls. With torch, ``VLLMScorer("http://...")`` is the same with tensors.
"""

from __future__ import annotations

from vllm_kl.client.client import AsyncClient, Client, TopK, ascore, score

__all__ = ["AsyncClient", "Client", "TopK", "ascore", "score"]
