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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

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


class Passes(NamedTuple):
    """The passes over a tile of logits ``[N, S]``, whose rows need not be contiguous.

    Both write the sum of ``2 ** x`` over each row, where x is a logit in base 2, minus the row's shift. Their
    last arguments are the same:

    - ``shift_N``: float32, whole numbers that the products' dtype holds.
    - ``masses_N``: float32, gets the sums.
    - ``best``: gets the best tokens of the slice; or ``None``.
    - ``first_id``: the id of the slice's first token.
    - ``moments_N``: float32, gets the sums of ``x * 2 ** x``; ``None``: they are not computed.
    """

    # (tile, scale2, shift_N, ...): float32 products, x = scale2 * tile - shift. A product that is -inf after
    # the scale is a token that is left out. The tile stays as it is.
    over_products: Callable[..., None]
    # (tile, shift_N, ...): x in 16 bits. The pass leaves -shift, which the next product adds to.
    over_shifted: Callable[..., None]


def passes(dtype: torch.dtype) -> Passes:
    """Return the passes of a walk over the vocabulary whose products have a dtype.

    A walk must use those of one dtype only: compiled passes and those by PyTorch keep the best tokens in
    orders of their own.
    """
    return _COMPILED if dtype in _NAME_OF and _library()[0] is not None else _BY_PYTORCH


def _over_products(
    tile_N_S: torch.Tensor,
    scale2: float,
    shift_N: torch.Tensor,
    masses_N: torch.Tensor,
    best: Best | None,
    first_id: int,
    moments_N: torch.Tensor | None = None,
) -> None:
    for rows in _few_rows(tile_N_S):
        logits = tile_N_S[rows] * scale2
        if best is not None:
            best[rows].add(logits, torch.zeros_like(shift_N[rows]), first_id)
        logits -= shift_N[rows, None]
        _sum_powers(logits, masses_N[rows], None if moments_N is None else moments_N[rows])


def _over_shifted(
    tile_N_S: torch.Tensor,
    shift_N: torch.Tensor,
    masses_N: torch.Tensor,
    best: Best | None,
    first_id: int,
    moments_N: torch.Tensor | None = None,
) -> None:
    for rows in _few_rows(tile_N_S):
        logits = tile_N_S[rows].float()
        if best is not None:
            best[rows].add(logits, shift_N[rows], first_id)
        _sum_powers(logits, masses_N[rows], None if moments_N is None else moments_N[rows])
        tile_N_S[rows] = -shift_N[rows, None]


def _few_rows(tile_N_S: torch.Tensor) -> Iterator[slice]:
    return (slice(low, low + _ROWS) for low in range(0, len(tile_N_S), _ROWS))


def _sum_powers(logits: torch.Tensor, masses: torch.Tensor, moments: torch.Tensor | None) -> None:
    powers = logits.exp2_() if moments is None else logits.exp2()
    torch.sum(powers, 1, out=masses)
    if moments is not None:
        # The hidden token's logit is -inf in float16, and 0 * -inf is NaN.
        torch.sum(powers.mul_(logits.clamp_min_(_LEAST)), 1, out=moments)


def _compiled_over_products(
    tile_N_S: torch.Tensor,
    scale2: float,
    shift_N: torch.Tensor,
    masses_N: torch.Tensor,
    best: Best | None,
    first_id: int,
    moments_N: torch.Tensor | None = None,
) -> None:
    assert tile_N_S.dtype == torch.float32
    function = _library()[0].sum_products
    function(*_rows(tile_N_S), scale2, *_sums(shift_N, masses_N, moments_N), *_found(best), first_id)


def _compiled_over_shifted(
    tile_N_S: torch.Tensor,
    shift_N: torch.Tensor,
    masses_N: torch.Tensor,
    best: Best | None,
    first_id: int,
    moments_N: torch.Tensor | None = None,
) -> None:
    assert tile_N_S.dtype == torch.bfloat16
    function = _library()[0].sum_shifted
    function(*_rows(tile_N_S), *_sums(shift_N, masses_N, moments_N), *_found(best), first_id)


def _rows(tile_N_S: torch.Tensor) -> tuple[int, int, int, int]:
    """Return the arguments of a compiled pass that tell its tile."""
    assert tile_N_S.stride(1) == 1
    return tile_N_S.data_ptr(), tile_N_S.stride(0), *tile_N_S.shape


def _sums(
    shift_N: torch.Tensor, masses_N: torch.Tensor, moments_N: torch.Tensor | None
) -> tuple[int, int, int | None]:
    """Return the arguments of a compiled loop that tell the shifts and the sums."""
    assert shift_N.dtype == masses_N.dtype == torch.float32
    assert moments_N is None or moments_N.dtype == torch.float32
    return shift_N.data_ptr(), masses_N.data_ptr(), None if moments_N is None else moments_N.data_ptr()


_COMPILED = Passes(_compiled_over_products, _compiled_over_shifted)
_BY_PYTORCH = Passes(_over_products, _over_shifted)


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
    """Multiply hidden states with a slice of the weights by AMX, and sum as :class:`Passes` do.

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
    assert left_out_N.dtype == torch.int64
    _amx_library()[0].product_sums(
        *(pairs_N_H.data_ptr(), weight_S_H.data_ptr(), weight_S_H.stride(0), weight_S_H.shape[1], scale2),
        *(left_out_N.data_ptr(), *_sums(shift_N, masses_N, moments_N), len(masses_N)),
        *(*_found(best), first_id, len(weight_S_H)),
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
    tile, sums, best = [pointer, *[number] * 3], [pointer] * 3, [pointer, pointer, number]
    library.sum_products.argtypes = [*tile, ctypes.c_float, *sums, *best, number]
    library.sum_shifted.argtypes = [*tile, *sums, *best, number]
    library.sum_products.restype = library.sum_shifted.restype = None
    for name in _NAME_OF.values():
        logits = getattr(library, f"token_logits_{name}")
        logits.argtypes, logits.restype = [*[pointer] * 4, *[number] * 3], None
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
        *[pointer, *[pointer] * 3, number],
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
