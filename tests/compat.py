"""Marks for tests that need a version of vLLM."""

from __future__ import annotations

import pytest
import vllm
from packaging.version import Version

VLLM = Version(Version(vllm.__version__).base_version)


def since(version: str, why: str) -> pytest.MarkDecorator:
    """Skip a test with an older vLLM."""
    return pytest.mark.skipif(Version(version) > VLLM, reason=f"{why}: needs vLLM {version}")
