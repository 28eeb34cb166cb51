"""Offers vLLM's C++ kernels for RMS norms on a CPU to vLLM's choice of kernels, ``ir_op_priority``.

vLLM (0.32) has the kernels and lists them for GPUs only. On a CPU it computes a norm by some ten operations
of PyTorch: of a sum in bfloat16 they take seven times as long. An owned engine on a CPU prefers what is
offered here. In 16 bits the kernel scales the rounded sum, and rounds once after the weight; vLLM's
operations scale the sum in float32, and round before and after the weight.

The kernels check no sizes but a row's, and compute in place. They get only what they take. Those for CPUs
without AVX512_BF16 cut bfloat16 off instead of rounding it: every norm is 0.3 % too small, and what the
layers add up 0.15 % at each of them. There bfloat16 is left to vLLM's operations.

Source: ``vllm/kernels/vllm_c.py`` and ``vllm/ir/ops/layernorm.py``; vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PROVIDER = "vllm_kl_cpu"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_rounded: set[torch.dtype] = set()  # those that the kernels of this CPU round to the nearest number
_MULTIPLE = 16  # a row has whole vectors of 8 or 16 numbers, else the kernels raise
_ALIGNED_BYTES = 16  # how they write 16 bits in place
_MOST = 1 << 31  # their counters have 32 bits


def install() -> None:
    """Offer the kernels, if this vLLM has a choice. Idempotent; on a CPU it loads vLLM's C++ library."""
    try:
        from vllm.ir import ops
    except ImportError:
        return
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    if is_cpu:
        current_platform.import_kernels()
        _rounded.update(filter(rounds, _DTYPES))
    for name, (function, how) in _KERNELS.items():
        operation = getattr(ops, name, None)
        if operation is not None and PROVIDER not in operation.impls:
            has_kernel = is_cpu and hasattr(torch.ops._C, name)
            operation.register_impl(PROVIDER, supported=has_kernel, **how)(function)


def rounds(dtype: torch.dtype) -> bool:
    """Return whether vLLM's kernels for this CPU take a dtype, and round to its nearest number.

    The kernel that adds and norms is asked; a library has one way to store a number.
    """
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "fused_add_rms_norm"):
        return False
    ones = torch.ones(1, _MULTIPLE, dtype=dtype)
    total, three_quarters = ones.clone(), ones * (0.75 * torch.finfo(dtype).eps)
    try:
        torch.ops._C.fused_add_rms_norm(three_quarters, total, ones, 1e-5)
    except RuntimeError:  # this library has no kernel for the dtype
        return False
    return bool((total > 1).all())


def _takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return (
        weight is not None
        and variance_size is None
        and x.dtype == weight.dtype
        and x.dtype in _rounded
        and x.shape[-1:] == weight.shape
        and x.shape[-1] % _MULTIPLE == 0
        and x.numel() < _MOST
    )


def _takes_both(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    both = (x, x_residual)
    return (
        x.shape == x_residual.shape
        and x.dtype == x_residual.dtype
        and x.data_ptr() != x_residual.data_ptr()
        and all(one.is_contiguous() and one.data_ptr() % _ALIGNED_BYTES == 0 for one in both)
        and _takes(x, weight, epsilon, variance_size)
    )


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """Return ``x / sqrt(mean(x**2) + epsilon) * weight``, the mean over the last dimension."""
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
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


_KERNELS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "rms_norm": (rms_norm, {"supports_args": _takes}),
    "fused_add_rms_norm": (fused_add_rms_norm, {"supports_args": _takes_both, "inplace": True}),
}
OPERATIONS = tuple(_KERNELS)  # vLLM's names
