"""What scoring computes and how often our Python runs, in counts: slower code changes a count on any machine.

Of the compiled loops, ratios within a run. Speeds are measured in benchmarks/. The transform's counts are in
tests/transforms/test_cost.py.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import vllm_kl
from tests import tiny
from tests.instant_engine import InstantEngine
from vllm_kl import VLLMScorer
from vllm_kl.bench.models import save_random
from vllm_kl.bench.traffic import from_shape
from vllm_kl.engines.base import drive
from vllm_kl.environment import on_a_gpu
from vllm_kl.plugin import cpu_loops, cpu_products, kernel
from vllm_kl.types import ScoreRequest

PACKAGE = str(Path(vllm_kl.__file__).parent) + os.sep
SHAPES = ("256,64,8", "250,33,4", "64,128,2")


def our_calls(work):
    """Return how often functions of the package were called, by name."""
    counts = Counter()

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            counts[frame.f_code.co_qualname] += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counts


def calls_of_one_more(work):
    """Return the calls for one sequence more, of ``work(num_sequences)``."""
    work(8)  # what the first call makes
    few, many = our_calls(lambda: work(16)), our_calls(lambda: work(64))
    return (many.total() - few.total()) / 48, (many - few).most_common(12)


def counted_in_an_engine(model):
    """Return the calls of a request more; and for each shape the computed tokens and what was scored again.

    The engine is in this process, so that the calls of its parts can be counted. The process is a child,
    because an engine that ends takes the process groups of vLLM's other engines with it.
    """
    from vllm_kl.engines.start_engine import start

    options = {**tiny.ENGINE_OPTIONS, "max_model_len": 512}
    driver = start(model=model, readout="pooling", options=options)
    rng = np.random.default_rng(0)

    def work(num_sequences):
        ids = rng.integers(2, 200, (num_sequences, 32)).astype(np.int32)
        drive(driver, [ScoreRequest(token_ids=row, start=16) for row in ids], share_prefix=True)

    calls, shapes = calls_of_one_more(work), {}
    for shape in SHAPES:
        traffic = from_shape(shape, 16)
        requests = [
            ScoreRequest(token_ids=ids.astype(np.int32), start=start)
            for ids, start in zip(*traffic.draw(np.arange(2, 200), 0), strict=True)
        ]
        results = drive(driver, requests, share_prefix=True)
        computed = traffic.fed_tokens - sum(result.num_cached_tokens for result in results)
        shapes[shape] = computed, sum(result.rescored for result in results)
    return calls, shapes


@pytest.fixture(scope="module")
def counted(tied_paths):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(counted_in_an_engine, (str(tied_paths[0]),)).get(timeout=200)


def test_a_request_more_costs_the_engine_few_calls(counted):
    (calls, most), _ = counted
    assert calls <= 15, most


@pytest.mark.compat
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_is_computed_once_but_for_a_part_of_a_block(counted, shape):
    computed, num_rescored = counted[1][shape]
    traffic, block = from_shape(shape, 16), tiny.ENGINE_OPTIONS["block_size"]
    siblings = traffic.num_sequences - len(traffic.groups)
    # The row before the first scored token is computed; whole blocks before it are shared.
    again = (traffic.groups[0][0] - 1) % block + 1
    assert computed == traffic.computed_tokens + siblings * (again - 1)
    assert num_rescored == 0


def test_a_sequence_more_costs_the_scorer_few_calls():
    scorer = VLLMScorer(InstantEngine(), canary=False)
    calls, most = calls_of_one_more(lambda n: scorer.score([[1, 2, 3, i % 200] for i in range(n)], 2))
    assert calls <= 10, most


def faults_of(scorer):
    """Return how often the engine's process has got a page of memory from the system."""
    return int(Path(f"/proc/{scorer._engine.pid}/stat").read_text().rpartition(")")[2].split()[7])


