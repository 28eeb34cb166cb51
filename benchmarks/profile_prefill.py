"""Where does the time of a scoring call go: products of matrices, attention, the LM head, or Python?

    python benchmarks/profile_prefill.py --shape 96M --dtype float32 --shapes 256,128,8 64,512,4

An engine with random weights runs in this process under PyTorch's profiler, as the floor of ``vllm-kl bench``
runs one. Each operation counts for the innermost of these parts that it runs in. What is left of a part is
Python:

    scheduler      vLLM's schedule() and update_from_output()
    model          the forward pass of the layers
    LM head        the read-out: products, the pass over the logits, the results
    the rest       vLLM's preparation of a step, the engine, and ours

The bound is that of the products alone: their operations at the speed of one large square product, in the
model's data type or in float32, whichever is faster, measured in the same process. A share that is above its
bound by a factor is what a faster engine could gain.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# As quiet_bench() sets them.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import numpy as np
import torch
from safetensors import safe_open
from torch.profiler import ProfilerActivity, profile, record_function

from vllm_kl.bench.limits import machine_limits
from vllm_kl.bench.models import save_random
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table
from vllm_kl.bench.traffic import Traffic, from_shape, usable_ids
from vllm_kl.engines.base import drive
from vllm_kl.engines.start_engine import start
from vllm_kl.environment import on_a_gpu
from vllm_kl.types import ScoreRequest

PARTS = ("scheduler", "model", "LM head")
# Parts of the names of operations, by kind. The first that fits counts.
KINDS = {
    "attention": ("attention", "reshape_and_cache", "flash_attn", "scaled_dot"),
    "products": ("mm", "linear", "matmul", "gemm"),
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


def run(driver: Any, traffic: Traffic, vocab_size: int, seed: int) -> float:
    """Score one call; return the seconds."""
    sequences, starts = traffic.draw(usable_ids(vocab_size, ()), seed)
    requests = [
        ScoreRequest(token_ids=ids.astype(np.int32), start=start)
        for ids, start in zip(sequences, starts, strict=True)
    ]
    began = time.perf_counter()
    drive(driver, requests, share_prefix=True)
    return time.perf_counter() - began


def profiled(driver: Any, traffic: Traffic, vocab_size: int) -> tuple[dict[tuple[str, str], float], float]:
    """Return the seconds of each part and kind, and of the whole call under the profiler."""
    core = driver._core.engine_core
    model = core.model_executor.driver_worker.worker.get_model()
    with (
        named(core.scheduler, "schedule", "scheduler"),
        named(core.scheduler, "update_from_output", "scheduler"),
        named(model.model, "forward", "model"),
        named(model.pooler, "forward", "LM head"),
        profile(activities=[ProfilerActivity.CPU]) as found,
    ):
        whole = run(driver, traffic, vocab_size, seed=1)
    seconds = seconds_by_part(found.events())
    seconds["the rest", "Python"] += whole - sum(seconds.values())
    return seconds, whole


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
    parser.add_argument("--shapes", nargs="+", default=["256,128,8", "64,512,4"], metavar="P,R,G")
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
        body = weights_of_layers(Path(home))
        options = {"max_model_len": longest, "dtype": args.dtype}
        driver: Any = start(model=home, readout="pooling", options=options)
        speed = machine_limits(getattr(torch, args.dtype), "cpu").flop_per_s
        for traffic in traffics:
            measure(driver, traffic, body, speed, report)
    report.line(machine_line(f"{args.shape}, {args.dtype}; a square product {speed / 1e9:,.0f} GFLOP/s"))


def measure(driver: Any, traffic: Traffic, body: int, speed: float, report: Report) -> None:
    """Profile a call of one shape, and print its table."""
    vocab_size = driver.info.vocab_size
    lm_head = driver._core.engine_core.model_executor.driver_worker.worker.get_model().pooler._head
    run(driver, traffic, vocab_size, seed=0)  # warm up
    plain = run(driver, traffic, vocab_size, seed=2)
    seconds, whole = profiled(driver, traffic, vocab_size)
    head = lm_head.lm_head.weight[: lm_head.num_tokens].numel()
    bounds = {
        ("model", "products"): 2 * body * traffic.computed_tokens / speed,
        ("LM head", "products"): 2 * head * traffic.scored_tokens / speed,
    }
    title = f"P,R,G = {traffic.name}: {whole:.2f} s, without the profiler {plain:.2f} s"
    table = make_table(title, "part", "what", "s", "share", "times its bound", left=("what",))
    for (part, kind), taken in sorted(seconds.items(), key=lambda item: -item[1]):
        if taken < 0.001 * whole:
            continue
        bound = bounds.get((part, kind))
        over = "" if bound is None else f"{taken / bound:.2f}"
        table.add_row(part, kind, f"{taken:.3f}", f"{taken / whole:.1%}", over)
    report.table(table)


if __name__ == "__main__":
    main()
