"""Rotary embeddings of heads that are kept apart, on a CPU.

vLLM's CPU kernel (0.32) takes ``query`` and ``key`` as ``[N, heads * size]``. Given ``[N, heads, size]`` it takes the heads for
tokens, and rotates by the wrong angles without a word: log-probs of models that hand it such tensors (MLA with plain rotary
embeddings) are off by 0.1 nats and more. Here such tensors are made flat before the kernel, and get their shape back after it.

Source: ``RotaryEmbedding.forward_cpu``, ``model_executor/layers/rotary_embedding/base.py``, vLLM 0.32.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


def flattened(forward_cpu: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's method, for tensors ``[N, heads, size]`` too."""

    @functools.wraps(forward_cpu)
    def forward(self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        if query.dim() != 3:
            return forward_cpu(self, positions, query, key)
        flat_key = None if key is None else key.reshape(len(key), -1)
        rotated, rotated_key = forward_cpu(self, positions, query.reshape(len(query), -1), flat_key)
        return rotated.view(query.shape), None if key is None else rotated_key.view(key.shape)

    return forward


def install() -> None:
    """Mend the embeddings of models that this process makes from here on. Idempotent; nothing on a GPU."""
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and inspect.unwrap(RotaryEmbedding.forward_cpu) is RotaryEmbedding.forward_cpu:
        RotaryEmbedding.forward_cpu = flattened(RotaryEmbedding.forward_cpu)
