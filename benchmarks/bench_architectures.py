"""Measures how far log-probs are from float64, architecture by architecture.

    python benchmarks/bench_architectures.py                              # every architecture of the tests
    python benchmarks/bench_architectures.py --names llama gemma2

The models have two layers and random weights. The requests are those of tests/engines/test_architectures.py:
groups that share prefixes, pad ids inside a sequence, a sequence of three engine steps. In float32, the
benchmark scores with and without prefix cache. In bfloat16, it compares with float64 on the same rounded
weights, and scores the same requests with vLLM's own prompt log-probs ("flat"). All engines start in one
child process. If this process ends or an engine fails, the table tells it, and a new process continues.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_kl.environment import on_a_gpu

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
if not on_a_gpu():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM's rank count, which the flat read-out needs: 20 s

import numpy as np
import torch

from tests import tiny
from tests.engines.test_architectures import REQUESTS, Run, log_probs_in_float64, run_engine
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table

NAMES = list(tiny.ARCHITECTURES)
# In nats. The first allows for the GPU's other kernels without TF32, the second for two layers in 16 bits.
FLOAT32_TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 0.5


class Engines:
    """Starts engines in a child process, and in a new child process if the first has ended."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # A daemon is killed when this process ends. vLLM's shutdown would take seconds, and fails after an
        # engine has failed.
        context.Process(target=serve, args=(theirs,), daemon=True).start()
        theirs.close()

    def run(self, path: Path, dtype: str, readout: str = "pooling") -> Run:
        """Start an engine, score the requests, and return the results.

        Raises:
            RuntimeError: the engine failed or its process died.
        """
        self._connection.send((str(path), readout, {"dtype": dtype, "enforce_eager": True}, REQUESTS))
        try:
            answer = self._connection.recv()
        except EOFError:
            self._begin()
            raise RuntimeError("the engine's process died") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def serve(connection: Connection) -> None:
    while True:
        try:
            connection.send(run_engine(*connection.recv()))
        except Exception as error:  # an engine may raise anything
            traceback.print_exc()
            connection.send(f"{type(error).__name__}: {error}")


def errors(results: Sequence[Any], truth: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return |log-prob - truth| of all scored tokens."""
    got = torch.from_numpy(np.concatenate([result.values[:, 0] for result in results])).double()
    return (got - torch.cat(list(truth))).abs()


def measure(name: str, home: Path, engines: Engines) -> tuple[list[str], list[str]]:
    """Return a row of the table, and a list of its faults."""
    path = tiny.build_architecture(home / name, name)
    truth = log_probs_in_float64(path, REQUESTS)
    run = engines.run(path, "float32")
    largest = [float(errors(results, truth).max()) for results in (run.cached, run.uncached)]
    wrong = [f"off by {error:.1e} nats in float32" for error in largest if not error < FLOAT32_TOLERANCE]
    row = [name, run.head, *(f"{error:.1e}" for error in largest)]
    path = tiny.build_architecture(home / f"{name}-16", name, dtype=torch.bfloat16)
    truth = log_probs_in_float64(path, REQUESTS)
    for readout in ("pooling", "flat"):
        error = errors(engines.run(path, "bfloat16", readout).uncached, truth)
        row.append(f"{error.square().mean().sqrt():.1e}, {error.max():.1e}")
        if readout == "pooling" and not error.max() < BFLOAT16_TOLERANCE:
            wrong.append(f"off by {error.max():.1e} nats in bfloat16")
    return row, wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    add_markdown_option(parser)
    args = parser.parse_args()
    table = make_table(
        "distance to float64, nats",
        *("model", "head", "float32", "uncached", "bfloat16: rms, largest", "vLLM's own: rms, largest"),
        left=("head",),
    )
    failures, engines = {}, Engines()
    with tempfile.TemporaryDirectory() as home:
        for name in args.names:
            try:
                row, wrong = measure(name, Path(home), engines)
            except RuntimeError as error:  # continue with the next model
                row, wrong = [name, "failed"], [str(error)]
            table.add_row(*row)
            failures |= {name: wrong} if wrong else {}
            print(*row, *wrong, sep=" | ", flush=True)
    report = Report(args.markdown)
    report.table(table)
    for name, wrong in failures.items():
        report.line(f"- {name}: {'; '.join(wrong)}")
    report.line(machine_line())
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
