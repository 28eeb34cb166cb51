"""Pushes into the replicas of TorchRL's AsyncVLLM, which are Ray actors. A real local Ray."""

from __future__ import annotations

import _thread
import json
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from tensordict import TensorDict
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from tests import local_ray
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import VLLMScorer, finish_update, push_weights
from vllm_kl.engines.generate import tells_versions
from vllm_kl.errors import EngineError, WeightsError
from vllm_kl.weights.all_or_none import deferring_interrupts
from vllm_kl.weights.push import weights_of
from vllm_kl.weights.replicas import ReplicaWeights

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = local_ray.MARKS

PROMPT = [5, 6, 7, 8] * 12


@pytest.fixture
def llm(async_llm):
    return async_llm


@pytest.fixture(scope="module")
def folders(tied_paths):
    return tied_paths


@pytest.fixture(scope="module")
def states(folders):
    return [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]


@pytest.fixture(scope="module")
def oracles(folders):
    return [Oracle(folder) for folder in folders]


def generated(llm, replica, max_tokens=6, seed=0):
    """Return the completion, and the largest error of its log-probs against an oracle."""
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, logprobs=0, seed=seed, ignore_eos=True)
    prompt = [TokensPrompt(prompt_token_ids=PROMPT)]
    return llm.generate(prompt, params, actor_index=replica)[0].outputs[0]


def error_of(completion, oracle):
    recorded = [next(iter(entry.values())).logprob for entry in completion.logprobs]
    wanted = oracle.log_probs(PROMPT + list(completion.token_ids))[len(PROMPT) :]
    return max(abs(a - b) for a, b in zip(recorded, wanted, strict=True))


def assert_serves(llm, oracle, version):
    assert weights_of(llm).version == version
    for replica in range(2):
        for _ in range(2):  # the second time the prompt's KV is in the cache
            completion = generated(llm, replica)
            assert error_of(completion, oracle) < LOG_PROB_TOLERANCE
            if tells_versions():
                assert [span.version for span in completion.weight_versions] == [str(version)]


def in_replica(llm, index, function, *args):
    return ray.get(llm.actors[index].__ray_call__.remote(function, *args))


def children(actor):
    return [process.pid for process in psutil.Process().children(recursive=True)]


def fail_at(actor, step):
    """Make a step of a replica fail; ``None``: no step fails any more."""
    from vllm_kl.weights.live_weights import AsyncWeights

    async def fail(self, *args, **kwargs):
        raise RuntimeError("a worker died")

    kept = vars(AsyncWeights).get("_kept", dict(vars(AsyncWeights)))
    AsyncWeights._kept = kept
    for name in ("prepare", "prepare_take_over", "commit"):
        setattr(AsyncWeights, name, fail if name == step else kept[name])


@pytest.mark.compat
def test_all_replicas_serve_pushed_weights(llm, states, oracles):
    for which in (1, 2, 0):
        version = push_weights(llm, states[which])
        assert_serves(llm, oracles[which], version)


@pytest.mark.parametrize("replica", [0, 1])
@pytest.mark.parametrize("step", ["prepare", "commit"])
def test_one_replica_that_fails_leaves_all_on_the_old_weights(llm, states, oracles, step, replica):
    before = push_weights(llm, states[0])
    in_replica(llm, replica, fail_at, step)
    try:
        with pytest.raises(WeightsError, match=f"(?s)replica {replica} .*a worker died.*old weights"):
            push_weights(llm, states[1])
    finally:
        in_replica(llm, replica, fail_at, None)
    assert_serves(llm, oracles[0], before)
    assert push_weights(llm, states[1]) == before + 1
    assert_serves(llm, oracles[1], before + 1)


def test_weights_of_another_model_and_old_versions_are_refused(llm, states):
    before = weights_of(llm).version
    with pytest.raises(WeightsError, match="shape"):
        push_weights(llm, {name: tensor[:1] for name, tensor in states[0].items()})
    with pytest.raises(WeightsError, match=f"{before}"):
        push_weights(llm, states[0], version=before)
    assert weights_of(llm).version == before


