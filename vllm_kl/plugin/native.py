"""What follows the LM head's product on a CPU: one compiled pass, or three of PyTorch's where there is no compiler.

Compiled once per machine, in less than a second, and kept in vLLM's cache: by the request with which an engine is warmed up,
never by a caller's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import vllm.envs

_SOURCE = Path(__file__).with_name("exp2_sums.cpp")
_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]
# Named, not "native": a cache may be shared by machines.
_FLAGS_OF = {
    "AVX512": ["-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
    "AVX2": ["-mfma", "-mavx2"],
}


def sum_powers(tile_N_S: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return ``sum_and_fill(fill_N_1, sums_N)`` for a contiguous tile.

    It writes the sums of ``2 ** tile`` over each row, float32, and then ``fill`` into every column, for the next product.
    """
    if tile_N_S.dtype == torch.bfloat16 and tile_N_S.shape[1] % 2 == 0 and (function := _compiled()[0]):

        def sum_and_fill(fill_N_1: torch.Tensor, sums_N: torch.Tensor) -> None:
            num_rows, num_columns = tile_N_S.shape
            function(tile_N_S.data_ptr(), fill_N_1.data_ptr(), sums_N.data_ptr(), num_rows, num_columns // 2)

    else:
        powers = tile_N_S if tile_N_S.dtype == torch.float32 else torch.empty_like(tile_N_S, dtype=torch.float32)

        def sum_and_fill(fill_N_1: torch.Tensor, sums_N: torch.Tensor) -> None:
            torch.sum((powers if powers is tile_N_S else powers.copy_(tile_N_S)).exp2_(), 1, out=sums_N)
            tile_N_S.copy_(fill_N_1)

    return sum_and_fill


def missing_compiler() -> str:
    """Return what a user must know of a read-out that runs without its compiled loop; empty if it has it."""
    return _compiled()[1] if not torch.cuda.is_available() else ""


@functools.cache
def _compiled() -> tuple[Callable[..., None] | None, str]:
    try:
        function = ctypes.CDLL(str(_build())).exp2_sums
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        return None, f"LM heads take up to twice as long without a C++ compiler (c++, or that of CXX): {reason}"
    function.argtypes, function.restype = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2], None
    return function, ""


def _build() -> Path:
    """Return the library, compiled unless the cache has it. Processes that do so at the same time do not meet."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    command = [*compiler, *_FLAGS, *_FLAGS_OF.get(torch.backends.cpu.get_cpu_capability(), [])]
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    library = Path(vllm.envs.VLLM_CACHE_ROOT, "vllm_kl", f"exp2_sums-{key}.so")
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, str(_SOURCE), "-o", str(unfinished)], check=True, capture_output=True, text=True)
        unfinished.replace(library)
    return library
