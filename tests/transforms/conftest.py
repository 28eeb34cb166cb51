"""Fixtures of the tests of the classes that TorchRL calls."""

from __future__ import annotations

import pytest

from tests import oracle
from tests.transforms.helpers import KEEP, SEQUENCES
from vllm_kl.weights.push import weights_of


@pytest.fixture
def truth(policy_oracle, ref_oracle):
    """The KL of every sample, unpadded, float64."""
    return [oracle.kl(policy_oracle, ref_oracle, s, k) for s, k in zip(SEQUENCES, KEEP, strict=True)]


@pytest.fixture
def half(ref_scorer, make_reference):
    """A reference at temperature 0.5, of other weights."""
    ref_scorer.temperature = 0.5
    yield make_reference()
    ref_scorer.temperature = 1.0


@pytest.fixture
def stamped(policy_engine):
    """Collect a batch; return its version, which is the engine's and the collector's."""

    def stamped(batches, collector):
        (version,) = set(next(batches).reshape(-1)["next", "policy_version"].tolist())
        assert collector.policy_version == weights_of(policy_engine).version == version
        return version

    return stamped
