"""Weights that vLLM or another program loaded: ``finish_update`` checks them and gives them a version."""

from __future__ import annotations

import json
import math
import shutil
import weakref

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm import vLLMWrapper
from torchrl.modules.llm.policies import Tokens

from tests.oracle import LOG_PROB_TOLERANCE
from tests.weights.helpers import IDS, error_of, tensors_in
from vllm_kl import VLLMScorer
from vllm_kl.batch.origins import GENERATED_BY, UNKNOWN
from vllm_kl.errors import OptionError, WeightsError
from vllm_kl.plugin import adopt_weights
from vllm_kl.transforms.engine_policy_version import EnginePolicyVersion
from vllm_kl.transforms.watched_policy import watch
from vllm_kl.weights import live_weights as weights_module
from vllm_kl.weights.push import finish_update, push_weights, weights_of


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


V = "model.layers.1.self_attn.v_proj.weight"


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
    with pytest.raises(
        WeightsError, match=rf"{message}.*Nothing was touched: the engine keeps version {version}"
    ):
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
    """A transfer leaves no trace of where the weights came from."""
    version = push_weights(llm, states[0])
    worker = llm.llm_engine.model_executor.driver_worker.worker
    worker.reload_weights(weights_iterator=iter(states[2].items()))
    with pytest.raises(
        WeightsError, match=r"the engine does not know which: pass finish_update\(source=...\)"
    ):
        finish_update(llm)
    with pytest.raises(WeightsError, match="version of the engine.s weights is not known"):
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
        WeightsError,
        match=r"gone', the folder that reload_weights loaded, could not be loaded again (?s:.*)source=",
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
    with pytest.raises(
        WeightsError, match=r"the engine does not know which: pass finish_update\(source=...\)"
    ):
        finish_update(llm)
    push_weights(llm, states[0])
    worker.get_model().model.norm.weight.data.mul_(2)
    with pytest.raises(WeightsError, match=r"neither those of the last push nor those of the engine.s start"):
        finish_update(llm)
    push_weights(llm, states[0])


@pytest.mark.parametrize("is_pushed", [False, True])
def test_weights_that_others_loaded_before_have_no_version_until_they_are_counted(
    llm, folders, states, oracles, monkeypatch, is_pushed
):
    push_weights(llm, states[0])
    # An engine that nobody gave to us yet.
    monkeypatch.setattr(weights_module, "_RECORDS", weakref.WeakKeyDictionary())
    llm.update_weight_version("default")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[1])})
    scorer = VLLMScorer(llm)
    assert scorer.weight_version is None
    assert error_of(llm, oracles[1]) < LOG_PROB_TOLERANCE
    scorer.score([IDS])
    assert scorer.stats.weight_version is None
    with pytest.raises(
        WeightsError, match=r"(?s)others loaded weights into this engine .*finish_update\(engine\)"
    ):
        EnginePolicyVersion(llm)
    with monkeypatch.context() as patch:
        adopt = adopt_weights.adopt

        def fail(found):
            adopt(found)
            raise RuntimeError("a worker died")

        patch.setattr(adopt_weights, "adopt", fail)
        with pytest.raises(
            WeightsError,
            match="could not be put back .another program loaded it, and its source is not known",
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
    with pytest.raises(WeightsError, match=r"only push_weights\(\) and refresh\(\)"):
        finish_update(owned)