def test_a_request_that_runs_finishes_with_the_old_weights(llm, states, oracles):
    before = push_weights(llm, states[0])
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(generated, llm, i % 2, max_tokens=200, seed=i) for i in range(4)]
        version = push_weights(llm, states[1])
    seen = set()
    for completion in (future.result() for future in running):
        (span,) = completion.weight_versions
        seen.add(int(span.version))
        which = {before: 0, version: 1}[int(span.version)]
        assert error_of(completion, oracles[which]) < 10 * LOG_PROB_TOLERANCE
    assert seen <= {before, version}


def test_pushes_at_the_same_time_get_a_version_each(llm, states, oracles):
    before = push_weights(llm, states[0])
    # Two objects, as two processes have.
    others = [weights_of(llm), ReplicaWeights(llm)]
    checkpoints = [others[0].skeleton.write(others[0].skeleton.checked(states[i])) for i in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        pushes = [pool.submit(w.load, c) for w, c in zip(others, checkpoints, strict=True)]
    versions = [push.result() for push in pushes]
    assert sorted(versions) == [before + 1, before + 2]
    assert_serves(llm, oracles[1 + versions.index(before + 2)], before + 2)


def test_a_trainer_that_falls_silent_loses_the_push_lock(llm, states, oracles):
    def be_impatient(actor, seconds):
        from vllm_kl.weights import replica

        replica._SILENT_AT_MOST_S = seconds

    version = push_weights(llm, states[0])
    for i in range(2):
        in_replica(llm, i, be_impatient, 0.5)
    silent = weights_of(llm)
    for i in range(2):
        silent._run("begin", {i: ["silent"]})
    order = silent._to_all("silent", str(silent._served.folder), None, False)
    assert all(is_done for is_done, _ in silent._run("prepare", order).values())
    # An order of somebody else is refused, and is no sign of life.
    assert not any(is_done for is_done, _ in silent._run("commit", silent._to_all("another")).values())
    assert push_weights(llm, states[1]) == version + 1  # waits until the lock is free
    is_done, error = silent._run("commit", silent._to_all("silent"))[0]
    assert not is_done
    assert "lost the push lock: push again" in str(error)
    for i in range(2):
        in_replica(llm, i, be_impatient, 60.0)
    assert_serves(llm, oracles[1], version + 1)


def test_the_version_can_be_read_while_the_replicas_change_over(llm, states):
    before = push_weights(llm, states[0])
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(generated, llm, 0, max_tokens=200)  # replica 0 changes over when it is done
        time.sleep(0.2)
        push = pool.submit(push_weights, llm, states[1])
        read = []
        while not push.done():
            read.append(weights_of(llm).version)
    assert set(read) <= {before, before + 1}
    assert before in read
    assert len(running.result().token_ids) == 200


def test_an_interrupt_while_replicas_change_over_leaves_them_in_step(llm, states, oracles, monkeypatch):
    before = push_weights(llm, states[0])
    commit = ReplicaWeights._commit

    def interrupted(self, *args):
        _thread.interrupt_main()
        commit(self, *args)

    # A shell ignores interrupts of what it runs in the background, and Python then has no handler.
    before_test = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ReplicaWeights, "_commit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                push_weights(llm, states[1])
    finally:
        signal.signal(signal.SIGINT, before_test)
    assert_serves(llm, oracles[1], before + 1)
    # The trainer's folder is gone. The replicas have links to its files, and can put them back.
    in_replica(llm, 1, fail_at, "commit")
    try:
        with pytest.raises(WeightsError, match="The others serve the old weights again"):
            push_weights(llm, states[2])
    finally:
        in_replica(llm, 1, fail_at, None)
    assert_serves(llm, oracles[1], before + 1)


def test_a_second_interrupt_stops_a_trainer_that_waits_for_a_replica_without_answer():
    came = []

    def wait():
        with deferring_interrupts():
            for number in range(3):
                signal.raise_signal(signal.SIGINT)
                came.append(number)

    before_test = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
        assert came == [0]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before_test)


