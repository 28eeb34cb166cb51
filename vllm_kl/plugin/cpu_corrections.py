"""Corrects three errors of vLLM's CPU backend (0.32), in engines that this package made or was given.

- **Rotary embeddings of 3-D tensors.** The kernel expects ``query`` and ``key`` as ``[N, heads * size]``. Of
  a tensor ``[N, heads, size]`` (MLA with plain rotary embeddings) it takes the heads for tokens, and rotates
  by wrong angles: log-probs are off by 0.1 nats and more. The correction flattens such tensors before the
  kernel.
- **The bias of a router without groups of experts** (ERNIE 4.5). vLLM ignores it, and so chooses other
  experts than the model would. The correction makes one group of all experts, for which vLLM applies the
  bias.
- **AMX without a request.** vLLM's attention in bfloat16 and its products in int8 use the tiles of AMX. A
  process must ask Linux for them, or is killed at the first use. oneDNN asks before its own first product of
  that kind, but an engine may have none. The correction asks in every process of the engine.

Source: ``RotaryEmbedding.forward_cpu``, ``model_executor/layers/rotary_embedding/base.py``;
``CPURouter._compute_routing``, ``model_executor/layers/fused_moe/router/cpu_router.py``; vLLM 0.32.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch


def flattened(forward_cpu: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``RotaryEmbedding.forward_cpu`` that is right for tensors ``[N, heads, size]``, too."""

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
    """Return ``CPURouter._compute_routing`` that applies the bias of every router that has one."""
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
    """Correct all later models of this process, on a CPU; return whether models before were wrong."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    changed = False
    for owner, name, corrected in _corrections():
        method = getattr(owner, name)
        if inspect.unwrap(method) is method:
            setattr(owner, name, corrected(method))
            changed = True
    return changed


def _corrections() -> Iterator[tuple[type, str, Callable[..., Any]]]:
    """Yield the classes, the names of their methods and the functions that correct these."""
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    yield RotaryEmbedding, "forward_cpu", flattened
    with contextlib.suppress(ImportError):  # older vLLM has no CPURouter
        from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

        yield CPURouter, "_compute_routing", biased


def correct(worker: Any) -> bool:
    """Correct a worker's model that exists already; return whether it may have computed wrong KV."""
    changed = install()
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    upstream = inspect.unwrap(RotaryEmbedding.forward_cpu)
    for module in worker.model_runner.get_model().modules():
        # The module has kept the method of its class since it was made.
        if (
            isinstance(module, RotaryEmbedding)
            and getattr(module._forward_method, "__func__", None) is upstream
        ):
            module._forward_method = module.forward_cpu
            changed = True
    return changed
