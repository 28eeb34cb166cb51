"""Runs the kernel's inner loops on a CPU: compiled C++, or PyTorch operations if there is no compiler.

The compilation takes a few seconds, once per machine. vLLM's cache folder keeps the libraries. An engine's
warm-up request compiles them, so no caller waits for it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import vllm.envs

from vllm_kl.plugin.best_tokens import Best

_FOLDER = Path(__file__).parent
_FLAGS = "-std=c++17 -O3 -ffp-contract=fast -fno-trapping-math -fno-strict-aliasing -fopenmp -shared -fPIC"
# Explicit flags instead of -march=native: several machines may share the cache.
_FLAGS_OF = {
    "AVX512": "-mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
    "AVX2": "-mfma -mavx2",
}
_AMX_FLAGS = "-mamx-tile -mamx-bf16"
_NAME_OF = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
# Rows that a PyTorch operation takes at a time, and bytes that it gathers: so its copies stay small.
_ROWS = 512
_MAX_GATHERED_BYTES = 8 << 20
# Rows of a tile of AMX, and features of a tile in 16 bits.
_AMX_SIDE, _AMX_DEPTH = 16, 32
# Two to this power is 0 in float32.
_LEAST = -1024.0


Reduce = Callable[..., None]


def reducer(dtype: torch.dtype) -> Reduce:
    """Return the function ``reduce(tile_N_S, scale2, shift_N, masses_N, best, first_id, moments_N=None)``.

    It is for products in ``dtype``. It writes the sum of ``2 ** x`` over each row, where x is a logit in base
    2, minus the row's shift.

    - ``tile_N_S``: ``dtype`` or float32. In float32 it holds the products, and ``x = scale2 * tile - shift``;
      a product of a token that is left out is ``-inf``, after the scale. In 16 bits it holds x, and is filled
      with ``-shift`` for the next product. The rows need not be contiguous.
    - ``scale2``: factor of a product, for base 2.
    - ``shift_N``: float32, whole numbers that ``dtype`` holds.
    - ``masses_N``: float32, gets the sums.
    - ``best``: gets the best tokens of the slice; or ``None``. A walk over the vocabulary must use one
      reducer only, because each keeps the candidates in its own order.
    - ``first_id``: the id of the slice's first token.
    - ``moments_N``: float32, gets the sums of ``x * 2 ** x``; ``None``: they are not computed.
    """
    return _reduce_compiled if dtype in _NAME_OF and _library()[0] is not None else _reduce


def _reduce_compiled(
    tile_N_S: torch.Tensor,
    scale2: float,
    shift_N: torch.Tensor,
    masses_N: torch.Tensor,
    best: Best | None,
    first_id: int,
    moments_N: torch.Tensor | None = None,
) -> None:
    assert shift_N.dtype == masses_N.dtype == torch.float32
    assert moments_N is None or moments_N.dtype == torch.float32
    assert tile_N_S.stride(1) == 1
    num_rows, num_columns = tile_N_S.shape
    getattr(_library()[0], f"reduce_{_NAME_OF[tile_N_S.dtype]}")(
        *(
            tile_N_S.data_ptr(),
            tile_N_S.stride(0),
            scale2,
            shift_N.data_ptr(),
            masses_N.data_ptr(),
            None if moments_N is None else moments_N.data_ptr(),
            num_rows,
            num_columns,
        ),
        *(*_found(best), first_id),
    )


def _reduce(
    tile_N_S: torch.Tensor,
    scale2: float,
    shift_N: torch.Tensor,
    masses_N: torch.Tensor,
    best: Best | None,
    first_id: int,
    moments_N: torch.Tensor | None = None,
) -> None:
    for low in range(0, len(tile_N_S), _ROWS):
        rows = slice(low, low + _ROWS)
        tile, shift = tile_N_S[rows], shift_N[rows]
        is_product = tile.dtype == torch.float32
        logits = tile * scale2 if is_product else tile.float()
        if best is not None:
            best[rows].add(logits, torch.zeros_like(shift) if is_product else shift, first_id)
        if is_product:
            logits -= shift[:, None]
        powers = logits.exp2_() if moments_N is None else logits.exp2()
        torch.sum(powers, 1, out=masses_N[rows])
        if moments_N is not None:
            # The hidden token's logit is -inf in float16, and 0 * -inf is NaN.
            torch.sum(powers.mul_(logits.clamp_min_(_LEAST)), 1, out=moments_N[rows])
        if not is_product:
            tile_N_S[rows] = -shift[:, None]


def token_logits(hidden_N_H: torch.Tensor, weight_V_H: torch.Tensor, ids_N_K: torch.Tensor) -> torch.Tensor:
    """Return ``[N, K]`` float64, the logits of K tokens per row, summed in float64 or pairwise in float32."""
    if hidden_N_H.is_cuda:
        from vllm_kl.plugin import triton_kernel

        logits = triton_kernel.token_logits(hidden_N_H.contiguous(), weight_V_H.contiguous(), ids_N_K)
        return logits.double()
    num_rows, num_ids = ids_N_K.shape
    hidden_size = hidden_N_H.shape[1]
    logits = torch.empty(num_rows, num_ids, dtype=torch.float64)
    library = _library()[0]
    if library is not None and hidden_N_H.dtype in _NAME_OF and hidden_N_H.dtype == weight_V_H.dtype:
        hidden, weight, ids = hidden_N_H.contiguous(), weight_V_H.contiguous(), ids_N_K.contiguous()
        getattr(library, f"token_logits_{_NAME_OF[hidden.dtype]}")(
            hidden.data_ptr(),
            weight.data_ptr(),
            ids.data_ptr(),
            logits.data_ptr(),
            num_rows,
            num_ids,
            hidden_size,
        )
        return logits
    step = max(1, _MAX_GATHERED_BYTES // (4 * max(1, num_ids) * hidden_size))
    for low in range(0, num_rows, step):
        rows = slice(low, low + step)
        # Multiply, then sum pairwise: this is more exact than a matrix product, which sums in order.
        logits[rows] = weight_V_H[ids_N_K[rows]].float().mul_(hidden_N_H[rows, None].float()).sum(-1)
    return logits


def amx_works(dtype: torch.dtype, hidden_size: int) -> bool:
    """Return whether :func:`product_sums` works here for hidden states of this dtype and size."""
    return dtype == torch.bfloat16 and hidden_size % _AMX_DEPTH == 0 and _amx_library()[0] is not None


def in_pairs(hidden_N_H: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy bfloat16 hidden states to ``out``, in the order of AMX's tiles; return it.

    N is a multiple of 32, and H is, too. Both tensors are contiguous.
    """
    groups, steps = len(hidden_N_H) // _AMX_SIDE, hidden_N_H.shape[1] // _AMX_DEPTH
    pairs = hidden_N_H.view(torch.int32).view(groups, _AMX_SIDE, steps, _AMX_SIDE)
    out.view(torch.int32).view(groups, steps, _AMX_SIDE, _AMX_SIDE).copy_(pairs.permute(0, 2, 3, 1))
    return out


