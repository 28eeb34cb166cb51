"""Connects to a Ray cluster or starts one, and checks that the plan fits before anything of it runs.

Ray Data's own operators take logical CPUs, too. Without one for each, a pipeline waits for ever.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from vllm_kl.errors import EngineError, OptionError
from vllm_kl.ray_address import check_address

_OPERATORS = 2  # stages beside the scorers, each a task of one CPU: read; compare and write
_FREE_WITHIN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the pipeline takes of a cluster."""

    replicas: int = 1  # of each model's engine
    workers: tuple[int, ...] = (1,)  # of an engine of each model: tensor times pipeline parallel
    num_gpus: float | None = None  # of each replica; None: one for each worker, if the cluster has GPUs
    num_cpus: float = 1  # logical ones, of each replica

    @property
    def num_engines(self) -> int:
        return self.replicas * len(self.workers)

    @property
    def cpus(self) -> float:
        return self.num_engines * self.num_cpus + _OPERATORS

    def gpus_of(self, model: int) -> float:
        """Return the GPUs of an engine of the first or the second model."""
        if self.num_gpus is not None:
            return self.num_gpus
        return self.workers[model] if ray.cluster_resources().get("GPU", 0) else 0

    def environment_of(self, model: int) -> dict[str, str]:
        """Return the environment of an engine on CPUs: its share of the cores.

        Ray gives an actor one thread for each of its logical CPUs. This is left so where there are several
        machines.
        """
        if self.gpus_of(model) or len([node for node in ray.nodes() if node["Alive"]]) > 1:
            return {}
        engines = self.num_engines
        defaults = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // engines))}
        if engines > 1:  # vLLM's own binding gives each engine all cores
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        return {name: os.environ.get(name, value) for name, value in defaults.items()}

    def check(self) -> None:
        """Refuse a plan that the cluster cannot hold, beside what others use of it.

        Raises:
            OptionError: too few CPUs or GPUs, in all, free, or on each node.
        """
        total = ray.cluster_resources()
        gpus = [self.gpus_of(n) for n in range(len(self.workers))]
        each = f"{self.num_cpus:g} CPUs and {' or '.join(dict.fromkeys(f'{n:g}' for n in gpus))} GPUs each"
        needs = (
            f"{self.num_engines} engines with {each}, and {_OPERATORS} CPUs for Ray Data's reader and writer"
        )
        for name, wanted in self._wanted:
            if wanted > total.get(name, 0):
                raise OptionError(
                    f"the Ray cluster has {total.get(name, 0):g} logical {name}s, the plan takes {wanted:g}: "
                    f"{needs}. Take fewer --replicas, or a larger cluster"
                )
        free = self._free()
        for name, wanted in self._wanted:
            if wanted > free.get(name, 0):
                raise OptionError(
                    f"of the {total[name]:g} logical {name}s of the Ray cluster {free.get(name, 0):g} are "
                    f"free, the plan takes {wanted:g}: {needs}. Take fewer --replicas, or wait for the others"
                )
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for of_engine in set(gpus):
            places = sum(self._places(node, of_engine) for node in nodes)
            if places < self.replicas * gpus.count(of_engine):
                raise OptionError(
                    f"the nodes of the Ray cluster have room for {places} engines, the plan takes {needs}. "
                    "An engine must fit on one node"
                )

    @property
    def _wanted(self) -> list[tuple[str, float]]:
        gpus = self.replicas * sum(map(self.gpus_of, range(len(self.workers))))
        return [(name, wanted) for name, wanted in (("CPU", self.cpus), ("GPU", gpus)) if wanted]

    def _free(self) -> dict[str, float]:
        """Return what the cluster has free. What just ended counts as used for a moment longer."""
        until = time.monotonic() + _FREE_WITHIN_S
        while True:
            free = ray.available_resources()
            if all(wanted <= free.get(name, 0) for name, wanted in self._wanted) or time.monotonic() > until:
                return free
            time.sleep(0.2)

    def _places(self, node: dict[str, float], num_gpus: float) -> int:
        each = [("CPU", self.num_cpus), ("GPU", num_gpus)]
        return min(int(node.get(name, 0) / wanted) for name, wanted in each if wanted)


# What Ray collects for a dashboard, which a local Ray here has not. It takes 0.07 of a core.
_FIGURES = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0"}


@contextlib.contextmanager
def _without_figures() -> Iterator[None]:
    """Let a Ray that starts in the block collect no figures, unless the environment says otherwise."""
    mine = {name: value for name, value in _FIGURES.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]


@contextlib.contextmanager
def connected(address: str | None, resources: Resources) -> Iterator[None]:
    """Use the cluster at an address, or the one that this process has, or a local one for the block.

    Raises:
        OptionError: the plan does not fit.
        EngineError: there is no such cluster.
    """
    if ray.is_initialized():
        resources.check()
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "num_cpus": int(resources.cpus + 0.999)}
        options |= {"object_store_memory": 1 << 30}
    else:
        check_address(address)
        options["address"] = address
    try:
        with _without_figures() if address is None else contextlib.nullcontext():
            ray.init(**options)
    except Exception as error:  # Ray 2.60 raises Exception itself where a local node does not start in time
        where = "a local Ray did not start" if address is None else f"no Ray cluster at {address}"
        raise EngineError(f"{where}: {error}") from error
    try:
        resources.check()
        yield
    finally:
        ray.shutdown()
