"""What a benchmark tells about its machine."""

from __future__ import annotations

import sys

import pytest
import torch

from vllm_kl import __version__
from vllm_kl.bench import report
from vllm_kl.bench.report import machine


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """Return the function that puts a script in the place of the driver's command."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(script):
        tmp_path.joinpath("nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        tmp_path.joinpath("nvidia-smi").chmod(0o755)

    return write


def test_the_gpu_is_told_with_its_memory_and_its_driver(nvidia_smi):
    nvidia_smi("echo 'NVIDIA L4, 23034 MiB, 580.1'")
    hardware = machine()["hardware"]
    assert (hardware["GPU"], hardware["driver"]) == ("NVIDIA L4, 23034 MiB", "580.1")


@pytest.mark.parametrize(
    "script", ["echo 'NVIDIA-SMI has failed, because it, or its driver, is broken'; exit 9", "echo '[N/A]'"]
)
def test_a_broken_driver_is_no_gpu_and_no_error(nvidia_smi, script):
    nvidia_smi(script)
    assert machine()["hardware"].keys().isdisjoint({"GPU", "driver"})


def test_16_bit_products_of_the_cpu_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "_CPUS", tmp_path / "cpuinfo")
    own = torch.backends.cpu.get_cpu_capability()
    assert report.cpu_use() == {"instructions": own, "threads": torch.get_num_threads()}
    tmp_path.joinpath("cpuinfo").write_text("model name\t: a CPU\nflags\t\t: fpu amx_bf16 avx512_bf16\n")
    assert report.cpu_use()["instructions"] == f"{own}, AVX512_BF16, AMX_BF16"
    assert report.machine()["hardware"]["CPU"].startswith("a CPU, ")


def test_a_package_whose_metadata_are_missing_has_no_version(monkeypatch, tmp_path):
    for name in ("sglang-0.5.dist-info", "of_no_interest-1.dist-info"):
        tmp_path.joinpath(name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    versions = machine()["versions"]
    assert versions["vllm-kl"] == __version__
    assert "torch" in versions
    assert "sglang" not in versions
