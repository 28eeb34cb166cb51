"""Where does the time of a scoring call go: products of matrices, attention, the LM head, or Python?

    python benchmarks/profile_prefill.py --shape 96M --dtype float32 --shapes 256,128,8 64,512,4

An engine with random weights runs in this process under PyTorch's profiler, as the floor of ``vllm-kl bench``
runs one. Each operation counts for the innermost of these parts that it runs in. What is left of a part is
Python:

    scheduler      vLLM's schedule() and update_from_output()
    model          the forward pass of the layers
    LM head        the read-out: products, the pass over the logits, the results
    the rest       vLLM's preparation of a step, the engine, and ours

A bound is what the machine's own speeds make of a share's work, measured in the same process: of products
and attention, their operations at the speed of the fastest of several large products, in the model's data
type or in float32; of the pass over the logits, which stands as Python of the LM head because it is no
operation of PyTorch, reading them, and in 16 bits filling them, at the speed of a copy in memory, which a
cache may beat.
With AMX there is no such pass: the loop that multiplies sums, too, and may be faster than PyTorch's
product. The products of the layers are those of the tokens that the engine computed: it shares whole blocks
only. A share that is above its bound by a factor is what a faster engine could gain.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig

from vllm_kl.bench.cost import attended
from vllm_kl.bench.limits import Limits, machine_limits
from vllm_kl.bench.models import save_random
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table
from vllm_kl.bench.traffic import Traffic, from_shape, usable_ids
from vllm_kl.engines.base import drive
from vllm_kl.engines.start_engine import start
from vllm_kl.environment import on_a_gpu, quiet_bench
from vllm_kl.plugin import cpu_products, kernel
from vllm_kl.types import ScoreRequest

SHAPES = ("256,128,8", "1024,128,16", "64,512,4", "2048,64,32")  # of the tables of vllm-kl bench
PARTS = ("scheduler", "model", "LM head")
# Parts of the names of operations, by kind. The first that fits counts.
KINDS = {
    "attention": ("attention", "reshape_and_cache", "flash_attn", "scaled_dot"),
    "products": ("mm", "linear", "matmul", "gemm", "product_sums"),
    "norms, rotary, activation": ("rms_norm", "rotary", "silu", "layer_norm"),
}


@contextmanager
def named(owner: Any, method: str, part: str) -> Iterator[None]:
    """Name the part in which a method of an object runs."""
    original = getattr(owner, method)

    def within(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return original(*args, **kwargs)

    setattr(owner, method, within)
    try:
        yield
    finally:
        setattr(owner, method, original)


def kind_of(name: str) -> str:
    """Return the kind of an operation by its name."""
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def seconds_by_part(events: Any) -> dict[tuple[str, str], float]:
    """Return the seconds of each part and kind of operation."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        above = event
        while above is not None and above.name not in PARTS:
            above = above.cpu_parent
        part = "the rest" if above is None else above.name
        kind = "Python" if event.name in PARTS else kind_of(event.name)
        seconds[part, kind] += event.self_cpu_time_total / 1e6
    return seconds


class Sizes(NamedTuple):
    """What the work of a call depends on, beside its tokens."""

    body: int  # weights that a token is multiplied with below the LM head
    vocab: int
    hidden: int
    layers: int
    width: int  # of attention: heads times their size
    logit_bytes: int  # that the pass reads of a logit, and in 16 bits writes; 0: there is no tile


def sizes_of(folder: Path, dtype: torch.dtype) -> Sizes:
    """Return the sizes of a saved model that is scored in a data type."""
    config = AutoConfig.from_pretrained(folder)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    is_fused = cpu_products.AmxProducts.takes(dtype, config.hidden_size)
    tile = kernel.product_dtype(dtype)
    logit_bytes = 0 if is_fused else tile.itemsize * (1 if tile == torch.float32 else 2)
    body = weights_of_layers(folder)
    return Sizes(body, config.vocab_size, config.hidden_size, config.num_hidden_layers, width, logit_bytes)


def bounds_of(
    traffic: Traffic, num_computed: int, sizes: Sizes, limits: Limits
) -> dict[tuple[str, str], float]:
    """Return the least seconds of parts and kinds, where the engine computes as many tokens."""
    pairs = attended(traffic, share_prefix=True)
    num_logits = sizes.vocab * traffic.scored_tokens
    bounds = {
        ("model", "products"): 2 * sizes.body * num_computed / limits.flop_per_s,
        ("model", "attention"): 4 * sizes.layers * sizes.width * pairs / limits.flop_per_s,
        ("LM head", "products"): 2 * sizes.hidden * num_logits / limits.flop_per_s,
    }
    if sizes.logit_bytes:
        bounds["LM head", "Python"] = sizes.logit_bytes * num_logits / limits.bytes_per_s
    return bounds


