"""An owned engine ends with its owner, however the owner ends; and an engine that dies says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests import shm
from vllm_kl import VLLMScorer, lifetime
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


LEAVES = """
import multiprocessing, os, sys, time
from multiprocessing.shared_memory import SharedMemory
from vllm_kl.lifetime import kill_group
lock = multiprocessing.get_context("spawn").Lock()
memory = SharedMemory(create=True, size=64)
print(f"sem.{lock._semlock.name[1:]}", memory.name, flush=True)
if sys.argv[1] == "by itself":
    kill_group(os.getpgrp())
time.sleep(600)
"""


@pytest.mark.parametrize("way", ["running", "stopped", "by itself"])
def test_a_group_that_is_killed_leaves_neither_semaphores_nor_shared_memory(way):
    leaves = [sys.executable, "-c", LEAVES, way]
    with subprocess.Popen(leaves, stdout=subprocess.PIPE, text=True, start_new_session=True) as leader:
        names = set(leader.stdout.readline().split())
        if way != "by itself":
            assert names <= shm.names_of(leader.pid)
            assert len(alive(leader.pid)) == 2  # with Python's resource tracker
            if way == "stopped":
                os.killpg(leader.pid, signal.SIGSTOP)
            lifetime.kill_group(leader.pid)
            assert alive(leader.pid) == []
        assert leader.wait(10) == -signal.SIGKILL
    assert wait_until_gone(leader.pid) == []
    assert not shm.left(names)


def test_a_tracker_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(lifetime, "_KILL_S", 0.2)
    script = "import time; 'multiprocessing.resource_tracker'; print(flush=True); time.sleep(600)"
    what = [sys.executable, "-c", script]
    with subprocess.Popen(what, stdout=subprocess.PIPE, text=True, start_new_session=True) as leader:
        leader.stdout.readline()
        lifetime.kill_group(leader.pid)
        assert leader.wait(10) == -signal.SIGKILL


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("way", "multiprocessing"),
    [
        pytest.param("exit", "0", marks=pytest.mark.nightly),
        pytest.param("exception", "0", marks=pytest.mark.nightly),
        pytest.param(signal.SIGTERM, "0", marks=pytest.mark.nightly),
        (signal.SIGKILL, "0"),
        pytest.param(signal.SIGKILL, "1", marks=pytest.mark.nightly),
    ],
    ids=["exit", "exception", "SIGTERM", "SIGKILL", "SIGKILL-of-an-engine-with-processes-of-its-own"],
)
def test_engine_processes_end_with_their_owner(ref_path, tmp_path, way, multiprocessing):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(ref_path), str(way)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing, "TMPDIR": str(tmp_path)},
    ) as owner:
        group = int(owner.stdout.readline())
        names = shm.names_of(group)
        if isinstance(way, signal.Signals):
            assert names
            assert len(alive(group)) >= (3 if multiprocessing == "1" else 1)
            owner.send_signal(way)
        owner.wait(60)
    assert wait_until_gone(group) == []
    assert not shm.left(names)
    if not isinstance(way, signal.Signals):
        assert list(tmp_path.glob("vllm*")) == []  # the engine's log, and vLLM's file by which workers meet


@pytest.fixture(scope="module")
def doomed(ref_path):
    with VLLMScorer(
        str(ref_path), dtype="float32", max_model_len=64, kv_cache_memory_bytes=16 << 20
    ) as scorer:
        yield scorer


class TestDeath:
    def test_an_engine_that_dies_says_so_and_leaves_nothing(self, doomed):
        group = doomed._engine.pid
        names = shm.names_of(group)
        assert names
        os.kill(group, signal.SIGKILL)
        with pytest.raises(EngineError, match="the engine process died"):
            doomed.score([[1, 2, 3]])
        assert wait_until_gone(group) == []
        assert not shm.left(names)

    def test_after_that_the_engine_is_closed(self, doomed):
        with pytest.raises(EngineError, match="the engine is closed: make a new VLLMScorer"):
            doomed.score([[1, 2, 3]])
        doomed.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"max_modl_len": 64},
            OptionError,
            "unknown engine option 'max_modl_len'.*Did you mean max_model_len",
        ),
        (
            {"max_model_len": 10**9},
            OptionError,
            "engine option max_model_len=1000000000 does not work. vLLM failed: ",
        ),
    ],
)
def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(ref_path, options, error, message):
    children = psutil.Process().children()
    with pytest.raises(error, match=message):
        VLLMScorer(str(ref_path), **options)
    assert psutil.Process().children() == children


def test_importing_the_package_loads_neither_vllm_nor_ray_nor_torchrl():
    code = "import sys, vllm_kl; print([m for m in ('vllm', 'ray', 'torchrl', 'torch') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_the_owner_never_imports_vllm():
    code = (
        "import sys; from vllm_kl import VLLMScorer; "
        "print([m for m in ('vllm', 'ray', 'torchrl') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


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
    options = {"dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 16 << 20}
    llm = LLM(sys.argv[1], enforce_eager=True, **options)
    push_weights(llm, model)
    print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
    while True:
        push_weights(llm, model)
"""
# vLLM forks on a GPU, and the worker is in the core's process.
FORKING_TRAINER = """
import multiprocessing, os, time
from vllm_kl import lifetime
from vllm_kl.plugin import taken_engines
folder = lifetime.new_folder(lifetime.SHARED_MEMORY)
def serve():
    taken_engines._end_with(os.getppid())
    time.sleep(600)
core = multiprocessing.get_context("fork").Process(target=serve, name="EngineCore_DP0")
core.start()
print(core.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "code",
    [pytest.param(SHARED_TRAINER, marks=pytest.mark.nightly), FORKING_TRAINER],
    ids=["spawned", "forked"],
)
def test_a_trainer_that_is_killed_leaves_neither_the_engine_of_its_policy_nor_weights(
    ref_path, tmp_path, code
):
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
    return list(lifetime.SHARED_MEMORY.glob(f"{lifetime.PREFIX}_{pid}_*"))


@pytest.mark.nightly
def test_a_trainer_that_is_killed_while_it_pushes_leaves_no_engine_behind(ref_path):
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(ref_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as trainer:
        group = int(trainer.stdout.readline())
        while int(trainer.stdout.readline()) < 3:
            pass
        assert alive(group)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait(60)
    assert wait_until_gone(group) == []
    assert weights_left_by(trainer.pid) == []


STOCK = """
import json, os, sys, threading
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
from vllm import LLM, SamplingParams

