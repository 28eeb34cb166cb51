"""Says how many operations a second a GPU does at most, by its maker's data sheet.

torch has such a table, too (torch._inductor.analysis.device_info), but in 2.13 it has one entry for all H100,
counts an L4 with sparsity, and halves the float32 of an H100, which no sparsity doubles.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# NVIDIA's data sheets of H100 and H200 (nvidia.com/en-us/data-center/h100 and h200), SXM: BFLOAT16 1,979 with
# sparsity, which is twice the dense, and FP32 67.
_HOPPER_SXM = (1979 / 2, 67.0)
# The same, NVL: BFLOAT16 1,671 with sparsity, FP32 60.
_HOPPER_NVL = (1671 / 2, 60.0)
# The data sheet of H100 of 2022, PCIe: BFLOAT16 1,513 with sparsity, FP32 51.
_H100_PCIE = (1513 / 2, 51.0)
# The data sheet of A100 (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf), all boards: BFLOAT16 312 dense,
# FP32 19.5.
_A100 = (312.0, 19.5)
# The data sheet of L4 (resources.nvidia.com, l4-tensor-datasheet): BFLOAT16 242 with sparsity, FP32 30.3.
_L4 = (242 / 2, 30.3)

# By torch.cuda.get_device_name(): TFLOP/s of dense products in 16 bits, and in float32 without TF32.
_TFLOP_PER_S: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
        "NVIDIA H200": _HOPPER_SXM,
        "NVIDIA H100 NVL": _HOPPER_NVL,
        "NVIDIA H200 NVL": _HOPPER_NVL,
        "NVIDIA H100 PCIe": _H100_PCIE,
        "NVIDIA A100-SXM4-40GB": _A100,
        "NVIDIA A100-SXM4-80GB": _A100,
        "NVIDIA A100-PCIE-40GB": _A100,
        "NVIDIA A100 80GB PCIe": _A100,
        "NVIDIA L4": _L4,
    }
)


def peak_flop_per_s(name: str, dtype: str) -> float | None:
    """Return the dense operations a second of one GPU; ``None``: its data sheet is not in the table.

    Args:
        name: as torch tells it. A part of a GPU (MIG) has another name than the whole, and is not known.
        dtype: "bfloat16", "float16" or "float32".

    >>> peak_flop_per_s("NVIDIA H100 PCIe", "bfloat16") / 1e12
    756.5
    """
    if name not in _TFLOP_PER_S:
        return None
    in_16_bits, in_float32 = _TFLOP_PER_S[name]
    return 1e12 * (in_float32 if dtype == "float32" else in_16_bits)
