"""New weights for live engines: every log-prob is of the version that it claims, and what fails changes nothing."""

from __future__ import annotations

import asyncio
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm import vLLMWrapper
from torchrl.modules.llm.policies import Tokens
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import VLLMReference, VLLMScorer, lifetime
from vllm_kl.batch.origins import GENERATED_BY, UNKNOWN
from vllm_kl.errors import EngineError, FrozenError, OptionError, WeightsError
from vllm_kl.plugin import adoption
from vllm_kl.plugin.weights import ADOPT, PREPARE, READY
from vllm_kl.transforms.engine_policy_version import EnginePolicyVersion
from vllm_kl.transforms.sync_scheme import VLLMSyncScheme
from vllm_kl.transforms.watched_policy import watch
from vllm_kl.transforms.weight_updater import VLLMWeightUpdater
from vllm_kl.weights import checkpoint, loading
from vllm_kl.weights import live as weights_module
from vllm_kl.weights.push import finish_update, push_weights, push_weights_async, weights_of

IDS = list(range(5, 80))  # more than two blocks: the prefix cache has something to keep


@pytest.fixture(scope="module")
def folders(tied_paths):
    return tied_paths[:3]


@pytest.fixture(scope="module")
def oracles(folders):
    return [torch.tensor(Oracle(folder).log_probs(IDS)[1:], dtype=torch.float64) for folder in folders]


@pytest.fixture(scope="module")
def states(folders):
    return [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]


@pytest.fixture(scope="module")
def llm(tied_llm):
    return tied_llm


@pytest.fixture(scope="module")
def owned(folders):
    with VLLMScorer(str(folders[0]), **tiny.ENGINE_OPTIONS) as scorer:
        yield scorer


@pytest.fixture(params=["shared", "owned"])
def engine(request, states):
    """A vllm.LLM in this process, or a scorer's engine in its own; with the weights of model 0."""
    engine = request.getfixturevalue({"shared": "llm", "owned": "owned"}[request.param])
    push_weights(engine, states[0])
    return engine


def scorer_on(engine):
    return engine if isinstance(engine, VLLMScorer) else VLLMScorer(engine)


def model_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()


def error_of(engine, oracle, *, share_prefix=True):
    scorer = scorer_on(engine)
    scorer.share_prefix = share_prefix
    return float((scorer.score([IDS])[0].double() - oracle).abs().max())


def generated(llm, n=8):
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(max_tokens=n, temperature=0.0, logprobs=0, ignore_eos=True)
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=IDS)], params, use_tqdm=False)
    (sample,) = output.outputs
    return list(sample.token_ids), [next(iter(entry.values())).logprob for entry in sample.logprobs], output


def test_after_a_push_every_log_prob_is_that_of_the_new_weights_cached_and_uncached(engine, states, oracles):
    version = weights_of(engine).version
    for step, which in enumerate([1, 2, 0, 1], start=1):
        assert push_weights(engine, states[which]) == version + step == weights_of(engine).version
        for share_prefix in (True, True, False):
            assert error_of(engine, oracles[which], share_prefix=share_prefix) < LOG_PROB_TOLERANCE
        assert all(error_of(engine, oracles[other]) > 0.1 for other in range(3) if other != which)


def test_what_the_policy_generates_after_a_push_comes_from_the_new_weights(llm, folders, states):
    for which in (0, 1, 2):
        version = push_weights(llm, states[which])
        response, log_probs, output = generated(llm)
        truth = Oracle(folders[which]).log_probs(IDS + response)[len(IDS) :]
        assert log_probs == pytest.approx(truth, abs=2e-5)
        assert [span.version for span in output.outputs[0].weight_versions] == [str(version)]


def test_scores_carry_the_version_that_made_them(engine, states):
    scorer = scorer_on(engine)
    version = push_weights(engine, states[1], version=weights_of(engine).version + 5)
    assert scorer.weight_version == version
    scorer.score([IDS])
    assert scorer.stats.weight_version == version


@pytest.mark.parametrize("as_what", ["module", "tensordict", "untied", "half", "wrapper"])
def test_any_form_of_the_weights_will_do(llm, folders, states, oracles, tokenizer, as_what):
    from torchrl.modules.llm import TransformersWrapper

    model = AutoModelForCausalLM.from_pretrained(folders[1])
    source = {
        "module": model,
        "tensordict": TensorDict.from_module(model),
        "untied": {name: t for name, t in states[1].items() if name != "lm_head.weight"},
        "half": {name: t.double() for name, t in states[1].items()},
        "wrapper": TransformersWrapper(model, tokenizer=tokenizer, generate=False, input_mode="tokens"),
    }[as_what]
    push_weights(llm, states[0])
    push_weights(llm, source)
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_names_of_a_checkpoint_on_disk_are_written_for_every_architecture(tmp_path, name):
    """transformers fuses experts in memory, and vLLM reads them as they are on disk."""
    folder = tiny.build_architecture(tmp_path / name, name)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    skeleton = checkpoint.Skeleton(str(folder))
    written = skeleton.write(skeleton.checked(state))
    assert tensors_in(written.folder).keys() == tensors_in(folder).keys()
    for key, tensor in tensors_in(folder).items():
        assert torch.equal(tensor, tensors_in(written.folder)[key])


def tensors_in(folder):
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


def with_one(tensor, number):
    return tensor.index_fill(0, torch.tensor(len(tensor) - 1), number)


