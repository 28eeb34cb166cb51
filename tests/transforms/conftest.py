"""Fixtures of the tests of the classes that TorchRL calls."""

from __future__ import annotations

import pytest

from vllm_kl.weights.push import weights_of


@pytest.fixture
def stamped(policy_engine):
    """Collect a batch; return its version, which is the engine's and the collector's."""

    def stamped(batches, collector):
        (version,) = set(next(batches).reshape(-1)["next", "policy_version"].tolist())
        assert collector.policy_version == weights_of(policy_engine).version == version
        return version

    return stamped
