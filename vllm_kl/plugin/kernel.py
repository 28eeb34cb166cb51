"""Hidden rows and an LM head's matrix -> log-normalizers, logits of given tokens, best tokens.

The ``[N, V]`` logits never exist. The vocabulary is walked in slices that stay in the cache, with one running sum per row:

    logits of a slice = scale * hidden @ weight[a:b].T                     one product, at the product's own best speed
    total            += sum(2 ** (log2(e) * logits - shift))               shift: close to log2 of the total so far

All sums are kept in base 2, because ``exp2`` is three times as fast as ``exp`` on a CPU.

Rounding. On a CPU the product of two bfloat16 matrices is bfloat16, whose error grows with the number's size. So the shift
is subtracted inside the product, before it is rounded: the logits that decide the sum come out near 0, where bfloat16 is
fine. A slice that outweighs everything that its shift knew of was rounded too coarsely, and is computed again for its row,
in float32. The logits of single tokens are summed in float32. On a GPU the product is accumulated and returned in float32.

Shapes. oneDNN compiles every shape of a 16-bit product once, in 2 to 6 ms, and keeps about 1 MiB of it. So these products
are made of few tiles: rows are padded, and what is narrower or of any height is computed in float32.

N rows, H hidden size, V vocabulary (of this shard, under tensor parallelism), K tokens per row.

Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from vllm_kl.plugin import native

LOG2_E = math.log2(math.e)

# Rows of one tile, at most. Its size was found by measurement (benchmarks/LOG.md): it stays in the cores' caches.
_MAX_ROWS = 4096
# Elements of a float32 tile on a GPU: 32 MiB, below an H100's or H200's 50 MiB of L2.
_CUDA_TILE = 1 << 23
# Elements of a float32 copy of hidden rows or of gathered weight rows: 8 MiB.
_MAX_GATHERED = 1 << 21
# Slices between two looks at the shift: a look costs as much as a pass over a tile.
_MAX_STRETCH = 16
# A slice with more than this many times the total before its stretch is computed again with a new shift.
_OUTWEIGHS = 4.0
# A total above this, in units of 2 ** shift, gets a new shift for the slices to come.
_GROWN = 4.0
# Candidates beyond k that are ranked again in float32: rounding may have misplaced them.
_SPARE_CANDIDATES = 8


def row_blocks(num_rows: int, hidden_size: int) -> Iterator[slice]:
    """Yield the blocks of rows that are computed together: large enough for the product, small enough for the memory.

    They are of one size, since the product is slow on the few rows that a division by the largest size would leave, and
    all but the last need no padding.
    """
    num_blocks = math.ceil(num_rows / max(64, min(_MAX_ROWS, _MAX_GATHERED // hidden_size)))
    step, _ = _tile_shape(math.ceil(num_rows / max(1, num_blocks)))
    for low in range(0, num_rows, max(1, step)):
        yield slice(low, min(num_rows, low + step))


def pad_rows(hidden_N_H: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return the rows and, after them, rows of zeros up to a multiple: products of few different heights."""
    padding = _round_up(len(hidden_N_H), multiple) - len(hidden_N_H)
    return F.pad(hidden_N_H, (0, 0, 0, padding)) if padding else hidden_N_H


