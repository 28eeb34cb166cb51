"""Simulates a fleet of scoring replicas, and compares rules that choose the replica of a group.

    python benchmarks/simulate_fleet.py
    python benchmarks/simulate_fleet.py --replicas 64 --load 1.2 --changed 0 --json

Nothing is measured here: no engine, no GPU, no Ray. Dialogs arrive at random. At each turn a group comes: one
prompt and G responses. The next prompt is the last one, one of its responses, and a new message. A share of
the dialogs begins with one common system prompt. A replica serves its groups in the order in which they came;
the time of a group is its computed tokens divided by the replica's tokens per second. A prompt's beginning is
not computed if the replica's prefix cache has it: an LRU of bounded size, which forgets whole dialogs.

``--load`` is the work of all groups without a cache, over what the replicas can compute: 0.8 keeps them
busy for 0.8 of the time if nothing is found in a cache. Latencies count from the arrival of a group to its
last log-prob. Their unit is the mean time of a group without a cache. Where a replica is always busy its
queue grows as long as dialogs come, and latencies tell only how long the simulation was: "grows". Every
rule gets the same dialogs.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial

import numpy as np

from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table
from vllm_kl.routing.affinity import choose

SYSTEM = -1  # the key of the common system prompt in a cache; dialogs have their numbers
Choice = Callable[[int, int, Mapping[str, int]], str]  # dialog, turn, loads -> replica


@dataclass(frozen=True, kw_only=True)
class Work:
    """The distribution of dialogs; lengths in tokens."""

    load: float = 0.8
    turns: int = 6
    group: int = 8
    system_tokens: int = 2000
    system_share: float = 0.75
    message_tokens: float = 1000.0  # mean
    response_tokens: float = 400.0  # mean
    sigma: float = 0.8  # of the logarithm of lengths; 0: all are equal
    think: float = 10.0  # mean time from a turn's log-probs to the next turn, exponential


@dataclass(frozen=True, kw_only=True)
class Dialogs:
    """Dialogs that arrive at a fleet; D of them, of T turns."""

    starts: np.ndarray  # [D], arrival of the first turn
    thinks: np.ndarray  # [D, T], time before each turn
    has_system: np.ndarray  # [D]
    messages: np.ndarray  # [D, T]
    prompts: np.ndarray  # [D, T], the system prompt included
    responses: np.ndarray  # [D, T], tokens of all responses of the group
    mean_work: float  # tokens of a group, mean


@lru_cache(maxsize=1)
def draw(work: Work, num_replicas: int, num_groups: int, seed: int) -> Dialogs:
    """Return the dialogs of about ``num_groups`` groups; the last ones are kept for the next call."""
    rng = np.random.default_rng(seed)
    shape = (max(1, num_groups // work.turns), work.turns)

    def lengths(mean: float, *shape: int) -> np.ndarray:
        drawn = rng.lognormal(np.log(mean) - work.sigma**2 / 2, work.sigma, shape)
        return np.maximum(1, np.rint(drawn)).astype(np.int64)

    messages = lengths(work.message_tokens, *shape)
    responses = lengths(work.response_tokens, *shape, work.group)
    has_system = rng.random(shape[0]) < work.system_share
    prompts = messages.cumsum(1) + work.system_tokens * has_system[:, None]
    prompts[:, 1:] += responses[:, :-1, 0].cumsum(1)  # the dialog goes on with the first response
    totals = responses.sum(2)
    gaps = rng.exponential(work.turns / (work.load * num_replicas), shape[0])
    return Dialogs(
        starts=gaps.cumsum(),
        thinks=rng.exponential(work.think, shape),
        has_system=has_system,
        messages=messages,
        prompts=prompts,
        responses=totals,
        mean_work=float((prompts + totals).mean()),
    )


class Replica:
    """Serves groups one after another, and keeps dialogs in its prefix cache."""

    def __init__(self, cache_tokens: int) -> None:
        self._cache: OrderedDict[int, tuple[int, int]] = OrderedDict()  # key -> last turn, tokens
        self._cache_tokens = cache_tokens
        self.num_cached = 0  # tokens in the cache
        self.free_at = 0.0
        self.busy = 0.0

    def cached_tokens(self, dialogs: Dialogs, system_tokens: int, dialog: int, turn: int) -> int:
        """Return how many tokens of a prompt need not be computed, and keep the whole group."""
        system = system_tokens if dialogs.has_system[dialog] else 0
        hit = 0
        if system and SYSTEM in self._cache:
            hit = system
        if dialog in self._cache:
            last = self._cache[dialog][0]  # all of the prompt but the messages and responses since then
            hit = int(dialogs.prompts[dialog, last + 1] - dialogs.messages[dialog, last + 1])
        group = int(dialogs.prompts[dialog, turn] - system + dialogs.responses[dialog, turn])
        self._keep(dialog, turn, group)
        if system:  # the last to be touched, so never forgotten before a dialog that begins with it
            self._keep(SYSTEM, 0, system)
        # Whole blocks of 16; and the last token of a prompt is computed, because it predicts the next.
        return min(hit, int(dialogs.prompts[dialog, turn]) - 1) // 16 * 16

    def _keep(self, key: int, turn: int, tokens: int) -> None:
        self.num_cached += tokens - self._cache.pop(key, (0, 0))[1]
        self._cache[key] = turn, tokens
        while self.num_cached > self._cache_tokens:
            self.num_cached -= self._cache.popitem(last=False)[1][1]


def affine(key_of: Callable[[int, int], bytes], spill: int) -> Choice:
    """Return the router's rule with keys of one kind, with its hashes computed once for each key.

    The rule takes the preferred replica, whatever the loads, unless it is behind by more than ``spill``. So
    the answer for equal loads is remembered, and ``choose`` is asked again only where it is behind.
    """
    preferred: dict[bytes, str] = {}

    def rule(dialog: int, turn: int, loads: Mapping[str, int]) -> str:
        key = key_of(dialog, turn)
        if key not in preferred:
            preferred[key] = choose(key, dict.fromkeys(loads, 0), spill=spill)
        first = preferred[key]
        if loads[first] - min(loads.values()) <= spill:
            return first
        return choose(key, loads, spill=spill)

    return rule


def least_loaded(dialog: int, turn: int, loads: Mapping[str, int], *, rng: random.Random) -> str:
    least = min(loads.values())
    return rng.choice([replica for replica, load in loads.items() if load == least])


def any_replica(dialog: int, turn: int, loads: Mapping[str, int], *, rng: random.Random) -> str:
    return rng.choice(list(loads))


def two_choices(dialog: int, turn: int, loads: Mapping[str, int], *, rng: random.Random) -> str:
    one, other = rng.choices(list(loads), k=2)
    return one if loads[one] <= loads[other] else other


def rules(dialogs: Dialogs, system_tokens: int, spill: int, seed: int) -> dict[str, Choice]:
    """Return the rules by their names in the tables."""

    def dialog_key(dialog: int, turn: int) -> bytes:
        return b"%d" % dialog

    def prompt_key(dialog: int, turn: int) -> bytes:
        return b"%d, %d" % (dialog, turn)

    def beginning_key(dialog: int, turn: int) -> bytes:
        """The first 2^k tokens, as many as there are: a dialog's key changes only when its length doubles."""
        k = int(dialogs.prompts[dialog, turn]).bit_length() - 1
        is_system = dialogs.has_system[dialog] and (1 << k) <= system_tokens
        return b"system, %d" % k if is_system else b"%d, %d" % (dialog, k)

    def first_tokens_key(dialog: int, turn: int) -> bytes:
        return b"system" if dialogs.has_system[dialog] else b"%d" % dialog

    never = 1 << 60
    return {
        f"one key a dialog, spill {spill}": affine(dialog_key, spill),
        "one key a dialog, no spill": affine(dialog_key, never),
        f"hash of the first 2^k tokens, spill {spill}": affine(beginning_key, spill),
        f"hash of the whole prompt, spill {spill}": affine(prompt_key, spill),
        "least loaded": partial(least_loaded, rng=random.Random(seed)),
        "the better of two at random (Serve's default)": partial(two_choices, rng=random.Random(seed)),
        "random": partial(any_replica, rng=random.Random(seed)),
        "hash of the first 8 tokens": affine(first_tokens_key, never),
    }


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of one fleet under one rule; without those of groups that came in the warm-up."""

    busy: float  # share of the time, mean of the replicas
    busiest: float  # the same of the busiest replica
    hits: float  # share of the prompts' tokens that caches had
    p50: float  # latency, in mean times of a group without a cache
    p99: float
    mean_wait: float  # time before a group is served, the same unit
    behind: float  # time that the busiest replica still needs at the end, the same unit
    num_groups: int


def simulate(
    dialogs: Dialogs,
    rule: Choice,
    *,
    num_replicas: int,
    system_tokens: int,
    cache_tokens: int,
    num_routers: int = 1,
    warm_up: float = 0.4,
    seed: int = 0,
) -> Result:
    """Return what becomes of the dialogs.

    Each of ``num_routers`` counts the groups that it has sent itself, and knows nothing of the others.
    """
    names = [f"replica-{n}" for n in range(num_replicas)]
    replicas = {name: Replica(cache_tokens) for name in names}
    loads = [dict.fromkeys(names, 0) for _ in range(num_routers)]
    router_of = random.Random(seed)
    begin, end = warm_up * dialogs.starts[-1], dialogs.starts[-1]
    waits, times, num_hits, num_prompt_tokens = [], [], 0, 0
    # (time, number, dialog, turn, router and replica of the group that ends; None: it arrives)
    events = [(at, n, n, 0, None) for n, at in enumerate(dialogs.starts.tolist())]
    heapq.heapify(events)
    while events:
        now, number, dialog, turn, served = heapq.heappop(events)
        if served is not None:
            loads[served[0]][served[1]] -= 1
            if turn + 1 < dialogs.thinks.shape[1]:
                at = now + float(dialogs.thinks[dialog, turn + 1])
                heapq.heappush(events, (at, number, dialog, turn + 1, None))
            continue
        if now > end:  # no more dialogs arrive: the fleet runs empty
            continue
        router = router_of.randrange(num_routers) if num_routers > 1 else 0
        name = rule(dialog, turn, loads[router])
        replica = replicas[name]
        prompt = int(dialogs.prompts[dialog, turn])
        hit = replica.cached_tokens(dialogs, system_tokens, dialog, turn)
        seconds = (prompt - hit + int(dialogs.responses[dialog, turn])) / dialogs.mean_work
        start = max(now, replica.free_at)
        replica.free_at = start + seconds
        loads[router][name] += 1
        heapq.heappush(events, (replica.free_at, number, dialog, turn, (router, name)))
        replica.busy += max(0.0, min(end, replica.free_at) - max(begin, start))
        if now >= begin:
            waits.append(start - now)
            times.append(replica.free_at - now)
            num_hits += hit
            num_prompt_tokens += prompt
    busy = np.array([replica.busy for replica in replicas.values()]) / (end - begin)
    p50, p99 = np.percentile(times, [50, 99])
    return Result(
        busy=float(busy.mean()),
        busiest=float(busy.max()),
        hits=num_hits / num_prompt_tokens,
        p50=float(p50),
        p99=float(p99),
        mean_wait=float(np.mean(waits)),
        behind=max(0.0, *(replica.free_at - end for replica in replicas.values())),
        num_groups=len(times),
    )


ONE_KEY, LEAST_LOADED = "one key a dialog, spill", "least loaded"  # how the names of rules begin
# What the second table changes, one thing a row, and for which rule.
CHANGES: dict[str, tuple[str, dict[str, float]]] = {
    **{f"spill {n}": (ONE_KEY, {"spill": n}) for n in (0, 1, 2, 4)},
    **{f"caches of {n:,} tokens": (ONE_KEY, {"cache_tokens": n}) for n in (120_000, 60_000, 20_000)},
    **{f"{n} routers, each knows only its own groups": (ONE_KEY, {"routers": n}) for n in (8, 64)},
    **{f"the same, least loaded, {n} routers": (LEAST_LOADED, {"routers": n}) for n in (8, 64)},
    "load 1.2": (ONE_KEY, {"load": 1.2}),
    "load 1.2, least loaded": (LEAST_LOADED, {"load": 1.2}),
    "dialogs of one turn": (ONE_KEY, {"turns": 1}),
    "dialogs of one turn, least loaded": (LEAST_LOADED, {"turns": 1}),
}


def results_of(args: argparse.Namespace, num_replicas: int, words: Sequence[str] = ()) -> dict[str, Result]:
    """Return the result of each rule, or of those whose name begins with one of the words."""
    work = Work(**{field.name: getattr(args, field.name) for field in fields(Work)})
    num_groups = max(args.groups, args.groups_per_replica * num_replicas)
    dialogs = draw(work, num_replicas, num_groups, args.seed)
    settings = {
        "num_replicas": num_replicas,
        "system_tokens": work.system_tokens,
        "cache_tokens": args.cache_tokens,
        "num_routers": args.routers,
        "seed": args.seed,
    }
    return {
        name: simulate(dialogs, rule, **settings)
        for name, rule in rules(dialogs, work.system_tokens, args.spill, args.seed).items()
        if not words or name.startswith(tuple(words))
    }


def cell(result: Result) -> str:
    """Return hits, busy and p99; or a word where latencies tell only how long the simulation was."""
    return "grows" if result.busiest > 0.99 else f"{result.hits:.2f}, {result.busy:.2f}, {result.p99:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--groups", type=int, default=20_000, help="at least so many groups a fleet")
    parser.add_argument("--groups-per-replica", type=int, default=150, help="at least so many, too")
    parser.add_argument("--cache-tokens", type=int, default=250_000, help="of each replica")
    parser.add_argument("--spill", type=int, default=2, help="groups that a replica may be behind")
    parser.add_argument("--routers", type=int, default=1, help="each knows only its own groups")
    parser.add_argument("--rules", nargs="+", metavar="WORD", default=[], help="whose name begins so")
    parser.add_argument(
        "--changed", type=int, metavar="N", default=64, help="replicas in the table of changes; 0: no table"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    for name, value in asdict(Work()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    add_markdown_option(parser)
    args = parser.parse_args()
    report, began = Report(args.markdown), time.perf_counter()

    fleets = {n: results_of(args, n, args.rules) for n in args.replicas}
    table = make_table("Cache hits, busy, p99", "rule", *(f"N={n:,}" for n in fleets))
    for rule in next(iter(fleets.values())):
        table.add_row(rule, *(cell(fleet[rule]) for fleet in fleets.values()))
    report.table(table)

    changed = {}
    if args.changed:
        title = f"N={args.changed:,}; {ONE_KEY} {args.spill} where nothing else is said"
        table = make_table(title, "", "cache hits", "busy", "p50", "p99")
        for name, (rule, change) in CHANGES.items():
            others = argparse.Namespace(**{**vars(args), **change})
            (changed[name], *_) = results_of(others, args.changed, [rule]).values()
            shares = (f"{x:.2f}" for x in (changed[name].hits, changed[name].busy))
            table.add_row(name, *shares, f"{changed[name].p50:.1f}", f"{changed[name].p99:.1f}")
        report.table(table)

    settings = {name: value for name, value in vars(args).items() if name not in ("json", "markdown")}
    told = ", ".join(
        f"{name} {settings[name]}" for name in (*asdict(Work()), "spill", "cache_tokens", "seed")
    )
    report.line(machine_line(f"{told}; {time.perf_counter() - began:.0f} s"))
    if args.json:
        rows = [
            {"replicas": n, "rule": rule, **asdict(result)}
            for n, fleet in fleets.items()
            for rule, result in fleet.items()
        ]
        changes = [{"change": name, **asdict(result)} for name, result in changed.items()]
        print(json.dumps({"settings": settings, "rows": rows, "changes": changes}))


if __name__ == "__main__":
    main()
