"""Compares the speed of the reference's scoring with that of prefill and of other ways to score.

    python benchmarks/bench_readout.py                   # all providers, about an hour on two cores
    python benchmarks/bench_readout.py --providers ours floor --rounds 9
    python benchmarks/bench_readout.py --model 7B --shapes 1024x1024x16 4096x512x8      # on a GPU

The model is a bfloat16 Qwen2 with random weights (96M: hidden 512, 6 layers, vocabulary 151,936). Sequences
come in groups of G, which share a prompt of P tokens and have R response tokens each (a shape is PxRxG). Only
response tokens are scored. Every round has new ids, so that no cache helps. Providers take turns within a
round, and ratios are computed round by round. Peers take part only in the first --peer-rounds. On a GPU,
which holds one model at a time, providers run one after another.

The tables count tokens in two ways: "fed" are B * (P + R) tokens, as a prefill without sharing computes;
"computed" counts the prompt once per group. TFLOP/s are two operations per parameter and computed token.
Divided by the GPU's peak, this is the model FLOP utilisation (MFU).

floor: the same engine without its LM head, plus the product of the LM head with the scored rows, in the
fastest of the tried ways. A way that computes the same cannot be faster. trl: transformers with TRL's fused
LM head, if TRL is installed.

Every provider runs in its own process. Memory is the peak of this process (of "ours": of the engine's
process), and the GPU memory in use above the use before. A provider that fails is left out, and the exit
status is 1.

Expected cost of 96M per group, in multiply-adds: prefill (P + G R) * 18 M and attention, LM head G R * 78 M.
TorchRL's way: G (P + R) tokens for both, and a Python object per token.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# The packages that the providers import read these variables.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", RL_LOGGING_LEVEL="ERROR")
if not Path("/dev/nvidiactl").exists():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM's rank count, which peers need: 20 s
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # huge pages for all providers, as in our engine's process

import numpy as np
import torch

from vllm_kl.bench import models
from vllm_kl.bench.report import Report, machine_line, make_table, median_ratio, on_a_gpu, p20_p50_p80

SHAPES = ["256x128x8", "1024x128x16", "64x512x4", "2048x64x32"]
MODELS = {"tiny": models.tiny, "96M": models.size_96m, "0.5B": models.qwen25_05b, "7B": models.qwen25_7b}
DEVICE = "cuda" if on_a_gpu() else "cpu"

Shape = tuple[int, int, int]  # P, R, G
Sequences = list[torch.Tensor]
Score = Callable[[Sequences, int], list[torch.Tensor]]


def build(path: Path, name: str) -> tuple[int, int]:
    """Save a model and a tokenizer; return the number of parameters and the size of the vocabulary."""
    from vllm_kl.demo.task import make_tokenizer

    with torch.device(DEVICE):  # a large model takes minutes on a CPU
        model = MODELS[name](max_position_embeddings=8192, initializer_range=0.06).bfloat16()
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    sizes = model.num_parameters(), model.config.vocab_size
    del model
    torch.cuda.empty_cache()
    return sizes


def make_groups(shape: Shape, num_sequences: int, vocab: int, seed: int) -> Sequences:
    """Return random ids without the pad id, which TorchRL would drop."""
    prompt, response, group = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(300, vocab, (n,), generator=generator)  # noqa: E731
    prompts = [draw(prompt) for _ in range(num_sequences // group)]
    return [torch.cat([p, draw(response)]) for p in prompts for _ in range(group)]


# Each provider is a generator. It yields a function that returns the log-probs of the tokens from ``start``
# on, and the id of the process whose memory counts.


def ours(folder: str, options: dict[str, Any]) -> Iterator[tuple[Score, int]]:
    from vllm_kl import VLLMScorer

    with VLLMScorer(folder, **options) as scorer:
        yield scorer.score, scorer._engine.pid


def _shared_llm(folder: str, options: dict[str, Any]) -> Any:
    import vllm

    settings: dict[str, Any] = {"enforce_eager": True, "max_num_batched_tokens": 2048}
    if DEVICE == "cpu":
        settings["kv_cache_memory_bytes"] = 512 << 20
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


def shared(folder: str, options: dict[str, Any]) -> Iterator[tuple[Score, int]]:
    """vLLM's prompt log-probs, with common prefixes computed once."""
    from vllm_kl import VLLMScorer

    yield VLLMScorer(_shared_llm(folder, options), readout="flat").score, os.getpid()


