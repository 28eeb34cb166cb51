"""An owned engine ends with its owner, however the owner ends; and an engine that dies says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from vllm_kl import VLLMScorer
from vllm_kl.errors import EngineError, OptionError

OWNER = """
import sys, time
from vllm_kl import VLLMScorer
scorer = VLLMScorer(sys.argv[1], dtype="float32", max_model_len=64, kv_cache_memory_bytes=16 << 20)
scorer.score([[1, 2, 3]])
print(scorer._engine.pid, flush=True)
if sys.argv[2] == "exit":
    sys.exit(0)
if sys.argv[2] == "exception":
    raise ValueError("the owner's own")
time.sleep(600)
"""
WITHIN_S = 10.0


def alive(group):
    """The processes of a process group that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def wait_until_gone(group):
    deadline = time.monotonic() + WITHIN_S
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive(group)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("way", "multiprocessing"),
    [("exit", "0"), ("exception", "0"), (signal.SIGTERM, "0"), (signal.SIGKILL, "0"), (signal.SIGKILL, "1")],
    ids=["exit", "exception", "SIGTERM", "SIGKILL", "SIGKILL-of-an-engine-with-processes-of-its-own"],
)
def test_engine_processes_end_with_their_owner(ref_path, way, multiprocessing):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(ref_path), str(way)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing},
    ) as owner:
        group = int(owner.stdout.readline())
        if isinstance(way, signal.Signals):
            assert len(alive(group)) >= (3 if multiprocessing == "1" else 1)
            owner.send_signal(way)
        owner.wait(60)
    assert wait_until_gone(group) == []


@pytest.fixture(scope="module")
def doomed(ref_path):
    with VLLMScorer(str(ref_path), dtype="float32", max_model_len=64, kv_cache_memory_bytes=16 << 20) as scorer:
        yield scorer


class TestDeath:
    def test_an_engine_that_dies_says_so_and_leaves_nothing(self, doomed):
        group = doomed._engine.pid
        os.kill(group, signal.SIGKILL)
        with pytest.raises(EngineError, match="the engine process died"):
            doomed.score([[1, 2, 3]])
        assert wait_until_gone(group) == []

    def test_after_that_the_engine_is_closed(self, doomed):
        with pytest.raises(EngineError, match="the engine is closed: make a new VLLMScorer"):
            doomed.score([[1, 2, 3]])
        doomed.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_modl_len": 64}, OptionError, "unknown engine option 'max_modl_len'.*Did you mean max_model_len"),
        ({"max_model_len": 10**9}, EngineError, "(?s)vLLM failed: .*max_model_len"),
    ],
)
def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(ref_path, options, error, message):
    children = psutil.Process().children()
    with pytest.raises(error, match=message):
        VLLMScorer(str(ref_path), **options)
    assert psutil.Process().children() == children


def test_importing_the_package_loads_neither_vllm_nor_ray_nor_torchrl():
    code = "import sys, vllm_kl; print([m for m in ('vllm', 'ray', 'torchrl', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_owner_never_imports_vllm():
    code = (
        "import sys; from vllm_kl import VLLMScorer; print([m for m in ('vllm', 'ray', 'torchrl') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


TRAINER = """
import sys
from transformers import AutoModelForCausalLM
from vllm_kl import VLLMScorer, push_weights
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
scorer = VLLMScorer(sys.argv[1], dtype="float32", max_model_len=64, kv_cache_memory_bytes=16 << 20)
print(scorer._engine.pid, flush=True)
while True:
    print(push_weights(scorer, model), flush=True)
"""


def test_a_trainer_that_is_killed_while_it_pushes_leaves_no_engine_behind(ref_path):
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(ref_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as trainer:
        group = int(trainer.stdout.readline())
        while int(trainer.stdout.readline()) < 3:
            pass
        assert alive(group)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait(60)
    assert wait_until_gone(group) == []