NORM, V = "model.norm.weight", "model.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, NORM), rf"missing {NORM}, unknown nothing"),
        (lambda s: {**s, "value_head.weight": s[NORM]}, r"missing nothing, unknown value_head\.weight"),
        (lambda s: {**s, NORM: s[NORM][:-1]}, rf"{NORM}: got shape \[63\], expected \[64\]"),
        (lambda s: {**s, NORM: s[NORM] * math.nan}, rf"{NORM}: 64 of 64 numbers are not finite"),
        (
            lambda s: {**s, NORM: with_one(s[NORM].half(), -math.inf)},
            rf"{NORM}: 1 of 64 numbers are not finite",
        ),
        (
            lambda s: {**s, NORM: with_one(s[NORM].bfloat16(), math.nan)},
            rf"{NORM}: 1 of 64 numbers are not finite",
        ),
        (
            lambda s: {**s, "lm_head.weight": s["lm_head.weight"] + 1},
            "lm_head.weight and .* are tied .* but differ",
        ),
        (lambda s: {"base_model.model." + k: t for k, t in s.items()}, "PEFT model: pass merge_and_unload"),
        (lambda s: {**s, NORM: [1.0]}, f"{NORM}: expected a tensor, got list"),
        (lambda s: list(s), "expected a state dict, a tensordict or a module, got list"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_before_the_engine_is_touched(
    engine, states, oracles, change, message, monkeypatch
):
    version = weights_of(engine).version
    monkeypatch.setattr(
        type(weights_of(engine)), "load", lambda *_, **__: pytest.fail("the engine was touched")
    )
    with pytest.raises(WeightsError, match=message):
        push_weights(engine, change(states[1]))
    assert weights_of(engine).version == version
    assert error_of(engine, oracles[0]) < LOG_PROB_TOLERANCE


@pytest.mark.parametrize("version", [0, -1, True, "7"])
def test_a_version_that_is_not_above_the_serving_one_is_refused(llm, states, version):
    with pytest.raises(WeightsError, match="expected an int above"):
        push_weights(llm, states[0], version=version)


@pytest.fixture
def two_at_once(monkeypatch):
    """Let two threads push; neither loads before both have chosen what to ask for."""
    barrier = threading.Barrier(2)
    write = checkpoint.Skeleton.write

    def wait_and_write(self, state):
        barrier.wait(60)
        return write(self, state)

    monkeypatch.setattr(checkpoint.Skeleton, "write", wait_and_write)

    def push(engine, states, **kwargs):
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(push_weights, engine, state, **kwargs) for state in states]
            return [future.exception() or future.result() for future in futures]

    return push


def test_two_pushes_at_once_get_a_version_each(engine, states, oracles, two_at_once):
    before = weights_of(engine).version
    versions = two_at_once(engine, [states[1], states[2]])
    assert sorted(versions) == [before + 1, before + 2]
    assert weights_of(engine).version == before + 2
    assert error_of(engine, oracles[1 + versions.index(before + 2)]) < LOG_PROB_TOLERANCE


def test_a_version_that_was_taken_in_the_meantime_is_refused(engine, states, oracles, two_at_once):
    wanted = weights_of(engine).version + 3
    results = two_at_once(engine, [states[1], states[2]], version=wanted)
    (refusal,) = [result for result in results if isinstance(result, WeightsError)]
    assert f"expected an int above {wanted}" in str(refusal)
    assert error_of(engine, oracles[1 + results.index(wanted)]) < LOG_PROB_TOLERANCE


def test_a_load_that_fails_halfway_touches_nothing(llm, states, oracles, monkeypatch):
    version = push_weights(llm, states[1])
    model = model_of(llm)
    load = type(model).load_weights

    def fail(self, weights):
        weights = list(weights)
        load(self, weights[: len(weights) // 2])
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "load_weights", fail)
        with pytest.raises(
            WeightsError, match=rf"out of memory\)\. Nothing was touched: version {version} goes on serving"
        ):
            push_weights(llm, states[2])
        assert weights_of(llm).version == version
        assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE
    push_weights(llm, states[2])
    assert error_of(llm, oracles[2]) < LOG_PROB_TOLERANCE


def test_what_fails_after_workers_took_over_is_put_back(llm, states, oracles, monkeypatch):
    version = push_weights(llm, states[1])
    adopt, failures = adoption.adopt, [RuntimeError("a worker died")]

    def fail_once(found):
        adopt(found)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(adoption, "adopt", fail_once)
    with pytest.raises(
        WeightsError, match=rf"a worker died\)\. Version {version} was put back and goes on serving"
    ):
        push_weights(llm, states[2])
    assert weights_of(llm).version == version
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


def interrupted_in_the_load(llm, monkeypatch):
    model = model_of(llm)
    load = type(model).load_weights

    def interrupt(self, weights):
        load(self, list(weights)[:10])
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "load_weights", interrupt)


def interrupted_while_it_copies(llm, monkeypatch):
    copy = torch.Tensor.copy_
    copied = []

    def interrupt(self, *args, **kwargs):
        copied.append(1)
        if len(copied) == 5:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return copy(self, *args, **kwargs)

    adopt = adoption.adopt

    def adopt_and_interrupt(found):
        monkeypatch.undo()
        monkeypatch.setattr(torch.Tensor, "copy_", interrupt)
        adopt(found)

    monkeypatch.setattr(adoption, "adopt", adopt_and_interrupt)


def interrupted_after_the_stamp(llm, monkeypatch):
    stamp = llm.llm_engine.set_weight_version

    def interrupt(name):
        stamp(name)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.llm_engine, "set_weight_version", interrupt)


@pytest.mark.parametrize(
    "interrupted", [interrupted_in_the_load, interrupted_while_it_copies, interrupted_after_the_stamp]
)
def test_a_push_that_is_interrupted_leaves_the_old_weights_and_the_old_version(
    llm, states, oracles, monkeypatch, interrupted
):
    version = push_weights(llm, states[1])
    interrupted(llm, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        push_weights(llm, states[2])
    assert weights_of(llm).version == version
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


def test_an_owner_that_is_interrupted_while_its_engine_loads_asks_what_came_of_it(
    owned, states, oracles, monkeypatch
):
    version = push_weights(owned, states[1])
    answers = type(owned._engine._child._calls).answers

    def interrupt(self, call_id):
        next(answers(self, call_id))  # the engine has done it, and its owner does not hear of it
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Skeleton, "write", written_then(monkeypatch, owned, interrupt))
    with pytest.raises(KeyboardInterrupt):
        push_weights(owned, states[2])
    assert owned.weight_version == version + 1
    assert error_of(owned, oracles[2]) < LOG_PROB_TOLERANCE
    assert owned.stats.weight_version == version + 1
    assert checkpoint.Path(owned.weights.source).exists()
    assert push_weights(owned, states[0]) == version + 2
    assert error_of(owned, oracles[0]) < LOG_PROB_TOLERANCE


