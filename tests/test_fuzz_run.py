"""``tests/fuzz/run.py`` counts cases, finds a fault that was planted, and lets atheris choose inputs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st
from rich.console import Console

from tests.fuzz import run as runner

ROOT = Path(__file__).parents[1]
WITH_ATHERIS = pytest.param(
    "--guided",
    marks=[
        pytest.mark.nightly,
        pytest.mark.skipif(
            importlib.util.find_spec("atheris") is None, reason="atheris has no build for this machine"
        ),
    ],
)


def test_a_planted_fault_is_found_with_its_smallest_input():
    def body(number):
        assert number < 10, f"{number} is too large"

    planted = runner.Property("planted", body, {"number": st.integers(0, 1000)}, 1.0)
    runner.run(planted, 1, 200)
    assert "10 is too large" in planted.fault
    assert planted.cases > 0


def test_a_property_that_holds_runs_all_its_cases():
    holds = runner.Property("holds", lambda number: None, {"number": st.integers(0, 10**6)}, 1.0)
    runner.run(holds, 1, 50)
    assert (holds.cases, holds.fault) == (50, None)


@pytest.mark.parametrize("cases", [7, 60, 1000])
def test_few_cases_are_shared_out_among_all_properties(tmp_path, cases):
    strategies = {"number": st.integers(0, 10**6)}
    every = [
        runner.Property(str(n), lambda number: None, strategies, share) for n, share in enumerate((1, 2, 4))
    ]
    options = argparse.Namespace(guided=False, cases=cases, minutes=1.0, seed=1)
    runner.rounds(every, options, Console(quiet=True), tmp_path)
    assert sum(one.cases for one in every) == cases
    assert [one.cases for one in every] == pytest.approx([cases / 7 * share for share in (1, 2, 4)], abs=2)


@pytest.mark.parametrize("how", ["--seed=1", WITH_ATHERIS])
def test_the_command_counts_cases(tmp_path, how):
    table = tmp_path / "table.md"
    command = [sys.executable, "-m", "tests.fuzz.run", "--only", "chosen ids are", "--cases", "300", how]
    done = subprocess.run(
        [*command, "--markdown", str(table)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = table.read_text()
    assert "300 cases, 0 properties failed" in written
    (row,) = [line for line in written.splitlines() if "chosen ids are" in line]
    _, cases, answered, refused, branches, *_ = (cell.strip() for cell in row.strip("| ").split("|"))
    assert int(cases) == 300
    assert int(answered) > 0
    assert int(refused) > 0
    assert (int(branches) > 20) == (how == "--guided")  # atheris counts them