@pytest.mark.skipif(on_a_gpu(), reason="an engine on a GPU keeps no memory of the CPU")
def test_a_call_works_in_the_memory_that_earlier_calls_have_used(ref_scorer):
    """Pages from the system took a quarter of a call on a CPU."""
    ids = np.random.default_rng(0).integers(2, 200, (64, 300))
    counts = []
    for _ in range(8):
        before = faults_of(ref_scorer)
        ref_scorer.score(ids, 8)
        counts.append(faults_of(ref_scorer) - before)
    # 50,000 where nothing is kept, some 1,500 by glibc's own choice.
    assert statistics.median(counts[-4:]) < 500, counts


@pytest.mark.skipif(on_a_gpu(), reason="an engine on a GPU keeps no memory of the CPU")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_the_memory_of_old_weights_is_given_back(tmp_path, workers):
    save_random("128,1,100000", tmp_path, max_tokens=64)  # 51 MB; two heads for two workers
    weights = load_file(tmp_path / "model.safetensors")
    options = {**tiny.ENGINE_OPTIONS, "max_model_len": 64, "tensor_parallel_size": workers}
    with VLLMScorer(str(tmp_path), **options) as scorer:
        engine = psutil.Process(scorer._engine.pid)

        def used():
            return sum(one.memory_info().rss for one in (engine, *engine.children(recursive=True)))

        before = used()
        for _ in range(3):
            scorer.refresh(weights)
        assert (used() - before) >> 20 < 100  # MiB; 250 where it is kept


class Operations(TorchDispatchMode):
    """Counts what torch is asked for, and the operations of the products of matrices."""

    def __init__(self):
        super().__init__()
        self.num_asked, self.flop = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_asked += 1
        if "mm" in func.__name__:
            a, b = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 2][-2:]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def operations_of(num_rows, vocab_size, dtype, with_entropy):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, 64, generator=generator).to(dtype)
    weight = torch.randn(vocab_size, 64, generator=generator).mul(0.2).to(dtype)
    tokens = torch.randint(vocab_size, (num_rows,), generator=generator)
    entropy = torch.empty(num_rows, dtype=torch.float64) if with_entropy else None
    with Operations() as counted:
        kernel.log_normalizer(hidden, weight, left_out_N=tokens, entropy_N=entropy)
    return counted


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_widened", [False, True])
def test_the_kernel_multiplies_each_row_with_each_token_once(monkeypatch, dtype, is_widened, with_entropy):
    monkeypatch.setattr(kernel, "product_dtype", lambda own: torch.float32 if is_widened else own)
    monkeypatch.setattr(cpu_loops, "_amx_library", lambda: (None, ""))
    for num_rows in (512, 1000):
        counted = operations_of(num_rows, 32_768, dtype, with_entropy)
        assert 1 <= counted.flop / (2 * num_rows * 32_768 * 64) <= 1.03


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler: install g++")
@pytest.mark.parametrize(
    ("dtype", "with_entropy", "most"),
    [
        (torch.float32, False, 280),
        (torch.float32, True, 305),
        (torch.bfloat16, False, 400),
        (torch.bfloat16, True, 425),
    ],
)
def test_more_vocabulary_costs_few_operations(monkeypatch, dtype, with_entropy, most):
    """24 slices of 1,024 tokens, of 11 to 17 operations each; narrower slices would be more.

    Of bfloat16 that is widened: half of its operations find the slice and copy it.
    """
    monkeypatch.setattr(kernel, "product_dtype", lambda _: torch.float32)
    few, many = (operations_of(512, vocab, dtype, with_entropy).num_asked for vocab in (8_192, 32_768))
    assert 100 < many - few <= most


