"""Runs providers on the same sequences: a check against the model, then rounds in which they take turns.

truth.py       the model's size and the log-probs in float64; limits.py: the machine's speeds
cost.py        the cost card
memory.py      which providers the memory holds at once
process.py     each provider starts in a process of its own
check.py       a provider whose log-probs are not the model's is refused before anything is timed
rounds         new ids in each, so that no cache of an earlier round helps
results.py     one row for each provider and shape
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kl.bench.check import check
from vllm_kl.bench.cost import Cost, cost_of
from vllm_kl.bench.memory import memory_bytes
from vllm_kl.bench.process import ProviderProcess
from vllm_kl.bench.providers import PEERS, find, num_gpus_of
from vllm_kl.bench.report import machine
from vllm_kl.bench.traffic import Traffic, usable_ids
from vllm_kl.bench.truth import truth
from vllm_kl.bench.types import Setup
from vllm_kl.errors import ReadoutUnavailableError, VLLMKLError

_USED_SHARE = 0.85  # of the free memory, by the estimates for all providers
_SHORT_S = 20.0  # a call of a peer that is shorter is done once more, to warm it up
_CHECKED, _WARM_UP = 10_000, 20_000  # seeds; those of the rounds count from 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a benchmark does."""

    setup: Setup
    traffics: Sequence[Traffic]
    providers: Mapping[str, Setup]  # by the name in the tables; the settings that differ are in each setup
    rounds: int
    peer_rounds: int  # at most as many as rounds
    log_folder: Path
    are_asked_for: bool = True  # the providers were named; else it does not matter whether a peer fails


@dataclass(kw_only=True)
class Measured:
    """What was measured; the keys are names of shapes, then of providers."""

    machine: dict[str, Any]  # as report.machine() tells it, and how the CPU is used
    facts: dict[str, Any] = field(default_factory=dict)  # of the model, and the machine's speeds
    costs: dict[str, Cost] = field(default_factory=dict)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    joules: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # the largest, nats
    checks: dict[str, str] = field(default_factory=dict)  # what a shape's log-probs are compared with
    told: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)  # by provider
    failures: dict[str, str] = field(default_factory=dict)  # by provider
    not_measured: dict[str, str] = field(default_factory=dict)  # why it is impossible here, by provider
    groups: list[list[str]] = field(default_factory=list)  # the providers that took turns with each other


class Bench:
    """Runs a plan.

    Args:
        on_costs: called with the costs before anything is measured.
        on_shape: called with what was measured so far, after each shape.
        on_line: called with what a user should read while it runs.
        on_step: called with what is done next, and how many steps are done by that.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        on_costs: Callable[[Measured], None],
        on_shape: Callable[[Measured], None],
        on_line: Callable[[str], None],
        on_step: Callable[[str, int], None],
    ) -> None:
        self._plan, self._setup = plan, plan.setup
        self._on_costs, self._on_shape = on_costs, on_shape
        self._on_line, self._on_step = on_line, on_step
        self._measured = Measured(machine=machine())
        self._ids = np.empty(0)
        self._truth: dict[str, list[np.ndarray]] = {}
        self._running: dict[str, ProviderProcess] = {}
        self._notes: set[str] = set()

    def run(self) -> Measured:
        """Return what was measured, also after Ctrl-C. No process is left, whatever happens.

        Raises:
            VLLMKLError: there is no such model.
        """
        try:
            self._learn()
            # The floor first, because it searches for its fastest way and needs an idle machine.
            names = sorted(self._plan.providers, key=lambda name: name != "floor")
            self._measured.groups = self._groups(names)
            for together in self._measured.groups:
                for name in together:
                    self._on_step(f"{name} starts", 1)
                    self._attempt(name, functools.partial(self._start, name))
                for traffic in self._plan.traffics:
                    self._measure(traffic, together)
                    self._on_shape(self._measured)
                for name in list(self._running):
                    self._attempt(name, functools.partial(self._end, name))
        except KeyboardInterrupt:
            if not any(self._measured.seconds.values()):
                raise
            self._measured.failures["the run"] = "stopped by Ctrl-C; what was measured before is kept"
        finally:
            for process in self._running.values():
                process.kill()
        return self._measured

    @staticmethod
    def num_steps(plan: Plan) -> int:
        """Return how many steps a run has, for a progress bar."""
        of_each = [1 + len(plan.traffics) * (1 + _rounds_of(name, plan)) for name in plan.providers]
        return 1 + sum(of_each)

    def _learn(self) -> None:
        self._on_step("reading the model", 0)
        process = ProviderProcess("truth", _truth, self._setup, self._plan.log_folder)
        self._running["truth"] = process
        facts = process.told()
        self._measured.machine["hardware"] |= facts["cpu"]
        self._measured.facts, self._setup = facts, dataclasses.replace(self._setup, dtype=facts["dtype"])
        self._ids = usable_ids(facts["vocab_size"], facts["special_ids"])
        for traffic in self._plan.traffics:
            known = (facts["size"], facts["dtype"], facts["limits"])
            options = {"share_prefix": self._setup.share_prefix, "num_devices": self._num_devices()}
            cost = cost_of(traffic, *known, **options)
            self._measured.costs[traffic.name] = cost
            for by_shape in ("seconds", "joules", "errors", "told"):
                getattr(self._measured, by_shape)[traffic.name] = {}
        self._on_costs(self._measured)
        self._on_step("the model's own log-probs", 1)
        try:
            for traffic in self._plan.traffics:
                self._truth[traffic.name] = process.score(*self._few(traffic))
                self._measured.checks[traffic.name] = process.told()["check"]
        except VLLMKLError as error:
            unchecked = [one.name for one in self._plan.traffics if one.name not in self._truth]
            self._on_line(f"the log-probs of {'; '.join(unchecked)} are NOT checked: {error}")
        if checks := dict.fromkeys(self._measured.checks.values()):
            self._on_line(
                f"the log-probs are checked against the model in {', '.join(checks)}, by transformers"
            )
        with contextlib.suppress(VLLMKLError):  # it failed, and has ended
            process.end()  # a process that is killed leaves semaphores, of which Python warns at the end
        process.kill()
        del self._running["truth"]

    def _num_devices(self) -> int:
        """Return how many devices share the work of a call: GPUs, or the one machine."""
        setup = self._setup
        return setup.num_processes * setup.replicas if setup.device == "cuda" else 1

    def _groups(self, names: list[str]) -> list[list[str]]:
        """Return which providers are in memory at the same time: as many as fit, beginning with the first."""
        if self._setup.device == "cuda":
            why = "a GPU holds one model at a time"
        elif self._measured.facts["size"] is None:
            why = "the model's size is not known"
        else:
            why = ""
        groups: list[list[str]] = []
        for name in names:
            with_room = (group for group in groups if not why and self._fit([*group, name]))
            if (group := next(with_room, None)) is None:
                groups.append(group := [])
            group.append(name)
        if len(groups) > 1:
            why = why or "the memory does not hold all models at a time"
            self._on_line(f"{turns_of(groups)}, because {why}")
        return groups

    def _fit(self, names: list[str]) -> bool:
        """Return whether the memory holds the processes of all providers at a time."""
        facts, setups = self._measured.facts, self._plan.providers
        needed = [memory_bytes(kind_of(name), setups[name], facts, self._plan.traffics) for name in names]
        return sum(needed) < _USED_SHARE * facts["free_bytes"]

    def _few(self, traffic: Traffic) -> tuple[list[np.ndarray], list[int]]:
        return traffic.few().draw(self._ids, _CHECKED)

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        """Do some work of a provider; after a failure, go on without the provider."""
        try:
            work()
        except VLLMKLError as error:
            if isinstance(error, ReadoutUnavailableError) and kind_of(name) != "ours":
                self._on_line(f"{name} is not measured: {error}")
                self._measured.not_measured[name] = str(error)
            else:
                self._on_line(f"{name} failed: {error}")
                self._measured.failures[name] = str(error)
            if (process := self._running.pop(name, None)) is not None:
                process.kill()

    def _start(self, name: str) -> None:
        setup = self._plan.providers[name]
        num_gpus = num_gpus_of(kind_of(name), setup)
        setup = dataclasses.replace(setup, dtype=self._setup.dtype, num_gpus=num_gpus)
        provider = functools.partial(find, kind_of(name))
        self._running[name] = ProviderProcess(name, provider, setup, self._plan.log_folder)
        self._tell_notes(name)

    def _tell_notes(self, name: str) -> None:
        """Tell what a provider's process has to say; what several say, once."""
        for note in self._running[name].notes():
            if note not in self._notes:
                self._notes.add(note)
                self._on_line(f"{name}: {note}")

    def _end(self, name: str) -> None:
        process = self._running.pop(name)
        self._measured.peaks[name] = process.end()

    def _measure(self, traffic: Traffic, names: Sequence[str]) -> None:
        for name in [name for name in names if name in self._running]:
            self._on_step(f"{name}, {traffic.name}: check", 1)
            self._attempt(name, functools.partial(self._check, name, traffic))
        for n in range(self._plan.rounds):
            drawn = traffic.draw(self._ids, n)
            for name in [name for name in order_of(names, n) if name in self._running]:
                if n < _rounds_of(name, self._plan):
                    self._on_step(f"{name}, {traffic.name}: round {n + 1}", 1)
                    is_first = n == 0 and is_peer(name)
                    self._attempt(name, functools.partial(self._time, name, traffic, drawn, is_first))

    def _check(self, name: str, traffic: Traffic) -> None:
        process = self._running[name]
        if name != "floor":
            scored = process.score(*self._few(traffic))
            if traffic.name in self._truth:
                error = check(scored, self._truth[traffic.name], self._setup.dtype)
                self._measured.errors[traffic.name][name] = error
        self._tell_notes(name)
        if not is_peer(name):
            process.time(*traffic.draw(self._ids, _WARM_UP))

    def _time(
        self, name: str, traffic: Traffic, drawn: tuple[list[np.ndarray], list[int]], is_first: bool
    ) -> None:
        """Time a call. Where ``is_first``, a short one warms up, and the next counts; a long one counts.

        In a long call that which is touched for the first time takes a small share, and peers take minutes.
        """
        process = self._running[name]
        taken = process.time(*(traffic.draw(self._ids, _WARM_UP) if is_first else drawn))
        if is_first and taken["seconds"] < _SHORT_S:
            taken = process.time(*drawn)
        for part, seconds in {name: taken["seconds"], **taken["parts"]}.items():
            self._measured.seconds[traffic.name].setdefault(part, []).append(seconds)
        if taken["joules"] is not None:
            self._measured.joules[traffic.name].setdefault(name, []).append(taken["joules"])
        self._measured.told[traffic.name][name] = process.told()


def order_of(names: Sequence[str], n: int) -> list[str]:
    """Return the order of the turns of a round.

    Who comes after another finds cold caches, and who comes after itself warm ones. In twice as many rounds
    as there are names each is the first equally often, and any two come before each other equally often.

    >>> [order_of(["floor", "ours", "flat"], n)[0] for n in range(6)]
    ['floor', 'flat', 'ours', 'floor', 'flat', 'ours']
    """
    first = n // 2 % len(names)
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if n % 2 else turned


def turns_of(groups: Sequence[Sequence[str]]) -> str:
    """Return how providers took turns, for a user; empty if all did."""
    if len(groups) < 2:
        return ""
    if all(len(group) == 1 for group in groups):
        return "providers run one after another"
    return f"providers in turns: {'; then '.join(map(', '.join, groups))}"


def kind_of(name: str) -> str:
    """Return the provider behind a name in the tables: "ours[flat]" is ours."""
    return name.partition("[")[0]


def is_peer(name: str) -> bool:
    """Return whether a provider is another way to score, one of the user's own included."""
    return name in PEERS or ":" in name


def _truth() -> Any:
    return truth


def _rounds_of(name: str, plan: Plan) -> int:
    return plan.peer_rounds if is_peer(name) else plan.rounds
