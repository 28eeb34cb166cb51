"""The annotations of the public modules hold: mypy, strict, with the settings of pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# ``entropy=`` may be True, False or a bool that only the caller knows.
PROGRAM = """
import torch

from vllm_kl import VLLMScorer


def scored(scorer: VLLMScorer, entropy: bool) -> list[torch.Tensor]:
    log_probs, entropies = scorer.score([[5, 6]], entropy=True)
    both = scorer.score([[5, 6]], entropy=entropy)
    return [*scorer.score([[5, 6]]), *log_probs, *entropies, *(both[0] if isinstance(both, tuple) else both)]
"""


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_annotations_hold_here_and_in_a_program_that_uses_them(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    files = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["tool"]["mypy"]["files"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", program, *files],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