@pytest.mark.parametrize("num_rows", [1, 512, 1000])
def test_amx_multiplies_each_token_once(monkeypatch, num_rows):
    seen = []

    def sums(pairs, weight, scale2, shift, left_out, masses, best, first_id, moments):
        seen.append((first_id, len(weight)))
        assert num_rows <= len(pairs) < num_rows + 32
        masses.fill_(1e-9)

    monkeypatch.setattr(kernel, "product_dtype", lambda own: own)
    monkeypatch.setattr(cpu_products, "amx_works", lambda dtype, hidden_size: True)
    monkeypatch.setattr(cpu_products, "product_sums", sums)
    counted = operations_of(num_rows, 32_768, torch.bfloat16, False)
    assert counted.flop == 2 * num_rows * 64 * 64  # the first columns, which give the shift
    ends = [64, *(first + number for first, number in seen)]
    assert [first for first, _ in seen] == ends[:-1]
    assert ends[-1] == 32_768
    assert len(seen) <= 8


def test_the_loops_are_compiled_with_optimisation_and_the_instructions_of_the_cpu(monkeypatch, tmp_path):
    compiled = []

    def run(command, **_):
        compiled.append(command)
        Path(command[-1]).touch()

    envs = SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path))
    monkeypatch.setattr(cpu_loops, "vllm", SimpleNamespace(envs=envs))
    monkeypatch.setattr(cpu_loops.subprocess, "run", run)
    for capability, flag in {"AVX2": "-mavx2", "AVX512": "-mavx512f", "DEFAULT": "-O3"}.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda own=capability: own)
        cpu_loops._library.__wrapped__()
        assert {"-O3", "-fopenmp", flag} <= set(compiled[-1])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr(cpu_loops, "_multiplies_bfloat16_tiles", lambda: True)
    monkeypatch.setattr(cpu_loops, "_library", lambda: (object(), ""))
    assert "knows AMX" in cpu_loops._amx_library.__wrapped__()[1]  # an empty file is no library
    assert {"-O3", "-fopenmp", "-mavx512f", "-mamx-bf16"} <= set(compiled[-1])
    assert len(compiled) == 4  # a library for each


def ratio_of_seconds(one, other, rounds=15):
    """Return the median of the ratios of rounds in which two calls take turns: another program slows both."""

    def seconds(call):
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    one(), other()
    return statistics.median(seconds(one) / seconds(other) for _ in range(rounds))


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler: install g++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_moments", [False, True])
def test_the_compiled_pass_over_a_tile_is_faster_than_pytorchs_operations(dtype, with_moments):
    tile, shift, masses = torch.zeros(1024, 2048, dtype=dtype), torch.ones(1024), torch.empty(1024)
    moments = torch.empty(1024) if with_moments else None
    compiled, by_pytorch = cpu_loops.passes(dtype), cpu_loops.passes(torch.float16)
    assert compiled is not by_pytorch
    name, scale = ("over_products", (1.0,)) if dtype == torch.float32 else ("over_shifted", ())
    call = (tile, *scale, shift, masses, None, 0, moments)
    # Measured with AVX-512: 0.30 in float32, 0.20 in bfloat16, half of that with moments.
    ratio = ratio_of_seconds(lambda: getattr(compiled, name)(*call), lambda: getattr(by_pytorch, name)(*call))
    assert ratio < 0.5


# Not needs_amx of tests/amx.py, which also skips where amx.cpp does not compile.
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="no AMX")
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler: install g++")
def test_amx_multiplies_and_sums_faster_than_pytorch_multiplies():
    assert cpu_loops.amx_works(torch.bfloat16, 512)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1024, 512, generator=generator).bfloat16()
    weight = torch.randn(16_384, 512, generator=generator).bfloat16()
    pairs = cpu_loops.in_pairs(hidden, torch.empty_like(hidden))
    shift, masses, product = torch.zeros(1024), torch.empty(1024), torch.empty(1024, 16_384).bfloat16()
    nothing = torch.full((1024,), -1)
    ratio = ratio_of_seconds(
        lambda: cpu_loops.product_sums(pairs, weight, 0.01, shift, nothing, masses, None, 0),
        lambda: torch.mm(hidden, weight.T, out=product),
    )
    assert ratio < 1  # measured: 0.6