def _hf_model(folder: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()


def oracle(folder: str, options: dict[str, Any]) -> Iterator[tuple[Score, int]]:
    """The same weights in float64, or in float32 if the GPU cannot hold float64."""
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))  # in 16 bits
    is_large = DEVICE == "cuda" and 5 * size > torch.cuda.mem_get_info()[0]
    model = _hf_model(folder, torch.float32 if is_large else torch.float64)

    @torch.no_grad()
    def score(sequences: Sequences, start: int) -> list[torch.Tensor]:
        scored = []
        for ids in (ids.to(DEVICE) for ids in sequences):
            logits = model(ids[None], logits_to_keep=len(ids) - start + 1, use_cache=False).logits[0, :-1]
            scored.append(logits.log_softmax(-1).gather(-1, ids[start:, None])[:, 0].cpu())
        return scored

    yield score, os.getpid()


def _padded(
    folder: str, options: dict[str, Any], read: Callable[..., torch.Tensor]
) -> Iterator[tuple[Score, int]]:
    """Score response rows with transformers, in slices of the batch whose logits take 1 GiB."""
    model = _hf_model(folder, options["dtype"])

    @torch.no_grad()
    def score(sequences: Sequences, start: int) -> list[torch.Tensor]:
        rows = max(1, (1 << 30) // (model.config.vocab_size * 4 * (len(sequences[0]) - start)))
        scored: list[torch.Tensor] = []
        for i in range(0, len(sequences), rows):
            scored += read(model, torch.stack(sequences[i : i + rows]).to(DEVICE), start).cpu()
        return scored

    yield score, os.getpid()


def transformers(folder: str, options: dict[str, Any]) -> Iterator[tuple[Score, int]]:
    def read(model: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
        logits = model(ids, logits_to_keep=ids.shape[1] - start + 1, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0]

    yield from _padded(folder, options, read)


def trl(folder: str, options: dict[str, Any]) -> Iterator[tuple[Score, int]]:
    """TRL 1.16's fused head, called as TRL's trainers call it."""
    from trl.kernels import ChunkedLogProbFunction

    def read(model: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, start - 1 : -1]
        targets = ids[:, start:]
        fused = ChunkedLogProbFunction.apply(
            *(hidden.flatten(0, 1), model.lm_head.weight, None, targets.flatten(), 1.0, 32_768, None, 1.0, ())
        )
        return fused[0].view(targets.shape)

    yield from _padded(folder, options, read)


ENGINE, PRODUCT = "  engine without LM head", "  LM-head product"


def floor(
    folder: str, options: dict[str, Any]
) -> Iterator[tuple[Callable[[Sequences, int], dict[str, float]], int]]:
    """The engine without its LM head, and the LM head's product; the function returns the seconds of both."""
    from vllm_kl.engines.base import drive
    from vllm_kl.engines.start_engine import start as start_engine
    from vllm_kl.types import ScoreRequest

    driver = start_engine(model=folder, readout="pooling", options=dict(options))
    model = driver._core.engine_core.model_executor.driver_worker.worker.get_model()
    head = model.pooler._head
    weight = head.lm_head.weight[: head.num_tokens]
    vocab_size, hidden_size = weight.shape

    class NoHead:
        def read(self, hidden_N_H, ids_N_K, *, top_k, temperature, entropy=False):
            return torch.zeros(len(ids_N_K), 1, device=weight.device)

    def product(num_rows: int, dtype: torch.dtype, rows: int, columns: int, vocab: int = vocab_size) -> float:
        hidden = torch.randn(num_rows, hidden_size, device=weight.device).to(weight.dtype)
        out = torch.empty(rows * columns, dtype=dtype, device=weight.device)
        widened = (
            torch.empty(columns, hidden_size, dtype=dtype, device=weight.device)
            if dtype != weight.dtype
            else None
        )
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
    few = min(vocab_size, 16_384)
    # A CPU without 16-bit products is faster if it widens the matrix to float32 slice by slice.
    dtype = min(
        (weight.dtype, torch.float32),
        key=lambda d: min(product(512, d, 512, 2048, vocab=few) for _ in range(3)),
    )
    tiles = [(rows, columns) for rows in (512, 1024, 2048, 4096) for columns in (512, 1024, 2048, 4096)]
    ways = [(dtype, *tile) for tile in tiles]
    best = min(ways, key=lambda way: min(product(4096, *way, vocab=few) for _ in range(3)))
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


PROVIDERS = {f.__name__: f for f in (ours, torchrl, flat, shared, transformers, trl, floor)}
PEERS = ("torchrl", "flat", "shared", "transformers", "trl")


class Provider:
    """Runs a provider in its own process.

    Raises:
        RuntimeError: the provider failed when it started or in a call; the message holds the provider's
            error.
    """

    def __init__(self, name: str, folder: str, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, folder, options))
        self._process.start()
        theirs.close()
        self._answer()

    def __call__(self, sequences: Sequences, start: int) -> tuple[float, Any]:
        """Return the seconds and the result of one call."""
        self._connection.send((sequences, start))
        return self._answer()

    def end(self) -> tuple[int, int]:
        """End the process; return its peak memory and its peak GPU memory, in bytes."""
        self._connection.send(None)
        peaks = self._answer()
        self._process.join()
        return peaks

    def _answer(self) -> Any:
        try:
            is_error, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            is_error, answer = True, f"its process ended with exit status {self._process.exitcode}"
        if is_error:
            raise RuntimeError(answer)
        return answer


def serve(connection: Connection, name: str, folder: str, options: dict[str, Any]) -> None:
    make = oracle if name == "oracle" else PROVIDERS[name]
    try:
        with GpuPeak() as gpu, contextlib.contextmanager(make)(folder, options) as (score, pid):
            connection.send((False, None))
            while (call := connection.recv()) is not None:
                began = time.perf_counter()
                result = score(*call)
                connection.send((False, (time.perf_counter() - began, result)))
            connection.send((False, (peak_bytes(pid), gpu.size_bytes)))
    except Exception as error:
        traceback.print_exc()
        connection.send((True, f"{type(error).__name__}: {error}"))


def peak_bytes(pid: int) -> int:
    """Return the peak resident memory of a process, in bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) << 10


class GpuPeak:
    """Measures the peak of the GPU memory in use above the use before, every 10 ms; 0 without a GPU."""

    def __init__(self) -> None:
        self.size_bytes, self._ended = 0, threading.Event()

    def __enter__(self) -> GpuPeak:
        if DEVICE == "cuda":
            used = gpu_memory()
            threading.Thread(target=self._watch, args=(used, used()), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def _watch(self, used: Callable[[], int], before: int) -> None:
        while not self._ended.wait(0.01):
            self.size_bytes = max(self.size_bytes, used() - before)


def gpu_memory() -> Callable[[], int]:
    """Return a function that reads the used bytes of the first GPU by NVML, which uses none itself."""
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    handle = (
        pynvml.nvmlDeviceGetHandleByIndex(int(first))
        if first.isdigit()
        else pynvml.nvmlDeviceGetHandleByUUID(first)
    )
    return lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used


def largest_error(scored: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """Return the largest |log-prob - truth|; raise if the mean is 0.3 or more.

    Rounding to 16 bits gives a mean of 0.12 nats with 24 layers of random weights; wrong rows give nats.
    """
    differences = torch.cat([(got.double() - want).abs() for got, want in zip(scored, truth, strict=True)])
    mean = differences.mean().item()
    if not mean < 0.3:
        raise RuntimeError(
            f"log-probs differ from the model's by {mean:.2g} nats on average, expected less than 0.3"
        )
    return differences.max().item()


class Bench:
    """Runs providers on shapes, and holds the results."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.num_parameters, self.vocab_size = build(Path(folder), args.model)
        self.options = {"dtype": args.dtype, "max_model_len": max(256, *(p + r for p, r, _ in args.shapes))}
        self.seconds: dict[Shape, dict[str, list[float]]] = {shape: {} for shape in args.shapes}
        self.errors: dict[Shape, dict[str, float]] = {shape: {} for shape in args.shapes}
        self.peaks: dict[str, tuple[int, int]] = {}
        self.failures: dict[str, str] = {}
        self._running: dict[str, Provider] = {}

    def sequences(self, shape: Shape, seed: int) -> Sequences:
        return make_groups(shape, self.args.sequences, self.vocab_size, seed)

    def few(self, shape: Shape) -> Sequences:
        return self.sequences(shape, 10_000)[:2]

    def run(self) -> None:
        truth_of = Provider("oracle", self.folder, self.options)
        truth = {shape: truth_of(self.few(shape), shape[0])[1] for shape in self.args.shapes}
        truth_of.end()
        # The floor first, because it searches for its fastest way and needs an idle machine.
        names = sorted(self.args.providers, key=lambda name: name != "floor")
        for together in [[name] for name in names] if DEVICE == "cuda" else [names]:
            for name in together:
                self._attempt(name, functools.partial(self._start, name))
            for shape in self.args.shapes:
                self._measure(shape, truth[shape])
            for name in list(self._running):
                self._attempt(name, functools.partial(self._end, name))

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        """Do some work of a provider; after a failure, leave the provider out."""
        try:
            work()
        except RuntimeError as error:
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
            self.failures[name] = str(error)
            self._running.pop(name, None)

    def _start(self, name: str) -> None:
        self._running[name] = Provider(name, self.folder, self.options)

    def _end(self, name: str) -> None:
        self.peaks[name] = self._running.pop(name).end()

    def _measure(self, shape: Shape, truth: list[torch.Tensor]) -> None:
        for name in list(self._running):
            self._attempt(name, functools.partial(self._warm_up, name, shape, truth))
        for n in range(self.args.rounds):
            sequences = self.sequences(shape, n)
            for name in list(self._running):
                if name not in PEERS or n < self.args.peer_rounds:
                    self._attempt(name, functools.partial(self._time, name, shape, sequences))

    def _warm_up(self, name: str, shape: Shape, truth: list[torch.Tensor]) -> None:
        if name != "floor":
            self.errors[shape][name] = largest_error(self._running[name](self.few(shape), shape[0])[1], truth)
        if name not in PEERS:  # the few sequences are enough for peers
            self._running[name](self.sequences(shape, 20_000), shape[0])

    def _time(self, name: str, shape: Shape, sequences: Sequences) -> None:
        took, result = self._running[name](sequences, shape[0])
        seconds = self.seconds[shape]
        print(f"{name}, {shape}: {took:.3g} s", flush=True)
        if name == "floor":
            took = sum(result.values())
        seconds.setdefault(name, []).append(took)
        for part, part_s in result.items() if name == "floor" else ():
            seconds.setdefault(part, []).append(part_s)

    def report(self, report: Report) -> None:
        for shape in self.args.shapes:
            report.table(self._table(shape))
        table = make_table("peak memory", "provider", "process, MiB", "GPU, MiB")
        for name, peaks in self.peaks.items():
            table.add_row(name, *(f"{peak / 2**20:,.0f}" if peak else "" for peak in peaks))
        report.table(table)
        for name, error in self.failures.items():
            report.line(f"{name} failed: {error}")
        args = self.args
        report.line(
            machine_line(
                f"{args.model} ({self.num_parameters / 1e6:,.0f} M parameters), {args.dtype}, "
                f"{args.sequences} sequences, {args.rounds} rounds, peers {args.peer_rounds}"
            )
        )

    def _table(self, shape: Shape) -> Any:
        prompt, response, group = shape
        peer = next((name for name in ("torchrl", "flat") if name in self.seconds[shape]), "")
        table = make_table(
            f"P={prompt} R={response} G={group}",
            *(
                "provider",
                "s p20",
                "s p50",
                "s p80",
                "tokens/s fed",
                "computed",
                "TFLOP/s",
                f"times {peer or 'TorchRL'}",
            ),
            *("fraction of the floor", "largest error"),
        )
        fed = self.args.sequences * (prompt + response)
        computed = self.args.sequences // group * (prompt + group * response)
        seconds = self.seconds[shape]
        for name in [name for name in (*PROVIDERS, ENGINE, PRODUCT) if name in seconds]:
            runs = seconds[name]
            p20, p50, p80 = p20_p50_p80(runs)
            flops = "" if name == PRODUCT else f"{2 * self.num_parameters * computed / p50 / 1e12:,.2f}"
            ratios = [
                f"{median_ratio(seconds[other], runs):.2f}" if other in seconds else ""
                for other in (peer, "floor")
            ]
            error = f"{self.errors[shape][name]:.1e}" if name in self.errors[shape] else ""
            figures = (
                f"{p20:.3g}",
                f"{p50:.3g}",
                f"{p80:.3g}",
                f"{fed / p50:,.0f}",
                f"{computed / p50:,.0f}",
                flops,
            )
            table.add_row(name, *figures, *ratios, error)
        return table


def as_shape(text: str) -> Shape:
    """Parse "256x128x8"."""
    prompt, response, group = map(int, text.split("x"))
    return prompt, response, group


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--peer-rounds", type=int, default=3, help="rounds of all providers but ours and the floor; default 3"
    )
    usable = [name for name in PROVIDERS if name != "trl" or find_spec("trl")]
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=usable)
    parser.add_argument("--model", choices=MODELS, default="96M")
    parser.add_argument(
        "--shapes", nargs="+", type=as_shape, default=[as_shape(s) for s in SHAPES], metavar="PxRxG"
    )
    parser.add_argument(
        "--sequences", type=int, default=32, help="number of sequences, a multiple of every group; default 32"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="file to append the tables to")
    args = parser.parse_args()
    if min(args.rounds, args.peer_rounds) < 2:
        parser.error("--rounds, --peer-rounds: at least 2, for a median")
    if any(args.sequences % group for _, _, group in args.shapes):
        parser.error("--sequences must be a multiple of every group")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, args)
        bench.run()
    bench.report(Report(args.markdown))
    sys.exit(bool(bench.failures))


if __name__ == "__main__":
    main()
