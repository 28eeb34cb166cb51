"""Sums over slices of the vocabulary on a CPU, by products that are fast there.

:class:`TiledProducts`: PyTorch (oneDNN, MKL) multiplies into a tile of logits that stays in the cache, and a
loop passes over the tile once. :class:`AmxProducts`: where a CPU has AMX, a loop of this package multiplies
bfloat16 matrices and sums; the logits are float32 then, and in no tensor.

Names and formulas are those of :mod:`.kernel`.
"""

from __future__ import annotations

import bisect
import functools
import math
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vllm_kl.plugin.best_tokens import Best
from vllm_kl.plugin.cpu_loops import amx_works, in_pairs, passes, product_sums

# Heights of the tiles of 16-bit products.
HEIGHTS = (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096)
# Width of a float32 product's tile, its elements, 16 MiB, and those of its widened slice of weights, 8 MiB.
_FLOAT32_WIDTH = 1536
_FLOAT32_TILE = 1 << 22
_MAX_WIDENED = 1 << 21
# Bytes of each part of the workspace, by the limits of this module and of the kernel. The system gives pages
# only when they are used.
_WORKSPACE_BYTES = 16 << 20
# The logit of a token that a sum leaves out, in base 2, minus the shift: the loop for 16 bits takes no -inf.
HIDDEN_LOGIT = -(2.0**20)
# The fewest tokens of a slice of AMX's products; rows and tokens of their blocks.
_AMX_WIDTH = 4096
_AMX_BLOCK = 32
# The widest head of AMX's products. Wider ones leave few rows in a core's cache, while oneDNN's blocks have a
# part of the features only (benchmarks/LOG.md).
_AMX_MAX_HIDDEN_SIZE = 2048


class LeftOut:
    """One token of each row, which the sums leave out."""

    def __init__(self, by_row_N: torch.Tensor) -> None:
        self.by_row = by_row_N

    @functools.cached_property
    def _by_token(self) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        tokens, rows = self.by_row.sort()
        return tokens.tolist(), tokens, rows

    def hide(self, products_N_S: torch.Tensor, first_id: int, hidden: float) -> None:
        """Hide the tokens in a slice of the vocabulary, of all rows: their products become ``hidden``."""
        in_order, tokens, rows = self._by_token
        low, high = (bisect.bisect_left(in_order, n) for n in (first_id, first_id + products_N_S.shape[1]))
        if low < high:
            products_N_S[rows[low:high], tokens[low:high] - first_id] = hidden

    def hide_in_rows(self, logits_M_S: torch.Tensor, rows: slice | torch.Tensor, first_id: int) -> None:
        """Hide the tokens in a slice of the vocabulary, of some rows: their logits become ``-inf``."""
        places = self.by_row[rows] - first_id
        (found,) = torch.where((places >= 0) & (places < logits_M_S.shape[1]))
        logits_M_S[found, places[found]] = -torch.inf


class Products:
    """The products of hidden rows with slices of the weights, and the sums over each slice."""

    dtype: torch.dtype  # of the products' results: it must hold the shifts
    width: int  # of a slice
    # A slice whose sum is above this many times the expected total is computed again, with a new shift: its
    # logits are too far from the shift for their digits.
    outweighs: float

    def __init__(self, weight: torch.Tensor, scale2: float, left_out: LeftOut, best: Best | None) -> None:
        self._weight, self._scale2, self._left_out, self._best = weight, scale2, left_out, best

    def sum_up(
        self,
        slices: Sequence[slice],
        shift_N: torch.Tensor,
        masses_S_N: torch.Tensor,
        moments_S_N: torch.Tensor | None,
    ) -> None:
        """Write the sums of ``2 ** x`` over each slice of the vocabulary, and of ``x * 2 ** x``.

        Args:
            slices: not empty, and at most :attr:`width` wide each.
            shift_N: float32, whole numbers that :attr:`dtype` holds.
            masses_S_N: float32.
            moments_S_N: float32; ``None``: not wanted.
        """
        self._begin(shift_N)
        for i, columns in enumerate(slices):
            moments_N = None if moments_S_N is None else moments_S_N[i]
            self._sum_slice(columns, shift_N, masses_S_N[i], moments_N)

    def _begin(self, shift_N: torch.Tensor) -> None:
        """Prepare for slices that have these shifts."""

    def _sum_slice(
        self, columns: slice, shift_N: torch.Tensor, masses_N: torch.Tensor, moments_N: torch.Tensor | None
    ) -> None:
        """Write the sums over one slice."""
        raise NotImplementedError


