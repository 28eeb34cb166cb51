"""Computes log-normalizers and logits of given tokens on a GPU, each in one Triton kernel.

A program of the first kernel multiplies some rows with some tokens of the vocabulary, and reduces the tile of
logits to one number per row while the tile is in registers. So no logits are written to the GPU's memory.
Rows and tokens are read by Hopper's tensor memory accelerator if the GPU has one.

Of one number per row and slice of the vocabulary, PyTorch makes the sum over all slices. For the entropy each
slice has a second number, the entropy of its own tokens. The entropy of all is that of the slices' weights,
plus the weighted mean of these: all terms are positive, so no digits are lost.

Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; the order of programs, Triton's
tutorial on matrix multiplication. Measured on an H100 and an H200: benchmarks/LOG.md.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

_LN_2 = math.log(2)
# Slices of the vocabulary whose programs run side by side, so that they read the same rows from the L2 cache.
_GROUP = 8


class _Tile(NamedTuple):
    """The shape of a program's product, and how Triton compiles it."""

    rows: int
    tokens: int
    depth: int  # numbers of the hidden size that are multiplied at a time
    num_warps: int
    num_stages: int


_HOPPER = _Tile(128, 256, 64, num_warps=8, num_stages=3)
# For GPUs with less shared memory, and for float32, whose products need more of it.
_SMALL = _Tile(128, 128, 32, num_warps=8, num_stages=3)


