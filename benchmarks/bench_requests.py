"""What does a request cost beside its tokens: submit, schedule, collect?

    python benchmarks/bench_requests.py          # under two minutes

A two-layer model (hidden 64, vocabulary 259) and sequences of 16 tokens, one of which is scored: next to nothing is
computed, so the time is what bringing a request to the engine and its result back takes. Providers take turns.

ours: VLLMScorer, its engine in another process. step: the same driver without the process between. encode: vLLM's own front
end for pooling models (LLM.encode) on an engine with the same scoring class. flat: LLM.generate with prompt log-probs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", TORCH_COMPILE_DISABLE="1")

import numpy as np
import torch
import vllm
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm.inputs import TokensPrompt

from vllm_kl import VLLMScorer, plugin
from vllm_kl.engines.base import drive
from vllm_kl.engines.local import start as start_engine
from vllm_kl.plugin.pooler import TASK
from vllm_kl.plugin.request import Readout, pack
from vllm_kl.types import ScoreRequest

LENGTH, START = 16, 15
OPTIONS = {"dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 64 << 20}


def build(path: Path) -> None:
    config = Qwen2Config(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


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
    pooling = vllm.LLM(folder, runner="pooling", convert="none", hf_overrides=overrides, max_num_seqs=512, **same)
    flat = VLLMScorer(vllm.LLM(folder, max_num_seqs=512, **same), readout="flat", share_prefix=False)

    def step(sequences):
        drive(driver, [ScoreRequest(token_ids=ids, start=START) for ids in sequences], share_prefix=True)

    def encode(sequences):
        params = vllm.PoolingParams(skip_reading_prefix_cache=False, extra_kwargs=pack(Readout(start=START)))
        prompts = [TokensPrompt(prompt_token_ids=ids.tolist()) for ids in sequences]
        pooling.encode(prompts, params, pooling_task=TASK, use_tqdm=False)

    providers = {
        "ours": lambda s: scorer.score(s, START),
        "step": step,
        "encode": encode,
        "flat": lambda s: flat.score(s, START),
    }
    return scorer, providers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=1024)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        scorer, providers = make_providers(folder)
        seconds = {name: [] for name in providers}
        for round_number in range(args.rounds + 1):
            rng = np.random.default_rng(round_number)
            sequences = list(rng.integers(0, 259, (args.requests, LENGTH), dtype=np.int32))
            for name, provider in providers.items():
                began = time.perf_counter()
                provider(sequences)
                seconds[name].append(time.perf_counter() - began)
        scorer.close()
    table = Table(title=f"{args.requests} requests of {LENGTH} tokens")
    for name in ("provider", "us per request, p50", "times ours"):
        table.add_column(name, justify="left" if name == "provider" else "right")
    for name, runs in seconds.items():
        runs = runs[1:]  # the first is a warm-up
        ratio = statistics.median(a / b for a, b in zip(runs, seconds["ours"][1:], strict=True))
        table.add_row(name, f"{statistics.median(runs) / args.requests * 1e6:,.0f}", f"{ratio:.2f}")
    Console(width=100).print(table)
    print(
        f"{args.rounds} rounds, {torch.get_num_threads()} threads, vllm {vllm.__version__}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
