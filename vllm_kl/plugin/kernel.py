"""Hidden rows and an LM head's matrix -> log-normalizers, logits of given tokens, best tokens.

The ``[N, V]`` logits never exist. The vocabulary is walked in slices that stay in the cache, with one running sum per row:

    logits of a slice = scale * hidden @ weight[a:b].T                     one product, at the product's own best speed
    total            += sum(2 ** (log2(e) * logits - shift))               shift: close to log2 of what the total will be

All sums are kept in base 2, because ``exp2`` is cheaper than ``exp`` on a CPU.

Rounding. On a CPU the product of two bfloat16 matrices is bfloat16, whose error grows with the number's size. So the shift
is subtracted inside the product, before it is rounded: the logits that decide the sum come out near 0, where bfloat16 is
fine. A slice that outweighs what its shift expected was rounded too coarsely, and is computed again for its row, in float32.
The logits of single tokens are summed in float64. On a GPU the product is accumulated and returned in float32; on a CPU that
multiplies 16-bit matrices one number at a time (one without AVX-512, say) both matrices are widened, slice by slice.

Shapes. oneDNN compiles every shape of a 16-bit product once, in 2 to 6 ms, and keeps up to 2 MiB of it. So these products
are made of few tiles: rows are padded, and what is narrower or of any height is computed in float32.

Memory. Less than 64 MiB in all, at any number of rows and any vocabulary: on a CPU whatever is large lives in a workspace,
made once and bounded by the constants below.

N rows, H hidden size, V vocabulary (of this shard, under tensor parallelism), K tokens per row, C candidates.

Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

import bisect
import functools
import math
import threading
from collections.abc import Callable, Iterator

import torch

from vllm_kl.plugin.best import Best
from vllm_kl.plugin.native import reducer, token_logits

LOG2_E = math.log2(math.e)

# Rows of one block, at most, and elements of its hidden states: 8 MiB in float32. Sizes here were found by measurement
# (benchmarks/LOG.md).
_MAX_ROWS = 4096
_MAX_HIDDEN = 1 << 21
# Heights of a 16-bit product's tiles.
_HEIGHTS = (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096)
# Width of a float32 product's tile, and elements of the slice of weights that is widened for it: 8 MiB.
_FLOAT32_WIDTH = 512
_MAX_WIDENED = 1 << 21
# Elements of a float32 tile on a GPU: 32 MiB, below an H100's or H200's 50 MiB of L2.
_CUDA_TILE = 1 << 23
# Bytes of each part of the workspace: what the limits above allow. The system gives pages only when they are used.
_WORKSPACE_BYTES = 8 << 20
# Columns that are computed in float32 before anything is known that could be subtracted.
_FIRST_COLUMNS = 64
# Rows that are computed in float32 at a time, and elements of their hidden states: 4 MiB.
_MAX_EXACT_ROWS = 512
_MAX_EXACT_HIDDEN = 1 << 20
# Candidates of a block, 12 bytes each.
_MAX_CANDIDATES = 1 << 20
# A shift further from 0 than this is too coarse in 16 bits: above 2 ** 12 it is off by up to 8 in bfloat16.
_MAX_SHIFT = 2.0**12
# Slices between two looks at the shift: a look costs as much as a pass over a tile.
_MAX_STRETCH = 32
# A slice with more than this many times the total that was expected is computed again with a new shift.
_OUTWEIGHS = 4.0
# An expected total above this, in units of 2 ** shift, gets a new shift for the slices to come.
_GROWN = 4.0
# Candidates beyond k that are ranked again in float32: rounding may have misplaced them.
_SPARE_CANDIDATES = 8


def row_blocks(num_rows: int, hidden_size: int, top_k: int = 0) -> Iterator[slice]:
    """Yield the blocks of rows that are computed together: large enough for the product, small enough for the memory.

    They are of one size, since the product is slow on the few rows that a division by the largest size would leave, and
    all but the last need no padding.
    """
    limit = min(_MAX_ROWS, _MAX_HIDDEN // hidden_size)
    if top_k:
        limit = min(limit, _MAX_CANDIDATES // (top_k + _SPARE_CANDIDATES))
    limit = _HEIGHTS[max(0, bisect.bisect_right(_HEIGHTS, limit) - 1)]
    step = _height(math.ceil(num_rows / max(1, math.ceil(num_rows / limit))))
    return _slices(num_rows, step)


def log_normalizer(hidden_N_H: torch.Tensor, weight_V_H: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Return ``[N]`` float32: ``log sum_v exp(scale * hidden . weight_v)``, in nats.

    Args:
        hidden_N_H: at most :data:`_MAX_ROWS` rows, see :func:`row_blocks`.
        weight_V_H: the head's matrix, same dtype.
        scale: factor of every logit: the head's own, divided by the temperature.

    >>> hidden, weight = torch.randn(3, 8), torch.randn(1000, 8)
    >>> want = (hidden @ weight.T).logsumexp(-1)
    >>> torch.testing.assert_close(log_normalizer(hidden, weight), want)
    """
    return _walk(hidden_N_H, weight_V_H, scale * LOG2_E, None) / LOG2_E


