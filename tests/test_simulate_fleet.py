"""The simulated fleet agrees with queueing theory where theory has a formula, its cache with arithmetic."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from tests import scripts
from vllm_kl.routing.affinity import choose

# One turn without a cache: groups arrive at random, and no group depends on another one.
SINGLE = {"turns": 1, "group": 1, "system_share": 0.0, "message_tokens": 5000.0, "response_tokens": 1.0}


@pytest.fixture(scope="module")
def fleet():
    with scripts.imported("benchmarks", "simulate_fleet") as module:
        yield module


def run(fleet, work, rule, num_groups, *, num_replicas=1, cache_tokens=0, num_routers=1):
    dialogs = fleet.draw(work, num_replicas, num_groups, seed=1)
    all_rules = fleet.rules(dialogs, work.system_tokens, 2, seed=1)
    rules = {name.partition(",")[0]: rule for name, rule in all_rules.items()}
    result = fleet.simulate(
        dialogs,
        rules[rule],
        num_replicas=num_replicas,
        system_tokens=work.system_tokens,
        cache_tokens=cache_tokens,
        num_routers=num_routers,
        warm_up=0.1,
    )
    return dialogs, result


@pytest.mark.parametrize("sigma", [0.0, 0.6])
@pytest.mark.parametrize("num_replicas", [1, 4])
def test_random_groups_wait_as_long_as_pollaczek_and_khinchine_say(fleet, sigma, num_replicas):
    """M/D/1 and M/G/1; random choices of several replicas give each one its own Poisson arrivals."""
    work = fleet.Work(load=0.6, sigma=sigma, **SINGLE)
    dialogs, result = run(fleet, work, "random", 30_000, num_replicas=num_replicas)
    services = (dialogs.prompts + dialogs.responses)[:, 0] / dialogs.mean_work
    load = services.sum() / dialogs.starts[-1] / num_replicas  # the drawn one
    expected = load * np.square(services).mean() / (2 * (1 - load))
    assert result.mean_wait == pytest.approx(expected, rel=0.08)  # means of other seeds lie within 0.07
    assert result.busy == pytest.approx(load, rel=0.02)
    assert result.hits == 0.0


def test_one_replica_with_room_computes_each_token_of_a_dialog_once(fleet):
    work = fleet.Work(load=0.5)
    dialogs, result = run(fleet, work, "one key a dialog", 6000, cache_tokens=10**9)
    new = dialogs.messages.sum() / dialogs.prompts.sum()
    assert result.hits == pytest.approx(1 - new, abs=0.01)
    _, without = run(fleet, work, "one key a dialog", 6000, cache_tokens=0)
    assert without.hits == 0.0
    assert without.busy == pytest.approx(work.load, rel=0.1)  # of some thousand groups


def test_a_dialog_that_moves_finds_only_the_system_prompt(fleet):
    work = fleet.Work(
        sigma=0.0, system_share=1.0, system_tokens=1600, message_tokens=160, response_tokens=160
    )
    dialogs = fleet.draw(work, 1, 60, seed=0)
    here, there = fleet.Replica(10**6), fleet.Replica(10**6)
    hits = [
        replica.cached_tokens(dialogs, work.system_tokens, dialog, turn)
        for replica, dialog, turn in [
            (here, 0, 0), (here, 0, 1), (there, 0, 2), (here, 1, 0), (here, 0, 3), (there, 0, 4),
        ]
    ]  # fmt: skip
    # A turn adds a response and a message. At turn 3 `here` has the prompt of turn 1 and its response.
    assert hits == [0, 1600 + 320, 0, 1600, 1600 + 640, 1600 + 960]


def test_a_cache_keeps_what_was_used_last(fleet):
    work = fleet.Work(sigma=0.0, system_share=0.0, group=1, message_tokens=160, response_tokens=160)
    dialogs = fleet.draw(work, 1, 60, seed=0)
    replica = fleet.Replica(cache_tokens=700)  # two groups of 320 tokens at turn 0
    for dialog in (0, 1, 0, 2):
        replica.cached_tokens(dialogs, 0, dialog, 0)
    assert replica.num_cached == 640
    assert replica.cached_tokens(dialogs, 0, 1, 1) == 0
    assert replica.num_cached == 640
    assert replica.cached_tokens(dialogs, 0, 2, 1) == 0  # the group of turn 1 was larger
    assert replica.num_cached <= 700


def test_the_simulated_rule_is_the_routers_rule(fleet):
    rng = random.Random(0)
    for spill in (0, 2, 5):
        rule = fleet.affine(lambda dialog, turn: b"%d" % dialog, spill)
        for _ in range(300):
            loads = {f"replica-{n}": rng.randrange(8) for n in range(9)}
            dialog = rng.randrange(20)
            assert rule(dialog, 0, loads) == choose(b"%d" % dialog, loads, spill=spill)


def test_a_router_that_knows_only_its_own_groups_balances_worse(fleet):
    work = fleet.Work(load=0.8, **SINGLE)
    waits = [
        run(fleet, work, "least loaded", 8000, num_replicas=8, num_routers=n)[1].mean_wait for n in (1, 64)
    ]
    assert waits[1] > 3 * waits[0]


def test_the_tables_of_the_page(fleet, capsys, monkeypatch, tmp_path):
    few = "--replicas 1 4 --groups 2000 --changed 4 --json --markdown"
    monkeypatch.setattr("sys.argv", ["simulate_fleet.py", *few.split(), str(tmp_path / "found.md")])
    fleet.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["rule"], row["replicas"]): row for row in found["rows"]}
    assert rows["hash of the first 8 tokens", 4]["busiest"] > 0.99
    one_key = rows["one key a dialog, spill 2", 4]
    changes = {change.pop("change"): change for change in found["changes"]}
    assert {**changes["spill 2"], "rule": "one key a dialog, spill 2", "replicas": 4} == one_key
    assert changes["caches of 20,000 tokens"]["hits"] < one_key["hits"] - 0.2
    table, _, second = (tmp_path / "found.md").read_text().partition("**N=4; one key a dialog, spill 2 where")
    (grows,) = (line for line in table.splitlines() if "first 8 tokens" in line)
    assert grows.split("|")[2].count(",") == 2
    assert grows.split("|")[3].strip() == "grows"
    assert second.count("\n| ") == len(fleet.CHANGES) + 1
