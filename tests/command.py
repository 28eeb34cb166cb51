"""Runs the command ``vllm-kl``."""

from __future__ import annotations

import subprocess
import sys


def vllm_kl(*args):
    """Run the command ``vllm-kl`` in a new process; return the process that has ended."""
    return subprocess.run(
        [sys.executable, "-c", "from vllm_kl.cli import main; main()", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )
