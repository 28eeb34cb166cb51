"""Whether commands take the GPU, which they decide before torch is imported; what keeps freed memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vllm_kl import environment
from vllm_kl.engines.devices import has_gpu
from vllm_kl.environment import ON_A_CPU, on_a_gpu


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with an NVIDIA GPU and a CUDA build of torch; a test may set another version of torch."""
    monkeypatch.setattr(environment, "_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    versions = {"torch": "2.13.0"}
    monkeypatch.setattr(environment.metadata, "version", versions.__getitem__)
    return versions


def test_torch_agrees_on_this_machine():
    assert on_a_gpu() == has_gpu()


def test_a_cpu_build_of_torch_uses_no_gpu(gpu):
    assert on_a_gpu()
    gpu["torch"] = "2.13.0+cu130"
    assert on_a_gpu()
    gpu["torch"] = "2.13.0+cpu"
    assert not on_a_gpu()


@pytest.mark.parametrize(
    "shown", ["", "-1", " ", "-1,0", "NoDevFiles", "0", "3,1", " 2", "+1", "GPU-8a", "MIG-8a"]
)
def test_a_process_that_is_shown_no_gpu_uses_none_as_torch_does(gpu, monkeypatch, shown):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert on_a_gpu() == bool(torch.cuda._parse_visible_devices())


KEEPS = """
import os
import psutil
from vllm_kl.environment import give_back_memory
rss = lambda: psutil.Process().memory_info().rss >> 20
started = rss()
blocks = [bytearray(40 << 20) for _ in range(5)]
held = rss() - started
del blocks
kept = rss() - started
give_back_memory()
print(held, kept, rss() - started)
"""


def test_a_process_keeps_freed_memory_until_it_gives_it_back():
    environment = {**os.environ, **ON_A_CPU}
    done = subprocess.run([sys.executable, "-c", KEEPS], env=environment, stdout=subprocess.PIPE, check=True)
    held, kept, given_back = map(int, done.stdout.split())  # MiB
    assert held > 190
    assert kept > 190
    assert given_back < 10


@pytest.mark.parametrize(
    ("library", "keeps"),
    [("glibc 2.36", True), ("glibc 2.35", True), ("glibc 2.34", False), ("musl 1", False)],
)
def test_a_glibc_that_takes_no_large_threshold_gets_none(monkeypatch, library, keeps):
    monkeypatch.setattr(os, "confstr", lambda name: library)
    assert bool(environment._keeps_memory()) == keeps


def test_another_c_library_keeps_nothing(monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown)
    assert environment._keeps_memory() == {}