def threads(worker):
    import threading
    return [thread.name for thread in threading.enumerate()]

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, dtype="float32", max_model_len=128,
              kv_cache_memory_bytes=16 << 20, max_num_batched_tokens=96, max_num_seqs=4,
              skip_tokenizer_init=True, use_tqdm_on_load=False, disable_log_stats=False)
    prompts = [{"prompt_token_ids": list(range(5, 75)) + [80 + n % 3, 9]} for n in range(9)]
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=2, prompt_logprobs=0, detokenize=False,
                            ignore_eos=True)
    found = []
    for skip in (False, True):
        params.skip_reading_prefix_cache = skip
        for output in llm.generate(prompts, params, use_tqdm=False):
            (sample,) = output.outputs
            rows = (*output.prompt_logprobs[1:], *sample.logprobs)
            log_probs = [[(t, e.logprob.hex()) for t, e in row.items()] for row in rows]
            found.append([output.num_cached_tokens, list(sample.token_ids), log_probs])
    steps = {m.name: m.count for m in llm.get_metrics() if m.name == "vllm:iteration_tokens_total"}
    names = [t for w in llm.collective_rpc(threads) for t in w]
    print(json.dumps({"found": found, "steps": steps, "threads": names}), flush=True)
    llm.llm_engine.engine_core.shutdown()
"""


@pytest.mark.nightly
def test_an_engine_that_is_nobodys_of_ours_is_left_alone(ref_path, tmp_path):
    """An engine gives the same bits, cache hits and steps with the package, without it, and with it off."""
    script = tmp_path / "stock.py"
    script.write_text(STOCK)
    runs = []
    for environment in ({}, {"VLLM_PLUGINS": ""}, {"VLLMKL_PLUGIN": "0"}):
        done = subprocess.run(
            [sys.executable, str(script), str(ref_path)],
            capture_output=True,
            text=True,
            check=True,
            timeout=240,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment},
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    assert runs[0]["found"] == runs[1]["found"] == runs[2]["found"]
    assert runs[0]["steps"] == runs[1]["steps"] == runs[2]["steps"] != {}
    assert not [name for run in runs for name in run["threads"] if "vllm_kl" in name]


@pytest.mark.nightly
def test_turned_off_it_cannot_give_an_engine_of_its_own(ref_path, monkeypatch):
    monkeypatch.setenv("VLLMKL_PLUGIN", "0")
    with pytest.raises(
        OptionError, match="VLLMKL_PLUGIN=0 turns off the plugin, which an engine of this package needs"
    ):
        VLLMScorer(str(ref_path), dtype="float32", max_model_len=64)
