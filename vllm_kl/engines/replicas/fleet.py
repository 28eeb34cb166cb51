"""Says how many replicas a scorer has, and what each takes of the cluster."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kl.errors import OptionError

_NAMES = ("min", "max", "cpus", "gpus", "weights_folder")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The argument ``replicas`` of a scorer."""

    fewest: int
    most: int | None  # None: as many as the cluster holds
    cpus: float | None = None
    gpus: float | None = None
    weights_folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """How many replicas there are, and what each of them takes."""

    fewest: int
    most: int
    num_cpus: float  # of Ray's
    num_gpus: float
    num_threads: int  # of each worker of an engine, on a CPU

    @property
    def is_elastic(self) -> bool:
        return self.fewest != self.most


def wish_of(replicas: Any) -> Wish:
    """Return what the argument ``replicas`` asks for.

    Raises:
        OptionError: it is neither a number, nor "auto", nor a mapping of the known names.
    """
    if replicas == "auto":
        return Wish(fewest=1, most=None)
    if isinstance(replicas, Mapping):
        if unknown := [name for name in replicas if name not in _NAMES]:
            raise OptionError(f"replicas={replicas!r}: {unknown[0]!r} is none of {', '.join(_NAMES)}")
        fewest, most = _number(replicas, "min", 1), _number(replicas, "max", None)
        if most is not None and most < fewest:
            raise OptionError(f"replicas={replicas!r}: max is below min")
        folder = replicas.get("weights_folder")
        if folder is not None and not Path(folder).is_dir():
            raise OptionError(f"replicas: the weights_folder {str(folder)!r} does not exist")
        return Wish(
            fewest=fewest,
            most=most,
            cpus=_amount(replicas, "cpus"),
            gpus=_amount(replicas, "gpus"),
            weights_folder=None if folder is None else Path(folder),
        )
    number = _number({"replicas": replicas}, "replicas", None)
    return Wish(fewest=number, most=number)


def fleet_of(
    wish: Wish,
    options: Mapping[str, Any],
    nodes: list[Mapping[str, float]],
    *,
    free_cpus: float | None = None,
) -> Fleet:
    """Return the fleet on a cluster.

    Args:
        wish: what the caller asked for.
        options: the options of the engines: one replica takes a GPU for each of its workers.
        nodes: what each machine of the cluster has, by Ray's names.
        free_cpus: how many CPUs are shared out; ``None``: all.
    """
    workers = int(options.get("tensor_parallel_size") or 1) * int(options.get("pipeline_parallel_size") or 1)
    gpus, cpus = (sum(node.get(name, 0) for node in nodes) for name in ("GPU", "CPU"))
    num_gpus = wish.gpus if wish.gpus is not None else (workers if gpus else 0)
    room = gpus // num_gpus if num_gpus else cpus // (wish.cpus or 1)
    most = wish.most or max(wish.fewest, int(room))
    share = max(1, int((cpus if free_cpus is None else free_cpus) // most))
    if not num_gpus:  # a replica is on one machine
        share = next((n for n in range(share, 1, -1) if _places(n, nodes) >= most), 1)
    num_cpus = wish.cpus if wish.cpus is not None else (1 if num_gpus else share)
    return Fleet(
        fewest=wish.fewest,
        most=most,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        num_threads=max(1, int(num_cpus) // workers),
    )


def _places(num_cpus: int, nodes: list[Mapping[str, float]]) -> int:
    """Return how many replicas the machines hold."""
    return sum(int(node.get("CPU", 0)) // num_cpus for node in nodes)


def _number(given: Mapping[str, Any], name: str, default: int | None) -> int | None:
    value = given.get(name, default)
    if value is None and name != "replicas":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(
            f"{name}={value!r}: expected how many replicas there are, a whole number of at least 1; or "
            "replicas='auto', or a mapping with min and max"
        )
    return value


def _amount(given: Mapping[str, Any], name: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and 0 <= value < math.inf):
        raise OptionError(f"replicas: {name}={value!r}, expected a number of at least 0, for one replica")
    return value
