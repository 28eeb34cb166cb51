"""Runs many cases of each property of this folder, counts them, and prints a table.

    python -m tests.fuzz.run --cases 1000000 --minutes 25
    python -m tests.fuzz.run --cases 1000000 --guided        # by atheris

Each round runs every property with other random numbers. A property that fails is printed with the smallest
input that fails it, and is not run again; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import Phase, given, seed, settings
from rich.console import Console
from rich.table import Table

from tests.fuzz.strategies import OPTIONS, OUTCOMES
from vllm_kl.bench.report import Report, add_markdown_option, machine_line

CHUNK = 300  # cases of a property in a round, times its share
GUIDED_CHUNK = 10_000  # each needs a process
CASE_AT_MOST_S = 60  # what takes longer hangs


@dataclass
class Property:
    """A property and what was counted of it."""

    name: str
    body: FunctionType
    strategies: dict
    share: float
    cases: int = 0
    wall_s: float = 0.0
    outcomes: Counter = field(default_factory=Counter)
    branches: int = 0  # that guided cases reached in the package
    fault: str | None = None


def properties(only: str | None) -> list[Property]:
    """Return the properties of all modules of this folder."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.fuzz.{path.stem}")
        for name, test in vars(module).items():
            if hasattr(test, "of_fuzz"):
                found.append(
                    Property(
                        f"{path.stem.removeprefix('test_')}: {name[5:].replace('_', ' ')}", *test.of_fuzz
                    )
                )
    return [one for one in found if only is None or only in one.name]


def run(one: Property, number: int, most: int) -> None:
    """Run some cases of a property, and count those that ran. A case that hangs fails the property."""

    def counted(**arguments: object) -> None:
        one.cases += 1
        began = time.monotonic()
        signal.alarm(CASE_AT_MOST_S)
        try:
            one.body(**arguments)
        finally:
            signal.alarm(0)
        if time.monotonic() - began > CASE_AT_MOST_S:  # the body has caught the error
            _tell_of_a_hang()

    phases = (Phase.generate, Phase.shrink)
    limits = settings(max_examples=most, database=None, phases=phases, print_blob=False, **OPTIONS)
    test = limits(seed(number)(given(**one.strategies)(counted)))
    before, began = OUTCOMES.copy(), time.perf_counter()
    try:
        test()
    except Exception:
        one.fault = traceback.format_exc()
    one.wall_s += time.perf_counter() - began
    one.outcomes += OUTCOMES - before


class HangError(Exception):
    """A case took too long. It is no OSError, which commands show as an error of a file."""


def _tell_of_a_hang(*_: object) -> None:
    raise HangError(f"a case took longer than {CASE_AT_MOST_S} s")


def run_guided(one: Property, number: int, most: int, corpus: Path) -> None:
    """Run some cases of a property that atheris chooses, in a process of its own (guided.py)."""
    inputs = corpus / one.name.replace(" ", "_")  # what reached new branches, for the next round
    inputs.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.guided", one.name, str(most), str(inputs), str(number)]
    pipe, began = subprocess.PIPE, time.perf_counter()
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, cwd=corpus, env=_environment()
    ) as process:
        try:
            told, progress = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # it then tells what it has counted, unless it just starts
            told, progress = process.communicate()
            if told:
                _count(one, told, progress)
            raise
        finally:
            one.wall_s += time.perf_counter() - began
    before = one.cases
    if process.returncode or not told:
        one.fault = f"exit status {process.returncode}: {progress[-3000:]}"
    else:
        _count(one, told, progress)
    if one.fault is None and one.cases == before:
        one.fault = f"no input was long enough to be a case: {progress[-3000:]}"
    if one.fault is None and not one.branches:
        one.fault = f"atheris counted no branch: {progress[-3000:]}"


def _count(one: Property, told: str, progress: str) -> None:
    """Add what guided.py told of a round."""
    found = json.loads(told.splitlines()[-1])
    one.cases += found["cases"]
    one.outcomes += Counter(found["outcomes"])
    one.fault = found["fault"]
    # libFuzzer's lines: "#512 NEW cov: 91 ft: 120 corp: 9/63b ..."
    one.branches = max([one.branches, *map(int, re.findall(r"\bcov: (\d+)", progress))])


def _environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def rounds(every: list[Property], options: argparse.Namespace, console: Console, corpus: Path) -> None:
    """Run rounds until there are enough cases, the time is over, or every property failed."""
    # The first round runs all properties, also where few cases are wanted.
    chunk = min(GUIDED_CHUNK if options.guided else CHUNK, options.cases / sum(one.share for one in every))
    with_guide = functools.partial(run_guided, corpus=corpus)
    began, rng = time.monotonic(), random.Random(options.seed)

    def left() -> int:
        is_over = time.monotonic() - began > 60 * options.minutes
        return 0 if is_over else options.cases - sum(one.cases for one in every)

    while left() > 0 and any(one.fault is None for one in every):
        for one in every:
            if one.fault is None and left() > 0:
                most = max(1, min(left(), math.ceil(chunk * one.share)))
                (with_guide if options.guided else run)(one, rng.randrange(1, 2**31), most)
                if one.fault:
                    console.print(f"{one.name}\n{one.fault}", markup=False, highlight=False)
        total = sum(one.cases for one in every)
        console.print(f"{total:,} cases, {time.monotonic() - began:.0f} s", highlight=False)


def table_of(every: list[Property]) -> Table:
    """Return what was counted of each property."""
    table = Table("property", "cases", "answered", "refused", "branches", "s", "failed")
    for one in every:
        counts = (one.cases, one.outcomes["answered"], one.outcomes["refused"], one.branches)
        failed = "" if one.fault is None else "yes"
        table.add_row(one.name, *(f"{number:,}" for number in counts), f"{one.wall_s:.0f}", failed)
    return table


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="how many in all")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this time")
    parser.add_argument("--seed", type=int, help="of the random numbers; default: another each time")
    parser.add_argument("--only", help="properties with this text in their names")
    parser.add_argument("--guided", action="store_true", help="atheris chooses inputs by what they reach")
    add_markdown_option(parser)
    options = parser.parse_args()
    if options.guided and importlib.util.find_spec("atheris") is None:
        parser.error(
            "--guided needs atheris, which has builds for Linux on x86-64 and Python below 3.14: "
            f"{sys.executable} -m pip install atheris"
        )
    console, every = Console(width=140), properties(options.only)
    if not every:
        parser.error(f"no property has {options.only!r} in its name")
    signal.signal(signal.SIGALRM, _tell_of_a_hang)
    with contextlib.suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as corpus:
        rounds(every, options, console, Path(corpus))  # Ctrl-C shows what was counted until then
    num_failed = sum(one.fault is not None for one in every)
    report = Report(options.markdown, console=console)
    report.table(table_of(every))
    report.line(f"{sum(one.cases for one in every):,} cases, {num_failed} properties failed")
    report.line(machine_line("guided by atheris" if options.guided else "by hypothesis"))
    raise SystemExit(int(bool(num_failed)))


if __name__ == "__main__":
    main()
