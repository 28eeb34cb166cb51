"""How much longer than the plain product does the LM head take, with the entropy and with the best tokens?

    python benchmarks/bench_lm_head.py                               # the sizes of 0.5B and 7B on a GPU
    python benchmarks/bench_lm_head.py --sizes 512,512 --vocab 20480 --dtype bfloat16

Of each size (rows, hidden size), four ways take turns: PyTorch's product of all logits in the dtype; the
kernel's log-normalizers; with the entropy; with the 8 best tokens. Before anything is timed, log-normalizers,
entropies and the best tokens' logits are compared with float64. Products of random numbers, scaled as in a
trained model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from vllm_kl.bench.limits import seconds_of
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table, median_ratio
from vllm_kl.plugin import kernel
from vllm_kl.plugin.cpu_products import AmxProducts

TOP_K = 8
WAYS = ("log-normalizers", "with entropy", f"with the {TOP_K} best")
TOLERANCE = 1e-4  # nats, where products are summed in float32
_IN_16_BITS = 2e-2  # where a CPU rounds them to 16 bits


def matrices(num_rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Return hidden rows ``[N, H]``, a head ``[V, H]`` and for each row a token ``[N]`` that is left out."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    rows = torch.randn(num_rows, hidden, **options).to(dtype)
    weight = torch.randn(vocab, hidden, **options).mul_(2 / hidden**0.5).to(dtype)
    return [rows, weight, torch.randint(vocab, (num_rows,), **options)]


def largest_errors(rows: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Return each way's largest error against float64, nats; of the best tokens, that of their logits."""
    some = torch.arange(0, len(rows), max(1, len(rows) // 64), device=rows.device)
    rows, tokens = rows[some], tokens[some]
    logits = rows.double() @ weight.double().T
    _, best, _ = kernel.top_tokens(rows, weight, TOP_K, left_out_N=tokens)
    of_best = best - logits.topk(TOP_K).values
    logits.scatter_(1, tokens[:, None], -torch.inf)
    entropy = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    normalizer = kernel.log_normalizer(rows, weight, left_out_N=tokens, entropy_N=entropy)
    of_entropy = entropy - torch.special.entr(logits.softmax(1)).sum(1)
    errors = (normalizer - logits.logsumexp(1), of_entropy, of_best)
    return dict(zip(WAYS, (error.abs().max().item() for error in errors), strict=True))


def tolerance(dtype: torch.dtype, device: str, hidden_size: int) -> float:
    """Return how far from float64 the kernel may be, nats."""
    in_float32 = kernel.product_dtype(dtype) == torch.float32 or AmxProducts.takes(dtype, hidden_size)
    return TOLERANCE if device == "cuda" or in_float32 else _IN_16_BITS


def ways(rows: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return the ways that are timed, by name. All of ours read as many rows at a time as the engine does."""
    entropy = torch.empty(len(rows), dtype=torch.float64, device=rows.device)

    def by_block(read: Callable[[slice], object], top_k: int = 0) -> Callable[[], object]:
        blocks = list(kernel.row_blocks(*rows.shape, top_k, on_a_gpu=rows.is_cuda))
        return lambda: [read(block) for block in blocks]

    def normalizer(block: slice) -> object:
        return kernel.log_normalizer(rows[block], weight, left_out_N=tokens[block])

    def with_entropy(block: slice) -> object:
        return kernel.log_normalizer(rows[block], weight, left_out_N=tokens[block], entropy_N=entropy[block])

    def with_best(block: slice) -> object:
        return kernel.top_tokens(rows[block], weight, TOP_K, left_out_N=tokens[block])

    ours = (by_block(normalizer), by_block(with_entropy), by_block(with_best, TOP_K))
    return {"product": lambda: rows @ weight.T, **dict(zip(WAYS, ours, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ["4096,896", "4096,3584", "2048,8192", "300,3584"]
    parser.add_argument("--sizes", nargs="+", default=sizes, metavar="ROWS,HIDDEN")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    add_markdown_option(parser)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report(args.markdown)
    ratios = ("times the product", "times the log-normalizers")
    columns = ("rows, hidden size", "way", "ms", "TFLOP/s", *ratios, "largest error, nats")
    table = make_table(f"LM head, vocabulary {args.vocab:,}, {args.dtype}", *columns, left=("way",))
    for size in args.sizes:
        num_rows, hidden = map(int, size.split(","))
        arguments = matrices(num_rows, hidden, args.vocab, getattr(torch, args.dtype), device)
        errors, most = largest_errors(*arguments), tolerance(arguments[0].dtype, device, hidden)
        if not max(errors.values()) <= most:
            raise SystemExit(f"{size}: errors of {errors} nats, expected at most {most}; not timed")
        todo = ways(*arguments)
        for work in todo.values():
            seconds_of(work)  # warm up
        taken: dict[str, list[float]] = {name: [] for name in todo}
        for _ in range(args.rounds):
            for name, work in todo.items():
                taken[name].append(seconds_of(work))
        for name, runs in taken.items():
            median = statistics.median(runs)
            rate = 2 * num_rows * hidden * args.vocab / median / 1e12
            error = f"{errors[name]:.1e}" if name in errors else ""
            ratios = [f"{median_ratio(runs, taken[other]):.2f}" for other in ("product", WAYS[0])]
            ratios[1] = ratios[1] if name in WAYS[1:] else ""
            table.add_row(size.replace(",", ", "), name, f"{1e3 * median:.3g}", f"{rate:.3g}", *ratios, error)
    report.table(table)
    report.line(machine_line(f"{args.rounds} rounds"))


if __name__ == "__main__":
    main()
