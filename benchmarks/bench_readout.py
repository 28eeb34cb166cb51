"""How close do reference log-probs come to the speed of prefill itself, and how far ahead is that of what exists?

    python benchmarks/bench_readout.py                   # all providers, about an hour
    python benchmarks/bench_readout.py --providers ours floor --rounds 9

A Qwen2-type model (hidden 512, 6 layers, vocabulary 151,936), bfloat16, random weights; 32 sequences in groups of G, which
share a prompt of P tokens and have R response tokens each. Only response tokens are scored. Tokens are counted as
B * (P + R), what a prefill without sharing computes. Every round has new ids, so nothing is left in a cache; providers take
turns within a round, and ratios are taken round by round. Peers take part in the first --peer-rounds only.

floor: the same engine with its LM head left out, plus the product of the LM head with the scored rows alone, in the fastest
slicing of those tried. Nothing reads log-probs for less without computing less.

Cost card, per group, in multiply-adds: prefill (P + G R) * 40 M, LM head G R * 78 M. TorchRL's way: G (P + R) of both, and a
Python object per token.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", RL_LOGGING_LEVEL="ERROR")
if not Path("/dev/nvidiactl").exists():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM's rank count, which peers need: 20 s
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as in our engine's process: huge pages for all

import numpy as np
import psutil
import torch
import torchrl
import vllm
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torchrl.modules.llm import vLLMWrapper
from torchrl.modules.llm.policies import Masks, Tokens
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vllm_kl import VLLMScorer
from vllm_kl.demo.task import make_tokenizer
from vllm_kl.engines.base import drive
from vllm_kl.engines.local import start as start_engine
from vllm_kl.types import ScoreRequest

SHAPES = [(256, 128, 8), (1024, 128, 16), (64, 512, 4), (2048, 64, 32)]  # P, R, G
NUM_SEQUENCES = 32
VOCAB, HIDDEN = 151_936, 512
OPTIONS = {"dtype": "bfloat16", "max_model_len": 2304}

Score = Callable[[list[torch.Tensor], int], list[torch.Tensor]]


def build(path: Path) -> None:
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


# Providers: each is made once, and returns the log-probs of the tokens from ``start`` on.


@contextlib.contextmanager
def ours(folder: str):
    with VLLMScorer(folder, **OPTIONS) as scorer:
        yield scorer.score, scorer._engine.pid


@contextlib.contextmanager
def shared_llm(folder: str):
    llm = vllm.LLM(folder, **OPTIONS, enforce_eager=True, max_num_batched_tokens=2048, kv_cache_memory_bytes=512 << 20)
    generate = llm.generate
    llm.generate = lambda *a, **k: generate(*a, **{"use_tqdm": False, **k})
    yield llm


def torchrl_score(wrapper, sequences, start):
    td = lazy_stack(
        [
            TensorDict(tokens=Tokens(full=s), masks=Masks(all_attention_mask=torch.ones_like(s, dtype=bool)))
            for s in sequences
        ]
    )
    return [row[start:] for row in wrapper(td).get(("log_probs", "full"), as_list=True)]


@torch.no_grad()
def transformers_score(model, sequences, start):
    """A padded batch (here all sequences are of one length), in slices whose logits take 1 GiB; response rows only."""
    rows = max(1, (1 << 30) // (VOCAB * 4 * (len(sequences[0]) - start)))
    scored = []
    for i in range(0, len(sequences), rows):
        ids = torch.stack(sequences[i : i + rows])
        kept = ids.shape[1] - start + 1
        logits = model(ids, logits_to_keep=kept, use_cache=False).logits[:, :-1].float()
        scored += list(logits.log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0])
    return scored


class Floor:
    """The same engine without its LM head, and the LM head's product alone."""

    def __init__(self, folder: str) -> None:
        self._driver = start_engine(model=folder, readout="pooling", options=dict(OPTIONS))
        model = self._driver._core.engine_core.model_executor.driver_worker.worker.get_model()
        model.pooler._head = self  # read() below
        self._device = next(model.parameters()).device
        self._weight = torch.randn(VOCAB, HIDDEN).bfloat16().to(self._device)
        self.slicing = min(
            ((rows, columns) for rows in (512, 1024, 2048, 4096) for columns in (1024, 2048, 4096, 8192)),
            key=lambda tiling: min(self._product(4096, *tiling) for _ in range(3)),
        )
        self.seconds: dict[str, list[float]] = {"engine without LM head": [], "LM-head product": []}

    def read(self, hidden_N_H, ids_N_K, *, top_k, temperature):
        return torch.zeros(len(ids_N_K), 1, device=self._device)

    def _product(self, num_rows: int, rows: int, columns: int) -> float:
        hidden = torch.randn(num_rows, HIDDEN).bfloat16().to(self._device)
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=self._device)
        torch.accelerator.synchronize() if self._device.type != "cpu" else None
        began = time.perf_counter()
        for low in range(0, num_rows, rows):
            block = hidden[low : low + rows]
            for first in range(0, VOCAB, columns):
                part = self._weight[first : first + columns]
                torch.mm(block, part.T, out=out.view(-1)[: len(block) * len(part)].view(len(block), len(part)))
        torch.accelerator.synchronize() if self._device.type != "cpu" else None
        return time.perf_counter() - began

    def __call__(self, sequences, start) -> None:
        began = time.perf_counter()
        requests = [ScoreRequest(token_ids=ids.numpy().astype(np.int32), start=start) for ids in sequences]
        drive(self._driver, requests, share_prefix=True)
        engine = time.perf_counter() - began
        self.seconds["engine without LM head"].append(engine)
        self.seconds["LM-head product"].append(self._product(sum(len(s) - start for s in sequences), *self.slicing))