def written_then(monkeypatch, owned, interrupt):
    """Interrupt the call after the weights were written: the load."""
    write = checkpoint.Skeleton.write

    def write_then(self, state):
        written = write(self, state)
        monkeypatch.setattr(type(owned._engine._child._calls), "answers", interrupt)
        return written

    return write_then


def test_where_the_old_weights_cannot_be_put_back_no_version_is_claimed(llm, states, oracles, monkeypatch):
    version = push_weights(llm, states[0])

    def fail(found):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(adoption, "adopt", fail)
        with pytest.raises(WeightsError, match="could not be put back"):
            push_weights(llm, states[2])
    with pytest.raises(WeightsError, match="not known since a push failed"):
        VLLMScorer(llm, canary=False).score([IDS])
    assert push_weights(llm, states[0]) == version + 1  # what the error says
    assert error_of(llm, oracles[0]) < LOG_PROB_TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight"],
)
def test_a_tensor_that_the_model_does_not_take_is_an_error_whatever_names_it_returns(
    llm, states, oracles, monkeypatch, name
):
    """v_proj and up_proj are parts of fused parameters, whose names are returned for their other parts."""
    push_weights(llm, states[0])
    model = model_of(llm)
    load = type(model).load_weights

    def lose_one(self, weights):
        load(self, [w for w in weights if w[0] != name])
        return {name for name, _ in self.named_parameters()}

    fused = name.replace("v_proj", "qkv_proj").replace("up_proj", "gate_up_proj")
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "load_weights", lose_one)
        with pytest.raises(
            WeightsError, match=rf"no weights for {fused}: the checkpoint lacks them.*Nothing was touched"
        ):
            push_weights(llm, states[1])
    assert error_of(llm, oracles[0]) < LOG_PROB_TOLERANCE


def test_an_engine_without_the_plugin_is_left_alone_and_told_the_cure(llm, states, oracles, monkeypatch):
    from vllm.v1.worker.worker_base import WorkerBase

    version = push_weights(llm, states[1])
    monkeypatch.delattr(WorkerBase, PREPARE)
    monkeypatch.delattr(WorkerBase, READY)
    with pytest.raises(
        WeightsError, match=r"not loaded the plugin vllm_kl.*nothing was touched.*VLLM_PLUGINS"
    ):
        push_weights(llm, states[2])
    assert weights_of(llm).version == version
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


def test_a_cache_that_is_busy_before_the_load_leaves_the_version_as_it_was(llm, states, oracles, monkeypatch):
    version = push_weights(llm, states[1])
    with monkeypatch.context() as patch:
        patch.setattr(llm.llm_engine, "reset_prefix_cache", lambda *_: False)
        with pytest.raises(WeightsError, match="blocks are in use. Push when every request is finished"):
            push_weights(llm, states[2])
    assert weights_of(llm).version == version
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


def test_what_a_kv_connector_keeps_of_the_old_weights_is_dropped(llm, states, oracles, monkeypatch):
    """An engine with kv_offloading_size reads KV from there that the prefix cache does not hold any more."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    answers = [True, True, False]  # before a load and after it; then it is busy
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "connector", SimpleNamespace(reset_cache=lambda: answers.pop(0)))
        version = push_weights(llm, states[1])
        assert answers == [False]
        with pytest.raises(WeightsError, match="prefix cache could not be emptied"):
            push_weights(llm, states[2])
    assert weights_of(llm).version == version
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


# The prefix cache of a scorer's engine is busy from the first look after a load until the second push.
BUSY = """
import sys
if any("_child" in argument for argument in sys.orig_argv):
    from vllm.v1.core.block_pool import BlockPool
    reset, calls = BlockPool.reset_prefix_cache, []
    def busy(self):
        calls.append(1)
        return reset(self) and len(calls) not in (2, 3)
    BlockPool.reset_prefix_cache = busy
