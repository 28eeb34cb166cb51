"""What vLLM's CPU backend (0.32) computes wrong without a word, and how it is mended in engines that are ours or were given to us.

- **Rotary embeddings of heads that are kept apart.** The kernel takes ``query`` and ``key`` as ``[N, heads * size]``. Given
  ``[N, heads, size]`` it takes heads for tokens, and rotates by the wrong angles: models that hand it such tensors (MLA with plain
  rotary embeddings) are off by 0.1 nats and more. Here such tensors are made flat before the kernel.
- **The bias of a router that has no groups of experts** (ERNIE 4.5) is left out, so that other experts are chosen than the model
  would. Here all experts are one group, for which vLLM has the code.

Source: ``RotaryEmbedding.forward_cpu``, ``model_executor/layers/rotary_embedding/base.py``; ``CPURouter._compute_routing``,
``model_executor/layers/fused_moe/router/cpu_router.py``; vLLM 0.32.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


def flattened(forward_cpu: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``RotaryEmbedding.forward_cpu`` for tensors ``[N, heads, size]`` too."""

    @functools.wraps(forward_cpu)
    def forward(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> Any:
        if query.dim() != 3:
            return forward_cpu(self, positions, query, key)
        flat_key = None if key is None else key.reshape(len(key), -1)
        rotated, rotated_key = forward_cpu(self, positions, query.reshape(len(query), -1), flat_key)
        return rotated.view(query.shape), None if key is None else rotated_key.view(key.shape)

    return forward


def biased(compute_routing: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``CPURouter._compute_routing`` that chooses experts by their biased scores wherever there is a bias."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import _grouped_topk

    @functools.wraps(compute_routing)
    def route(
        self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        knows_the_bias = self.use_grouped_topk or self.custom_routing_function is not None
        if (
            knows_the_bias
            or self.e_score_correction_bias is None
            or self.scoring_func not in ("softmax", "sigmoid")
        ):
            return compute_routing(self, hidden_states, router_logits, *args, **kwargs)
        return _grouped_topk(
            gating_output=router_logits,
            topk=self.top_k,
            renormalize=self.renormalize,
            num_expert_group=1,
            topk_group=1,
            scoring_func=self.scoring_func,
            routed_scaling_factor=self.routed_scaling_factor,
            e_score_correction_bias=self.e_score_correction_bias,
        )

    return route


def install() -> bool:
    """Mend the models that this process makes from here on; return whether they were not yet. Nothing on a GPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    changed = False
    for owner, name, mended in (
        (RotaryEmbedding, "forward_cpu", flattened),
        (CPURouter, "_compute_routing", biased),
    ):
        method = getattr(owner, name)
        if inspect.unwrap(method) is method:
            setattr(owner, name, mended(method))
            changed = True
    return changed


def mend(worker: Any) -> bool:
    """Mend the model of a worker that was made before :func:`install`; return whether there may have been something to mend."""
    changed = install()
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    upstream = inspect.unwrap(RotaryEmbedding.forward_cpu)
    for module in worker.model_runner.get_model().modules():
        # It took the method from its class when it was made.
        if (
            isinstance(module, RotaryEmbedding)
            and getattr(module._forward_method, "__func__", None) is upstream
        ):
            module._forward_method = module.forward_cpu
            changed = True
    return changed
