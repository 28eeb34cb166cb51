"""The mark of tests that need a CPU with AMX. Its import compiles the loops, so ``compat.py`` lacks it."""

from __future__ import annotations

import shutil

import pytest

from vllm_kl.plugin import cpu_loops

needs_amx = pytest.mark.skipif(
    cpu_loops._amx_library()[0] is None or not shutil.which("c++"),
    reason="needs a CPU with AMX, and a compiler that knows it",
)