"""


def test_an_owned_engine_whose_weights_are_not_known_says_so_and_lives(
    folders, states, oracles, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(BUSY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with VLLMScorer(str(folders[0]), canary=False, **tiny.ENGINE_OPTIONS) as scorer:
        with pytest.raises(WeightsError, match="which weights serve is not known"):
            push_weights(scorer, states[1])
        for _ in range(2):
            with pytest.raises(WeightsError, match="push again"):
                scorer.weight_version  # noqa: B018
            with pytest.raises(WeightsError, match="push again"):
                scorer.score([IDS, IDS[:-1]])
        assert push_weights(scorer, states[2]) == 1
        assert scorer.weight_version == 1
        assert error_of(scorer, oracles[2]) < LOG_PROB_TOLERANCE


def test_weights_that_do_not_fit_in_memory_say_how_much_they_need_and_leave_nothing(llm, states):
    version = weights_of(llm).version
    before = set(lifetime.SHARED_MEMORY.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a disk that is full
    try:
        with pytest.raises(WeightsError, match=r"[\d,]+ bytes of weights could not be written to .* TMPDIR"):
            push_weights(llm, states[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert weights_of(llm).version == version
    assert not [
        path for path in set(lifetime.SHARED_MEMORY.iterdir()) - before if str(os.getpid()) in path.name
    ]


def test_an_engine_with_unfinished_requests_is_not_pushed_to(llm, states):
    from vllm import SamplingParams

    llm.llm_engine.add_request("0", {"prompt_token_ids": IDS}, SamplingParams(max_tokens=2))
    try:
        with pytest.raises(WeightsError, match="unfinished requests"):
            push_weights(llm, states[1])
    finally:
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()


def test_scores_of_two_versions_never_meet_in_one_batch(owned, states, oracles):
    """Calls and pushes from many threads: each call's numbers are all of the version that it reports."""
    push_weights(owned, states[0], version=1000 * (1 + owned.weight_version // 1000))
    first = owned.weight_version
    stop = threading.Event()

    def score():
        seen = set()
        while not stop.is_set():
            results = owned._engine.score(requests(), share_prefix=True)
            versions = {r.weight_version for r in results}
            assert len(versions) == 1
            which = (versions.pop() - first) % 3
            seen.add(which)
            for result in results:
                error = np.abs(result.values[:, 0] - oracles[which].numpy()).max()
                assert error < LOG_PROB_TOLERANCE
        return seen

    with ThreadPoolExecutor(3) as pool:
        scoring = [pool.submit(score) for _ in range(3)]
        try:
            for step in range(1, 7):
                push_weights(owned, states[step % 3])
        finally:
            stop.set()
        assert set().union(*(future.result() for future in scoring)) == {0, 1, 2}


def requests():
    from vllm_kl.types import ScoreRequest

    return [ScoreRequest(token_ids=np.array(IDS, np.int32), start=1) for _ in range(4)]


def test_an_engine_that_dies_during_a_push_says_which_version_served_last(folders, states):
    with VLLMScorer(str(folders[0]), **tiny.ENGINE_OPTIONS) as scorer:
        push_weights(scorer, states[1], version=7)
        os.kill(scorer._engine.pid, 9)
        with pytest.raises(
            EngineError,
            match=r"the engine process died(?s:.*)No engine serves any more; version 7 was the last",
        ):
            push_weights(scorer, states[2])


DYING = """
import sys
import psutil
from transformers import AutoModelForCausalLM
from vllm import LLM
from vllm_kl import errors, push_weights
from vllm_kl.weights import checkpoint
if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, dtype="float32", max_model_len=64, kv_cache_memory_bytes=16 << 20)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    push_weights(llm, model, version=7)
    (core,) = [p for p in psutil.Process().children() if "EngineCore" in p.name()]
    def kill(*_):
        for process in [core, *core.children(recursive=True)]:
            process.kill()
    if sys.argv[2] == "before the load":
        written = checkpoint.Skeleton.write
        checkpoint.Skeleton.write = lambda self, state: (written(self, state), kill())[0]
    else:
        rpc = llm.llm_engine.collective_rpc
        def stop_and_kill(*args):
            core.suspend()  # the call is on its way when the process dies
            __import__("threading").Timer(1, kill).start()
            return rpc(*args)
        llm.llm_engine.collective_rpc = stop_and_kill
    try:
        push_weights(llm, model)
    except errors.EngineError as error:
        print("caught", error, "|", type(error.__cause__).__name__, flush=True)
"""


ASYNC_DYING = """
import asyncio, sys
import psutil
from transformers import AutoModelForCausalLM
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_kl import errors, push_weights_async
async def main():
    options = {"enforce_eager": True, "dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 16 << 20}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=sys.argv[1], disable_log_stats=True, **options))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    await push_weights_async(engine, model, version=7)
    (core,) = [p for p in psutil.Process().children() if "EngineCore" in p.name()]
    rpc = engine.collective_rpc
    async def stop_and_kill(*args):
        core.suspend()
        asyncio.get_running_loop().call_later(1, core.kill)
        return await rpc(*args)
    engine.collective_rpc = stop_and_kill
    try:
        await push_weights_async(engine, model)
    except errors.EngineError as error:
        print("caught", error, "|", type(error.__cause__).__name__, flush=True)
if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("code", "when"),
    [(DYING, "before the load"), (DYING, "in the load"), (ASYNC_DYING, "in the load")],
    ids=["before-the-load", "in-the-load", "in-the-load-of-an-AsyncLLM"],
)
def test_a_shared_engine_whose_process_dies_during_a_push_says_which_version_served_last(
    folders, tmp_path, code, when
):
    script = tmp_path / "dying.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), str(folders[0]), when],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    (caught,) = [line for line in done.stdout.splitlines() if line.startswith("caught")] or [done.stderr]
    assert "Nothing serves any more; the last that did was version 7." in caught
    assert caught.endswith("| EngineDeadError")


@pytest.mark.timeout(300)
def test_an_engine_that_cannot_take_weights_over_is_started_anew_on_them(
    folders, states, oracles, tmp_path, monkeypatch, caplog
):
    """As one that is compiled on a CPU cannot. Calls of other threads go on, each with one version."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'vllm_kl.engines._child' in ' '.join(sys.orig_argv):\n"
        "    from vllm_kl.plugin import weights\n"
        "    weights._is_compiled = lambda worker: True\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with VLLMScorer(str(folders[0]), **tiny.ENGINE_OPTIONS) as scorer, ThreadPoolExecutor(1) as pool:
        first, is_over = scorer._engine.pid, threading.Event()

        def score_on():
            while not is_over.is_set():
                values = scorer.score([IDS])[0].double()
                assert min(float((values - oracle).abs().max()) for oracle in oracles) < LOG_PROB_TOLERANCE

        scoring = pool.submit(score_on)
        for n, which in enumerate([1, 2], start=1):
            assert push_weights(scorer, states[which]) == scorer.weight_version == n
            assert error_of(scorer, oracles[which]) < LOG_PROB_TOLERANCE
        is_over.set()
        scoring.result(timeout=60)
        assert scorer._engine.pid != first
        assert "served by a new engine" in caplog.text
        assert "compiled code holds values that can only be replaced, not copied" in caplog.text
        wrong = {**states[1], NORM: torch.full_like(states[1][NORM], torch.nan)}
        with pytest.raises(WeightsError, match="not finite"):
            push_weights(scorer, wrong)
        assert error_of(scorer, oracles[2]) < LOG_PROB_TOLERANCE
    assert not psutil.pid_exists(first)


def test_pushed_weights_leave_shared_memory_with_their_engine(folders, states):
    with VLLMScorer(str(folders[0]), **tiny.ENGINE_OPTIONS) as scorer:
        push_weights(scorer, states[1])
        folder = checkpoint.Path(scorer.weights.source)
        push_weights(scorer, states[2])
        assert not folder.exists()
        folder = checkpoint.Path(scorer.weights.source)
        assert folder.exists()
    assert not folder.exists()


def test_what_a_killed_process_left_in_shared_memory_is_removed(states, folders):
    code = (
        "import os; from vllm_kl import lifetime; print(lifetime.new_folder(lifetime.SHARED_MEMORY), flush=True);"
        "input(); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        theirs = checkpoint.Path(owner.stdout.readline().strip())
        first = checkpoint.Skeleton(str(folders[0])).write(states[0])
        assert theirs.exists()
        owner.communicate("\n")
    assert theirs.exists()
    second = checkpoint.Skeleton(str(folders[0])).write(states[0])
    assert not theirs.exists()
    assert first.folder.exists()
    assert second.folder.exists()


def test_a_folder_is_its_owners_whatever_process_ids_say(tmp_path, monkeypatch):
    """Containers that share /dev/shm have process ids of their own."""
    monkeypatch.setattr(lifetime, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # nobody's here
    mine = lifetime.new_folder(tmp_path)
    lifetime.remove_orphans()
    assert mine.exists()
    lifetime.remove(mine)
    assert list(tmp_path.iterdir()) == []


def test_a_fork_neither_keeps_nor_removes_its_parents_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(lifetime, "SHARED_MEMORY", tmp_path)
    mine = lifetime.new_folder(tmp_path)
    ours, theirs = os.pipe(), os.pipe()
    if not (child := os.fork()):
        lifetime.remove(mine)
        os.write(theirs[1], b"x")
        os.read(ours[0], 1)
        os._exit(0)
    os.read(theirs[0], 1)
    try:
        assert mine.exists()
        os.close(lifetime._HELD.pop(mine))  # as if this process had been killed, and not its fork
        lifetime.remove_orphans()
        assert not mine.exists()
    finally:
        os.write(ours[1], b"x")
        os.waitpid(child, 0)
        for end in (*ours, *theirs):
            os.close(end)


# A reference that is proved frozen, and refreshed on purpose.


def test_a_frozen_reference_proves_it_and_one_that_was_moved_is_caught(owned, states):
    moved = {
        name: t + 1e-4 * torch.randn_like(t) for name, t in owned.weights.skeleton.checked(states[0]).items()
    }
    owned.refresh(states[0])
    assert owned.check_frozen() == 0.0
    known = owned._canary._known
    version = push_weights(owned, moved)
    known[version] = known[version - 1]  # as if nobody had said that the weights are others
    with pytest.raises(
        FrozenError, match=rf"the weights of version {version} moved: token \d+ of the canary"
    ):
        owned.check_frozen()
    assert 0 < owned.check_frozen(tolerance=0.1) < 0.1
    with pytest.raises(FrozenError, match="moved"):
        owned.refresh(states[1])  # the average would be of weights that nobody knows


@pytest.mark.parametrize("as_what", ["state dict", "folder", "module"])
def test_a_refresh_changes_the_reference_to_what_was_asked_for(
    folders, owned_fresh, states, oracles, as_what
):
    source = {
        "state dict": states[1],
        "folder": folders[1],
        "module": AutoModelForCausalLM.from_pretrained(folders[1]),
    }[as_what]
    reference = VLLMReference(owned_fresh)
    version = reference.weight_version
    assert reference.refresh(source) == version + 1 == reference.weight_version
    for share_prefix in (True, False):
        assert error_of(owned_fresh, oracles[1], share_prefix=share_prefix) < LOG_PROB_TOLERANCE
    assert owned_fresh.check_frozen() == 0.0


@pytest.fixture
def owned_fresh(owned, states):
    owned._canary._known.clear()
    owned.refresh(states[0])  # remembers
    return owned


def test_an_average_is_of_the_old_weights_and_the_new(owned_fresh, states, folders, tmp_path):
    expected = {name: t.clone().double() for name, t in states[0].items()}
    for _ in range(3):
        owned_fresh.refresh(states[1], ema=0.9)
        expected = {name: 0.9 * expected[name] + 0.1 * states[1][name].double() for name in expected}
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float64)
    model.load_state_dict(expected)
    model.save_pretrained(tmp_path)
    oracle = torch.tensor(Oracle(tmp_path).log_probs(IDS)[1:], dtype=torch.float64)
    assert error_of(owned_fresh, oracle) < LOG_PROB_TOLERANCE


def test_a_push_is_no_refresh(owned_fresh, states):
    """Whoever pushes into a reference's engine has moved the reference: KL against it is another KL."""
    version = push_weights(owned_fresh, states[1])
    with pytest.raises(
        FrozenError, match=rf"version {version} of the weights serves, which no refresh\(\) made"
    ):
        owned_fresh.check_frozen()
    owned_fresh.refresh(states[1])
    assert owned_fresh.check_frozen() == 0.0


def test_an_average_with_a_checkpoint_that_was_written_over_is_refused(folders, states, oracles, tmp_path):
    mine = tmp_path / "model"
    shutil.copytree(folders[0], mine)
    with VLLMScorer(str(mine), **tiny.ENGINE_OPTIONS) as scorer:
        shutil.copy(folders[2] / "model.safetensors", mine)
        with pytest.raises(
            WeightsError, match=r"model' have changed since the engine was started.*without ema= needs"
        ):
            scorer.refresh(states[1], ema=0.5)
        assert scorer.weight_version == 0
        assert error_of(scorer, oracles[0]) < LOG_PROB_TOLERANCE
        assert scorer.refresh(states[1]) == 1
        assert scorer.refresh(states[1], ema=0.5) == 2  # of what was pushed
        assert error_of(scorer, oracles[1]) < LOG_PROB_TOLERANCE


def test_a_checkpoint_that_was_written_over_is_not_put_back(folders, tmp_path):
    """A fake engine: one whose version is still 0 and whose workers fail is not had otherwise."""
    mine = tmp_path / "model"
    shutil.copytree(folders[0], mine)
    record = loading.Record(SimpleNamespace(model=str(mine)))
    record.is_taken = True
    calls = []

    async def call(method, *args):
        calls.append((method, *args))
        if args[:1] == (ADOPT,):
            raise RuntimeError("out of memory")
        return {"get_weight_version": "default", "collective_rpc": [[]]}.get(method, True)

    os.utime(mine / "model.safetensors", ns=(0, 0))
    with pytest.raises(
        WeightsError, match=r"out of memory.* could not be put back .*have changed since the engine"
    ):
        loading.run_sync(record.load(call, checkpoint.Checkpoint(folders[1]), None))
    assert calls[-1] == ("set_weight_version", "unknown")
    assert sum(PREPARE in call for call in calls) == 1


def test_a_checkpoint_is_read_in_the_engines_revision_and_by_its_code(folders, monkeypatch):
    asked = []
    load = AutoModelForCausalLM.from_pretrained

    def note(source, **options):
        asked.append((options["revision"], options["trust_remote_code"]))
        return load(source, dtype=options["dtype"], output_loading_info=options["output_loading_info"])

    skeleton = checkpoint.Skeleton(str(folders[0]), revision="a1b2", trust_remote_code=True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", note)
    for folder in folders[:2]:
        skeleton.read(folder)
    assert asked == [("a1b2", True), ("main", True)]


def test_a_refresh_that_is_interrupted_before_its_proof_proves_nothing(
    owned_fresh, states, oracles, monkeypatch
):
    score, calls = owned_fresh._canary._score, []

    def interrupted_after_the_load(request):
        calls.append(request)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(request)

    monkeypatch.setattr(owned_fresh._canary, "_score", interrupted_after_the_load)
    with pytest.raises(KeyboardInterrupt):
        owned_fresh.refresh(states[1])
    assert error_of(owned_fresh, oracles[1]) < LOG_PROB_TOLERANCE
    with pytest.raises(FrozenError, match=r"which no refresh\(\) made"):
        owned_fresh.check_frozen()
    owned_fresh.refresh(states[1])
    assert owned_fresh.check_frozen() == 0.0


def test_a_scorer_that_remembers_nothing_proves_nothing(llm):
    with pytest.raises(FrozenError, match="nothing can be proved.*Make the scorer with canary=True"):
        VLLMScorer(llm, canary=False).check_frozen()


def test_refreshes_and_proofs_in_several_threads_take_turns(owned_fresh, states):
    def work(n):
        return owned_fresh.refresh(states[n % 2]) if n < 4 else owned_fresh.check_frozen()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert len(set(results[:4])) == 4
    assert results[4:] == [0.0] * 4
    owned_fresh.score([IDS])


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.1, math.nan])
def test_an_average_that_is_none_is_refused(owned, states, ema):
    with pytest.raises(OptionError, match="ema must lie between 0 and 1"):
        owned.refresh(states[1], ema=ema)


def test_a_folder_without_a_checkpoint_is_refused(owned_fresh, tmp_path):
    with pytest.raises(WeightsError, match="no checkpoint that transformers can read"):
        owned_fresh.refresh(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"rms_norm_eps": 0.5},
            r"is another model: its configuration has rms_norm_eps=0.5, the engine's 1e-06",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            r"is another model: .*rope_parameters=.*7\.0",
        ),
        (
            {"intermediate_size": 96},
            r"mlp\.down_proj\.weight has shape \[64, 128\], its configuration says \[64, 96\]",
        ),
    ],
)
def test_a_checkpoint_that_computes_otherwise_is_not_taken_for_the_engines_model(
    folders, tmp_path, setting, message
):
    folder = shutil.copytree(folders[1], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    skeleton = checkpoint.Skeleton(str(folders[0]))
    skeleton.read(folder)
    (folder / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(WeightsError, match=message):
        skeleton.read(folder)


def test_a_damaged_checkpoint_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:9000])
    with pytest.raises(WeightsError, match="no checkpoint that transformers can read"):
        checkpoint.Skeleton(str(folders[0])).read(folder)


