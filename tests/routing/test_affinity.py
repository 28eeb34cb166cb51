"""The rule that sends a prompt to a replica: stable, even, and without a replica that falls behind."""

from __future__ import annotations

from collections import Counter

import pytest

from vllm_kl.routing.affinity import choose, order

REPLICAS = [f"replica-{n}" for n in range(8)]
KEYS = [n.to_bytes(4, "big") for n in range(4000)]
IDLE = dict.fromkeys(REPLICAS, 0)


def test_a_prompt_has_one_replica_whatever_the_order_of_the_replicas():
    for key in KEYS[:200]:
        backwards = dict.fromkeys(reversed(REPLICAS), 0)
        assert choose(key, IDLE, spill=0) == choose(key, backwards, spill=0) == order(key, REPLICAS)[0]


def test_prompts_are_spread_evenly():
    counts = Counter(choose(key, IDLE, spill=0) for key in KEYS)
    assert set(counts) == set(REPLICAS)
    assert max(counts.values()) < 1.2 * len(KEYS) / len(REPLICAS)


def test_a_replica_that_goes_moves_its_own_prompts_only():
    left = {replica: 0 for replica in REPLICAS if replica != "replica-3"}
    for key in KEYS:
        before, after = choose(key, IDLE, spill=0), choose(key, left, spill=0)
        assert after == before if before != "replica-3" else after == order(key, REPLICAS)[1]


def test_no_chosen_replica_is_behind_by_more_than_the_bound():
    loads = dict(IDLE)
    for key in [KEYS[0]] * 100:  # one prompt that everybody asks for
        loads[choose(key, loads, spill=5)] += 1
        assert max(loads.values()) - min(loads.values()) <= 6
    assert loads[order(KEYS[0], REPLICAS)[0]] == max(loads.values())


def test_spilled_prompts_keep_to_their_second_replica():
    first, second, *_ = order(KEYS[7], REPLICAS)
    assert choose(KEYS[7], {**IDLE, first: 9}, spill=8) == second


def test_no_replica_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        choose(b"", {}, spill=1)