class TiledProducts(Products):
    """Products into a tile, and a pass over it."""

    outweighs = 4.0
    _hidden_product: float  # that hides a token from the pass

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        scale2: float,
        left_out: LeftOut,
        best: Best | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(weight, scale2, left_out, best)
        self.dtype = dtype
        height, self.width = self._tile_shape(len(hidden), *weight.shape)
        self._num_rows = len(hidden)
        self._hidden = _padded(hidden, height, dtype)
        self._tile = workspace("tile", (height, self.width), dtype)
        self._passes = passes(dtype)

    @staticmethod
    def _tile_shape(num_rows: int, vocab_size: int, hidden_size: int) -> tuple[int, int]:
        raise NotImplementedError

    def _sum_slice(
        self, columns: slice, shift_N: torch.Tensor, masses_N: torch.Tensor, moments_N: torch.Tensor | None
    ) -> None:
        # The last slice is as wide as the others, so it begins among columns that are done.
        first = columns.stop - self.width
        self._multiply(_widened(self._weight[first : columns.stop], self.dtype))
        logits = self._tile[: self._num_rows, columns.start - first :]
        self._left_out.hide(logits, columns.start, self._hidden_product)
        self._pass_over(logits, shift_N, masses_N, self._best, columns.start, moments_N)

    def _multiply(self, weight: torch.Tensor) -> None:
        """Multiply the hidden rows with a slice of the weights."""
        raise NotImplementedError

    def _pass_over(self, logits: torch.Tensor, *args: Any) -> None:
        """Sum over a part of the tile."""
        raise NotImplementedError


