"""How many replicas there are, and what each takes of a cluster."""

from __future__ import annotations

import pytest

pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")

from vllm_kl.engines.replicas.fleet import fleet_of, wish_of

GPUS = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}]
CPUS = [{"CPU": 8.0, "memory": 1e9}]


def fleet(replicas, nodes, **options):
    found = fleet_of(wish_of(replicas), options, nodes)
    return found.fewest, found.most, found.num_gpus, found.num_cpus, found.num_threads


@pytest.mark.parametrize(
    ("replicas", "nodes", "options", "expected"),
    [
        (4, GPUS, {}, (4, 4, 1, 1, 1)),
        (2, GPUS, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, (2, 2, 4, 1, 1)),
        ("auto", GPUS, {"tensor_parallel_size": 2}, (1, 4, 2, 1, 1)),
        ({"min": 2, "max": 3}, GPUS, {}, (2, 3, 1, 1, 1)),
        ({"min": 2}, GPUS, {"tensor_parallel_size": 4}, (2, 2, 4, 1, 1)),
        ({"min": 2, "gpus": 0.5, "cpus": 3}, GPUS, {}, (2, 16, 0.5, 3, 3)),
        # On a CPU the cores are shared out; the workers of one engine share those of their replica.
        (2, CPUS, {}, (2, 2, 0, 4, 4)),
        (2, CPUS, {"tensor_parallel_size": 2}, (2, 2, 0, 4, 2)),
        (16, CPUS, {}, (16, 16, 0, 1, 1)),
        ("auto", CPUS, {}, (1, 8, 0, 1, 1)),
        # A replica is on one machine.
        (1, CPUS * 2, {}, (1, 1, 0, 8, 8)),
        (2, [{"CPU": 6.0}, {"CPU": 2.0}], {}, (2, 2, 0, 3, 3)),
    ],
)
def test_each_replica_gets_its_share(replicas, nodes, options, expected):
    assert fleet(replicas, nodes, **options) == expected


def test_what_others_have_is_not_shared_out():
    assert fleet_of(wish_of(2), {}, CPUS, free_cpus=5.0).num_cpus == 2
    assert fleet_of(wish_of(2), {}, CPUS, free_cpus=0.0).num_cpus == 1  # which then is refused