def _tile_shape(num_rows: int) -> tuple[int, int]:
    """Return the height and the width of the tile of so many rows: thirty-five shapes in all."""
    multiple = 16 if num_rows <= 64 else 64 if num_rows <= 1024 else 128 if num_rows <= 2048 else 256
    return _round_up(num_rows, multiple), 2048 if num_rows <= 1024 else 1024


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def token_logits(hidden_N_H: torch.Tensor, weight_V_H: torch.Tensor, ids_N_K: torch.Tensor) -> torch.Tensor:
    """Return ``[N, K]`` float32 logits of K tokens per row, summed in float32."""
    num_rows, num_tokens = ids_N_K.shape
    logits = torch.empty(num_rows, num_tokens, dtype=torch.float32, device=hidden_N_H.device)
    step = max(1, _MAX_GATHERED // (max(1, num_tokens) * hidden_N_H.shape[1]))
    for low in range(0, num_rows, step):
        rows = slice(low, low + step)
        # Multiplied, then summed pairwise: more exact than a product of matrices, which sums in order.
        logits[rows] = weight_V_H[ids_N_K[rows]].float().mul_(hidden_N_H[rows, None].float()).sum(-1)
    return logits


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
    best = _Best(k, hidden_N_H, weight_V_H)
    normalizer = _walk(hidden_N_H, weight_V_H, scale * LOG2_E, best.add) / LOG2_E
    logits_N_C = token_logits(hidden_N_H, weight_V_H, best.ids_N_C)
    logits_N_k, order = logits_N_C.topk(min(k, logits_N_C.shape[1]), dim=1)
    return best.ids_N_C.gather(1, order), logits_N_k, normalizer


class _Best:
    """The best candidates of each row over the slices seen so far."""

    def __init__(self, k: int, hidden_N_H: torch.Tensor, weight_V_H: torch.Tensor) -> None:
        shape, device = (len(hidden_N_H), min(k + _SPARE_CANDIDATES, len(weight_V_H))), hidden_N_H.device
        self.ids_N_C = torch.zeros(shape, dtype=torch.long, device=device)
        self._values_N_C = torch.full(shape, -torch.inf, device=device)  # base 2, best first

    def add(self, low: int, logits_N_S: torch.Tensor, shift_N_1: torch.Tensor | None) -> None:
        """Take the columns from ``low`` on: logits in base 2, less the row's shift."""
        shift_N_1 = torch.zeros_like(self._values_N_C[:, :1]) if shift_N_1 is None else shift_N_1.float()
        worst_N_1 = self._values_N_C[:, -1:] - shift_N_1
        (rows,) = torch.where(logits_N_S.amax(1).float() > worst_N_1[:, 0])
        if not len(rows):
            return
        logits = logits_N_S[rows]
        # Few get in after the first slices, and few are quick to find.
        most = int((logits > worst_N_1[rows]).count_nonzero(1).max())
        num_candidates = self.ids_N_C.shape[1]
        values, ids = logits.topk(min(num_candidates, most), dim=1)
        values = values.float() + shift_N_1[rows]
        values, order = torch.cat([self._values_N_C[rows], values], 1).topk(num_candidates, dim=1)
        self._values_N_C[rows] = values
        self.ids_N_C[rows] = torch.cat([self.ids_N_C[rows], ids + low], 1).gather(1, order)


_OnSlice = Callable[[int, torch.Tensor, torch.Tensor | None], None]


def _walk(hidden: torch.Tensor, weight: torch.Tensor, scale2: float, on_slice: _OnSlice | None) -> torch.Tensor:
    """Return ``[N]`` float32, base 2: ``log2 sum_v 2 ** (scale2 * hidden . weight_v)``."""
    walk = _walk_float32_products if hidden.is_cuda else _walk_shifted_products
    return walk(hidden, weight, scale2, on_slice)


def _float32_logits(hidden: torch.Tensor, weight: torch.Tensor, scale2: float) -> torch.Tensor:
    hidden, logits = hidden.float(), torch.empty(len(hidden), len(weight))
    step = max(1, _MAX_GATHERED // hidden.shape[1])
    for low in range(0, len(weight), step):
        columns = slice(low, low + step)
        torch.mm(hidden, weight[columns].float().T, out=logits[:, columns])
    return logits.mul_(scale2)


def _walk_shifted_products(
    hidden: torch.Tensor, weight: torch.Tensor, scale2: float, on_slice: _OnSlice | None
) -> torch.Tensor:
    num_rows, vocab_size, dtype = len(hidden), len(weight), hidden.dtype
    height, width = _tile_shape(num_rows)
    padded = pad_rows(hidden, height)
    # The first slice takes the columns that the others leave, in float32: nothing is known yet that could be subtracted.
    done = (vocab_size - 1) % width + 1
    logits = _float32_logits(hidden, weight[:done], scale2)
    if on_slice:
        on_slice(0, logits, None)
    top = logits.amax(1, keepdim=True)
    # Shifts are whole numbers: the dtype holds them exactly, and what changes with them is multiplied by a power of two.
    total = logits.sub_(top).exp2_().sum(1, keepdim=True).double()
    shift = (top + total.log2()).round_().to(dtype)
    total = (total * torch.exp2(top.double() - shift.double()))[:, 0]  # of the columns done, in units of 2 ** shift

    tile = torch.zeros(height, width, dtype=dtype)
    logits = tile[:num_rows]
    sum_and_fill = native.sum_powers(logits)
    stretch = 1
    while done < vocab_size:
        slices = range(done, vocab_size, width)[:stretch]
        masses = torch.empty(len(slices), num_rows)
        minus_shift = -shift
        logits.copy_(minus_shift)
        for low, mass in zip(slices, masses, strict=True):
            tile.addmm_(padded, weight[low : low + width].T, alpha=scale2)
            if on_slice:
                on_slice(low, logits, shift)
            sum_and_fill(minus_shift, mass)
        outweighs = ~(masses <= _OUTWEIGHS * total)  # NaN and inf too
        for i in outweighs.any(1).nonzero()[:, 0].tolist():
            (rows,) = torch.where(outweighs[i])
            columns, old = weight[slices[i] : slices[i] + width], shift[rows]
            exact = _float32_logits(hidden[rows], columns, scale2)
            new = torch.maximum(old.float(), exact.amax(1, keepdim=True).round_()).to(dtype)
            factor = torch.exp2(old.float() - new.float())[:, 0]
            masses[:, rows] *= factor
            total[rows] *= factor
            shift[rows] = new
            masses[i][rows] = exact.sub_(new).exp2_().sum(1)
        total += masses.sum(0)
        if (total > _GROWN).any():
            old, shift = shift, (shift.double() + total.log2().round_()[:, None]).to(dtype)
            total *= torch.exp2(old.double() - shift.double())[:, 0]
        done, stretch = slices[-1] + width, min(2 * stretch, _MAX_STRETCH)
    return (shift[:, 0].double() + total.log2_()).float()


def _walk_float32_products(
    hidden: torch.Tensor, weight: torch.Tensor, scale2: float, on_slice: _OnSlice | None
) -> torch.Tensor:
    """On a GPU: products with float32 results; maximum and sum in one fused kernel per slice."""
    num_rows, vocab_size = len(hidden), len(weight)
    columns = max(1024, _CUDA_TILE // num_rows)
    tile = torch.empty(num_rows * min(columns, vocab_size), dtype=torch.float32, device=hidden.device)
    top = torch.full((num_rows, 1), -torch.inf, device=hidden.device)
    total = torch.zeros(num_rows, 1, device=hidden.device)
    update = _fused_update()
    for low in range(0, vocab_size, columns):
        high = min(vocab_size, low + columns)
        logits = tile[: num_rows * (high - low)].view(num_rows, high - low)
        _mm_float32(hidden, weight[low:high].T, logits)
        if on_slice:
            on_slice(low, logits, None)
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
