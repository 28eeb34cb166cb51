"""Has MKL choose the code of its functions before several threads call them.

PyTorch computes cosines, exponentials and the like of large tensors on a CPU by MKL, a part of the tensor in
each thread. MKL (2024, in the wheels of PyTorch 2.13) chooses a function's code at its first call. When two
threads make that call at a time, one of them may compute its part with 12 bits only: of 133 processes four
had rotary embeddings that were off by 1.5e-4, and so log-probs off by 7e-5.

Source: https://github.com/pytorch/pytorch/issues/188792
"""

from __future__ import annotations

import functools

import torch

# Those of PyTorch's functions on MKL (``aten/src/ATen/cpu/vml.h``, 2.13) that models and losses use.
FUNCTIONS = (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.tanh, torch.erf)


@functools.cache
def choose_code() -> None:
    """Call each function for one number, which one thread does. Takes 3 ms, once in a process."""
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for function in FUNCTIONS:
            function(half)
