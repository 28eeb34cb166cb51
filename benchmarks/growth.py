"""Measures how the time of a call grows with each of its sizes, and fits exponents and lines.

    python benchmarks/growth.py                # a quarter of an hour on two cores
    python benchmarks/growth.py --axis G --axis V

    B   sequences: P=128, R=64, G=8
    P   tokens of a prompt: R=16, no siblings
    R   tokens of a response: P=16, no siblings
    G   responses of each of four prompts: P=1024, R=16
    V   size of the vocabulary: P=16, R=256, no siblings

Each size is a run of ``vllm-kl bench``, which checks the log-probs against float64 before it times. Beside
the exponent of the time stand those of the computed and of the scored tokens: the work that the sizes ask
for. An exponent of 1 is linear, 0 is no growth.

An exponent mixes what grows with what does not: a call costs something at any size. So a line ``seconds = a
+ b * size`` is fitted, too. For G, ``a`` is the time of the four prompts and of the call, and ``b * G`` that
of the responses. Where prompts are shared, ``b`` is the time of 4 * (16 + 32) tokens: an engine shares whole
blocks of 32 tokens, without the one of the prompt's last token. A prompt that is computed for each response
makes it the time of 4 * (16 + 1024).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table

VOCAB = 8192


class Size(NamedTuple):
    """One run."""

    value: int  # of the axis
    shape: str  # P,R,G
    num_sequences: int = 32
    vocab: int = VOCAB


AXES = {
    "B": [Size(n, "128,64,8", n) for n in (16, 40, 80, 160)],
    "P": [Size(n, f"{n},16,1") for n in (64, 160, 320, 640)],
    "R": [Size(n, f"16,{n},1") for n in (64, 160, 320, 640)],
    "G": [Size(n, f"1024,16,{n}", 4 * n) for n in (2, 5, 10, 20)],
    "V": [Size(n, "16,256,1", vocab=n) for n in (4096, 10_240, 20_480, 40_960)],
}


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """Run the command; return its row of figures."""
    command = [sys.executable, "-c", "from vllm_kl.cli import main; main()", "bench", "--json"]
    command += ["--shape", f"256,4,{size.vocab}", "--shapes", size.shape, "--dtype", "float32"]
    command += ["--sequences", str(size.num_sequences), "--providers", "ours", "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    (row,) = json.loads(done.stdout.splitlines()[-1])["results"]
    return row


def exponent(sizes: Sequence[float], amounts: Sequence[float]) -> float:
    """Return the slope of the line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(amounts), 1)[0])


def line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return a and b of ``seconds = a + b * size`` with the least squares of the relative errors."""
    b, a = np.polyfit(sizes, seconds, 1, w=1 / np.asarray(seconds))
    return float(a), float(b)


def prompts_and_responses(rows: list[dict[str, Any]]) -> tuple[Table, str]:
    """Return what the engine computed for each size of the axis G, and what one response more costs."""
    sizes, seconds = [size.value for size in AXES["G"]], [row["s_p50"] for row in rows]
    a, b = line(sizes, seconds)
    table = make_table("G", "size", "engine computed", "scored", "seconds")
    for size, row, taken in zip(sizes, rows, seconds, strict=True):
        counts = (row["engine_computed_tokens"], row["scored_tokens"])
        table.add_row(f"{size}", *(f"{count:,}" for count in counts), f"{taken:.3f}")
    prompts = rows[0]["computed_tokens"] - rows[0]["scored_tokens"]
    names = ("engine_computed_tokens", "scored_tokens", "fed_tokens")
    computed, own, fed = (line(sizes, [row[name] for row in rows])[1] for name in names)
    return table, (
        f"One response more of each prompt takes as long as {b * prompts / a:,.0f} prompt tokens. The engine "
        f"computed {computed:,.0f} for it: {own:,.0f} of its own, with the LM head for each, and "
        f"{computed - own:,.0f} of prompts. Prompts that are computed again would make it {fed:,.0f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axis", choices=AXES, action="append", help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    add_markdown_option(parser)
    args = parser.parse_args()
    exponents = make_table(
        "exponents", "size", "from, to", "seconds", "of the time", "of computed tokens", "of scored tokens"
    )
    lines = make_table("seconds = a + b * size", "size", "a, s", "b, ms", "largest error of the line")
    report = Report(args.markdown)
    for axis in args.axis or AXES:
        rows = [measure(size, args.rounds) for size in AXES[axis]]
        values = [size.value for size in AXES[axis]]
        amounts = ("s_p50", "computed_tokens", "scored_tokens")
        fitted = [f"{exponent(values, [row[name] for row in rows]):.2f}" for name in amounts]
        seconds = [row["s_p50"] for row in rows]
        taken = ", ".join(f"{one:.2f}" for one in seconds)
        exponents.add_row(axis, f"{values[0]:,}, {values[-1]:,}", taken, *fitted)
        a, b = line(values, seconds)
        error = max(abs(a + b * value - one) / one for value, one in zip(values, seconds, strict=True))
        lines.add_row(axis, f"{a:.3f}", f"{1e3 * b:.3f}", f"{100 * error:.0f} %")
        if axis == "G":
            apart, told = prompts_and_responses(rows)
            report.table(apart)
            report.line(told)
    report.table(exponents)
    report.table(lines)
    report.line(machine_line(f"{args.rounds} rounds"))


if __name__ == "__main__":
    main()