def test_a_trainer_that_gives_up_while_it_waits_never_gets_the_lock(llm, states):
    weights = weights_of(llm)
    version = push_weights(llm, states[0])
    weights._run("begin", {0: ["first"]})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(weights._run, "begin", {0: ["second"]})
        time.sleep(0.2)
        weights._run("end", {0: ["second"]})
        weights._run("end", {0: ["first"]})
        waiting.result(timeout=10)
    assert push_weights(llm, states[0]) == version + 1


def test_a_folder_of_another_model_is_refused(llm, states, folders, tmp_path):
    before = push_weights(llm, states[0])
    other = shutil.copytree(folders[1], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(WeightsError, match="rms_norm_eps"):
        finish_update(llm, source=other)
    assert finish_update(llm, source=folders[1]) == before + 1


def test_replicas_on_another_machine_get_the_files_through_ray(llm, states, oracles, monkeypatch):
    nodes = ReplicaWeights._nodes
    monkeypatch.setattr(ReplicaWeights, "_nodes", lambda self: [nodes(self)[0], "another machine"])
    for which in (2, 1):
        version = push_weights(llm, states[which])
        assert_serves(llm, oracles[which], version)


def test_a_replica_that_cannot_receive_the_files_leaves_none_on_the_others(llm, states, oracles, monkeypatch):
    def fail_to_receive(actor, is_on):
        from vllm_kl.weights import replica

        def fail(*args):
            raise OSError("No space left on device")

        kept = vars(replica).setdefault("_new_folder", replica.new_folder)
        replica.new_folder = fail if is_on else kept

    def received(actor):
        return list(actor._vllm_kl_replica.received)

    before = push_weights(llm, states[0])
    nodes = ReplicaWeights._nodes
    monkeypatch.setattr(ReplicaWeights, "_nodes", lambda self: nodes(self) and ["another machine"] * 2)
    in_replica(llm, 1, fail_to_receive, True)
    try:
        with pytest.raises(OSError, match="No space left"):
            push_weights(llm, states[1])
    finally:
        in_replica(llm, 1, fail_to_receive, False)
    assert [in_replica(llm, i, received) for i in range(2)] == [[], []]
    assert_serves(llm, oracles[0], before)
    assert_serves(llm, oracles[1], push_weights(llm, states[1]))


def test_what_torchrls_double_buffer_loads_is_not_served_and_finish_update_mends_it(
    llm, states, oracles, tmp_path
):
    """TorchRL 0.14 hands the worker one (name, tensor) pair at a time, and never looks at the errors."""
    before = push_weights(llm, states[0])
    TensorDict(states[1]).memmap(tmp_path)
    ray.get(llm.collective_rpc("load_weights_from_storage", args=(str(tmp_path),)))
    assert error_of(generated(llm, 0), oracles[1]) > 0.1
    version = finish_update(llm, source=states[1])
    assert version == before + 1
    assert_serves(llm, oracles[1], version)


def test_weights_that_others_loaded_have_no_version_until_they_are_counted(llm, states, folders, oracles):
    before = push_weights(llm, states[0])
    ray.get(llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[2])}))
    assert weights_of(llm).version is None
    assert finish_update(llm) == before + 1
    assert_serves(llm, oracles[2], before + 1)


def test_versions_that_differ_are_told(llm, states):
    push_weights(llm, states[0])
    weights = weights_of(llm)
    for step, *args in (("begin",), ("prepare_take_over", 900, True), ("commit",), ("end",)):
        assert weights._run(step, {1: ["another", *args]})[1][0]
    with pytest.raises(WeightsError, match="the replicas serve different versions.*900"):
        _ = weights.version
    assert push_weights(llm, states[0]) == 901


