"""How long does the exact KL over the vocabulary take, beside scoring the same tokens with both models?

    python benchmarks/bench_exact_kl.py                                   # 96M, a few minutes on two cores
    python benchmarks/bench_exact_kl.py --model tiny --dtype float32 --rounds 2

Two models with other random weights, an engine each, and four ways that take turns: ``score`` by both models;
``score_topk`` of the first and ``score_ids`` of the other, which ``kl_estimate(estimator="topk")`` takes;
``hidden_states`` and ``lm_head`` of both, which ``exact_kl`` takes; and ``exact_kl`` itself, on the GPU where
there is one. Before anything is timed, the KL of some tokens is compared with float64 of the same hidden
states.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vllm_kl import VLLMScorer
from vllm_kl.bench import models
from vllm_kl.bench.limits import seconds_of
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table, median_ratio

TOP_K = 64
SCORE, TOPK, PARTS, EXACT = "score", f"the {TOP_K} best", "hidden states, heads", "exact_kl"
# Of the largest logit: float32 rounds them.
TOLERANCE = 2e-6


def build(size: str, folder: Path, seed: int) -> str:
    """Save a model, moved away from the one that every run makes; return the folder."""
    model = models.NAMED[size]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.std().nan_to_num(0) * torch.randn(weight.shape, generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def ways(
    policy: VLLMScorer, reference: VLLMScorer, sequences: list[np.ndarray], start: int, device: str
) -> dict[str, Callable[[], object]]:
    def topk() -> object:
        best = policy.score_topk(sequences, TOP_K, start)
        return reference.score_ids(sequences, [one.token_ids for one in best], start)

    both = (policy, reference)
    return {
        SCORE: lambda: [scorer.score(sequences, start) for scorer in both],
        TOPK: topk,
        PARTS: lambda: [(scorer.hidden_states(sequences, start), scorer.lm_head()) for scorer in both],
        EXACT: lambda: policy.exact_kl(reference, sequences, start, device=device),
    }


def errors(
    policy: VLLMScorer, reference: VLLMScorer, sequence: np.ndarray, start: int, device: str
) -> tuple[float, float, float]:
    """Return the largest error of a sequence's KL, the error that is allowed, and the KL's mean, nats."""
    (kl,) = policy.exact_kl(reference, [sequence], start, device=device)
    logits = []
    for scorer in (policy, reference):
        (hidden,), head = scorer.hidden_states([sequence], start), scorer.lm_head()
        logits.append(head.scale * (hidden.double() @ head.weight.double().T))
    a, b = (row.log_softmax(-1) for row in logits)
    want = (a.exp() * (a - b)).sum(-1)
    allowed = max(1e-6, TOLERANCE * max(float(row.abs().max()) for row in logits))
    return float((kl.double() - want).abs().max()), allowed, float(want.mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=models.NAMED, default="96M")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), nargs="+", default=["bfloat16", "float32"]
    )
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    add_markdown_option(parser)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report, rng = Report(args.markdown), np.random.default_rng(0)
    columns = ("dtype", "way", "s", f"times {SCORE}, in each round", "largest error, nats")
    size = f"{args.group} sequences of {args.prompt} + {args.response} tokens"
    table = make_table(f"{args.model}, {size}", *columns, left=("way",))
    with tempfile.TemporaryDirectory() as home:
        paths = [build(args.model, Path(home, str(seed)), seed) for seed in range(2)]
        for dtype in args.dtype:
            options = {"dtype": dtype, "max_model_len": args.prompt + args.response + 1}
            with VLLMScorer(paths[0], **options) as policy, VLLMScorer(paths[1], **options) as reference:
                top = policy.info.vocab_size
                prompt = rng.integers(0, top, args.prompt)
                sequences = [
                    np.concatenate([prompt, rng.integers(0, top, args.response)]) for _ in range(args.group)
                ]
                error, allowed, mean = errors(policy, reference, sequences[0], args.prompt, device)
                if not error <= allowed or not mean > 1e-3:
                    raise SystemExit(
                        f"{dtype}: an error of {error} nats in {mean}, expected {allowed}; not timed"
                    )
                todo = ways(policy, reference, sequences, args.prompt, device)
                for work in todo.values():
                    seconds_of(work)  # warm up
                taken: dict[str, list[float]] = {name: [] for name in todo}
                for n in range(args.rounds):
                    for name in list(todo)[:: 1 if n % 2 else -1]:
                        taken[name].append(seconds_of(todo[name]))
            for name, runs in taken.items():
                ratio = "" if name == SCORE else f"{median_ratio(runs, taken[SCORE]):.2f}"
                of_exact = f"{error:.1e}" if name == EXACT else ""
                table.add_row(dtype, name, f"{statistics.median(runs):.3g}", ratio, of_exact)
    report.table(table)
    report.line(machine_line(f"{args.rounds} rounds, KL {mean:.2f} nats a token, on {device}"))


if __name__ == "__main__":
    main()
