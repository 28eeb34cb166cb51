"""The fused read-out of the LM head against float64: every dtype, shape and scale it must take."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from tests.amx import needs_amx
from tests.oracle import entropy as exact_entropy
from vllm_kl.plugin import cpu_loops, cpu_products, kernel, lm_head
from vllm_kl.plugin.best_tokens import Best, largest

ON_A_GPU = pytest.param(
    "gpu",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
)


WITH_AMX = pytest.param("amx", marks=needs_amx)
# How this CPU multiplies matrices of 16 bits.
PRODUCTS = (
    "amx"
    if cpu_loops._amx_library()[0] is not None
    else "own"
    if torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else "widened"
)


@pytest.fixture(params=["own", "widened", WITH_AMX, ON_A_GPU])
def products(request, monkeypatch):
    """Multiplies 16-bit matrices directly (oneDNN), or widened to float32, or by AMX, or on a GPU."""
    monkeypatch.setattr(
        kernel, "product_dtype", lambda dtype: dtype if request.param in ("own", "amx") else torch.float32
    )
    if request.param != "amx":
        monkeypatch.setattr(cpu_loops, "_amx_library", lambda: (None, ""))
    if request.param == "gpu":
        torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(params=["compiled", "torch"])
def loops(request, monkeypatch):
    """What surrounds the product: compiled, or without a compiler."""
    if request.param == "torch":
        if "products" in request.fixturenames and request.getfixturevalue("products") == "amx":
            pytest.skip("AMX has compiled loops only")
        monkeypatch.setattr(cpu_loops, "_library", lambda: (None, ""))
        monkeypatch.setattr(cpu_loops, "_amx_library", lambda: (None, ""))
    return request.param


def make(num_rows, vocab_size, *, hidden_size=64, dtype=torch.float32, spread=1.0, seed=0):
    """Hidden rows and a matrix; ``spread`` is the logits' standard deviation, in nats."""
    generator = torch.Generator("cpu").manual_seed(seed)
    hidden = torch.randn(num_rows, hidden_size, generator=generator, device="cpu")
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device="cpu")
    weight *= spread / hidden_size**0.5
    return tuple(matrix.to(torch.get_default_device(), dtype) for matrix in (hidden, weight))


def in_float64(hidden, weight, scale=1.0):
    return (hidden.double() @ weight.double().T * scale).log_softmax(-1)


def fused(hidden, weight, ids, scale=1.0):
    return (
        kernel.token_logits(hidden, weight, ids) * scale
        - kernel.log_normalizer(hidden, weight, scale=scale)[:, None]
    )


def of_own_token(hidden, weight, ids, scale=1.0):
    """The log-probs of one token per row, as the read-out computes them."""
    others = kernel.log_normalizer(hidden, weight, scale=scale, left_out_N=ids)
    own = kernel.token_logits(hidden, weight, ids[:, None])[:, 0] * scale
    return own - torch.logaddexp(own, others)


