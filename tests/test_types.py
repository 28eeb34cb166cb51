"""The annotations of the public modules hold: mypy, strict, with the settings of pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vllm_kl

ROOT = Path(__file__).parents[1]
MYPY = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["tool"]["mypy"]
# ``entropy=`` may be True, False or a bool that only the caller knows.
PROGRAM = """
import torch

from vllm_kl import VLLMScorer


def scored(scorer: VLLMScorer, entropy: bool) -> list[torch.Tensor]:
    log_probs, entropies = scorer.score([[5, 6]], entropy=True)
    both = scorer.score([[5, 6]], entropy=entropy)
    return [*scorer.score([[5, 6]]), *log_probs, *entropies, *(both[0] if isinstance(both, tuple) else both)]
"""


@pytest.mark.timeout(1200)
def test_annotations_hold_here_and_in_a_program_that_uses_them(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", program, *MYPY["files"]],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", [*vllm_kl._PUBLIC, "configs", "offline.pipeline", "client.client"])
def test_every_public_module_is_checked(module):
    file = f"vllm_kl/{module.replace('.', '/')}.py"
    assert any(file == path or file.startswith(f"{path}/") for path in MYPY["files"])
    assert not any(re.search(pattern, file) for pattern in MYPY["exclude"])
