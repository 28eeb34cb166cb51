"""Computes log-normalizers, logits of given tokens and best tokens of hidden rows, by an LM head's matrix.

The ``[N, V]`` logits never exist. The kernel walks over the vocabulary in slices that stay in the cache, with
one running sum per row:

    logits of a slice = scale * hidden @ weight[a:b].T             one matrix product
    x                 = log2(e) * logits - shift                   shift: close to log2 of the final mass
    mass             += sum(2 ** x)
    moment           += sum(x * 2 ** x)                            only for the entropy

All sums are in base 2, because ``exp2`` is cheaper than ``exp`` on a CPU. The log-normalizer is ``shift +
log2(mass)``. The entropy is ``log2(mass) - moment / mass``, whatever the shift.

Cancellation. Where one token has nearly all the probability, its logit and the log-normalizer are nearly
equal, and their difference keeps only their rounding errors: 1e-5 nats for a logit of 30 in float32. So the
sum leaves out one token per row, the token of the sequence. Its logit is computed by itself, more exactly,
and :mod:`.lm_head` puts both together, for the entropy as well.

Rounding. On a GPU, and for heads that AMX multiplies, logits of bfloat16 matrices are float32. Other
products of two bfloat16 matrices on a CPU are bfloat16, whose error grows with the number's size. So the
shift is subtracted inside the product, before the rounding: the logits that decide the sum are then near
0, where bfloat16 is fine. If a slice's sum is far above the expected total, its logits were rounded too
coarsely. The kernel then computes the slice again for this row, in float32. Mass and moment are sums over
the same rounded logits, so they give the exact entropy of a distribution nearby. Logits of single tokens
are summed in float64. On a CPU that multiplies 16-bit matrices one number at a time (for example without
AVX-512) the kernel widens both matrices to float32, slice by slice. :mod:`.cpu_products` has the ways of
a CPU, :mod:`.triton_kernel` that of a GPU.

Shapes. oneDNN compiles every shape of a 16-bit product once, in 2 to 6 ms, and keeps up to 2 MiB for it.
So its products have few shapes: their rows are padded. Narrow products, and those of other heights, are
computed in float32.

Memory. The kernel takes less than 64 MiB, for any number of rows and any vocabulary. On a CPU all large
tensors lie in a workspace, which is made once and limited by the constants below.

N rows, H hidden size, V vocabulary (of this shard, under tensor parallelism), K tokens per row, C candidates.

Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_kl.plugin.best_tokens import Best
from vllm_kl.plugin.cpu_loops import passes, token_logits
from vllm_kl.plugin.cpu_products import (
    HEIGHTS,
    HIDDEN_LOGIT,
    AmxProducts,
    Float32Products,
    LeftOut,
    Products,
    ShiftedProducts,
    float32_logits,
    height_of,
    product_dtype,
    slices_of,
    workspace,
)

LOG2_E = math.log2(math.e)

# The most rows of a block, and the most elements of its hidden states: 8 MiB in float32. The sizes here were
# measured (benchmarks/LOG.md).
_MAX_ROWS = 4096
_MAX_HIDDEN = 1 << 21
# On a GPU: elements of a float32 tile (16 MiB), and the multiple of its width. cuBLAS takes three to five
# times as long if the tile's rows begin at odd places.
_CUDA_TILE = 1 << 22
_CUDA_ALIGNED = 64
# On a GPU: the most elements of a block's hidden states, 32 MiB in 16 bits; and the multiple of its rows.
_CUDA_MAX_HIDDEN = 1 << 24
_CUDA_ROWS = 128
# Columns that are computed first, in float32: they give the first shift.
_FIRST_COLUMNS = 64
# The most rows that are computed in float32 at a time, and elements of their hidden states: 4 MiB.
_MAX_EXACT_ROWS = 512
_MAX_EXACT_HIDDEN = 1 << 20
# The most candidates of a block, 12 bytes each.
_MAX_CANDIDATES = 1 << 20
# The largest shift in 16 bits: above 2 ** 12 bfloat16 rounds it by up to 8.
_MAX_SHIFT = 2.0**12
# The most slices between two checks of the shift: a check costs as much as a pass over a tile.
_MAX_STRETCH = 32
# An expected total above this, in units of 2 ** shift, gets a new shift for the next slices.
_GROWN = 4.0
# Further candidates beside the k best, because rounding may misplace some; float32 logits rank them again.
_SPARE_CANDIDATES = 8


def row_blocks(num_rows: int, hidden_size: int, top_k: int = 0, *, on_a_gpu: bool = False) -> Iterator[slice]:
    """Yield blocks of rows: large enough for a fast product, small enough for the memory.

    All blocks have equal size: blocks of the largest size could leave a last block of few rows, on which the
    product is slow. Only the last block needs padding.
    """
    limit = min(_MAX_ROWS, (_CUDA_MAX_HIDDEN if on_a_gpu else _MAX_HIDDEN) // hidden_size)
    if top_k:
        limit = min(limit, _MAX_CANDIDATES // (top_k + _SPARE_CANDIDATES))
    if on_a_gpu:
        num_blocks = max(1, math.ceil(num_rows / max(1, limit)))
        return slices_of(num_rows, math.ceil(num_rows / num_blocks / _CUDA_ROWS) * _CUDA_ROWS or _CUDA_ROWS)
    limit = HEIGHTS[max(0, bisect.bisect_right(HEIGHTS, limit) - 1)]
    step = height_of(math.ceil(num_rows / max(1, math.ceil(num_rows / limit))))
    return slices_of(num_rows, step)


def log_normalizer(
    hidden_N_H: torch.Tensor,
    weight_V_H: torch.Tensor,
    *,
    scale: float = 1.0,
    left_out_N: torch.Tensor | None = None,
    entropy_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``[N]`` float64: ``log sum_v exp(scale * hidden . weight_v)``, in nats.

    Args:
        hidden_N_H: at most :data:`_MAX_ROWS` rows, see :func:`row_blocks`.
        weight_V_H: the head's matrix, in the same dtype.
        scale: factor of every logit: the head's scale divided by the temperature.
        left_out_N: for each row the id of a token that the sum leaves out, int64; -1 leaves out none.
        entropy_N: gets the entropy of the tokens in the sum, float64, in nats: that of their softmax. It is 0
            where the sum has no token. ``None``: it is not computed.

    >>> hidden, weight = torch.randn(3, 8), torch.randn(1000, 8)
    >>> want = (hidden @ weight.T).logsumexp(-1)
    >>> torch.testing.assert_close(log_normalizer(hidden, weight).float(), want)
    >>> torch.allclose(log_normalizer(hidden, weight, left_out_N=torch.tensor([0, 1, -1])).exp()[:2].float(),
    ...     want.exp()[:2] - (hidden @ weight.T).exp().diagonal()[:2], rtol=1e-4)
    True
    >>> entropy, probs = torch.empty(3, dtype=torch.float64), (hidden @ weight.T).softmax(-1)
    >>> _ = log_normalizer(hidden, weight, entropy_N=entropy)
    >>> torch.testing.assert_close(entropy.float(), -(probs * probs.log()).sum(-1))
    """
    return _walk(hidden_N_H, weight_V_H, scale, None, left_out_N, entropy_N)