def test_a_refresh_of_the_policys_own_engine_is_refused(llm, states):
    with pytest.raises(WeightsError, match="would change the policy as well"):
        VLLMScorer(llm).refresh(states[1])


def test_asleep_says_on_a_cpu_that_it_does_nothing(owned):
    if torch.cuda.is_available():
        pytest.skip("on a GPU it does something")
    with pytest.warns(UserWarning, match="does nothing on a CPU"), owned.asleep():
        pass
    owned.score([IDS])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_call_that_is_interrupted_leaves_no_request_in_a_shared_engine(
    llm, states, oracles, monkeypatch, error
):
    """vllm.LLM would give their outputs to whoever generates next."""
    push_weights(llm, states[0])
    scorer, step, steps = VLLMScorer(llm), llm.llm_engine.step, []

    def interrupted_step():
        steps.append(1)
        if len(steps) == 2:
            raise error
        return step()

    monkeypatch.setattr(llm.llm_engine, "step", interrupted_step)
    with pytest.raises(error):
        scorer.score([IDS + [5 + n % 90] * 60 for n in range(40)])
    monkeypatch.undo()
    assert llm.llm_engine.get_num_unfinished_requests() == 0
    assert len(generated(llm, n=3)[0]) == 3
    assert error_of(llm, oracles[0]) < LOG_PROB_TOLERANCE