def log2_normalizer(
    hidden_N_H: torch.Tensor,
    weight_V_H: torch.Tensor,
    scale2: float,
    left_out_N: torch.Tensor,
    entropy_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``[N]`` float32, base 2: ``log2 sum_v 2 ** (scale2 * hidden . weight_v)``.

    Args:
        hidden_N_H: contiguous, on a GPU.
        weight_V_H: contiguous, in the same dtype, on the same GPU.
        scale2: factor of every logit, times ``log2(e)``.
        left_out_N: for each row the id of a token that the sum leaves out, int64; -1 leaves out none.
        entropy_N: gets the entropy of the tokens in the sum, in nats; ``None``: it is not computed.
    """
    assert hidden_N_H.is_contiguous()
    assert weight_V_H.is_contiguous()
    (num_rows, hidden_size), vocab_size = hidden_N_H.shape, len(weight_V_H)
    is_hopper = _capability(hidden_N_H.device) >= (9, 0) and hidden_N_H.dtype.itemsize == 2
    tile = _HOPPER if is_hopper else _SMALL
    num_slices = triton.cdiv(vocab_size, tile.tokens)
    partial_S_N = torch.empty(num_slices, num_rows, dtype=torch.float32, device=hidden_N_H.device)
    entropies_S_N = partial_S_N if entropy_N is None else torch.empty_like(partial_S_N)
    is_described = is_hopper and hidden_size % tile.depth == 0
    matrices = (hidden_N_H, weight_V_H)
    if is_described:
        blocks = ([tile.rows, tile.depth], [tile.tokens, tile.depth])
        matrices = tuple(map(TensorDescriptor.from_tensor, matrices, blocks))
    _normalize_slices[(triton.cdiv(num_rows, tile.rows) * num_slices,)](
        *matrices,
        left_out_N.contiguous(),
        partial_S_N,
        entropies_S_N,
        num_rows,
        vocab_size,
        scale2,
        hidden_size,
        *tile[:3],
        _GROUP,
        is_described,
        entropy_N is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    normalizer = partial_S_N.mul_(_LN_2).logsumexp(0)
    if entropy_N is not None:
        weights_S_N = partial_S_N.sub_(normalizer).exp_()
        joined = torch.special.entr(weights_S_N).add_(weights_S_N.mul_(entropies_S_N)).sum(0)
        entropy_N.copy_(joined.masked_fill_(normalizer == -torch.inf, 0))
    return normalizer.div_(_LN_2)


def token_logits(hidden_N_H: torch.Tensor, weight_V_H: torch.Tensor, ids_N_K: torch.Tensor) -> torch.Tensor:
    """Return ``[N, K]`` float32, the logits of K tokens per row, summed pairwise in float32."""
    logits = torch.empty(ids_N_K.shape, dtype=torch.float32, device=hidden_N_H.device)
    hidden_size = hidden_N_H.shape[1]
    if logits.numel():
        _multiply_rows[(logits.numel(),)](
            hidden_N_H,
            weight_V_H,
            ids_N_K.contiguous(),
            logits,
            ids_N_K.shape[1],
            hidden_size,
            triton.next_power_of_2(hidden_size),
        )
    return logits


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.version.hip is None else (0, 0)


@triton.jit(do_not_specialize=["num_rows", "vocab_size", "scale2"])
def _normalize_slices(
    hidden,  # [N, H]: a descriptor or a pointer
    weight,  # [V, H]: likewise
    left_out,  # [N] int64: for each row a token that the sum leaves out, or -1
    partial,  # [S, N] float32, the output
    entropies,  # [S, N] float32, the second output: in nats
    num_rows,
    vocab_size,
    scale2,
    hidden_size: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    IS_DESCRIBED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    program = tl.program_id(0)
    num_blocks = tl.cdiv(num_rows, ROWS)
    num_slices = tl.cdiv(vocab_size, TOKENS)
    first_slice = program // (GROUP * num_blocks) * GROUP
    group = tl.minimum(num_slices - first_slice, GROUP)
    within = program % (GROUP * num_blocks)
    slice_index, block = first_slice + within % group, within // group

    rows = block * ROWS + tl.arange(0, ROWS)
    tokens = slice_index * TOKENS + tl.arange(0, TOKENS)
    product = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, hidden_size, DEPTH):
        if IS_DESCRIBED:
            a = hidden.load([block * ROWS, first])
            b = weight.load([slice_index * TOKENS, first])
        else:
            places = first + tl.arange(0, DEPTH)
            is_inside = (places < hidden_size)[None, :]
            a = tl.load(
                hidden + rows[:, None].to(tl.int64) * hidden_size + places[None, :],
                mask=(rows < num_rows)[:, None] & is_inside,
                other=0.0,
            )
            b = tl.load(
                weight + tokens[:, None].to(tl.int64) * hidden_size + places[None, :],
                mask=(tokens < vocab_size)[:, None] & is_inside,
                other=0.0,
            )
        product = tl.dot(a, b.T, product, input_precision="ieee")
    hidden_tokens = tl.load(left_out + rows, mask=rows < num_rows, other=-1)
    is_summed = (tokens < vocab_size)[None, :] & (tokens[None, :] != hidden_tokens[:, None])
    logits = tl.where(is_summed, product * scale2, -float("inf"))
    top = tl.max(logits, 1)
    top = tl.where(top == -float("inf"), 0.0, top)  # a slice of one token, which is left out
    powers = tl.exp2(logits - top[:, None])
    total = tl.sum(powers, 1)
    places_of_rows = slice_index.to(tl.int64) * num_rows + rows
    tl.store(partial + places_of_rows, top + tl.log2(total), mask=rows < num_rows)
    if WITH_ENTROPY:
        moment = tl.sum(tl.where(is_summed, powers * (logits - top[:, None]), 0.0), 1)
        entropy = tl.where(total > 0.0, tl.log2(total) - moment / total, 0.0) * 0.6931471805599453
        tl.store(entropies + places_of_rows, tl.maximum(entropy, 0.0), mask=rows < num_rows)


@triton.jit
def _multiply_rows(hidden, weight, ids, logits, num_ids, hidden_size: tl.constexpr, WIDTH: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, WIDTH)
    is_inside = places < hidden_size
    row = tl.load(hidden + program // num_ids * hidden_size + places, mask=is_inside, other=0.0)
    token = tl.load(weight + tl.load(ids + program) * hidden_size + places, mask=is_inside, other=0.0)
    tl.store(logits + program, tl.sum(row.to(tl.float32) * token.to(tl.float32), 0))