@pytest.mark.usefixtures("products")
class TestLogNormalizer:
    @pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 1000, 5000])
    @pytest.mark.parametrize("num_rows", [1, 2, 77])
    def test_any_number_of_rows_and_columns(self, num_rows, vocab_size):
        hidden, weight = make(num_rows, vocab_size)
        want = (hidden.double() @ weight.double().T).logsumexp(-1)
        torch.testing.assert_close(kernel.log_normalizer(hidden, weight).double(), want, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
    @pytest.mark.parametrize("scale", [0.25, 1.0, 1 / 0.7])
    def test_float32_agrees_for_flat_and_peaked_rows(self, spread, scale):
        hidden, weight = make(64, 5000, spread=spread)
        ids = (hidden @ weight.T).topk(3).indices
        error = (
            (fused(hidden, weight, ids, scale) - in_float64(hidden, weight, scale).gather(1, ids)).abs().max()
        )
        assert error < 2e-6 * max(1.0, spread * scale)

    @pytest.mark.parametrize("logit", [5.0, 30.0, 100.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_token_that_is_nearly_certain_keeps_its_digits(self, dtype, logit):
        """A difference of two numbers that are rounded to float32 is wrong by 1e-5 for a logit of 30."""
        hidden, weight = make(300, 5000)
        ids = torch.arange(300) * 16
        own = weight[ids]
        hidden += own * (logit / (own * own).sum(1, keepdim=True))
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        want = in_float64(hidden, weight).gather(1, ids[:, None])[:, 0]
        error = (of_own_token(hidden, weight, ids) - want).abs().max()
        if logit == 5.0:
            assert error < (1e-6 if dtype == torch.float32 else 2e-3)
        else:
            assert want.min() > -1e-3
            assert error < (1e-8 if dtype == torch.float32 else 1e-6)

    def test_the_head_keeps_the_digits_of_both_kinds_of_log_probs(self, monkeypatch):
        monkeypatch.setattr(lm_head, "get_tensor_model_parallel_world_size", lambda: 1)
        hidden, weight = make(50, 1000)
        ids = torch.arange(50) * 16
        hidden += weight[ids] * 30 / weight[ids].square().sum(1, keepdim=True)
        head = lm_head.MatrixHead(SimpleNamespace(weight=weight), scale=1.0, num_tokens=1000, first_token=0)
        asked = torch.stack([ids, ids + 1, ids], dim=1)
        values = head.read(hidden, asked, top_k=2, temperature=1.0)
        want = in_float64(hidden, weight)
        assert (values[:, 0] - want.gather(1, ids[:, None])[:, 0]).abs().max() < 1e-8
        assert (values[:, 1] - want.gather(1, ids[:, None] + 1)[:, 0]).abs().max() < 1e-5
        assert torch.equal(values[:, 2], values[:, 0])
        assert torch.equal(values[:, 3].long(), ids)
        assert torch.equal(values[:, 5], values[:, 0])

    @pytest.mark.parametrize("vocab_size", [1, 2, 64, 65, 5000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_one_token_per_row_is_left_out_or_none(self, vocab_size, dtype):
        hidden, weight = make(70, vocab_size, dtype=dtype, spread=3.0)
        ids = torch.arange(70) * 71 % vocab_size
        ids[::7] = -1
        logits = hidden.double() @ weight.double().T
        is_left_out = torch.zeros_like(logits).scatter(1, ids.clamp_min(0)[:, None], 1.0).bool()
        is_left_out[::7] = False
        want = logits.masked_fill(is_left_out, -torch.inf).logsumexp(-1)
        got = kernel.log_normalizer(hidden, weight, left_out_N=ids)
        torch.testing.assert_close(got, want, rtol=0, atol=3e-6 if dtype == torch.float32 else 5e-3)

    @pytest.mark.parametrize("k", [1, 20, 300])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_token_that_the_sum_leaves_out_is_among_the_best(self, k, dtype):
        hidden, weight = make(70, 300, dtype=dtype, spread=3.0)
        logits = hidden.double() @ weight.double().T
        ids = logits.argmax(1)
        ids[::7] = -1
        best, values, _ = kernel.top_tokens(hidden, weight, k, left_out_N=ids)
        want = logits.topk(k)
        torch.testing.assert_close(values.double(), want.values, rtol=0, atol=1e-5)
        assert torch.equal(best.sort(1).values, want.indices.sort(1).values)

    def test_a_huge_logit_late_in_the_vocabulary_counts(self):
        # It outweighs everything before it, in the last slice, and overflows a sum with the shift so far.
        for dtype, atol in ((torch.float32, 1e-4), (torch.bfloat16, 5e-3)):
            hidden, weight = make(40, 5000, dtype=dtype)
            weight[4990] = (4 * hidden[7].float()).to(dtype)
            ids = torch.full((40, 1), 4990)
            want = in_float64(hidden, weight).gather(1, ids)
            assert want[7] == 0
            torch.testing.assert_close(fused(hidden, weight, ids).double(), want, rtol=1e-5, atol=atol)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_two_slices_of_one_stretch_that_outweigh_all_before_them(self, dtype):
        hidden, weight = make(40, 20_000, dtype=dtype)
        large = (4 * hidden[7].float()).to(dtype)
        for low, high in ((large, large), (large, large / 2), (large / 2, large)):
            weight[9000], weight[14_000] = low, high
            ids = torch.tensor([[9000, 14_000, 3]]).expand(40, -1)
            want = in_float64(hidden, weight).gather(1, ids)
            torch.testing.assert_close(fused(hidden, weight, ids).double(), want, rtol=1e-5, atol=5e-3)

    def test_a_row_that_is_not_a_number_leaves_the_others_as_they_are(self):
        hidden, weight = make(100, 20_000, dtype=torch.bfloat16, spread=4.0)
        want = kernel.log_normalizer(hidden, weight)
        hidden[5, 3] = torch.nan
        got = kernel.log_normalizer(hidden, weight)
        assert got[5].isnan()
        others = torch.arange(100) != 5
        torch.testing.assert_close(got[others], want[others], rtol=0, atol=1e-5)

    def test_rows_that_overflow_are_not_hidden(self):
        hidden, weight = make(3, 1000)
        hidden[1, 0] = torch.nan
        assert kernel.log_normalizer(hidden, weight).isfinite().tolist() == [True, False, True]

    def test_no_vocabulary_at_all_weighs_nothing(self):
        """A rank's share under tensor parallelism."""
        assert kernel.log_normalizer(torch.randn(3, 8), torch.empty(0, 8)).tolist() == [-torch.inf] * 3
        ids, logits, _ = kernel.top_tokens(torch.randn(3, 8), torch.empty(0, 8), 5)
        assert ids.shape == logits.shape == (3, 0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("temperature", [0.01, 1e-3, 1e-4])
    def test_a_temperature_near_zero(self, dtype, temperature):
        """Logits of ten thousands: a shift that 16 bits hold only coarsely."""
        hidden, weight = make(300, 5000, spread=8.0, dtype=dtype)
        best, _, normalizer = kernel.top_tokens(hidden, weight, 5, scale=1 / temperature)
        logits = hidden.double() @ weight.double().T / temperature
        assert torch.equal(best, logits.topk(5).indices)
        torch.testing.assert_close(normalizer.double(), logits.logsumexp(-1), rtol=1e-6, atol=5e-3)

    @pytest.mark.parametrize("spread", [1.0, 4.0, 12.0])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_bfloat16_is_ten_times_nearer_than_rounded_logits(self, spread, temperature):
        hidden, weight = make(200, 20_000, dtype=torch.bfloat16, spread=spread)
        ids = torch.cat([(hidden @ weight.T).argmax(-1, keepdim=True), torch.arange(200)[:, None]], 1)
        want = in_float64(hidden, weight, 1 / temperature).gather(1, ids)
        rounded = ((hidden @ weight.T).float() / temperature).log_softmax(-1).gather(1, ids)
        mine = (fused(hidden, weight, ids, 1 / temperature) - want).square().mean().sqrt()
        assert mine < (rounded - want).square().mean().sqrt() / 10
        assert mine < 1e-3


def exact_entropies(hidden, weight, scale=1.0):
    return torch.tensor(
        [exact_entropy(row) for row in (hidden.double() @ weight.double().T * scale).tolist()],
        dtype=torch.float64,
    )


def head_of(weight, monkeypatch):
    monkeypatch.setattr(lm_head, "get_tensor_model_parallel_world_size", lambda: 1)
    return lm_head.MatrixHead(
        SimpleNamespace(weight=weight), scale=1.0, num_tokens=len(weight), first_token=0
    )


def read_entropies(hidden, weight, ids, monkeypatch, temperature=1.0):
    """The entropies as the read-out computes them, beside the log-probs of one token per row."""
    head = head_of(weight, monkeypatch)
    both = head.read(hidden, ids[:, None], top_k=0, temperature=temperature, entropy=True)
    without = head.read(hidden, ids[:, None], top_k=0, temperature=temperature)
    torch.testing.assert_close(both[:, :1], without, rtol=1e-6, atol=1e-6)  # sums in another order
    assert both.shape == (len(hidden), 2)
    return both[:, 1].double()


# Largest errors of entropies, in nats, by the dtype of the product's results. Results in float32 are wrong by
# rounding. In 16 bits the logits x are rounded, so the entropy is wrong by sum_v p_v (x_v - mean) error_v:
# most where a few tokens share the mass.
ENTROPY_ATOL = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def dtype_of_results(products, dtype):
    in_16_bits = products == "own" or (products == "amx" and dtype != torch.bfloat16)
    return dtype if in_16_bits else torch.float32


@pytest.mark.usefixtures("products", "loops")
class TestEntropy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("spread", "temperature"), [(0.1, 1.0), (3.0, 0.7), (12.0, 1.0), (12.0, 4.0)])
    def test_agrees_with_float64(self, products, monkeypatch, dtype, temperature, spread):
        hidden, weight = make(20, 4000, dtype=dtype, spread=spread)
        want = exact_entropies(hidden, weight, 1 / temperature)
        best = (hidden.float() @ weight.float().T).topk(2).indices
        atol = ENTROPY_ATOL[dtype_of_results(products, dtype)]
        for ids in (torch.arange(20) * 71, best[:, 0], best[:, 1]):
            got = read_entropies(hidden, weight, ids, monkeypatch, temperature)
            print(f"{(got - want).abs().max():.1e}", end=" ")
            torch.testing.assert_close(got, want, rtol=1e-6, atol=atol)
            assert (got >= 0).all()
            assert (got <= math.log(4000) + 1e-5).all()

    @pytest.mark.parametrize("vocab_size", [1, 2, 64, 65, 255, 2050])
    @pytest.mark.parametrize("num_rows", [1, 77])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_number_of_rows_and_columns(self, monkeypatch, num_rows, vocab_size, dtype):
        hidden, weight = make(num_rows, vocab_size, dtype=dtype)
        ids = torch.arange(num_rows) * 71 % vocab_size
        got = read_entropies(hidden, weight, ids, monkeypatch)
        want = exact_entropies(hidden, weight)
        torch.testing.assert_close(got, want, rtol=0, atol=3e-6 if dtype == torch.float32 else 5e-3)
        if vocab_size == 1:
            assert (got == 0).all()

    @pytest.mark.parametrize("logit", [30.0, 60.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_token_that_is_nearly_certain_keeps_its_digits(self, monkeypatch, dtype, logit):
        """Of log Z and the mean logit, each near 30, the difference would be 1e-5 instead of 1e-8."""
        hidden, weight = make(100, 5000)
        ids = torch.arange(100) * 16
        own = weight[ids]
        hidden += own * (logit / (own * own).sum(1, keepdim=True))
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        want = exact_entropies(hidden, weight)
        assert want.min() < 1e-6
        got = read_entropies(hidden, weight, ids, monkeypatch)
        torch.testing.assert_close(got, want, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-30)
        # The certain token is another than the sequence's own: its entropy keeps absolute digits only.
        got = read_entropies(hidden, weight, ids + 1, monkeypatch)
        torch.testing.assert_close(got, want, rtol=0, atol=5e-6)
        assert (got >= 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_huge_logits_late_in_the_vocabulary_count(self, monkeypatch, dtype):
        """The shift moves in the middle of a stretch, and the sums so far move with it."""
        hidden, weight = make(40, 20_000, dtype=dtype)
        large = (4 * hidden[7].float()).to(dtype)
        weight[9000], weight[14_000] = large, (0.999 * large.float()).to(dtype)
        want = exact_entropies(hidden, weight)
        for ids in (torch.full((40,), 9000), torch.full((40,), 3)):
            got = read_entropies(hidden, weight, ids, monkeypatch)
            torch.testing.assert_close(got, want, rtol=0, atol=2e-4 if dtype == torch.float32 else 2e-2)

    def test_equal_logits_have_the_logarithm_of_the_vocabulary(self, monkeypatch):
        """Equal numbers are rounded in one direction: sums of 1,024 made it 1.2e-5 nats with AVX2."""
        for dtype in (torch.float32, torch.bfloat16):
            hidden, weight = torch.ones(3, 64).to(dtype), torch.full((20_000, 64), 0.3).to(dtype)
            got = read_entropies(hidden, weight, torch.arange(3), monkeypatch)
            torch.testing.assert_close(
                got, torch.full((3,), math.log(20_000), dtype=torch.float64), rtol=0, atol=1e-5
            )

    def test_a_row_that_is_not_a_number_is_not_hidden(self, monkeypatch):
        hidden, weight = make(3, 1000)
        hidden[1, 0] = torch.nan
        ids = torch.tensor([1, 2, 3])
        head = head_of(weight, monkeypatch)
        both = head.read(hidden, ids[:, None], top_k=0, temperature=1.0, entropy=True)
        assert both.isfinite().all(1).tolist() == [True, False, True]

    def test_beside_the_best_tokens(self, monkeypatch):
        hidden, weight = make(50, 3000, spread=3.0)
        head, ids = head_of(weight, monkeypatch), torch.arange(50)[:, None]
        without = head.read(hidden, ids, top_k=4, temperature=0.8)
        values = head.read(hidden, ids, top_k=4, temperature=0.8, entropy=True)
        torch.testing.assert_close(values[:, :-1], without, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            values[:, -1].double(), exact_entropies(hidden, weight, 1 / 0.8), rtol=0, atol=2e-5
        )

    @pytest.mark.parametrize("num_ranks", [2, 3])
    def test_ranks_join_the_entropies_of_their_shards(self, monkeypatch, num_ranks):
        """Ranks in threads, which meet where tensor-parallel workers exchange tensors."""
        hidden, weight = make(50, 300, spread=4.0)
        ids = (torch.arange(50) * 7 % 300)[:, None]
        hidden[:20] += weight[ids[:20, 0]] * 40 / weight[ids[:20, 0]].square().sum(1, keepdim=True)
        want = exact_entropies(hidden, weight)
        per_rank = -(-300 // num_ranks)
        for rank, values in enumerate(
            on_ranks(
                num_ranks,
                monkeypatch,
                lambda r: shard(weight, r, per_rank).read(
                    hidden, ids, top_k=3, temperature=1.0, entropy=True
                ),
            )
        ):
            torch.testing.assert_close(values[:, -1].double(), want, rtol=2e-5, atol=1e-5, msg=str(rank))
            certain = slice(0, 20)
            torch.testing.assert_close(values[certain, -1].double(), want[certain], rtol=1e-3, atol=1e-30)


def shard(weight, rank, per_rank):
    first = rank * per_rank
    part = weight[first : first + per_rank]
    return lm_head.MatrixHead(
        SimpleNamespace(weight=part), scale=1.0, num_tokens=len(part), first_token=first
    )


def on_ranks(num_ranks, monkeypatch, work):
    """Run ``work(rank)`` in a thread for each rank; return the results."""
    barrier, given = threading.Barrier(num_ranks), {}
    rank_of = threading.local()

    def exchange(tensor):
        given[rank_of.rank] = tensor
        barrier.wait()
        tensors = [given[rank] for rank in range(num_ranks)]
        barrier.wait()
        return tensors

    monkeypatch.setattr(lm_head, "get_tensor_model_parallel_world_size", lambda: num_ranks)
    monkeypatch.setattr(
        lm_head, "tensor_model_parallel_all_gather", lambda t, dim: torch.cat(exchange(t), dim)
    )
    monkeypatch.setattr(
        lm_head, "tensor_model_parallel_all_reduce", lambda t: torch.stack(exchange(t)).sum(0)
    )

    def run(rank):
        rank_of.rank = rank
        return work(rank)

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(run, range(num_ranks)))


class TestModelHead:
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_entropies_of_a_models_own_logits(self, temperature):
        """A head with a soft cap, whose model masks a token."""
        hidden, weight = make(40, 1000, spread=6.0)

        def compute_logits(hidden):
            logits = 5 * ((hidden @ weight.T) / 5).tanh()
            logits[:, 17] = -torch.inf
            return logits

        head = lm_head.ModelHead(SimpleNamespace(compute_logits=compute_logits), 1000, [], "a test")
        ids = torch.arange(40)[:, None] + 100
        values = head.read(hidden, ids, top_k=2, temperature=temperature, entropy=True)
        assert torch.equal(values[:, :-1], head.read(hidden, ids, top_k=2, temperature=temperature))
        want = [exact_entropy(row) for row in (compute_logits(hidden).double() / temperature).tolist()]
        torch.testing.assert_close(values[:, -1].double(), torch.tensor(want).double(), rtol=0, atol=5e-6)


def pass_over(dtype, scale2=1.0):
    """Return the pass over a tile that products in a dtype are followed by."""
    passes = cpu_loops.passes(dtype)
    if dtype != torch.float32:
        return passes.over_shifted
    return lambda tile, *args: passes.over_products(tile, scale2, *args)


@pytest.mark.usefixtures("loops")
class TestPasses:
    @pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 4e-6), (torch.float32, 6e-7)])
    def test_sums_and_fills_any_number_of_rows_and_columns(self, dtype, rtol):
        for num_rows in (1, 2, 3, 64, 77):
            for num_columns in (1, 2, 31, 1024, 1543):
                for skipped in (0, 1, 6):  # the last slice of a vocabulary begins inside its tile
                    tile, _ = make(num_rows, 1, hidden_size=skipped + num_columns, dtype=dtype)
                    tile *= 8
                    before, part = tile.clone(), tile[:, skipped:]
                    shift, x = torch.randn(num_rows).mul(9).round(), part.double()
                    if is_product := dtype == torch.float32:
                        shift = part.amax(1).mul(0.25).round()
                        x = 0.25 * x - shift[:, None].double()
                    sum_up = pass_over(dtype, scale2=0.25)
                    want, want_moments = x.exp2().sum(1), (x * x.exp2()).sum(1)
                    sizes = (x * x.exp2()).abs().sum(1)
                    sums, moments = torch.empty(2, num_rows)
                    sum_up(part.clone(), shift, sums, None, 0, moments)
                    torch.testing.assert_close(sums.double(), want, rtol=rtol, atol=0)
                    assert ((moments.double() - want_moments).abs() <= rtol * sizes).all()
                    sum_up(part, shift, sums, None, 0)
                    torch.testing.assert_close(sums.double(), want, rtol=rtol, atol=0)
                    left = before[:, skipped:].float() if is_product else -shift[:, None].expand_as(part)
                    assert torch.equal(part.float(), left)
                    assert torch.equal(tile[:, :skipped], before[:, :skipped])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_what_does_not_fit_is_seen(self, dtype):
        tile = torch.zeros(6, 64, dtype=dtype)
        tile[0, 3], tile[1, 4], tile[2, 5], tile[3, 6], tile[4, 7] = torch.nan, torch.inf, 1e30, 200, -1e30
        sums = torch.empty(6)
        pass_over(dtype)(tile, torch.zeros(6), sums, None, 0)
        assert not (sums[:4] < 1e38).any()
        torch.testing.assert_close(sums[4:], torch.tensor([63.0, 64.0]))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_the_best_are_kept_over_slices(self, dtype):
        logits = make(77, 1, hidden_size=1000, dtype=dtype)[0] * 8
        best, shift = Best.of(77, 9, logits.device), torch.arange(77.0) - 30
        for low in range(0, 1000, 300):
            part = logits[:, low : low + 300].clone()
            pass_over(dtype, scale2=0.5)(part, shift, torch.empty(77), best, low)
        values, order = best.values.sort(descending=True, stable=True)
        want = logits.float().topk(9).values
        assert torch.equal(values, 0.5 * want if dtype == torch.float32 else want + shift[:, None])
        assert torch.equal(logits.float().gather(1, best.ids.gather(1, order)), want)

    def test_logits_of_single_tokens_are_exact(self):
        for dtype in (torch.bfloat16, torch.float32):
            hidden, weight = make(50, 300, hidden_size=77, dtype=dtype)
            ids = torch.randint(300, (50, 5))
            want = (hidden.double() @ weight.double().T).gather(1, ids)
            torch.testing.assert_close(
                cpu_loops.token_logits(hidden, weight, ids).double(), want, rtol=1e-6, atol=1e-6
            )

    @pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler: install g++")
    def test_is_compiled_where_there_is_a_compiler(self):
        assert not cpu_loops.missing_compiler()

    def test_without_a_compiler_the_read_out_says_so_and_works(self):
        script = """
import torch
from vllm_kl.plugin import kernel, cpu_loops
assert "no-such-compiler" in cpu_loops.missing_compiler()
hidden, weight = torch.randn(9, 64).bfloat16(), torch.randn(5000, 64).bfloat16() / 8
want = (hidden.double() @ weight.double().T).logsumexp(-1)
assert (kernel.log_normalizer(hidden, weight) - want).abs().max() < 1e-3
"""
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "CXX": "no-such-compiler"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


@needs_amx
class TestAmx:
    """The loop that multiplies and sums: any shape, any number of threads."""

    @pytest.mark.parametrize("num_threads", [1, 2, 5])
    @pytest.mark.parametrize("with_moments", [False, True])
    @pytest.mark.parametrize("num_best", [0, 1, 9])
    def test_sums_over_any_number_of_rows_tokens_and_features(self, num_best, with_moments, num_threads):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            for num_rows, num_tokens, hidden_size in [
                *((n, 70, 32) for n in (1, 15, 16, 17, 31, 32, 33, 77, 161)),
                *((40, n, 64) for n in (1, 2, 16, 17, 31, 32, 33, 64, 65, 1000)),
                *((35, 100, n) for n in (32, 96, 896, 1056, 2048)),
                (1200, 130, 2048),  # more rows than stay in a cache at a time
            ]:
                self.check(num_rows, num_tokens, hidden_size, num_best, with_moments)
        finally:
            torch.set_num_threads(before)

    def check(self, num_rows, num_tokens, hidden_size, num_best, with_moments):
        hidden, wide = make(num_rows, num_tokens, hidden_size=hidden_size + 8, dtype=torch.bfloat16, spread=4)
        hidden, weight = hidden[:, 8:].contiguous(), wide[:, 8:]  # rows of weights that are not adjacent
        first_id, scale2 = 1000, 0.7
        logits2 = hidden.double() @ weight.double().T * scale2
        left_out = torch.arange(num_rows) * 7 % (num_tokens + 1) + first_id
        left_out[left_out == first_id + num_tokens] = -1
        is_left_out = torch.arange(num_tokens) + first_id == left_out[:, None]
        shift = logits2.amax(1).round().float() - 3
        x = logits2 - shift[:, None]
        powers = x.exp2().masked_fill(is_left_out, 0)
        padded = torch.zeros(math.ceil(num_rows / 32) * 32, hidden_size, dtype=torch.bfloat16)
        padded[:num_rows] = hidden
        pairs = cpu_loops.in_pairs(padded, torch.empty_like(padded))
        masses, moments = torch.full((2, num_rows), torch.nan)
        best = Best.of(num_rows, num_best, hidden.device) if num_best else None
        wanted = moments if with_moments else None
        cpu_loops.product_sums(pairs, weight, scale2, shift, left_out, masses, best, first_id, wanted)
        sizes = (x.abs() * powers).sum(1)
        torch.testing.assert_close(masses.double(), powers.sum(1), rtol=3e-6, atol=1e-30)
        if with_moments:
            assert ((moments.double() - (x * powers).sum(1)).abs() <= 3e-6 * (sizes + powers.sum(1))).all()
        if num_best:
            k = min(num_best, num_tokens - 1)
            want = logits2.masked_fill(is_left_out, -torch.inf).topk(k, dim=1).values
            got, order = best.values.topk(k, dim=1)
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
            ids = best.ids.gather(1, order) - first_id
            torch.testing.assert_close(logits2.gather(1, ids), want, rtol=1e-5, atol=1e-5)

    def test_what_does_not_fit_is_seen(self):
        hidden, weight = torch.zeros(32, 32), torch.ones(40, 32)
        hidden[0, 3], hidden[1, 4], hidden[2, 5], hidden[3, 6] = torch.nan, torch.inf, 1e30, -1e30
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
        masses, left_out = torch.empty(32), torch.full((32,), -1)
        pairs = cpu_loops.in_pairs(hidden, torch.empty_like(hidden))
        cpu_loops.product_sums(pairs, weight, 1.0, torch.zeros(32), left_out, masses, None, 0)
        assert not (masses[:3] < 1e38).any()
        torch.testing.assert_close(masses[3:], torch.tensor([0.0] + [40.0] * 28))

    def test_tiles_that_a_thread_has_configured_are_put_back(self, tmp_path):
        source, library = tmp_path / "tiles.cpp", tmp_path / "tiles.so"
        source.write_text(
            """
            #include <immintrin.h>
            struct alignas(64) Config { unsigned char bytes[64]; };
            extern "C" void configure() {
                Config config = {{1}};
                config.bytes[16] = 32, config.bytes[48] = 5;  // tile 0: five rows of 32 bytes
                asm volatile("ldtilecfg %0" :: "m"(config));
            }
            extern "C" int rows() {
                Config config;
                asm volatile("sttilecfg %0" : "=m"(config));
                return config.bytes[48];
            }
            extern "C" void release() { asm volatile("tilerelease"); }
            """
        )
        flags = ["-shared", "-fPIC", "-mamx-tile"]
        subprocess.run(["c++", *flags, str(source), "-o", str(library)], check=True)
        tiles = ctypes.CDLL(str(library))
        tiles.configure()
        kernel.log_normalizer(*make(3, 100, dtype=torch.bfloat16))
        rows = tiles.rows()
        tiles.release()
        assert rows == 5
        kernel.log_normalizer(*make(3, 100, dtype=torch.bfloat16))
        assert tiles.rows() == 0

    def test_products_of_other_libraries_keep_their_tiles(self):
        hidden, weight = make(64, 2000, hidden_size=128, dtype=torch.bfloat16)
        want = hidden @ weight.T
        normalizer = kernel.log_normalizer(hidden, weight)
        for _ in range(5):
            assert torch.equal(hidden @ weight.T, want)
            assert torch.equal(kernel.log_normalizer(hidden, weight), normalizer)

    def test_bfloat16_is_as_exact_as_float32(self):
        hidden, weight = make(200, 20_000, dtype=torch.bfloat16, spread=4.0)
        ids = torch.cat([(hidden @ weight.T).argmax(-1, keepdim=True), torch.arange(200)[:, None]], 1)
        assert (fused(hidden, weight, ids) - in_float64(hidden, weight).gather(1, ids)).abs().max() < 5e-6

    @pytest.mark.parametrize(("spread", "most"), [(4.0, 0.0), (8.0, 0.02)])
    def test_float32_logits_are_rarely_computed_again(self, monkeypatch, spread, most):
        computed = []

        def float32_logits(hidden, weight, scale2):
            computed.append(len(hidden) * len(weight))
            return cpu_products.float32_logits(hidden, weight, scale2)

        monkeypatch.setattr(kernel, "float32_logits", float32_logits)
        hidden, weight = make(512, 20_000, hidden_size=512, dtype=torch.bfloat16, spread=spread)
        kernel.log_normalizer(hidden, weight)
        assert 0 <= sum(computed) / 512 - kernel._FIRST_COLUMNS <= most * 20_000

    @pytest.mark.parametrize("num_rows", [1, 32, 33, 300])
    def test_best_tokens_of_few_rows_keep_all_threads_busy(self, monkeypatch, num_rows):
        calls = []
        monkeypatch.setattr(
            cpu_products, "product_sums", lambda *args: calls.append(args) or args[5].fill_(1)
        )
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        kernel.top_tokens(*make(num_rows, 100, dtype=torch.bfloat16), 5)
        assert bool(calls) is (num_rows > 64)

    @pytest.mark.parametrize(("hidden_size", "is_used"), [(2048, True), (2080, False), (48, False)])
    def test_heads_that_it_does_not_fit_are_multiplied_by_onednn(self, monkeypatch, hidden_size, is_used):
        calls = []
        monkeypatch.setattr(cpu_products, "product_sums", lambda *args: calls.append(args))
        hidden, weight = make(3, 100, hidden_size=hidden_size, dtype=torch.bfloat16)
        kernel.log_normalizer(hidden, weight)
        assert bool(calls) is is_used


@pytest.mark.usefixtures("products", "loops")
class TestProductDtype:
    @pytest.mark.parametrize(
        ("slow", "fast"),
        [
            (cpu_products.ShiftedProducts, cpu_products.Float32Products),
            (cpu_products.Float32Products, cpu_products.ShiftedProducts),
        ],
    )
    def test_16_bits_are_multiplied_in_the_faster_way(self, monkeypatch, slow, fast):
        monkeypatch.setattr(cpu_products, "has_products", lambda dtype: True)
        monkeypatch.setattr(cpu_products, "amx_works", lambda *_: False)
        monkeypatch.setattr(slow, "_multiply", lambda self, weight: time.sleep(0.1))
        monkeypatch.setattr(fast, "_multiply", lambda self, weight: None)
        expected = torch.float32 if slow is cpu_products.ShiftedProducts else torch.bfloat16
        assert cpu_products.product_dtype.__wrapped__(torch.bfloat16) == expected

    def test_with_amx_nothing_is_timed(self, monkeypatch):
        monkeypatch.setattr(cpu_products, "has_products", lambda dtype: True)
        monkeypatch.setattr(cpu_products, "amx_works", lambda *_: True)
        monkeypatch.setattr(cpu_products.Products, "sum_up", None)
        assert cpu_products.product_dtype.__wrapped__(torch.bfloat16) == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_without_products_of_16_bits_nothing_is_timed(self, monkeypatch, dtype):
        monkeypatch.setattr(cpu_products, "has_products", lambda dtype: False)
        monkeypatch.setattr(cpu_products.Products, "sum_up", None)
        assert cpu_products.product_dtype.__wrapped__(dtype) == torch.float32


class TestTopTokens:
    @pytest.mark.parametrize("k", [1, 5, 40])
    def test_best_tokens_are_those_of_the_whole_vocabulary(self, k):
        hidden, weight = make(50, 3000, spread=3.0)
        ids, logits, normalizer = kernel.top_tokens(hidden, weight, k)
        want = in_float64(hidden, weight).topk(k)
        assert torch.equal(ids, want.indices)
        torch.testing.assert_close((logits - normalizer[:, None]).double(), want.values, rtol=0, atol=1e-5)

    def test_rounding_does_not_misplace_them_in_bfloat16(self):
        hidden, weight = make(50, 3000, dtype=torch.bfloat16, spread=3.0)
        ids, _, _ = kernel.top_tokens(hidden, weight, 10)
        assert torch.equal(ids, in_float64(hidden, weight).topk(10).indices)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_peaked_rows_of_many_slices(self, dtype):
        hidden, weight = make(200, 20_000, dtype=dtype, spread=12.0)
        ids, logits, normalizer = kernel.top_tokens(hidden, weight, 20)
        want = in_float64(hidden, weight).topk(20)
        assert torch.equal(ids, want.indices)
        torch.testing.assert_close((logits - normalizer[:, None]).double(), want.values, rtol=1e-6, atol=5e-3)

    def test_k_may_be_the_whole_vocabulary(self):
        hidden, weight = make(4, 300)
        ids, _, _ = kernel.top_tokens(hidden, weight, 300)
        assert torch.equal(ids.sort().values, torch.arange(300).expand(4, -1))


class TestTheCodeOfAGPU:
    @pytest.fixture(autouse=True)
    def _small_tiles(self, monkeypatch):
        """Small slices, and products that a CPU has, too."""
        monkeypatch.setattr(kernel, "_CUDA_TILE", 1 << 14)
        monkeypatch.setattr(kernel, "_mm_float32", lambda a, b, out: torch.mm(a.float(), b.float(), out=out))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (3, 1025), (40, 5000)])
    def test_ranks_all_tokens_slice_by_slice(self, num_rows, vocab_size, dtype):
        hidden, weight = make(num_rows, vocab_size, dtype=dtype)
        best = Best.of(num_rows, min(9, vocab_size), hidden.device)
        logits = hidden.float() @ weight.float().T
        left_out = logits.argmax(1)
        left_out[-1] = -1
        kernel._rank(hidden, weight, best, left_out)
        logits[:-1] = logits[:-1].scatter(1, left_out[:-1, None], -torch.inf)
        want = logits.topk(best.ids.shape[1])
        torch.testing.assert_close(best.values, want.values)
        torch.testing.assert_close(logits.gather(1, best.ids), want.values)

    @pytest.mark.parametrize("width", [1, 15, 16, 300, 1024, 1039])
    @pytest.mark.parametrize("k", [1, 5, 21, 1100])
    def test_the_largest_of_groups_are_the_largest_of_all(self, width, k):
        values = torch.randn(30, width, generator=torch.Generator().manual_seed(0))
        values[:10] = values[:10].round()  # many equal ones
        values[5:12, : width - 1] = -torch.inf
        values[12:20] = values[12:20].sort(descending=True).values  # all in the first groups
        found, places = largest(values, k)
        want = values.topk(min(k, width)).values
        assert torch.equal(found, want)
        assert torch.equal(values.gather(1, places), want)
        assert all(len(set(row)) == len(row) for row in places.tolist())

    def test_slices_are_aligned(self):
        """Of rows that begin at odd places, cuBLAS takes several times as long."""
        hidden, weight = make(40, 5001)
        with ProductShapes(torch.float32) as seen:
            kernel._rank(hidden, weight, Best.of(40, 3, hidden.device), torch.zeros(40, dtype=torch.long))
        assert {columns for _, (_, columns) in seen.shapes} == {1024, 5001 - 4 * 1024}

    @pytest.mark.parametrize(
        ("num_rows", "hidden_size", "top_k", "height"),
        [
            (0, 64, 0, None),
            (1, 64, 0, 128),
            (4096, 3584, 0, 4096),
            (4097, 3584, 0, 2176),
            (9000, 16_384, 0, 1024),
            (9000, 64, 1000, 1024),
        ],
    )
    def test_row_blocks_are_a_multiple_of_what_a_program_takes(self, num_rows, hidden_size, top_k, height):
        blocks = list(kernel.row_blocks(num_rows, hidden_size, top_k, on_a_gpu=True))
        assert sum(b.stop - b.start for b in blocks) == num_rows
        assert [b.start for b in blocks] == [n * height for n in range(len(blocks))]
        assert all(b.stop - b.start <= kernel._MAX_ROWS for b in blocks)


class TestMemory:
    def test_no_rows_by_vocabulary_tensor_is_made(self):
        hidden, weight = make(kernel._MAX_ROWS, 152_000, dtype=torch.bfloat16)
        ids = torch.zeros(len(hidden), 1, dtype=torch.long)
        fused(hidden, weight, ids)  # the product's own workspace
        with LargestAllocation() as largest:
            fused(hidden, weight, ids)
        assert largest.size_bytes <= 16 << 20  # 1024 rows of logits in bfloat16 alone are 297 MiB

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: run it on Linux")
    # Each case is a process of its own: in CI with the products that this CPU has.
    @pytest.mark.parametrize(
        "products",
        [
            pytest.param("own", marks=() if PRODUCTS == "own" else pytest.mark.nightly),
            pytest.param("widened", marks=() if PRODUCTS == "widened" else pytest.mark.nightly),
            WITH_AMX,
        ],
    )
    @pytest.mark.parametrize(
        ("hidden_size", "vocab_size", "heights"),
        [(64, 152_000, "[4096] * 4"), (512, 20_000, "kernel.HEIGHTS"), (4096, 4_000, "[64, 512, 500]")],
    )
    def test_a_read_out_takes_less_than_64_mib(self, products, hidden_size, vocab_size, heights):
        """Covers a vocabulary of 152k, all heights of a block, best tokens and padding."""
        if products == "own" and PRODUCTS == "widened":
            pytest.skip("this CPU widens bfloat16 matrices: needs AVX-512 or AMX")
        script = f"""
import torch
from vllm_kl.plugin import kernel, cpu_loops
def peak_kib():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
hidden = torch.randn(4096, {hidden_size}).bfloat16()
weight = torch.randn({vocab_size}, {hidden_size}).bfloat16() * {3 / hidden_size**0.5}
# The libraries' own memory.
torch.mm(hidden[:64], weight[:64].T), torch.mm(hidden[:64].float(), weight[:64].float().T)
kernel.product_dtype = lambda dtype: {"torch.float32" if products == "widened" else "dtype"}
if {products != "amx"}:
    cpu_loops._amx_library = lambda: (None, "")
cpu_loops.token_logits(hidden[:1], weight, torch.zeros(1, 1, dtype=torch.long))
open("/proc/self/clear_refs", "w").write("5")  # the peak is what is used now
before = peak_kib()
for num_rows in {heights}:
    assert len(list(kernel.row_blocks(num_rows, {hidden_size}))) == 1
    for rows in (num_rows, num_rows - 1):
        kernel.top_tokens(hidden[:rows], weight, 20)
        cpu_loops.token_logits(hidden[:rows], weight, torch.zeros(rows, 1, dtype=torch.long))
print((peak_kib() - before) / 1024)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert float(done.stdout) <= 64
        print(f"{float(done.stdout):.0f} MiB")

    def test_row_blocks_shrink_with_the_best_tokens(self):
        for top_k in (1, 20, 2000, 150_000):
            largest = max(b.stop - b.start for b in kernel.row_blocks(5000, 64, top_k))
            assert largest == 64 or 12 * largest * top_k <= 16 << 20
        assert [*kernel.row_blocks(5000, 64, 1)] == [*kernel.row_blocks(5000, 64)]

    def test_products_have_few_shapes(self, monkeypatch):
        # oneDNN compiles each shape of a 16-bit product, and keeps it.
        monkeypatch.setattr(kernel, "product_dtype", lambda dtype: dtype)
        monkeypatch.setattr(cpu_loops, "_amx_library", lambda: (None, ""))
        weight = make(1, 3000, dtype=torch.bfloat16)[1]
        with ProductShapes(torch.bfloat16) as seen:
            for num_rows in [*range(1, 200), *range(200, kernel._MAX_ROWS, 99)]:
                kernel.log_normalizer(make(num_rows, 1, dtype=torch.bfloat16, spread=4.0)[0], weight)
        assert 0 < len(seen.shapes) <= 15

    def test_row_blocks_shrink_with_the_hidden_size(self):
        for num_rows, hidden_size in [
            (0, 64),
            (1, 64),
            (5000, 512),
            (5000, 8192),
            (100, 1 << 22),
            (4680, 896),
            (4680, 3584),
        ]:
            blocks = list(kernel.row_blocks(num_rows, hidden_size))
            assert sum(b.stop - b.start for b in blocks) == num_rows
            assert len({b.stop - b.start for b in blocks[:-1]}) <= 1
            assert all(
                (b.stop - b.start) * hidden_size <= max(kernel._MAX_HIDDEN, 64 * hidden_size) for b in blocks
            )


class LargestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation makes."""

    size_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.size_bytes = max(self.size_bytes, tensor.numel() * tensor.element_size())
        return result


class ProductShapes(torch.utils._python_dispatch.TorchDispatchMode):
    """The shapes of all products of matrices of one dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.shapes = dtype, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2][-2:]
        if "mm" in func.__name__ and matrices[-1].dtype == self.dtype:
            self.shapes.add(tuple(tuple(m.shape) for m in matrices))
        return func(*args, **(kwargs or {}))
