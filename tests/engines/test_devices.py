"""Tests which GPUs an engine sees, on a fake machine without a GPU and without CUDA."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from vllm_kl import VLLMScorer
from vllm_kl.engines import devices, process
from vllm_kl.engines.devices import device_environment, has_gpu
from vllm_kl.environment import ON_A_CPU
from vllm_kl.errors import OptionError


@pytest.fixture
def machine(monkeypatch):
    """A CUDA build of torch on a machine of four GPUs, where asking CUDA is an error."""

    def initialise():
        raise AssertionError("CUDA was asked: it is initialised in this process")

    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", initialise, raising=False)
    monkeypatch.setattr(torch.cuda, "_cached_device_count", None)
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv(devices._ASK_NVML, raising=False)


def test_a_gpu_is_found_without_cuda_so_that_forks_made_later_can_use_it(machine):
    with pytest.raises(AssertionError, match="CUDA was asked"):
        torch.cuda.is_available()  # what spoils them
    assert has_gpu()
    assert not ON_A_CPU.keys() & process._environment({}).keys()
    assert devices._ASK_NVML not in os.environ


def test_what_the_user_set_is_left_as_it_was(machine, monkeypatch):
    monkeypatch.setenv(devices._ASK_NVML, "0")
    has_gpu()
    assert os.environ[devices._ASK_NVML] == "0"


@pytest.mark.parametrize(
    ("given", "visible", "options", "seen"),
    [
        (1, None, {}, "1"),
        ("3", None, {}, "3"),
        ([2, 0], None, {"tensor_parallel_size": 2}, "2,0"),
        (1, "5,6,7", {}, "6"),  # as Ray, or a scheduler, gave them to this process
        ([0, 2], "GPU-aa,GPU-bb,GPU-cc", {"pipeline_parallel_size": 2}, "GPU-aa,GPU-cc"),
        ("GPU-1234", None, {}, "GPU-1234"),
    ],
)
def test_an_engine_sees_the_devices_that_were_named(machine, monkeypatch, given, visible, options, seen):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_environment(given, options) == {"CUDA_VISIBLE_DEVICES": seen}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (4, {}, r"names device 4, but this process sees 4 \(CUDA_VISIBLE_DEVICES=0,1,2,3\), counted from 0"),
        (-1, {}, "names device -1"),
        ([0, 1], {}, "must name 1 different devices, as many as the engine uses"),
        (0, {"tensor_parallel_size": 2}, "must name 2 different devices"),
        ([1, 1], {"tensor_parallel_size": 2}, "must name 2 different devices"),
    ],
)
def test_devices_that_are_not_there_or_not_as_many_are_refused(machine, given, options, message):
    with pytest.raises(OptionError, match=message):
        device_environment(given, options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_are_refused_where_there_is_no_gpu(ref_path, policy_llm):
    with pytest.raises(OptionError, match="devices=1 has no effect: torch sees no GPU here"):
        VLLMScorer(str(ref_path), devices=1)
    with pytest.raises(OptionError, match="devices=1 has no effect on an engine that already runs"):
        VLLMScorer(policy_llm, devices=1)


def test_the_childs_environment_has_the_devices_and_not_the_callers(machine, monkeypatch):
    started = []

    class Popen:
        pid = 0

        def __init__(self, command, *, env, **options):
            started.append(env)
            raise RuntimeError("not in this test")

    monkeypatch.setattr(process.subprocess, "Popen", Popen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(RuntimeError, match="not in this test"):
        process.ProcessEngine(sys.executable, readout="auto", options={}, devices=1)
    assert started[0]["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_engine_on_a_cpu_keeps_few_of_onednns_products():
    assert process._environment({}).items() >= ON_A_CPU.items()
    assert int(ON_A_CPU["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024  # oneDNN's own
