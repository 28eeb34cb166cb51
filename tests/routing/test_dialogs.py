"""The keys of prompts: one for a dialog that grows, others for prompts that only begin alike."""

from __future__ import annotations

import pickle
import random

import numpy as np

from vllm_kl.routing.affinity import order
from vllm_kl.routing.dialogs import Dialogs


def ids_of(*numbers):
    return np.array(numbers, np.int32)


def test_a_dialog_has_one_key_whatever_is_added_to_it():
    draw = random.Random(0)
    for _ in range(200):
        dialogs, prompt = Dialogs(), np.arange(draw.randrange(64, 400), dtype=np.int32)
        key = dialogs.key_of(prompt)
        for _ in range(5):
            prompt = np.append(prompt, ids_of(*(draw.randrange(9) for _ in range(draw.randrange(1, 300)))))
            assert dialogs.key_of(prompt) == key


def test_prompts_with_one_system_prompt_have_keys_of_their_own():
    """Also where the system prompt ends inside a block, and where a prompt ends there."""
    dialogs, replicas = Dialogs(), ["a", "b", "c", "d"]
    system = np.arange(600, dtype=np.int32)
    prompts = [np.append(system, ids_of(*[n] * (1 + n % 90))) for n in range(1000)]
    keys = [dialogs.key_of(prompt) for prompt in prompts]
    assert len(set(keys)) == 1000
    counts = [[order(key, replicas)[0] for key in keys].count(replica) for replica in replicas]
    assert min(counts) > 180


def test_the_key_of_a_prompt_that_nobody_has_seen_is_the_same_everywhere():
    prompt = np.arange(500, dtype=np.int32)
    assert Dialogs().key_of(prompt) == Dialogs().key_of(prompt) != Dialogs().key_of(prompt[:499])


def test_of_two_beginnings_the_longer_one_counts():
    dialogs, first = Dialogs(), np.arange(100, dtype=np.int32)
    branches = [np.append(first, ids_of(*[n] * 100)) for n in range(2)]
    others = Dialogs()
    keys = [others.key_of(branch) for branch in branches]  # here the first turn was not seen
    assert keys[0] != keys[1]
    others.key_of(first)
    assert [others.key_of(np.append(branch, ids_of(7))) for branch in branches] == keys
    assert len({dialogs.key_of(one) for one in (first, *branches)}) == 1


def test_the_prompts_that_were_used_longest_ago_are_forgotten():
    dialogs, ids = Dialogs(most=10), np.arange(64, dtype=np.int32)
    prompts = [np.append(ids_of(n), ids) for n in range(30)]
    keys = [dialogs.key_of(prompt) for prompt in prompts]
    longer = [np.append(prompt, ids) for prompt in prompts]
    assert [dialogs.key_of(one) for one in longer[25:]] == keys[25:]
    assert dialogs.key_of(longer[0]) != keys[0]
    assert len(dialogs._known) == 10
    assert sum(sum(lengths.values()) for lengths in dialogs._lengths.values()) == 10


def test_short_prompts_are_not_remembered():
    """Else a prompt of one token would be the beginning of all others."""
    dialogs = Dialogs()
    dialogs.key_of(ids_of(1))
    assert dialogs.key_of(np.append(ids_of(1), np.arange(100, dtype=np.int32))) != dialogs.key_of(ids_of(1))
    assert not pickle.loads(pickle.dumps(dialogs))._known
