"""Measures how the time of a call grows with each of its sizes, and fits the exponents.

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
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vllm_kl.bench.report import Report, machine_line, make_table

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axis", choices=AXES, action="append", help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, help="file to append the table to")
    args = parser.parse_args()
    table = make_table(
        "exponents", "size", "from, to", "seconds", "of the time", "of computed tokens", "of scored tokens"
    )
    for axis in args.axis or AXES:
        rows = [measure(size, args.rounds) for size in AXES[axis]]
        values = [size.value for size in AXES[axis]]
        amounts = ("s_p50", "computed_tokens", "scored_tokens")
        fitted = [f"{exponent(values, [row[name] for row in rows]):.2f}" for name in amounts]
        seconds = ", ".join(f"{row['s_p50']:.2f}" for row in rows)
        table.add_row(axis, f"{values[0]:,}, {values[-1]:,}", seconds, *fitted)
    report = Report(args.markdown)
    report.table(table)
    report.line(machine_line(f"{args.rounds} rounds"))


if __name__ == "__main__":
    main()