def top_tokens(
    hidden_N_H: torch.Tensor, weight_V_H: torch.Tensor, k: int, *, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the ids ``[N, k]`` int64 of the best tokens, their unscaled logits ``[N, k]``, and the log-normalizer ``[N]``.

    Best first. Candidates are ranked by float32 logits; two tokens closer than the dtype's rounding may change places.
    """
    best = Best.of(len(hidden_N_H), min(k + _SPARE_CANDIDATES, len(weight_V_H)), hidden_N_H.device)
    normalizer = _walk(hidden_N_H, weight_V_H, scale * LOG2_E, best) / LOG2_E
    logits_N_C = token_logits(hidden_N_H, weight_V_H, best.ids)
    logits_N_k, order = logits_N_C.topk(min(k, logits_N_C.shape[1]), dim=1)
    return best.ids.gather(1, order), logits_N_k, normalizer


def _walk(hidden: torch.Tensor, weight: torch.Tensor, scale2: float, best: Best | None) -> torch.Tensor:
    """Return ``[N]`` float32, base 2: ``log2 sum_v 2 ** (scale2 * hidden . weight_v)``."""
    if not len(weight):  # of this shard
        return hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    if hidden.is_cuda:
        return _walk_float32_products(hidden, weight, scale2, best)
    walked = _walk_shifted_products(hidden, weight, scale2, best, product_dtype(hidden.dtype))
    if walked is None:
        if best is not None:
            best.forget()
        walked = _walk_shifted_products(hidden, weight, scale2, best, torch.float32)
    return walked


def _walk_shifted_products(
    hidden: torch.Tensor, weight: torch.Tensor, scale2: float, best: Best | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """On a CPU: the shift is subtracted inside the product; one pass over its results.

    ``None`` if the logits are too large for products in ``dtype``: a temperature near 0.
    """
    num_rows, vocab_size, hidden_size = len(hidden), len(weight), hidden.shape[1]
    reduce = reducer(dtype)
    height, width = _tile_shape(num_rows, vocab_size, hidden_size, dtype)
    num_exact = max(1, min(_MAX_EXACT_ROWS, _MAX_EXACT_HIDDEN // hidden_size))
    padded = _padded(hidden, height, dtype)
    tile = _workspace("tile", (height, width), dtype)
    tile[num_rows:] = 0

    done = min(vocab_size, _FIRST_COLUMNS)
    shift = torch.empty(num_rows, dtype=torch.float32)
    total = torch.empty(num_rows, dtype=torch.float64)  # in units of 2 ** shift
    for rows in _slices(num_rows, num_exact):
        logits = _float32_logits(hidden[rows], weight[:done], scale2)
        shift[rows] = _representable(logits.amax(1), dtype)
        sums = torch.empty(len(logits), dtype=torch.float32)
        reduce(logits.sub_(shift[rows, None]), shift[rows], sums, None if best is None else best[rows], 0)
        total[rows] = sums.double()

    stretch = 1
    while done < vocab_size:
        slices = [
            slice(low, min(low + width, vocab_size)) for low in range(done, vocab_size, width)[:stretch]
        ]
        # What the total will be after this stretch, if its columns are like those done.
        expected = total * (slices[-1].stop / done)
        if (expected > _GROWN).any():
            old, shift = shift, _representable(shift + expected.log2().float(), dtype)
            factor = torch.exp2((old - shift).double())
            total, expected = total * factor, expected * factor
        if dtype != torch.float32 and (shift.abs() > _MAX_SHIFT).any():
            return None
        masses = torch.empty(len(slices), num_rows, dtype=torch.float32)
        tile[:num_rows] = -shift[:, None]
        for columns, mass in zip(slices, masses, strict=True):
            # The last slice is as wide as the others, and begins among columns that are done.
            first = columns.stop - width
            tile.addmm_(padded, _widened(weight[first : columns.stop], dtype).T, alpha=scale2)
            reduce(tile[:num_rows, columns.start - first :], shift, mass, best, columns.start)
        outweighs = ~(masses <= _OUTWEIGHS * expected)  # NaN and inf too
        for i in outweighs.any(1).nonzero()[:, 0].tolist():
            for rows in torch.where(outweighs[i])[0].split(num_exact):
                exact = _float32_logits(hidden[rows], weight[slices[i]], scale2)
                new = torch.maximum(shift[rows], _representable(exact.amax(1), dtype))
                factor = torch.exp2(shift[rows] - new)
                masses[:, rows] *= factor
                total[rows] *= factor
                shift[rows] = new
                masses[i, rows] = exact.sub_(new[:, None]).exp2_().sum(1)
        total += masses.sum(0)
        done, stretch = slices[-1].stop, min(2 * stretch, _MAX_STRETCH)
    if dtype != torch.float32 and (shift.abs() > _MAX_SHIFT).any():
        return None
    return (shift.double() + total.log2_()).float()


_buffers = threading.local()


def _workspace(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return memory that this thread keeps for one purpose. It holds what was left in it.

    Freed memory of many sizes would stay with the process in pieces, and be cleared by the system every time it is new.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    buffer = getattr(_buffers, name, None)
    if buffer is None or len(buffer) < size_bytes:
        buffer = torch.empty(max(size_bytes, _WORKSPACE_BYTES), dtype=torch.uint8)
        setattr(_buffers, name, buffer)
    return buffer[:size_bytes].view(dtype).view(shape)


def _padded(hidden: torch.Tensor, height: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows in the product's dtype and, after them, rows of zeros."""
    if len(hidden) == height and hidden.dtype == dtype:
        return hidden
    padded = _workspace("hidden", (height, hidden.shape[1]), dtype)
    padded[: len(hidden)] = hidden
    padded[len(hidden) :] = 0
    return padded


def _widened(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight if weight.dtype == dtype else _workspace("weight", tuple(weight.shape), dtype).copy_(weight)


def _float32_logits(hidden: torch.Tensor, weight: torch.Tensor, scale2: float) -> torch.Tensor:
    hidden = hidden.float()
    logits = _workspace("logits", (len(hidden), len(weight)), torch.float32)
    for columns in _slices(len(weight), max(1, _MAX_WIDENED // hidden.shape[1])):
        torch.mm(hidden, _widened(weight[columns], torch.float32).T, out=logits[:, columns])
    return logits.mul_(scale2)


def _representable(shift: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return whole numbers that the dtype holds: what changes with them is multiplied by a power of two, exactly."""
    return shift.round().to(dtype).float()


def _slices(number: int, step: int) -> Iterator[slice]:
    return (slice(low, min(low + step, number)) for low in range(0, number, step))


def _height(num_rows: int) -> int:
    """Return the height of the tile of so many rows."""
    return _HEIGHTS[min(bisect.bisect_left(_HEIGHTS, num_rows), len(_HEIGHTS) - 1)]


def _tile_shape(num_rows: int, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> tuple[int, int]:
    if dtype != torch.float32:
        return _height(num_rows), min(vocab_size, 2048 if num_rows <= 1024 else 1024)
    return num_rows, min(vocab_size, _FLOAT32_WIDTH, max(64, _MAX_WIDENED // hidden_size))


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what matrices of a dtype are multiplied in: itself, if oneDNN multiplies it."""
    is_fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype in is_fast and is_fast[dtype]() else torch.float32


def _walk_float32_products(
    hidden: torch.Tensor, weight: torch.Tensor, scale2: float, best: Best | None
) -> torch.Tensor:
    """On a GPU: products with float32 results; maximum and sum in one fused kernel per slice."""
    num_rows, vocab_size = len(hidden), len(weight)
    # Ranking makes copies of the tile. Slices of one size: a last one of a single column would be compiled by itself.
    num_slices = math.ceil(
        vocab_size / max(1024, (_CUDA_TILE if best is None else _CUDA_TILE // 2) // num_rows)
    )
    columns = math.ceil(vocab_size / num_slices)
    tile = torch.empty(num_rows * columns, dtype=torch.float32, device=hidden.device)
    top = torch.full((num_rows, 1), -torch.inf, dtype=torch.float32, device=hidden.device)
    total = torch.zeros(num_rows, 1, dtype=torch.float32, device=hidden.device)
    update = (
        _fused_update() if num_rows > 1 else _update
    )  # torch.compile makes a graph of its own for a single row
    for low in range(0, vocab_size, columns):
        high = min(vocab_size, low + columns)
        logits = tile[: num_rows * (high - low)].view(num_rows, high - low)
        _mm_float32(hidden, weight[low:high].T, logits)
        if best is not None:
            best.take(logits, None, low)
        top, total = update(logits, scale2, top, total)
    return (top + total.log2())[:, 0]


def _mm_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _update(
    logits: torch.Tensor, scale2: float, top: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the new maximum and the sum in units of ``2 ** maximum``."""
    logits = logits * scale2
    higher = torch.maximum(top, logits.amax(1, keepdim=True))
    return higher, total * torch.exp2(top - higher) + torch.exp2(logits - higher).sum(1, keepdim=True)


@functools.cache
def _fused_update() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """One pass over the tile instead of four. Compiled by vLLM's profile run, never by a request."""
    return torch.compile(_update, dynamic=True)
