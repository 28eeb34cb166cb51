"""Measures the bias and the variance of each estimate of the KL.

    python benchmarks/bench_estimators.py

The demo's policy answers word problems. At every position of the answers, the benchmark computes the whole
distribution of policy and reference. Mean and standard deviation of an estimate over the sampled token are
then sums over the vocabulary, without sampling noise. ``topk`` takes the engines' results: ``score_topk`` of
the policy, and ``score_ids`` of the reference on the same ids.

The tables show averages over positions, in nats: the KL, the bias (mean of the estimate minus KL) and the
standard deviation. The last column is the number of tokens at one position whose mean has an error (bias and
noise together) within 10 % of the KL, or "never" if the bias alone is larger.
"""

from __future__ import annotations

import argparse
import math
import os
import random

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from vllm_kl import VLLMScorer, kl_estimate
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table
from vllm_kl.demo.task import make_problem, make_tokenizer
from vllm_kl.demo.train import checkpoints
from vllm_kl.kl import TOKEN_ESTIMATORS

WITHIN = 0.1


@torch.no_grad()
def sample(folder: str, prompts: list[list[int]], max_new_tokens: int, eos: int) -> list[list[int]]:
    """Return the prompts with answers that the model samples."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sequences = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]),
            do_sample=True,
            top_k=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        sequences.append(ids[0].tolist())
    return sequences


@torch.no_grad()
def distributions(folder: str, sequences: list[list[int]], starts: list[int]) -> torch.Tensor:
    """Return ``[positions, V]`` float64 log-probs of all tokens at each position of the answers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rows = [model(torch.tensor([s])).logits[0, n - 1 : -1] for s, n in zip(sequences, starts, strict=True)]
    return torch.cat(rows).log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 16])
    add_markdown_option(parser)
    args = parser.parse_args()
    report, tokenizer = Report(args.markdown, width=120), make_tokenizer()
    reference, policy = map(str, checkpoints(Console(width=120)))
    torch.manual_seed(0)
    rng = random.Random(0)
    chats = [[{"role": "user", "content": make_problem(rng).question}] for _ in range(args.answers)]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    sequences = sample(policy, prompts, 24, tokenizer.eos_token_id)
    starts = [len(p) for p in prompts]
    p, q = (distributions(folder, sequences, starts) for folder in (policy, reference))

    for direction in ("reverse", "forward"):
        a, b = (p, q) if direction == "reverse" else (q, p)
        exact = (a.exp() * (a - b)).sum(-1)
        columns = ("estimator", "bias", "standard deviation", f"tokens for {WITHIN:.0%}")
        table = make_table(
            f"{direction}: {len(exact)} positions, KL {exact.mean():.4f} nats a token", *columns
        )

        def row(
            name: str, bias: float, std: float, kl: float = float(exact.mean()), table: Table = table
        ) -> None:
            allowed = (WITHIN * kl) ** 2 - bias**2
            tokens = "never" if allowed <= 0 else f"{max(1, math.ceil(std**2 / allowed)):,}"
            table.add_row(name, f"{bias:+.4f}", f"{std:.4f}", tokens)

        for name in TOKEN_ESTIMATORS:
            values = kl_estimate(
                p, q, torch.ones_like(p, dtype=torch.bool), estimator=name, direction=direction
            ).double()
            mean = (p.exp() * values).sum(-1)
            second = (p.exp() * values.square()).sum(-1)
            # The standard deviation at a random position, about the mean of this position.
            row(
                name, float((mean - exact).mean()), float((second - mean.square()).clamp(min=0).mean().sqrt())
            )
        for k in args.k:
            row(
                f"topk, k={k}",
                float((lumped(policy, reference, sequences, starts, k, direction) - exact).mean()),
                0.0,
            )
        report.table(table)
    report.line(machine_line(f"{args.answers} answers, vocabulary {p.shape[1]}"))


def lumped(
    policy: str, reference: str, sequences: list[list[int]], starts: list[int], k: int, direction: str
) -> torch.Tensor:
    """Return the ``topk`` estimates of all positions, computed by two engines."""
    options = {"dtype": "float32", "max_model_len": 256}
    with VLLMScorer(policy, **options) as scorer:
        best = scorer.score_topk(sequences, k, starts)
    with VLLMScorer(reference, **options) as scorer:
        theirs = scorer.score_ids(sequences, [b.token_ids for b in best], starts)
    masks = [torch.ones(len(row), dtype=torch.bool) for row in theirs]
    kl = kl_estimate([b.log_probs for b in best], theirs, masks, estimator="topk", direction=direction)
    return torch.cat(kl).double()


if __name__ == "__main__":
    main()