def run(driver: Any, traffic: Traffic, vocab_size: int, seed: int) -> tuple[float, int]:
    """Score one call; return the seconds, and the tokens that the engine computed."""
    sequences, starts = traffic.draw(usable_ids(vocab_size, ()), seed)
    requests = [
        ScoreRequest(token_ids=ids.astype(np.int32), start=start)
        for ids, start in zip(sequences, starts, strict=True)
    ]
    began = time.perf_counter()
    results = drive(driver, requests, share_prefix=True)
    seconds = time.perf_counter() - began
    return seconds, traffic.fed_tokens - sum(result.num_cached_tokens for result in results)


def profiled(
    driver: Any, traffic: Traffic, vocab_size: int
) -> tuple[dict[tuple[str, str], float], float, int]:
    """Return the seconds of each part and kind, those of the whole call, and the tokens that it computed."""
    core = driver._core.engine_core
    model = core.model_executor.driver_worker.worker.get_model()
    with (
        named(core.scheduler, "schedule", "scheduler"),
        named(core.scheduler, "update_from_output", "scheduler"),
        named(model.model, "forward", "model"),
        named(model.pooler, "forward", "LM head"),
        named(cpu_products, "product_sums", "product_sums"),
        profile(activities=[ProfilerActivity.CPU]) as found,
    ):
        whole, num_computed = run(driver, traffic, vocab_size, seed=1)
    seconds = seconds_by_part(found.events())
    seconds["the rest", "Python"] += whole - sum(seconds.values())
    return seconds, whole, num_computed


def weights_of_layers(folder: Path) -> int:
    """Return how many weights a token is multiplied with below the LM head.

    They are read from the checkpoint: vLLM packs them on a CPU, and then they have no shape.
    """
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        matrices = (shape for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name)
        total += sum(rows * columns for rows, columns in matrices)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="96M", help="of the model, as vllm-kl bench takes it")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="P,R,G")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_markdown_option(parser)
    args = parser.parse_args()
    if on_a_gpu():
        parser.error("this profile counts operations on a CPU: on a GPU, use vLLM's own profiler")
    report = Report(args.markdown)
    traffics = [from_shape(shape, args.sequences) for shape in args.shapes]
    longest = max(one.longest for one in traffics)
    with tempfile.TemporaryDirectory() as home:
        save_random(args.shape, Path(home), max_tokens=longest)
        sizes = sizes_of(Path(home), getattr(torch, args.dtype))
        options = {"max_model_len": longest, "dtype": args.dtype}
        driver: Any = start(model=home, readout="pooling", options=options)
        limits = machine_limits(getattr(torch, args.dtype), "cpu")
        for traffic in traffics:
            measure(driver, traffic, sizes, limits, report)
    speeds = f"{limits.flop_per_s / 1e9:,.0f} GFLOP/s, a copy {limits.bytes_per_s / 1e9:,.1f} GB/s"
    report.line(machine_line(f"{args.shape}, {args.dtype}; a product {speeds}"))


def measure(driver: Any, traffic: Traffic, sizes: Sizes, limits: Limits, report: Report) -> None:
    """Profile a call of one shape, and print its table."""
    vocab_size = driver.info.vocab_size
    run(driver, traffic, vocab_size, seed=0)  # warm up
    plain, _ = run(driver, traffic, vocab_size, seed=2)
    seconds, whole, num_computed = profiled(driver, traffic, vocab_size)
    bounds = bounds_of(traffic, num_computed, sizes, limits)
    title = f"P,R,G = {traffic.name}: {whole:.2f} s, without the profiler {plain:.2f} s"
    table = make_table(title, "part", "what", "s", "share", "times its bound", left=("what",))
    for (part, kind), taken in sorted(seconds.items(), key=lambda item: -item[1]):
        if taken < 0.001 * whole:
            continue
        bound = bounds.get((part, kind))
        over = "" if bound is None else f"{taken / bound:.2f}"
        table.add_row(part, kind, f"{taken:.3f}", f"{taken / whole:.1%}", over)
    report.table(table)
    report.line(
        f"The engine computed {num_computed:,} tokens; at least {traffic.computed_tokens:,} were needed: it "
        "shares whole blocks only."
    )


if __name__ == "__main__":
    found = dict(os.environ)
    quiet_bench()
    if found != dict(os.environ):  # libraries read theirs when they are imported, glibc when a process starts
        os.execv(sys.executable, sys.orig_argv)
    main()
