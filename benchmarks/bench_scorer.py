"""How fast are reference log-probs of GRPO groups, by each way that exists today?

    python benchmarks/bench_scorer.py            # prints the table of benchmarks/README.md, about three minutes

One model, one process, one set of ids; providers take turns within each round, so that ratios compare like with like.
Before anything is timed every provider's log-probs are compared with float64 on the first group. G responses share one
prompt of P tokens and have R tokens each; tokens are counted as B * (P + R), what a prefill without sharing computes.

Cost card, per group: sharing prefills P + G * R tokens instead of G * (P + R); the flat read-out still runs the LM head on
every row that is prefilled, and makes a few Python numbers per row; TorchRL's parameters prefill everything and make an
object per row.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", TORCH_COMPILE_DISABLE="1", RL_LOGGING_LEVEL="ERROR"
)

import torch
import torchrl
import vllm
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from torchrl.modules.llm.policies import Masks, Tokens
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vllm_kl import VLLMScorer
from vllm_kl.demo.task import make_tokenizer

SHAPES = [(256, 128, 8), (1000, 128, 8)]  # P, R, G: a prompt that ends at a block's edge, and one that does not
GROUPS = 1
ROUNDS = 5
VOCAB = 32_000


def build(path: Path) -> None:
    """Save a random model: hidden 256, 4 layers; the vocabulary decides the LM head's cost."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.06,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def make_groups(prompt: int, response: int, group: int) -> list[torch.Tensor]:
    """Return GROUPS * group sequences; ids are random, and none is the pad id that TorchRL would drop."""
    generator = torch.Generator().manual_seed(prompt)
    draw = lambda n: torch.randint(300, VOCAB, (n,), generator=generator)  # noqa: E731
    return [torch.cat([p, draw(response)]) for p in [draw(prompt) for _ in range(GROUPS)] for _ in range(group)]


def torchrl_provider(wrapper, sequences, start):
    td = lazy_stack(
        [
            TensorDict(tokens=Tokens(full=s), masks=Masks(all_attention_mask=torch.ones_like(s, dtype=bool)))
            for s in sequences
        ]
    )
    return [row[start:] for row in wrapper(td).get(("log_probs", "full"), as_list=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    set_list_to_stack(True).set()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        run(folder, args.rounds)


def run(folder: str, rounds: int) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    llm = vllm.LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=512 << 20,
    )
    llm_generate = llm.generate
    llm.generate = lambda *a, **k: llm_generate(*a, **{"use_tqdm": False, **k})
    tokenizer = make_tokenizer()
    sharing, alone = VLLMScorer(llm), VLLMScorer(llm, share_prefix=False)
    options = {"tokenizer": tokenizer, "input_mode": "tokens", "generate": False, "pad_output": False}
    torchrl_vllm, torchrl_hf = vLLMWrapper(llm, **options), TransformersWrapper(hf_model, **options)
    providers = {
        "ours (flat)": lambda s, p: sharing.score(s, p),
        "ours (flat), share_prefix=False": lambda s, p: alone.score(s, p),
        "TorchRL vLLMWrapper": lambda s, p: torchrl_provider(torchrl_vllm, s, p),
        "TorchRL TransformersWrapper": lambda s, p: torch.no_grad()(torchrl_provider)(torchrl_hf, s, p),
    }
    console = Console(width=140)
    for prompt, response, group in SHAPES:
        sequences = make_groups(prompt, response, group)
        errors = {
            name: largest_error(oracle, f(sequences[:group], prompt), sequences[:group], prompt)
            for name, f in providers.items()
        }
        seconds = {name: [] for name in providers}
        for _ in range(rounds):
            for name, provider in providers.items():
                began = time.perf_counter()
                provider(sequences, prompt)
                seconds[name].append(time.perf_counter() - began)
        report(console, prompt, response, group, seconds, errors)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout
    print(
        f"{date.today()}, commit {commit.strip()}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, vllm {vllm.__version__}, torch {torch.__version__}, torchrl {torchrl.__version__}; "
        f"float32, hidden 256, 4 layers, vocabulary {VOCAB}, {GROUPS} groups, {rounds} rounds"
    )


def largest_error(oracle, log_probs, sequences, start) -> float:
    """Return the largest |log-prob - float64|; a provider that is wrong is not worth timing."""
    largest = 0.0
    with torch.no_grad():
        for got, ids in zip(log_probs, sequences, strict=True):
            want = oracle(ids[None]).logits[0, start - 1 : -1].log_softmax(-1).gather(-1, ids[start:, None])[:, 0]
            largest = max(largest, (got.double() - want).abs().max().item())
    assert largest < 1e-3, "this provider returns other numbers than the model"
    return largest


def report(console, prompt, response, group, seconds, errors) -> None:
    table = Table(title=f"P={prompt} R={response} G={group}")
    for name in (
        "provider",
        "s p20",
        "s p50",
        "s p80",
        "tokens/s",
        "ratio to TorchRL's vLLMWrapper, p50",
        "largest error",
    ):
        table.add_column(name, justify="left" if name == "provider" else "right")
    tokens = GROUPS * group * (prompt + response)
    peer = seconds["TorchRL vLLMWrapper"]
    for name, runs in seconds.items():
        p20, p50, p80 = (statistics.quantiles(runs, n=10, method="inclusive")[k] for k in (1, 4, 7))
        ratio = statistics.median(theirs / mine for theirs, mine in zip(peer, runs, strict=True))
        table.add_row(
            name,
            f"{p20:.2f}",
            f"{p50:.2f}",
            f"{p80:.2f}",
            f"{tokens / p50:,.0f}",
            f"{ratio:.2f}",
            f"{errors[name]:.1e}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