def product_sums(
    pairs_N_H: torch.Tensor,
    weight_S_H: torch.Tensor,
    scale2: float,
    shift_N: torch.Tensor,
    left_out_N: torch.Tensor,
    masses_N: torch.Tensor,
    best: Best | None,
    first_id: int,
    moments_N: torch.Tensor | None = None,
) -> None:
    """Multiply hidden states with a slice of the weights by AMX, and sum as :func:`reducer` tells.

    The logits are float32, and in no tensor.

    Args:
        pairs_N_H: of :func:`in_pairs`.
        weight_S_H: bfloat16, with contiguous rows.
        scale2: factor of a logit, for base 2.
        shift_N: float32.
        left_out_N: for each row the id of a token that no sum counts, int64.
        masses_N: float32, gets the sums of ``2 ** x`` with ``x = scale2 * logit - shift``.
        best: gets the best tokens of the slice; or ``None``.
        first_id: the id of the slice's first token.
        moments_N: float32, gets the sums of ``x * 2 ** x``; ``None``: they are not computed.
    """
    assert pairs_N_H.dtype == weight_S_H.dtype == torch.bfloat16
    assert pairs_N_H.is_contiguous()
    assert weight_S_H.stride(1) == 1
    assert shift_N.dtype == masses_N.dtype == torch.float32
    assert left_out_N.dtype == torch.int64
    assert moments_N is None or moments_N.dtype == torch.float32
    _amx_library()[0].product_sums(
        *(pairs_N_H.data_ptr(), weight_S_H.data_ptr(), weight_S_H.stride(0), weight_S_H.shape[1], scale2),
        *(shift_N.data_ptr(), left_out_N.data_ptr(), masses_N.data_ptr()),
        *(None if moments_N is None else moments_N.data_ptr(), len(masses_N)),
        *_found(best),
        *(first_id, len(weight_S_H)),
    )