class Float32Products(TiledProducts):
    """Products in float32, whose pass subtracts the shift and writes nothing.

    A tile is beyond the second cache, so every access counts.
    """

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, scale2: float, left_out: LeftOut, best: Best | None
    ) -> None:
        super().__init__(hidden, weight, scale2, left_out, best, torch.float32)
        self._hidden_product = math.copysign(torch.inf, -scale2)

    @staticmethod
    def _tile_shape(num_rows: int, vocab_size: int, hidden_size: int) -> tuple[int, int]:
        of_a_tile = _FLOAT32_TILE // max(1, num_rows) // 64 * 64
        limit = min(vocab_size, _FLOAT32_WIDTH, of_a_tile, max(64, _MAX_WIDENED // hidden_size))
        # Slices of equal width: what the last one has too many of is computed twice.
        equal = math.ceil(vocab_size / math.ceil(vocab_size / limit))
        return num_rows, min(limit, _multiple(equal, 16))

    def _multiply(self, weight: torch.Tensor) -> None:
        torch.mm(self._hidden, weight.T, out=self._tile)

    def _pass_over(self, logits: torch.Tensor, *args: Any) -> None:
        self._passes.over_products(logits, self._scale2, *args)


class ShiftedProducts(TiledProducts):
    """Products in 16 bits: the shift is subtracted inside the product, before it is rounded."""

    _hidden_product = HIDDEN_LOGIT

    @staticmethod
    def _tile_shape(num_rows: int, vocab_size: int, hidden_size: int) -> tuple[int, int]:
        return height_of(num_rows), min(vocab_size, 2048 if num_rows <= 1024 else 1024)

    def _begin(self, shift_N: torch.Tensor) -> None:
        # As the pass leaves it for the next slice. Rows that pad are computed, too.
        self._tile[: self._num_rows] = -shift_N[:, None]
        self._tile[self._num_rows :] = 0

    def _multiply(self, weight: torch.Tensor) -> None:
        self._tile.addmm_(self._hidden, weight.T, alpha=self._scale2)

    def _pass_over(self, logits: torch.Tensor, *args: Any) -> None:
        self._passes.over_shifted(logits, *args)


class AmxProducts(Products):
    """Products and sums in one compiled loop, which AMX multiplies for."""

    dtype = torch.float32
    outweighs = 2.0**16

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, scale2: float, left_out: LeftOut, best: Best | None
    ) -> None:
        super().__init__(weight, scale2, left_out, best)
        # Each thread gets as many panels of a slice.
        self.width = _multiple(_AMX_WIDTH, _AMX_BLOCK * torch.get_num_threads())
        padded = _padded(hidden.contiguous(), _multiple(len(hidden), _AMX_BLOCK), hidden.dtype)
        self._pairs = in_pairs(padded, workspace("pairs", tuple(padded.shape), hidden.dtype))

    @staticmethod
    def takes(dtype: torch.dtype, hidden_size: int) -> bool:
        """Return whether this way is there for heads of this dtype and size, and is the fastest."""
        return hidden_size <= _AMX_MAX_HIDDEN_SIZE and amx_works(dtype, hidden_size)

    @classmethod
    def fit(cls, hidden: torch.Tensor, weight: torch.Tensor, best: Best | None) -> bool:
        """Return whether to multiply these matrices in this way."""
        # The best tokens of a block of rows are one thread's work.
        num_parts = math.ceil(len(hidden) / _AMX_BLOCK)
        keeps_busy = best is None or num_parts >= torch.get_num_threads()
        is_plain = weight.dtype == hidden.dtype and weight.stride(1) == 1
        return keeps_busy and is_plain and cls.takes(hidden.dtype, hidden.shape[1])

    def _sum_slice(
        self, columns: slice, shift_N: torch.Tensor, masses_N: torch.Tensor, moments_N: torch.Tensor | None
    ) -> None:
        product_sums(
            *(self._pairs, self._weight[columns], self._scale2, shift_N, self._left_out.by_row),
            *(masses_N, self._best, columns.start, moments_N),
        )


_buffers = threading.local()


def workspace(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return uninitialised memory that this thread keeps under a name.

    Tensors of many sizes would leave the process with fragmented memory, and the system clears all new
    memory.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    buffer = getattr(_buffers, name, None)
    if buffer is None or len(buffer) < size_bytes:
        buffer = torch.empty(max(size_bytes, _WORKSPACE_BYTES), dtype=torch.uint8)
        setattr(_buffers, name, buffer)
    return buffer[:size_bytes].view(dtype).view(shape)


def float32_logits(hidden: torch.Tensor, weight: torch.Tensor, scale2: float) -> torch.Tensor:
    """Return ``[N, V]`` logits in base 2, in the workspace: few rows at a time, or few columns."""
    hidden = hidden.float()
    logits = workspace("logits", (len(hidden), len(weight)), torch.float32)
    for columns in slices_of(len(weight), max(1, _MAX_WIDENED // hidden.shape[1])):
        torch.mm(hidden, _widened(weight[columns], torch.float32).T, out=logits[:, columns])
    return logits.mul_(scale2)


def slices_of(number: int, step: int) -> Iterator[slice]:
    return (slice(low, min(low + step, number)) for low in range(0, number, step))


def height_of(num_rows: int) -> int:
    """Return the height of a tile for this number of rows."""
    return HEIGHTS[min(bisect.bisect_left(HEIGHTS, num_rows), len(HEIGHTS) - 1)]


def has_products(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies matrices of 16 bits on this CPU."""
    is_supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in is_supported and is_supported[dtype]()


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which matrices of a dtype are multiplied: it or float32, whichever is faster.

    A CPU with AVX-512 for bfloat16 and without AMX may multiply a tile of float32 faster (benchmarks/LOG.md).
    So each process times both ways, once, on slices of equal width. On such a CPU two processes may choose
    differently if the ways are nearly as fast, and log-probs then differ by their rounding.
    """
    num_rows, num_tokens, hidden_size = 2048, 1024, 512
    if not has_products(dtype):
        return torch.float32
    if amx_works(dtype, hidden_size):
        return dtype  # nothing is as fast
    hidden, weight = (torch.ones(number, hidden_size, dtype=dtype) for number in (num_rows, num_tokens))
    left_out = LeftOut(torch.zeros(num_rows, dtype=torch.int64))
    ways = (
        ShiftedProducts(hidden, weight, 1.0, left_out, None, dtype),
        Float32Products(hidden, weight, 1.0, left_out, None),
    )
    shift_N, masses_S_N = torch.full((num_rows,), float(hidden_size)), torch.empty(1, num_rows)
    seconds: dict[torch.dtype, float] = {}
    for _ in range(5):
        for way in ways:
            began = time.perf_counter()
            way.sum_up([slice(0, num_tokens)], shift_N, masses_S_N, None)
            taken = time.perf_counter() - began
            seconds[way.dtype] = min(taken, seconds.get(way.dtype, taken))
    return min(seconds, key=lambda one: seconds[one])


def _multiple(number: int, of: int) -> int:
    return math.ceil(number / of) * of


def _padded(hidden: torch.Tensor, height: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows in the product's dtype, followed by rows of zeros."""
    if len(hidden) == height and hidden.dtype == dtype:
        return hidden
    padded = workspace("hidden", (height, hidden.shape[1]), dtype)
    padded[: len(hidden)] = hidden
    padded[len(hidden) :] = 0
    return padded


def _widened(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight if weight.dtype == dtype else workspace("weight", tuple(weight.shape), dtype).copy_(weight)