def test_requests_that_others_left_in_a_shared_engine_are_told_of(llm):
    from vllm import SamplingParams

    scorer = VLLMScorer(llm)
    llm.llm_engine.add_request("left", {"prompt_token_ids": IDS}, SamplingParams(max_tokens=3))
    try:
        with pytest.raises(EngineError, match="has 1 unfinished requests of an interrupted generate"):
            scorer.score([IDS])
    finally:
        llm.llm_engine.abort_request(["left"])
    scorer.score([IDS])


# Weights that came another way.


def test_weights_that_vllm_loaded_itself_serve_whole_and_under_a_version_of_theirs(
    llm, folders, states, oracles
):
    version = push_weights(llm, states[0])
    assert error_of(llm, oracles[0]) < LOG_PROB_TOLERANCE  # leaves KV
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[1])})
    assert finish_update(llm) == weights_of(llm).version == version + 1
    for share_prefix in (True, True, False):
        assert error_of(llm, oracles[1], share_prefix=share_prefix) < LOG_PROB_TOLERANCE
    with pytest.raises(WeightsError, match=f"expected an int above {version + 1}"):
        finish_update(llm, version=version)
    assert push_weights(llm, states[2]) == version + 2
    assert error_of(llm, oracles[2]) < LOG_PROB_TOLERANCE


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, a reload is vLLM's own")
def test_vllms_own_reload_of_a_folder_leaves_nothing_behind_on_a_cpu(llm, folders, states, oracles):
    """It serves a tied head's packed product of the old weights otherwise."""
    push_weights(llm, states[0])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[1])})
    assert error_of(llm, oracles[1], share_prefix=False) < LOG_PROB_TOLERANCE
    assert finish_update(llm) == weights_of(llm).version
    push_weights(llm, states[0])
    llm.collective_rpc("reload_weights")  # the folder that it was told last
    assert error_of(llm, oracles[1], share_prefix=False) < LOG_PROB_TOLERANCE
    push_weights(llm, states[0])


