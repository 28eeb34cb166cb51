"""What the weights of replicas do where Ray Serve fails, on scripted replicas. No Ray, no engine."""

from __future__ import annotations

import os
import shutil

import pytest

pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")

from vllm_kl.engines.replicas import service
from vllm_kl.engines.replicas.fleet import Fleet
from vllm_kl.engines.replicas.weights import ReplicatedWeights
from vllm_kl.errors import EngineError, OptionError
from vllm_kl.weights.checkpoint import Checkpoint, InitialCheckpoint


def test_weights_that_serve_cannot_keep_are_put_back(ref_path, policy_path):
    called, kept = [], []

    def keep(config):
        kept.append(config["version"])
        if len(kept) == 1:
            raise RuntimeError("Serve is gone")

    def on_each(step, *_):
        called.append(step)
        return [(True, kept[-1] if step == "kept" else None)] * 2

    weights = ReplicatedWeights(
        on_each, keep, lambda: False, lambda: None, InitialCheckpoint(str(ref_path)), None
    )
    with pytest.raises(RuntimeError, match="Serve is gone"):
        weights.load(Checkpoint(policy_path))
    assert called == ["prepare", "commit", "put_back", "end_push"]
    assert weights.version == 0
    assert weights.load(Checkpoint(policy_path)) == 2  # Serve may have kept version 1
    assert weights.version == 2
    assert "put_back" not in called[4:]


def test_a_copy_on_another_machine_is_the_same_checkpoint(ref_path, policy_path, tmp_path):
    files = InitialCheckpoint(str(ref_path)).identity
    assert files.is_of(InitialCheckpoint(str(ref_path)).identity)
    shutil.copytree(ref_path, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", (1, 1))
    assert files.is_of(InitialCheckpoint(str(tmp_path / "copy")).identity)
    assert not files.is_of(InitialCheckpoint(str(policy_path)).identity)
    assert not files.is_of(InitialCheckpoint(str(tmp_path)).identity)


@pytest.fixture
def two_cpus(monkeypatch):
    monkeypatch.setattr(service.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(service.ray, "available_resources", lambda: {"CPU": 1.0})


def test_a_fleet_without_room_is_refused_with_numbers(two_cpus, monkeypatch, caplog):
    fleet = Fleet(fewest=2, most=2, num_cpus=1, num_gpus=0, num_threads=1)
    monkeypatch.setattr(service._RAY, "is_ours", True)
    with pytest.raises(OptionError, match=r"2 replicas take 1 CPUs and 0 GPUs each. .* 1 of 2 CPUs free"):
        service._check_room(fleet)
    monkeypatch.setattr(service._RAY, "is_ours", False)  # a cluster may grow
    service._check_room(fleet)
    assert "start when there is room" in caplog.text


def test_replicas_that_somebody_deleted_are_not_waited_for(monkeypatch):
    class Status:
        applications: dict = {}  # noqa: RUF012

    monkeypatch.setattr(service.serve, "status", Status)
    deployed = service.Deployed("a", None, None, None)
    assert not deployed.check_alive(0.0)  # Serve may have started anew
    monkeypatch.setattr(service, "_DELETED_AFTER_S", 0.0)
    with pytest.raises(EngineError, match="they were deleted"):
        deployed.check_alive(0.0)