def top_tokens(
    hidden_N_H: torch.Tensor,
    weight_V_H: torch.Tensor,
    k: int,
    *,
    scale: float = 1.0,
    left_out_N: torch.Tensor | None = None,
    entropy_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the best tokens' ids ``[N, k]`` int64 and logits ``[N, k]``, and the log-normalizer ``[N]``.

    The best token is first. The logits are unscaled. Float32 logits rank the candidates. Two tokens that
    differ by less than the dtype's rounding may change places. The log-normalizer and ``entropy_N`` leave out
    ``left_out_N``, as in :func:`log_normalizer`; the best tokens do not.
    """
    best = Best.of(len(hidden_N_H), min(k + _SPARE_CANDIDATES, len(weight_V_H)), hidden_N_H.device)
    normalizer = _walk(hidden_N_H, weight_V_H, scale, best, left_out_N, entropy_N)
    ids_N_C, is_token = best.ids, best.values > -torch.inf
    if left_out_N is not None:  # the walk did not see its logit
        is_token &= ids_N_C != left_out_N[:, None]
        ids_N_C = torch.cat([ids_N_C, left_out_N.clamp_min(0)[:, None]], dim=1)
        is_token = torch.cat([is_token, left_out_N[:, None] >= 0], dim=1)
    if not len(weight_V_H):
        return ids_N_C[:, :0], ids_N_C[:, :0].double(), normalizer
    logits_N_C = token_logits(hidden_N_H, weight_V_H, ids_N_C).where(is_token, -torch.inf)
    logits_N_k, order = logits_N_C.topk(min(k, len(weight_V_H)), dim=1)
    return ids_N_C.gather(1, order), logits_N_k, normalizer


def _walk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    best: Best | None,
    left_out: torch.Tensor | None,
    entropy: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``[N]`` float64: ``log sum_v exp(scale * hidden . weight_v)``; write the entropy."""
    if not len(weight):  # an empty shard of a tensor-parallel rank
        if entropy is not None:
            entropy.zero_()
        return hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float64)
    scale2 = scale * LOG2_E
    if left_out is None:
        left_out = torch.full((len(hidden),), -1, device=hidden.device)
    if hidden.is_cuda:
        from vllm_kl.plugin.triton_kernel import log2_normalizer

        if best is not None:
            _rank(hidden, weight, best, left_out)
        return log2_normalizer(hidden, weight, scale2, left_out, entropy).double() / LOG2_E
    tokens = LeftOut(left_out)
    for products in _ways(hidden, weight, scale2, tokens, best):
        sums = _walk_slices(products, hidden, weight, scale2, tokens, best, entropy is not None)
        if sums is not None:
            break
        if best is not None:
            best.forget()
    else:
        raise AssertionError("products in float32 take logits of any size")
    if entropy is not None:
        entropy.copy_(sums.entropy2() / LOG2_E)
    return sums.normalizer2() / LOG2_E


