"""How a local Ray is started. No Ray, no engine."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")

from vllm_kl.offline import cluster

NAME = "RAY_enable_metrics_collection"


@pytest.mark.parametrize(("before", "inside"), [(None, "0"), ("1", "1")])
def test_a_local_ray_collects_no_figures_unless_the_user_wants_them(monkeypatch, before, inside):
    monkeypatch.delenv(NAME, raising=False)
    if before is not None:
        monkeypatch.setenv(NAME, before)
    with cluster._without_figures():
        assert os.environ[NAME] == inside
    assert os.environ.get(NAME) == before
