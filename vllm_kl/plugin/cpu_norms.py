"""Offers vLLM's C++ kernels for RMS norms on a CPU to vLLM's choice of kernels, ``ir_op_priority``.

vLLM (0.32) has the kernels and lists them for GPUs only. On a CPU it computes a norm by eight operations of
PyTorch, which take seven times as long in bfloat16. An owned engine on a CPU prefers what is offered here.
In 16 bits the kernel rounds the sum with the residual before it is squared, as transformers does; vLLM's
operations round after.

Source: ``vllm/kernels/vllm_c.py`` and ``vllm/ir/ops/layernorm.py``; vLLM 0.32.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

PROVIDER = "vllm_kl_cpu"
PRIORITY = {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MULTIPLE = 16  # numbers in the kernel's vector: it reads and writes whole ones


def install() -> None:
    """Offer the kernels, if this vLLM has a choice. Idempotent."""
    if importlib.util.find_spec("vllm.ir") is None:
        return
    from vllm import ir
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    if is_cpu:
        current_platform.import_kernels()
    offered: dict[Any, dict[str, Any]] = {
        rms_norm: {"supports_args": _takes},
        fused_add_rms_norm: {"supports_args": _takes_both, "inplace": True},
    }
    for function, how in offered.items():
        operation = getattr(ir.ops, function.__name__)
        if PROVIDER not in operation.impls:
            has_kernel = is_cpu and hasattr(torch.ops._C, function.__name__)
            operation.register_impl(PROVIDER, supported=has_kernel, **how)(function)


def _takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return (
        weight is not None
        and variance_size is None
        and x.dtype == weight.dtype
        and x.dtype in _DTYPES
        and x.shape[-1] % _MULTIPLE == 0
    )


def _takes_both(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    is_flat = x.is_contiguous() and x_residual.is_contiguous()
    return is_flat and x.dtype == x_residual.dtype and _takes(x, weight, epsilon, variance_size)


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """Return ``x / sqrt(mean(x**2) + epsilon) * weight``, the mean over the last dimension."""
    output = torch.empty(x.shape, dtype=x.dtype)
    torch.ops._C.rms_norm(output, x.contiguous(), weight, epsilon)
    return output


def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x + x_residual``, and the sum; in the memory of the two."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