@dataclass(slots=True)
class _Sums:
    """Sums over tokens of each row, in units of ``2 ** shift``. x is a logit in base 2, minus the shift."""

    shift: torch.Tensor  # [N] float32, whole numbers
    mass: torch.Tensor  # [N], or [S, N] for each of S slices: sum of 2 ** x
    moment: torch.Tensor | None  # in the same shape: sum of x * 2 ** x; None: no entropy is wanted

    def move(self, rows: slice | torch.Tensor, by: torch.Tensor) -> None:
        """Change the units of some rows, before their shift is lowered by ``by``."""
        factor = torch.exp2(by)
        if self.moment is not None:
            self.moment[..., rows] = (self.moment[..., rows] + by * self.mass[..., rows]) * factor
        self.mass[..., rows] *= factor

    def put(self, i: int, rows: torch.Tensor, logits_M_S: torch.Tensor) -> None:
        """Replace the sums of slice i and some rows by those of float32 logits minus the shift."""
        if self.moment is None:
            self.mass[i, rows] = logits_M_S.exp2_().sum(1)
            return
        powers = torch.exp2(logits_M_S, out=workspace("powers", tuple(logits_M_S.shape), torch.float32))
        self.mass[i, rows] = powers.sum(1)
        self.moment[i, rows] = powers.mul_(logits_M_S.clamp_min_(HIDDEN_LOGIT)).sum(1)  # 0 * -inf is NaN

    def add(self, of_slices: _Sums) -> None:
        """Add the sums of all slices."""
        self.mass += of_slices.mass.sum(0)
        if self.moment is not None:
            self.moment += of_slices.moment.sum(0)

    def normalizer2(self) -> torch.Tensor:
        """Return the log-normalizer in base 2, ``[N]`` float64."""
        return self.shift.double() + self.mass.log2()

    def entropy2(self) -> torch.Tensor:
        """Return the entropy in base 2, ``[N]`` float64; 0 where no token is summed."""
        entropy = self.mass.log2() - self.moment / self.mass
        return entropy.clamp_min_(0).masked_fill_(self.mass == 0, 0)


def _ways(
    hidden: torch.Tensor, weight: torch.Tensor, scale2: float, tokens: LeftOut, best: Best | None
) -> Iterator[Products]:
    """Yield ways to multiply on this CPU: the fastest, then one that takes logits of any size."""
    dtype = product_dtype(hidden.dtype)
    if dtype == hidden.dtype and AmxProducts.fit(hidden, weight, best):  # not where 16 bits are widened
        yield AmxProducts(hidden, weight, scale2, tokens, best)
        return
    if dtype != torch.float32:
        yield ShiftedProducts(hidden, weight, scale2, tokens, best, dtype)
    yield Float32Products(hidden, weight, scale2, tokens, best)


