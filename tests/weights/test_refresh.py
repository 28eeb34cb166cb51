"""A reference is proved frozen, and only ``refresh()`` changes it."""

from __future__ import annotations

import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from tests.weights.helpers import IDS, error_of
from vllm_kl import VLLMReference, VLLMScorer
from vllm_kl.errors import FrozenError, OptionError, WeightsError
from vllm_kl.weights import canary, checkpoint
from vllm_kl.weights.push import push_weights


def test_a_frozen_reference_proves_it_and_one_that_was_moved_is_caught(owned_fresh, states):
    owned, own = owned_fresh, owned_fresh.weights.skeleton.checked(states[0])
    moved = {name: tensor + 1e-4 * torch.randn_like(tensor) for name, tensor in own.items()}
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


def test_a_push_is_no_refresh(owned_fresh, states):
    """Whoever pushes into a reference's engine has moved the reference: KL against it is another KL."""
    version = push_weights(owned_fresh, states[1])
    with pytest.raises(
        FrozenError, match=rf"the engine serves version {version} of the weights, which no refresh\(\) made"
    ):
        owned_fresh.check_frozen()
    owned_fresh.refresh(states[1])
    assert owned_fresh.check_frozen() == 0.0


def test_the_canary_remembers_the_last_versions_only(owned_fresh, states, monkeypatch):
    monkeypatch.setattr(canary, "_MOST_VERSIONS", 2)
    versions = [owned_fresh.refresh(states[n % 2]) for n in range(4)]
    assert [*owned_fresh._canary._known] == versions[-2:]
    assert owned_fresh.check_frozen() == 0.0


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


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.1, math.nan])
def test_an_average_that_is_none_is_refused(owned, states, ema):
    with pytest.raises(OptionError, match="ema must lie between 0 and 1"):
        owned.refresh(states[1], ema=ema)


def test_an_average_with_a_checkpoint_that_was_written_over_is_refused(folders, states, oracles, tmp_path):
    mine = tmp_path / "model"
    shutil.copytree(folders[0], mine)
    with VLLMScorer(str(mine), **tiny.ENGINE_OPTIONS) as scorer:
        shutil.copy(folders[2] / "model.safetensors", mine)
        with pytest.raises(
            WeightsError, match=r"model' have changed since the engine was started(?s:.*)without ema= needs"
        ):
            scorer.refresh(states[1], ema=0.5)
        assert scorer.weight_version == 0
        assert error_of(scorer, oracles[0]) < LOG_PROB_TOLERANCE
        assert scorer.refresh(states[1]) == 1
        assert scorer.refresh(states[1], ema=0.5) == 2  # of what was pushed
        assert error_of(scorer, oracles[1]) < LOG_PROB_TOLERANCE
        folder = checkpoint.Path(scorer.weights.source)
        assert folder.exists()
    assert not folder.exists()


def test_a_folder_without_a_checkpoint_is_refused(owned_fresh, tmp_path):
    with pytest.raises(WeightsError, match="no checkpoint that transformers can read"):
        owned_fresh.refresh(tmp_path)


def test_a_refresh_of_the_policys_own_engine_is_refused(llm, states):
    with pytest.raises(WeightsError, match="would change the policy as well"):
        VLLMScorer(llm).refresh(states[1])


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
