"""An engine that dies during a push: the error names the version that served last."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import tiny
from vllm_kl import VLLMScorer
from vllm_kl.errors import EngineError
from vllm_kl.weights import checkpoint
from vllm_kl.weights.push import push_weights


def test_an_owned_engine_that_dies_during_a_push_names_its_last_version_and_leaves_no_weights(
    folders, states
):
    with VLLMScorer(str(folders[0]), **tiny.ENGINE_OPTIONS) as scorer:
        push_weights(scorer, states[2])
        first = checkpoint.Path(scorer.weights.source)
        assert first.exists()
        push_weights(scorer, states[1], version=7)
        assert not first.exists()
        last = checkpoint.Path(scorer.weights.source)
        os.kill(scorer._engine.pid, 9)
        with pytest.raises(
            EngineError,
            match=r"the engine process died(?s:.*)No engine serves any more; version 7 was the last",
        ):
            push_weights(scorer, states[2])
        assert last.exists()
    assert not last.exists()


# Starts three engines, one after the other, and kills the process of each during a push.
DYING = """
import asyncio
import sys
import threading

import psutil
from transformers import AutoModelForCausalLM
from vllm import LLM
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_kl import errors, push_weights, push_weights_async
from vllm_kl.weights import checkpoint

OPTIONS = {
    "model": sys.argv[1],
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 64,
    "kv_cache_memory_bytes": 16 << 20,
}


def core_of_the_engine():
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    (core,) = [child for child in children if "EngineCore" in child.name()]
    return core


def kill(core):
    for process in [*core.children(recursive=True), core]:
        process.kill()


def tell(error):
    print("caught", error, "|", type(error.__cause__).__name__, flush=True)


def before_the_load(model):
    llm = LLM(**OPTIONS)
    push_weights(llm, model, version=7)
    core, write = core_of_the_engine(), checkpoint.Skeleton.write
    checkpoint.Skeleton.write = lambda self, state: (write(self, state), kill(core))[0]
    try:
        push_weights(llm, model)
    except errors.EngineError as error:
        tell(error)
    checkpoint.Skeleton.write = write


def in_the_load(model):
    llm = LLM(**OPTIONS)
    push_weights(llm, model, version=7)
    core, rpc = core_of_the_engine(), llm.llm_engine.collective_rpc

    def stop_and_kill(*args):
        core.suspend()  # the call is on its way when the process dies
        threading.Timer(1, kill, [core]).start()
        return rpc(*args)

    llm.llm_engine.collective_rpc = stop_and_kill
    try:
        push_weights(llm, model)
    except errors.EngineError as error:
        tell(error)


async def in_the_load_of_an_async_llm(model):
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(disable_log_stats=True, **OPTIONS))
    await push_weights_async(engine, model, version=7)
    core, rpc = core_of_the_engine(), engine.collective_rpc

    async def stop_and_kill(*args):
        core.suspend()
        asyncio.get_running_loop().call_later(1, kill, core)
        return await rpc(*args)

    engine.collective_rpc = stop_and_kill
    try:
        await push_weights_async(engine, model)
    except errors.EngineError as error:
        tell(error)


if __name__ == "__main__":
    model, when = AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]
    if when == "in the load of an AsyncLLM":
        asyncio.run(in_the_load_of_an_async_llm(model))
    else:
        {"before the load": before_the_load, "in the load": in_the_load}[when](model)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("when", ["before the load", "in the load", "in the load of an AsyncLLM"])
def test_a_shared_engine_whose_process_dies_during_a_push_says_which_version_served_last(
    folders, tmp_path, when
):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    done = subprocess.run(
        [sys.executable, str(script), str(folders[0]), when],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    (caught,) = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("caught")]
    assert "No engine serves any more; version 7 was the last." in caught[0]
    assert caught[1] == "EngineDeadError"
