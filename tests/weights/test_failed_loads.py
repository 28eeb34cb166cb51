"""A load that is refused, fails or is interrupted: the old weights go on serving under their version."""

from __future__ import annotations

import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from tests.weights.helpers import IDS, NORM, error_of, model_of
from vllm_kl import VLLMScorer
from vllm_kl.errors import WeightsError
from vllm_kl.plugin import adopt_weights
from vllm_kl.plugin.load_weights import ADOPT, OBSTACLE, PREPARE
from vllm_kl.weights import checkpoint, loading
from vllm_kl.weights.push import finish_update, push_weights, weights_of


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


def with_one(tensor, number):
    return tensor.index_fill(0, torch.tensor(len(tensor) - 1), number)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, NORM), rf"missing {NORM}\. Expected"),
        (lambda s: {**s, "value_head.weight": s[NORM]}, r"engine.s model: unknown value_head\.weight"),
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


def test_an_engine_without_the_plugin_is_left_alone_and_told_the_cure(llm, states, oracles, monkeypatch):
    from vllm.v1.worker.worker_base import WorkerBase

    version = push_weights(llm, states[1])
    monkeypatch.delattr(WorkerBase, PREPARE)
    monkeypatch.delattr(WorkerBase, OBSTACLE)
    with pytest.raises(
        WeightsError, match=r"not loaded the plugin vllm_kl.*nothing was touched(?s:.*)VLLM_PLUGINS"
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
            WeightsError, match=rf"out of memory\)\. Nothing was touched: the engine keeps version {version}"
        ):
            push_weights(llm, states[2])
        assert weights_of(llm).version == version
        assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE
    push_weights(llm, states[2])
    assert error_of(llm, oracles[2]) < LOG_PROB_TOLERANCE


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


def test_pushes_that_fail_pile_nothing_up(owned, states, folders, tmp_path):
    push_weights(owned, states[0])
    for _ in range(3):
        with pytest.raises(WeightsError, match="Nothing was touched"):
            owned.weights.load(checkpoint.Checkpoint(tmp_path))  # no weights in it
    assert len(owned.weights._kept) == 1
    assert error_of(owned, torch.tensor(Oracle(folders[0]).log_probs(IDS)[1:])) < LOG_PROB_TOLERANCE


def test_what_fails_after_workers_took_over_is_put_back(llm, states, oracles, monkeypatch):
    version = push_weights(llm, states[1])
    adopt, failures = adopt_weights.adopt, [RuntimeError("a worker died")]

    def fail_once(found):
        adopt(found)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(adopt_weights, "adopt", fail_once)
    with pytest.raises(WeightsError, match=rf"a worker died\)\. Version {version} was put back"):
        push_weights(llm, states[2])
    assert weights_of(llm).version == version
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


def test_weights_that_came_another_way_are_put_back_when_a_push_after_them_fails(
    llm, folders, states, oracles, monkeypatch
):
    push_weights(llm, states[0])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[1])})
    version = finish_update(llm)
    broken = {name: tensor for name, tensor in states[2].items() if name != NORM}
    monkeypatch.setattr(checkpoint.Skeleton, "checked", lambda self, state: dict(state))
    with pytest.raises(
        WeightsError, match=f"{NORM}.*Nothing was touched: the engine keeps version {version}"
    ):
        push_weights(llm, broken)
    assert weights_of(llm).version == version
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE


def test_where_the_old_weights_cannot_be_put_back_no_version_is_claimed(llm, states, oracles, monkeypatch):
    version = push_weights(llm, states[0])

    def fail(found):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(adopt_weights, "adopt", fail)
        with pytest.raises(WeightsError, match="could not be put back"):
            push_weights(llm, states[2])
    with pytest.raises(WeightsError, match="not known, because a push failed"):
        VLLMScorer(llm, canary=False).score([IDS])
    assert push_weights(llm, states[0]) == version + 1  # what the error says
    assert error_of(llm, oracles[0]) < LOG_PROB_TOLERANCE


@pytest.mark.parametrize("is_shared", [True, False])
def test_only_the_workers_of_a_shared_engine_are_asked_for_loads_of_others(folders, is_shared):
    """A step of a private engine reads the version, and would pay a round trip to every worker."""
    record = loading.Record(SimpleNamespace(model=str(folders[0])))
    record.is_taken, record.is_shared = True, is_shared
    calls = []

    async def call(method, *args):
        calls.append(method)
        return {"get_weight_version": "default", "collective_rpc": [[]]}[method]

    assert loading.run_sync(record.version(call)) == 0
    assert calls == ["get_weight_version", *(["collective_rpc"] if is_shared else [])]


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


@pytest.mark.nightly
def test_an_owned_engine_whose_weights_are_not_known_says_so_and_lives(
    folders, states, oracles, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(BUSY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with VLLMScorer(str(folders[0]), canary=False, **tiny.ENGINE_OPTIONS) as scorer:
        with pytest.raises(WeightsError, match="version of the engine.s weights is not known"):
            push_weights(scorer, states[1])
        for _ in range(2):
            with pytest.raises(WeightsError, match="(?i:push again)"):
                scorer.weight_version  # noqa: B018
            with pytest.raises(WeightsError, match="(?i:push again)"):
                scorer.score([IDS, IDS[:-1]])
        assert push_weights(scorer, states[2]) == 1
        assert scorer.weight_version == 1
        assert error_of(scorer, oracles[2]) < LOG_PROB_TOLERANCE


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

    adopt = adopt_weights.adopt

    def adopt_and_interrupt(found):
        monkeypatch.undo()
        monkeypatch.setattr(torch.Tensor, "copy_", interrupt)
        adopt(found)

    monkeypatch.setattr(adopt_weights, "adopt", adopt_and_interrupt)


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