@pytest.mark.parametrize("step", ["prepare_take_over", "commit"])
def test_a_version_for_weights_of_others_is_given_to_all_replicas_or_to_none(
    llm, states, folders, oracles, step
):
    before = push_weights(llm, states[0])
    in_replica(llm, 1, fail_at, step)
    try:
        with pytest.raises(WeightsError, match="(?s)replica 1 .*a worker died.*old weights"):
            finish_update(llm)
    finally:
        in_replica(llm, 1, fail_at, None)
    assert_serves(llm, oracles[0], before)
    assert finish_update(llm) == before + 1
    assert finish_update(llm, check=False) == before + 2
    assert_serves(llm, oracles[0], before + 2)


def test_weights_that_one_replica_cannot_load_again_are_counted_by_none(
    llm, states, folders, oracles, tmp_path
):
    before = push_weights(llm, states[0])
    gone = shutil.copytree(folders[2], tmp_path / "gone")
    for actor, folder in zip(llm.actors, (folders[2], gone), strict=True):
        ray.get(actor.collective_rpc_v1.remote("reload_weights", kwargs={"weights_path": str(folder)}))
    shutil.rmtree(gone)
    with pytest.raises(WeightsError, match="(?s)replica 1 refused the weights.*could not be loaded again"):
        finish_update(llm)
    assert weights_of(llm).states()[0].version is None  # nobody gave these weights one
    assert finish_update(llm, source=states[2]) == before + 1
    assert_serves(llm, oracles[2], before + 1)


@pytest.mark.parametrize("change", [push_weights, finish_update])
def test_a_sleeping_replica_is_refused_before_anything_is_touched(llm, states, oracles, change):
    before = push_weights(llm, states[0])
    ray.get(llm.actors[1].sleep.remote(level=0))
    try:
        with pytest.raises(WeightsError, match="(?s)replica 1 .*the engine sleeps, .*wake_up.*old weights"):
            change(llm, states[1]) if change is push_weights else change(llm)
    finally:
        ray.get(llm.actors[1].wake_up.remote())
    assert_serves(llm, oracles[0], before)
    assert push_weights(llm, states[1]) == before + 1


def test_a_replica_that_cannot_be_reached_for_a_moment_has_not_died(llm, states, oracles, monkeypatch):
    """A fake: Ray raises this error when its network fails, which no test can make fail."""
    before, get, lost = push_weights(llm, states[0]), ray.get, []

    def lose_one(refs, **kwargs):
        if not lost:
            lost.append(get(refs, **kwargs))
            raise ray.exceptions.ActorUnavailableError("connection reset", llm.actors[0]._actor_id.binary())
        return get(refs, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ray, "get", lose_one)
        with pytest.raises(EngineError, match="replica 0 .*cannot be reached now, and has not died: try"):
            _ = weights_of(llm).version
        lost.clear()
        with pytest.raises(EngineError, match="cannot be reached now, and has not died"):
            VLLMScorer(llm, canary=False).score([PROMPT])
    assert_serves(llm, oracles[0], before)


def test_a_replica_that_died_is_named(llm, states):
    """The last test of all that use these replicas: it kills one."""
    scorer, weights = VLLMScorer(llm), weights_of(llm)
    processes = [psutil.Process(pid) for pid in in_replica(llm, 1, children)]
    assert processes
    ray.kill(llm.actors[1])
    with pytest.raises(EngineError, match="(?s)replica 1 of the AsyncVLLM: its actor died"):
        scorer.score([[*PROMPT, k] for k in range(20)])
    with pytest.raises(EngineError, match="replica 1 .*its actor died"):
        push_weights(llm, states[0])
    with pytest.raises(EngineError, match="replica 1 .*its actor died"):
        _ = weights.version
    assert len(generated(llm, 0).token_ids) == 6
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
