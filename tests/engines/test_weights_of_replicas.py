"""What the weights of replicas do where Ray Serve fails, on scripted replicas. No Ray, no engine."""

from __future__ import annotations

import functools
import os
import shutil

import pytest

pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")

from vllm_kl.engines.replicas import engine, replica, service
from vllm_kl.engines.replicas.fleet import Fleet
from vllm_kl.engines.replicas.weights import ReplicatedWeights
from vllm_kl.errors import EngineError, OptionError, WeightsError
from vllm_kl.weights.checkpoint import Checkpoint, InitialCheckpoint, Skeleton


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


@pytest.mark.parametrize("error", [EngineError("no memory"), replica.DyingError("no memory")])
def test_the_error_of_a_replicas_start_comes_back_as_one_of_the_package(error):
    with pytest.raises(RuntimeError) as told, replica._as_text():
        raise error
    found = replica.from_text(f"The deployment failed to start 3 times: {told.value}")
    assert (type(found), str(found)) == (EngineError, "no memory")


def test_replicas_that_cannot_be_described_are_ended(monkeypatch):
    ended = []

    class Service:
        name, timeout_s, is_open = "a", None, True

        def __init__(self, *args, **options):
            self.handle = self

        def broadcast(self, method):
            return self

        def results(self, **options):
            return [EngineError("no answer")]

        def close(self):
            ended.append(True)

    monkeypatch.setattr(engine, "Service", Service)
    with pytest.raises(EngineError, match="no answer"):
        engine.ReplicatedEngine("no/model", replicas=1, readout="auto", options={})
    assert ended


def test_a_model_that_transformers_cannot_build_is_refused_only_by_a_push(tmp_path):
    start = InitialCheckpoint(str(tmp_path))
    make = functools.partial(Skeleton, str(tmp_path))
    weights = ReplicatedWeights(None, None, None, make, start, None)
    with pytest.raises(WeightsError, match="can be updated from a state dict"):
        weights.skeleton  # noqa: B018