def test_a_stamp_that_is_no_number_is_replaced_by_one(llm, states, oracles):
    last = push_weights(llm, states[0])
    llm.llm_engine.set_weight_version("step-7")  # what finish_weight_update(weight_version="step-7") does
    with pytest.raises(WeightsError, match="'step-7', expected a number"):
        VLLMScorer(llm)
    assert finish_update(llm, version=last + 8) == last + 8
    llm.llm_engine.set_weight_version("step-9")
    assert push_weights(llm, states[1]) == last + 9
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


def test_pushes_that_fail_pile_nothing_up(owned, states, folders, tmp_path):
    push_weights(owned, states[0])
    for _ in range(3):
        with pytest.raises(WeightsError, match="Nothing was touched"):
            owned.weights.load(checkpoint.Checkpoint(tmp_path))  # no weights in it
    assert len(owned.weights._kept) == 1
    assert error_of(owned, torch.tensor(Oracle(folders[0]).log_probs(IDS)[1:])) < LOG_PROB_TOLERANCE


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: {**t, V: t[V][:, 1:].clone()},
            r"v_proj\.weight has shape \[32, 63\], and \[32, 64\] in the engine's checkpoint",
        ),
        (
            lambda t: {**t, V: t[V] * math.nan},
            r"no weights for .*qkv_proj\.weight: the checkpoint lacks them, or they are NaN",
        ),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused_by_its_tensor(
    llm, folders, states, oracles, tmp_path, damage, message
):
    from safetensors.torch import save_file

    version = push_weights(llm, states[0])
    folder = shutil.copytree(folders[1], tmp_path / "damaged")
    save_file(damage(tensors_in(folder)), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"{message}.*Nothing was touched: version {version} goes on"):
        finish_update(llm, source=folder)
    assert error_of(llm, oracles[0]) < LOG_PROB_TOLERANCE


def test_a_folder_of_another_model_or_none_is_refused_before_anything_is_touched(
    llm, folders, states, oracles, tmp_path
):
    version = push_weights(llm, states[0])
    folder = shutil.copytree(folders[1], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(
        WeightsError, match="is another model: its configuration has rms_norm_eps=0.5, the engine's 1e-06"
    ):
        finish_update(llm, source=folder)
    with pytest.raises(WeightsError, match="is no folder: nothing was touched"):
        finish_update(llm, source=tmp_path / "nowhere")
    assert weights_of(llm).version == version
    assert error_of(llm, oracles[0]) < LOG_PROB_TOLERANCE


def test_weights_in_bin_files_are_loaded(llm, folders, states, oracles, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "bin")
    torch.save(tensors_in(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    push_weights(llm, states[0])
    finish_update(llm, source=folder)
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


def test_weights_that_nobody_named_are_refused_with_what_to_pass(llm, folders, states, oracles):
    """A transfer leaves no trace of where weights came from: here, a folder that vLLM was told before another load."""
    version = push_weights(llm, states[0])
    worker = llm.llm_engine.model_executor.driver_worker.worker
    worker.reload_weights(weights_iterator=iter(states[2].items()))
    with pytest.raises(WeightsError, match=r"nothing says which: pass finish_update\(source=...\)"):
        finish_update(llm)
    with pytest.raises(WeightsError, match="which weights serve is not known"):
        VLLMScorer(llm)
    assert finish_update(llm, source=states[2]) == version + 1
    assert error_of(llm, oracles[2]) < LOG_PROB_TOLERANCE
    assert finish_update(llm, source=str(folders[1])) == version + 2
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE
    with pytest.raises(OptionError, match="source has no effect"):
        finish_update(llm, source=states[2], check=False)


def test_a_folder_that_is_gone_or_of_another_model_is_refused_after_vllms_own_reload(
    llm, folders, states, oracles, tmp_path
):
    push_weights(llm, states[0])
    gone, other = (shutil.copytree(folders[1], tmp_path / name) for name in ("gone", "other"))
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(gone)})
    shutil.rmtree(gone)
    with pytest.raises(
        WeightsError, match=r"gone', which reload_weights was told, could not be loaded again .*source="
    ):
        finish_update(llm)
    push_weights(llm, states[0])
    with pytest.raises(Exception, match="gone"):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(gone)})
    finish_update(llm)  # a reload that was refused has touched nothing
    assert error_of(llm, oracles[0]) < LOG_PROB_TOLERANCE
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    with pytest.raises(WeightsError, match="rms_norm_eps"):
        finish_update(llm)
    finish_update(llm, source=states[2])
    assert error_of(llm, oracles[2]) < LOG_PROB_TOLERANCE


def test_a_load_of_some_layers_alone_is_not_taken_for_what_was_pushed_before(llm, states):
    """What is compared, norms and embeddings, is the same: packed products are not looked into."""
    push_weights(llm, states[0])
    worker = llm.llm_engine.model_executor.driver_worker.worker
    some = {name: states[1][name] if "proj" in name else tensor for name, tensor in states[0].items()}
    worker.reload_weights(weights_iterator=iter(some.items()))
    with pytest.raises(WeightsError, match=r"nothing says which: pass finish_update\(source=...\)"):
        finish_update(llm)
    push_weights(llm, states[0])
    worker.get_model().model.norm.weight.data.mul_(2)
    with pytest.raises(WeightsError, match=r"neither those that were pushed last nor its own"):
        finish_update(llm)
    push_weights(llm, states[0])


def test_weights_that_came_another_way_are_put_back_when_a_push_after_them_fails(
    llm, folders, states, oracles, monkeypatch
):
    push_weights(llm, states[0])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[1])})
    version = finish_update(llm)
    broken = {name: tensor for name, tensor in states[2].items() if name != NORM}
    monkeypatch.setattr(checkpoint.Skeleton, "checked", lambda self, state: dict(state))
    with pytest.raises(WeightsError, match=f"{NORM}.*Nothing was touched: version {version}"):
        push_weights(llm, broken)
    assert weights_of(llm).version == version
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