def largest_error(oracle, score: Score, sequences: list[torch.Tensor], start: int) -> float:
    """Return the largest |log-prob - float64| on the same bfloat16 weights; a wrong provider is not worth timing."""
    largest = 0.0
    with torch.no_grad():
        for got, ids in zip(score(sequences, start), sequences, strict=True):
            logits = oracle(ids[None], logits_to_keep=len(ids) - start + 1).logits[0, :-1]
            want = logits.log_softmax(-1).gather(-1, ids[start:, None])[:, 0]
            largest = max(largest, (got.double() - want).abs().max().item())
    assert largest < 0.5, "this provider returns other numbers than the model"
    return largest


def peak_bytes(pid: int) -> int:
    """Return the peak of the resident memory of a process and its children."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    lines = [Path(f"/proc/{p.pid}/status").read_text().split("VmHWM:")[1].split()[0] for p in processes]
    return sum(int(kib) << 10 for kib in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("ours", "floor", "torchrl", "flat", "transformers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--peer-rounds", type=int, default=3, help="rounds of torchrl, flat and transformers; default 3"
    )
    parser.add_argument("--providers", nargs="+", choices=names, default=names)
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=range(len(SHAPES)))
    args = parser.parse_args()
    if min(args.rounds, args.peer_rounds) < 2:
        parser.error("--rounds, --peer-rounds: at least 2, for a median")
    set_list_to_stack(True).set()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        build(Path(folder))
        run(folder, stack, args)


def run(folder: str, stack: contextlib.ExitStack, args: argparse.Namespace) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    providers: dict[str, Score] = {}
    floor = pid = None
    if "ours" in args.providers:
        providers["ours"], pid = stack.enter_context(ours(folder))
    if {"torchrl", "flat"} & {*args.providers}:
        llm = stack.enter_context(shared_llm(folder))
        options = {"tokenizer": make_tokenizer(), "input_mode": "tokens", "generate": False, "pad_output": False}
        if "torchrl" in args.providers:
            providers["torchrl"] = functools.partial(torchrl_score, vLLMWrapper(llm, **options))
        if "flat" in args.providers:
            providers["flat"] = VLLMScorer(llm, readout="flat", share_prefix=False).score
    if "transformers" in args.providers:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        providers["transformers"] = functools.partial(transformers_score, model)
    if "floor" in args.providers:
        floor = Floor(folder)

    console = Console(width=132)
    for n in args.shapes:
        prompt, response, group = SHAPES[n]
        few = make_groups(prompt, response, group, seed=10_000 + n)[:2]
        errors = {name: largest_error(oracle, score, few, prompt) for name, score in providers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in providers}
        if floor:
            floor(make_groups(prompt, response, group, seed=20_000 + n), prompt)  # warm-up
            floor.seconds = {name: [] for name in floor.seconds}
        for round_number in range(args.rounds):
            sequences = make_groups(prompt, response, group, seed=100 * n + round_number)
            for name, score in providers.items():
                if name != "ours" and round_number >= args.peer_rounds:
                    continue
                began = time.perf_counter()
                score(sequences, prompt)
                seconds[name].append(time.perf_counter() - began)
            if floor:
                floor(sequences, prompt)
        if floor:
            seconds["floor"] = [sum(parts) for parts in zip(*floor.seconds.values(), strict=True)]
            seconds |= {f"  {name}": values for name, values in floor.seconds.items()}
        report(console, (prompt, response, group), seconds, errors)
    if pid is not None:
        print(f"peak memory of our engine's process: {peak_bytes(pid) / 2**20:,.0f} MiB")
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    print(
        f"{date.today()}, commit {commit}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"vllm {vllm.__version__}, torch {torch.__version__}, torchrl {torchrl.__version__}; {NUM_SEQUENCES} sequences, "
        f"{args.rounds} rounds, peers {args.peer_rounds}; floor's slicing {floor.slicing if floor else None} (rows, columns)"
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
