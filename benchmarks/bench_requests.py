"""Measures what a request costs beside its tokens, and which part of the code costs it.

    python benchmarks/bench_requests.py          # three minutes

A two-layer model (hidden 64, vocabulary 259) scores the second half of many short sequences. The model
computes next to nothing, so the time goes into the way of a request to the engine and of its result back.
Each process has one thread, and the benchmark measures CPU time, so that other work on the machine changes
little. Providers take turns.

    ours    VLLMScorer, whose engine runs in another process
    step    the same driver in this process
    encode  vLLM's own front end for pooling models (LLM.encode), on an engine with the same scoring class
    flat    LLM.generate with prompt log-probs
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", TORCH_COMPILE_DISABLE="1")
os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")

import numpy as np
import vllm
from vllm.inputs import TokensPrompt
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_kl import VLLMScorer, plugin
from vllm_kl.bench import models
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table, median_ratio
from vllm_kl.engines.base import drive
from vllm_kl.engines.pooling import PoolingEngine
from vllm_kl.engines.start_engine import start as start_engine
from vllm_kl.plugin.cache_cap import capped
from vllm_kl.plugin.lm_head import MatrixHead
from vllm_kl.plugin.pooler import TASK, LogProbPooler
from vllm_kl.plugin.readout_request import Readout, pack
from vllm_kl.types import ScoreRequest

VOCAB = 259
OPTIONS = {"dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": 64 << 20}


def build(path: Path) -> None:
    models.tiny(vocab=VOCAB, max_position_embeddings=128, tie_word_embeddings=False).save_pretrained(path)


def make_providers(folder: str):
    scorer = VLLMScorer(folder, **OPTIONS)
    driver = start_engine(model=folder, readout="pooling", options=dict(OPTIONS))
    same = {
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "block_size": 32,
        "max_num_batched_tokens": 4096,
        **OPTIONS,
    }
    overrides = {"architectures": [plugin.enable("Qwen2ForCausalLM")]}
    pooling = vllm.LLM(
        folder, runner="pooling", convert="none", hf_overrides=overrides, max_num_seqs=512, **same
    )
    flat = VLLMScorer(vllm.LLM(folder, max_num_seqs=512, **same), readout="flat", share_prefix=False)

    def step(sequences, starts):
        requests = [
            ScoreRequest(token_ids=ids, start=start) for ids, start in zip(sequences, starts, strict=True)
        ]
        drive(driver, requests, share_prefix=True)

    def encode(sequences, starts):
        params = [
            vllm.PoolingParams(skip_reading_prefix_cache=False, extra_kwargs=pack(Readout(start=start)))
            for start in starts
        ]
        prompts = [TokensPrompt(prompt_token_ids=ids.tolist()) for ids in sequences]
        pooling.encode(prompts, params, pooling_task=TASK, use_tqdm=False)

    return scorer, {"ours": scorer.score, "step": step, "encode": encode, "flat": flat.score}


class Stages:
    """Measures the CPU time of wrapped functions, without the time of wrapped functions that they call."""

    # Stage, class and function, from the outermost to the innermost.
    PLACES = (
        ("ours: take results", PoolingEngine, "step"),
        ("ours: make requests", PoolingEngine, "_send"),
        ("vLLM: take requests", InprocClient, "add_request"),
        ("vLLM: scheduler", Scheduler, "schedule"),
        ("vLLM: scheduler", Scheduler, "update_from_output"),
        ("vLLM: worker", GPUModelRunner, "execute_model"),
        ("the model", GPUModelRunner, "_model_forward"),
        ("ours: pooler", LogProbPooler, "forward"),
        ("the LM head", MatrixHead, "read"),
    )

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = [0.0]  # for each running function: seconds of the wrapped functions that it called

    def wrap(self, stage: str, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            self._inside.append(0.0)
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - began
                self.seconds[stage] += took - self._inside.pop()
                self._inside[-1] += took

        return timed

    def install(self) -> None:
        for stage, owner, name in self.PLACES:
            setattr(owner, name, self.wrap(stage, getattr(owner, name)))
        lookup = self.wrap("vLLM: scheduler", KVCacheManager.get_computed_blocks.__wrapped__)
        KVCacheManager.get_computed_blocks = self.wrap("ours: cap", capped(lookup))


def cpu_seconds(child_pid: int) -> float:
    """Return the CPU time of this process plus that of the scorer's engine."""
    utime, stime = Path(f"/proc/{child_pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return time.process_time() + (int(utime) + int(stime)) / os.sysconf("SC_CLK_TCK")


def batch(seed: int, num_requests: int, shortest: int, longest: int):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, num_requests)
    return [rng.integers(0, VOCAB, length, dtype=np.int32) for length in lengths], (lengths // 2).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=4096)
    parser.add_argument(
        "--lengths", type=int, nargs=2, default=(16, 64), help="the shortest and the longest sequence"
    )
    add_markdown_option(parser)
    args = parser.parse_args()
    per_request = 1e6 / args.requests
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        scorer, providers = make_providers(folder)
        seconds = {name: [] for name in providers}
        for round_number in range(args.rounds + 1):
            sequences = batch(round_number, args.requests, *args.lengths)
            for name, provider in providers.items():
                began = cpu_seconds(scorer._engine.pid)
                provider(*sequences)
                seconds[name].append((cpu_seconds(scorer._engine.pid) - began) * per_request)
        scorer.close()
        stages = Stages()
        stages.install()
        for round_number in range(args.rounds):
            providers["step"](*batch(100 + round_number, args.requests, *args.lengths))
    report = Report(args.markdown, width=100)
    title = f"{args.requests} requests of {args.lengths[0]} to {args.lengths[1]} tokens"
    table = make_table(title, "provider", "us p20", "us p50", "us p80", "times ours")
    for name, (_, *runs) in seconds.items():  # the first is a warm-up
        ratio = f"{median_ratio(runs, seconds['ours'][1:]):.2f}"
        table.add_row(name, *(f"{np.quantile(runs, q):,.0f}" for q in (0.2, 0.5, 0.8)), ratio)
    report.table(table)
    table = make_table("where the time of a step goes", "stage of step", "us a request")
    for name, total in stages.seconds.most_common():
        table.add_row(name, f"{total / args.rounds * per_request:.1f}")
    report.table(table)
    report.line(machine_line(f"{args.rounds} rounds"))


if __name__ == "__main__":
    main()