@pytest.mark.parametrize("is_pushed", [False, True])
def test_weights_that_others_loaded_before_have_no_version_until_they_are_counted(
    llm, folders, states, oracles, monkeypatch, is_pushed
):
    push_weights(llm, states[0])
    monkeypatch.setattr(
        weights_module, "_RECORDS", weakref.WeakKeyDictionary()
    )  # an engine that nobody gave to us yet
    llm.update_weight_version("default")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[1])})
    scorer = VLLMScorer(llm)
    assert scorer.weight_version is None
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE
    scorer.score([IDS])
    assert scorer.stats.weight_version is None
    with pytest.raises(
        WeightsError, match=r"others loaded weights into this engine .*finish_update\(engine\)"
    ):
        EnginePolicyVersion(llm)
    with monkeypatch.context() as patch:
        adopt = adoption.adopt

        def fail(found):
            adopt(found)
            raise RuntimeError("a worker died")

        patch.setattr(adoption, "adopt", fail)
        with pytest.raises(
            WeightsError, match="could not be put back .others loaded it, and from where is not known"
        ):
            push_weights(llm, states[2])
    assert (push_weights(llm, states[1]) if is_pushed else finish_update(llm, source=folders[1])) == 1
    assert scorer.weight_version == EnginePolicyVersion(llm).version == 1
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


@pytest.mark.parametrize("is_pushed", [False, True])
def test_weights_that_others_load_later_have_no_version_until_they_are_counted(
    llm, folders, states, oracles, monkeypatch, tokenizer, is_pushed
):
    if is_pushed:
        push_weights(llm, states[0])
    else:
        monkeypatch.setattr(weights_module, "_RECORDS", weakref.WeakKeyDictionary())
        push_weights(llm, states[0])
        monkeypatch.setattr(weights_module, "_RECORDS", weakref.WeakKeyDictionary())
        llm.update_weight_version("default")
    policy = vLLMWrapper(llm, tokenizer=tokenizer, input_mode="tokens", generate=True, pad_output=False)
    scorer, tracker = VLLMScorer(llm), EnginePolicyVersion(llm)
    version = tracker.version
    assert version == scorer.weight_version

    def told():
        watch(policy)
        td = policy(lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(IDS)))]), max_tokens=2)
        return td[GENERATED_BY, "version"].tolist()

    assert told() == [version]
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[1])})
    assert scorer.weight_version is None
    assert told() == [UNKNOWN]
    scorer.score([IDS])
    assert scorer.stats.weight_version is None
    with pytest.raises(WeightsError, match="gave them no version"):
        _ = tracker.version
    assert finish_update(llm) == version + 1
    assert told() == [tracker.version] == [scorer.weight_version] == [version + 1]
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[2])})
    llm.update_weight_version(str(version + 5))  # as vLLM's finish_weight_update(weight_version=...)
    assert told() == [tracker.version] == [version + 5]
    assert push_weights(llm, states[0]) == version + 6
    assert error_of(llm, oracles[0]) < LOG_PROB_TOLERANCE


def test_a_scorers_own_engine_is_reached_by_nobody_else(owned):
    with pytest.raises(WeightsError, match=r"nobody but push_weights\(\) and refresh\(\)"):
        finish_update(owned)


# TorchRL's two ways, and the asynchronous engine.


def test_the_sync_scheme_pushes_a_registered_model(llm, folders, states, oracles):
    push_weights(llm, states[0])
    sender = VLLMSyncScheme(llm).create_sender()
    with pytest.raises(OptionError, match="no weights"):
        sender.update_weights()
    sender.register_model(AutoModelForCausalLM.from_pretrained(folders[2]))
    assert sender.update_weights() == weights_of(llm).version
    assert error_of(llm, oracles[2]) < LOG_PROB_TOLERANCE
    VLLMSyncScheme(llm).create_transport().send_weights(states[1])
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


def test_the_weight_updater_needs_weights(llm):
    with pytest.raises(OptionError, match="no weights"):
        VLLMWeightUpdater(llm)()


def test_an_engine_of_another_kind_is_refused_with_what_works():
    with pytest.raises(WeightsError, match="expected a vllm.LLM, an AsyncLLM or a VLLMScorer, got object"):
        push_weights(object(), {})


@pytest.mark.timeout(300)
def test_an_async_engine_finishes_what_it_generates_and_then_serves_the_new_weights(folders, states):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

    params = SamplingParams(max_tokens=64, temperature=0.0, logprobs=0, ignore_eos=True)

    async def generate(engine, name):
        async for output in engine.generate(TokensPrompt(prompt_token_ids=IDS), params, name):
            last = output
        (sample,) = last.outputs
        return (
            list(sample.token_ids),
            [next(iter(e.values())).logprob for e in sample.logprobs],
            [span.version for span in sample.weight_versions],
        )

    async def run():
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(folders[0]), enforce_eager=True, disable_log_stats=True, **tiny.ENGINE_OPTIONS
            )
        )
        try:
            with pytest.raises(WeightsError, match="await push_weights_async"):
                push_weights(engine, states[1])
            before = asyncio.create_task(generate(engine, "before"))
            await asyncio.sleep(0.2)
            with pytest.raises(WeightsError, match="would block the event loop"):
                push_weights(engine, states[1])
            pushed = asyncio.create_task(push_weights_async(engine, states[1]))
            assert await pushed == 1
            assert before.done()
            between = await generate(engine, "after")
            # From another thread, as a trainer would.
            assert await asyncio.to_thread(push_weights, engine, states[2]) == 2
            last = await generate(engine, "last")
            rpc = engine.collective_rpc

            async def cancel(*args):
                push.cancel()
                return await rpc(*args)

            engine.collective_rpc = cancel
            push = asyncio.create_task(push_weights_async(engine, states[1]))
            with pytest.raises(asyncio.CancelledError):
                await push
            engine.collective_rpc = rpc
            cancelled = await generate(engine, "cancelled")
            both = [push_weights_async(engine, states[which]) for which in (0, 1)]
            assert sorted(await asyncio.gather(*both)) == [4, 5]
            return [before.result(), between, last, cancelled]
        finally:
            engine.shutdown()

    for (which, version), (response, log_probs, versions) in zip(
        [(0, "default"), (1, "1"), (2, "2"), (1, "3")], asyncio.run(run()), strict=True
    ):
        truth = Oracle(folders[which]).log_probs(IDS + response)[len(IDS) :]
        assert log_probs == pytest.approx(truth, abs=2e-5)
        assert versions == [version]