def _found(best: Best | None) -> tuple[int | None, int | None, int]:
    """Return the arguments of a loop that gets the best tokens."""
    if best is None:
        return None, None, 0
    return best.values.data_ptr(), best.ids.data_ptr(), best.ids.shape[1]


def missing_compiler() -> str:
    """Return a note for the user of a read-out without compiled loops; empty if it has them."""
    return "" if torch.cuda.is_available() else _library()[1] or _amx_library()[1]


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """Return the loops of kernel.cpp; or ``None``, and a note for the user."""
    library, reason = _compiled("kernel.cpp", _FLAGS_OF.get(torch.backends.cpu.get_cpu_capability(), ""))
    if library is None:
        costs = "LM heads take up to twice as long without a C++ compiler (c++, or the one in CXX)"
        return None, f"{costs}: {reason}"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in _NAME_OF.values():
        reduce, logits = getattr(library, f"reduce_{name}"), getattr(library, f"token_logits_{name}")
        reduce.argtypes = [
            *[pointer, number, ctypes.c_float, pointer, pointer, pointer],
            *[number, number],
            *[pointer, pointer, number, number],
        ]
        logits.argtypes = [*[pointer] * 4, *[number] * 3]
        reduce.restype = logits.restype = None
    return library, ""


@functools.cache
def _amx_library() -> tuple[ctypes.CDLL | None, str]:
    """Return the loops of amx.cpp; or ``None``, and a note for the user of a CPU with AMX."""
    # A process must ask Linux for the tiles, which _init_amx does.
    has_tiles = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    if not (has_tiles and _multiplies_bfloat16_tiles()) or _library()[0] is None:
        return None, ""
    library, reason = _compiled("amx.cpp", f"{_FLAGS_OF['AVX512']} {_AMX_FLAGS}")
    if library is None:
        costs = "LM heads in bfloat16 take up to twice as long without a C++ compiler that knows AMX"
        return None, f"{costs}: {reason}"
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.product_sums.argtypes = [
        *[pointer, pointer, number, number, ctypes.c_float],
        *[pointer, pointer, pointer],
        *[pointer, number],
        *[pointer, pointer, number],
        *[number, number],
    ]
    library.product_sums.restype = None
    return library, ""


def _multiplies_bfloat16_tiles() -> bool:
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _compiled(source: str, flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Return the library of a source file; or ``None``, and why there is none."""
    try:
        return ctypes.CDLL(str(_build(source, flags))), ""
    except (OSError, subprocess.CalledProcessError) as error:
        return None, str(getattr(error, "stderr", None) or error)


def _build(source: str, flags: str) -> Path:
    """Return the library; compile it if the cache lacks it. Several processes may do so at the same time."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    command = [*compiler, *f"{_FLAGS} {flags}".split()]
    texts = [(_FOLDER / source).read_bytes(), *(path.read_bytes() for path in sorted(_FOLDER.glob("*.h")))]
    key = hashlib.sha256(b"".join(texts) + " ".join([platform.machine(), *command]).encode()).hexdigest()[:16]
    library = Path(vllm.envs.VLLM_CACHE_ROOT, "vllm_kl", f"{Path(source).stem}-{key}.so")
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            unfinished = Path(folder, library.name)
            subprocess.run(
                [*command, str(_FOLDER / source), "-o", str(unfinished)],
                check=True,
                capture_output=True,
                text=True,
            )
            unfinished.replace(library)
    return library