def _walk_slices(
    products: Products,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale2: float,
    tokens: LeftOut,
    best: Best | None,
    with_moment: bool,
) -> _Sums | None:
    """Walk over the vocabulary on a CPU: a few slices, then a look at the shift.

    Returns ``None`` if the logits are too large for the products, as with a temperature near 0.
    """
    num_rows, vocab_size = len(hidden), len(weight)
    num_exact = max(1, min(_MAX_EXACT_ROWS, _MAX_EXACT_HIDDEN // hidden.shape[1]))

    done = min(vocab_size, _FIRST_COLUMNS)
    total = _first_columns(
        hidden, weight[:done], scale2, best, tokens, with_moment, products.dtype, num_exact
    )
    shift, stretch = total.shift, 1
    while done < vocab_size:
        slices = [
            slice(low, min(low + products.width, vocab_size))
            for low in range(done, vocab_size, products.width)[:stretch]
        ]
        # The total after this stretch, if its columns are like the earlier ones.
        growth = slices[-1].stop / done
        expected = total.mass * growth
        if (expected > _GROWN).any():
            new = _representable(shift + expected.log2().float(), products.dtype)
            total.move(slice(None), (shift - new).double())
            shift.copy_(new)
            expected = total.mass * growth
        if products.dtype != torch.float32 and (shift.abs() > _MAX_SHIFT).any():
            return None
        masses, moments = torch.empty(2, len(slices), num_rows, dtype=torch.float32)
        of_slices = _Sums(shift, masses, moments if with_moment else None)
        products.sum_up(slices, shift, masses, of_slices.moment)
        outweighs = ~(masses <= products.outweighs * expected)  # so written that NaN and inf count, too
        for i in outweighs.any(1).nonzero()[:, 0].tolist():
            for rows in torch.where(outweighs[i])[0].split(num_exact):
                exact = float32_logits(hidden[rows], weight[slices[i]], scale2)
                tokens.hide_in_rows(exact, rows, slices[i].start)
                new = torch.maximum(shift[rows], _representable(exact.amax(1), products.dtype))
                for sums in (total, of_slices):
                    sums.move(rows, shift[rows] - new)
                shift[rows] = new
                of_slices.put(i, rows, exact.sub_(new[:, None]))
        total.add(of_slices)
        done, stretch = slices[-1].stop, min(2 * stretch, _MAX_STRETCH)
    if products.dtype != torch.float32 and (shift.abs() > _MAX_SHIFT).any():
        return None
    return total


def _first_columns(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale2: float,
    best: Best | None,
    tokens: LeftOut,
    with_moment: bool,
    dtype: torch.dtype,
    num_exact: int,
) -> _Sums:
    """Return the first shift, and the sums of the first columns ``[N]`` in float64."""
    sum_up = passes(dtype).over_products
    shift = torch.empty(len(hidden), dtype=torch.float32)
    mass, moment = torch.zeros(2, len(hidden), dtype=torch.float64)
    for rows in slices_of(len(hidden), num_exact):
        logits = float32_logits(hidden[rows], weight, scale2)
        tokens.hide_in_rows(logits, rows, 0)
        largest = logits.amax(1)
        is_any = largest != -torch.inf  # else there is one column, and it is hidden
        shift[rows] = _representable(largest.where(is_any, 0), dtype)
        sums, moments = torch.empty(2, len(logits), dtype=torch.float32)
        of_rows = None if best is None else best[rows]
        sum_up(logits, 1.0, shift[rows], sums, of_rows, 0, moments if with_moment else None)
        mass[rows] = sums.where(is_any, 0).double()
        if with_moment:
            moment[rows] = moments.where(is_any, 0).double()
    return _Sums(shift, mass, moment if with_moment else None)


def _representable(shift: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the shift rounded to whole numbers that the dtype holds: ``2 ** shift`` is then exact."""
    return shift.round().to(dtype).float()


def _rank(hidden: torch.Tensor, weight: torch.Tensor, best: Best, left_out: torch.Tensor) -> None:
    """Find the best tokens on a GPU, without those left out: products with float32 results, by slices."""
    num_rows, vocab_size = len(hidden), len(weight)
    columns = min(vocab_size, max(1024, _CUDA_TILE // num_rows // _CUDA_ALIGNED * _CUDA_ALIGNED))
    tile = torch.empty(num_rows * columns, dtype=torch.float32, device=hidden.device)
    for columns_of_slice in slices_of(vocab_size, columns):
        part = weight[columns_of_slice]
        logits = tile[: num_rows * len(part)].view(num_rows, len(part))
        _mm_float32(hidden, part.T, logits)
        places = left_out[:, None] - columns_of_slice.start
        is_here = (places >= 0) & (places < len(part))
        places = places.clamp(0, len(part) - 1)
        logits.scatter_(1, places, logits.gather(1, places).masked_fill_(is_here, -torch.inf))
        best.add_at_once(logits, columns_of_slice.start)


def _mm_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
