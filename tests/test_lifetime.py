"""An owned engine ends with its owner, however the owner ends; and an engine that dies says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from vllm_kl import VLLMScorer, orphans
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
        ({"max_model_len": 10**9}, OptionError, "engine option max_model_len=1000000000 does not work. vLLM failed: "),
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


SHARED_TRAINER = """
import sys
import psutil
from transformers import AutoModelForCausalLM
from vllm import LLM
from vllm_kl import push_weights
if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    llm = LLM(sys.argv[1], enforce_eager=True, dtype="float32", max_model_len=64, kv_cache_memory_bytes=16 << 20)
    push_weights(llm, model)
    print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
    while True:
        push_weights(llm, model)
"""
# vLLM forks on a GPU: the fork loads no plugins, its parent has.
FORKING_TRAINER = """
import multiprocessing, time
from vllm_kl import orphans, plugin
plugin.register()
folder = orphans.new_folder(orphans.SHARED_MEMORY)
core = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), name="EngineCore_DP0")
core.start()
print(core.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("code", [SHARED_TRAINER, FORKING_TRAINER], ids=["spawned", "forked"])
def test_a_trainer_that_is_killed_leaves_neither_the_engine_of_its_policy_nor_weights(ref_path, tmp_path, code):
    script = tmp_path / "trainer.py"
    script.write_text(code)
    with subprocess.Popen(
        [sys.executable, str(script), str(ref_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    ) as trainer:
        children = [int(pid) for pid in trainer.stdout.readline().split()]
        assert children
        assert all(map(runs, children))
        assert weights_left_by(trainer.pid)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait(60)
    deadline = time.monotonic() + WITHIN_S
    while (any(map(runs, children)) or weights_left_by(trainer.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in children if runs(pid)] == []
    assert weights_left_by(trainer.pid) == []


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def weights_left_by(pid):
    return list(orphans.SHARED_MEMORY.glob(f"{orphans.PREFIX}_{pid}_*"))


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
    assert weights_left_by(trainer.pid) == []
