"""Is a scorer the same after an hour as after a minute? Threads score, push, refresh and err, all at once.

    python benchmarks/soak.py --minutes 60 --out soak_out

One engine of the scorer's own, and a tiny model whose weights change between two sets of random ones. Five
kinds of threads use it together:

    dialogs   renders dialogs by a chat template, scores them, and asks which version scored
    groups    scores groups of responses to one prompt, in a random order, with starts
    best      asks for the most likely tokens, or for the entropy
    weights   pushes one of the two sets, refreshes to it, or proves that the reference is frozen
    wrong     gives ids, starts, temperatures and weights that must be refused

Each number is compared with float64 (tests/oracle.py) of the weights of the version that it claims. A
call that tells no version must be of one set of weights as a whole. Meanwhile the main thread samples what
the process and its engine hold: memory (PSS, which counts a page of two processes half for each; without the
pages of files, which other programs share), file descriptors, threads, and the scorer's files in /dev/shm.
Each window, of a minute, is a line of ``soak.jsonl``, with the latencies of its calls, and the share of the
CPUs that other programs took. Latencies are judged by the windows in which that was less than a tenth.

The verdict leaves out the first ten minutes, or the first half of a shorter run, in which caches fill. Each
figure of the rest must stay below a tolerance, which the table shows, in two ways: by the median slope of all
pairs of windows (Theil and Sen), which sees a steady leak; and by the median of the last windows against that
of the first ones, which sees a step. Exit code 1: something grew or was not measured, a result was wrong, or
a thread did not end; then ``stacks.txt`` has the stacks of all threads.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' oracle and tiny models

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.oracle import ENTROPY_TOLERANCE, LOG_PROB_TOLERANCE, Oracle, entropy
from vllm_kl import VLLMScorer, push_weights
from vllm_kl.batch.alignment import scored_spans
from vllm_kl.batch.read_messages import read_messages
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table
from vllm_kl.errors import FrozenError, InputError, WeightsError
from vllm_kl.lifetime import PREFIX, SHARED_MEMORY

K = 3
GROUP = 6
MIB = 1 << 20
WARM_UP_S = 600.0
ENDS = 5  # how many of the first and of the last windows are compared
ENDS_WITHIN_S = 120.0  # the longest call takes a second
OTHERS_AT_MOST = 0.1  # of the CPUs, in a window whose latencies are judged


class Tolerance(NamedTuple):
    """How much a figure may grow in a run of any length: a fraction of its median, and an amount."""

    fraction: float
    amount: float
    unit: str


# Memory. What fills is bounded: the pages that the allocator keeps after the largest push or batch so far.
# Together 18 MiB of 1,000 here. An hour has about 100,000 scoring calls and 3,000 changes of weights: a leak
# of 200 bytes a call, or of 6 KiB a change, is found.
# The others. A descriptor, a thread or a file that is left at each push or call would be hundreds in an hour;
# one or two come and go with a push that a sample meets.
TOLERANCES = {
    "pss_mib": Tolerance(0.01, 8.0, "MiB"),
    "fds": Tolerance(0.0, 2.0, ""),
    "threads": Tolerance(0.0, 2.0, ""),
    "shm_files": Tolerance(0.0, 2.0, ""),
    "shm_mib": Tolerance(0.0, 4.0, "MiB"),
    "p50_ms": Tolerance(0.25, 5.0, "ms"),
    "p99_ms": Tolerance(0.5, 20.0, "ms"),
}


class Truth(NamedTuple):
    """What one sequence scores with one set of weights: float64, nats; entry t belongs to token t + 1."""

    log_probs: torch.Tensor  # [L - 1]
    entropies: torch.Tensor  # [L - 1]
    all_log_probs: torch.Tensor  # [L - 1, V]


class Soak:
    """The threads' common ground: the scorer, the truths, and what was found.

    Attributes:
        set_of: version -> which of the two sets of weights it has.
        is_pushed: whether the last change of the weights was a push; else the reference is frozen.
        faults: texts of results that were wrong.
    """

    def __init__(self, home: Path, seed: int) -> None:
        self.paths = [tiny.build(home / str(n), seed=n, tie_word_embeddings=True) for n in range(2)]
        self.states = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in self.paths]
        self.tokenizer = AutoTokenizer.from_pretrained(self.paths[0])
        self.oracles = [Oracle(path) for path in self.paths]
        self.dialogs, self.groups = _dialogs(seed), _groups(seed)
        self.truths: dict[tuple[int, ...], list[Truth]] = {}
        for ids in [*itertools.chain(*self.groups), *(self.rendered(dialog)[0] for dialog in self.dialogs)]:
            self.truths[tuple(ids)] = [_truth(oracle, ids) for oracle in self.oracles]
        self.scorer = VLLMScorer(str(self.paths[0]), **tiny.ENGINE_OPTIONS)
        self.set_of = {self.scorer.weight_version: 0}
        self.is_pushed = False
        self.faults: list[str] = []
        self.latencies: dict[str, list[float]] = defaultdict(list)
        self.counts: dict[str, int] = defaultdict(int)
        self.lock, self.has_ended = threading.Lock(), threading.Event()

    def rendered(self, dialog: list[dict[str, str]]) -> tuple[list[int], tuple[int, int]]:
        """Return the ids of a dialog, and the span of its scored tokens."""
        batch = read_messages([dialog], self.tokenizer)
        return batch.token_ids[0].tolist(), scored_spans(batch.packed_keep, batch.lengths)[0]

    def timed(self, kind: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        found = call()
        with self.lock:
            self.latencies[kind].append(time.perf_counter() - began)
            self.counts[kind] += 1
        return found

    def check(self, kind: str, errors: list[float], tolerance: float, told: str = "") -> None:
        """Note a fault if no set of weights, or not the one that is claimed, gives these numbers."""
        if not min(errors) < tolerance:
            self.faults.append(f"{kind}: {told} errors {errors} against {len(errors)} sets of weights")


def _dialogs(seed: int) -> list[list[dict[str, str]]]:
    draw = random.Random(seed)
    words = ["one", "two", "plus", "is", "what", "é", "7", "\n"]

    def said() -> str:
        return " ".join(draw.choices(words, k=draw.randrange(1, 12)))

    return [
        [
            {"role": role, "content": said()}
            for _ in range(draw.randrange(1, 4))
            for role in ("user", "assistant")
        ]
        for _ in range(12)
    ]


def _groups(seed: int) -> list[list[list[int]]]:
    """Return groups of sequences with one prompt each, longer than a block of the prefix cache."""
    draw = random.Random(seed + 1)
    groups = []
    for _ in range(6):
        prompt = [draw.randrange(250) for _ in range(draw.randrange(20, 100))]
        groups.append([[*prompt, *(draw.randrange(250) for _ in range(24))] for _ in range(GROUP)])
    return groups


def _truth(oracle: Oracle, ids: list[int]) -> Truth:
    logits = oracle.logits(ids)[:-1]
    return Truth(
        torch.tensor(oracle.log_probs(ids)[1:], dtype=torch.float64),
        torch.tensor([entropy(row.tolist()) for row in logits], dtype=torch.float64),
        logits.log_softmax(-1),
    )


def score_dialogs(soak: Soak, draw: random.Random) -> None:
    dialogs = draw.sample(soak.dialogs, draw.randrange(1, 7))
    rendered = [soak.rendered(dialog) for dialog in dialogs]
    _score_and_check(soak, "dialogs", [ids for ids, _ in rendered], [span[0] for _, span in rendered])


def score_groups(soak: Soak, draw: random.Random) -> None:
    ids = list(itertools.chain(*draw.sample(soak.groups, 2)))
    draw.shuffle(ids)
    _score_and_check(soak, "groups", ids, [len(one) - 24 for one in ids])


def _score_and_check(soak: Soak, kind: str, ids: list[list[int]], starts: list[int]) -> None:
    """Score, and compare with the weights of the version that the call tells."""
    rows, stats = soak.timed(kind, lambda: soak.scorer.score_and_tell(ids, starts))
    which = soak.set_of[stats.weight_version]
    for one, start, row in zip(ids, starts, rows, strict=True):
        truth = soak.truths[tuple(one)][which].log_probs[start - 1 :]
        soak.check(kind, [_distance(row, truth)], LOG_PROB_TOLERANCE, f"version {stats.weight_version}:")


def score_best(soak: Soak, draw: random.Random) -> None:
    """The call tells no version: all of its numbers are of one set of weights."""
    ids = draw.choice(soak.groups)[: draw.randrange(1, GROUP + 1)]
    truths = [soak.truths[tuple(one)] for one in ids]
    if draw.random() < 0.5:
        found = soak.timed("best", lambda: soak.scorer.score_topk(ids, K, entropy=True))
        log_probs, entropies = [one.target_log_probs for one in found], [one.entropy for one in found]
        errors = [
            max(
                _distance(one.log_probs, truth[which].all_log_probs.gather(1, one.token_ids))
                for one, truth in zip(found, truths, strict=True)
            )
            for which in range(2)
        ]
        soak.check("best", errors, LOG_PROB_TOLERANCE, "top k:")
        best = [
            max(
                _distance(one.log_probs, truth[which].all_log_probs.topk(K).values)
                for one, truth in zip(found, truths, strict=True)
            )
            for which in range(2)
        ]
        soak.check("best", best, LOG_PROB_TOLERANCE, "largest k:")
    else:
        log_probs, entropies = soak.timed("best", lambda: soak.scorer.score(ids, entropy=True))
    errors = [max(map(_distance, log_probs, (t[which].log_probs for t in truths))) for which in range(2)]
    soak.check("best", errors, LOG_PROB_TOLERANCE, "log-probs:")
    which = errors.index(min(errors))
    of_entropy = max(map(_distance, entropies, (t[which].entropies for t in truths)))
    soak.check("best", [of_entropy], ENTROPY_TOLERANCE, "entropies:")


def change_weights(soak: Soak, draw: random.Random) -> None:
    which, version = draw.randrange(2), soak.scorer.weight_version + 1
    soak.set_of[version] = which
    how = draw.choice(["push", "refresh", "refresh from a folder", "check"])
    if how == "push":
        found = soak.timed("push", lambda: push_weights(soak.scorer, soak.states[which], version=version))
        expected, soak.is_pushed = version, True
    elif how == "check":
        found = soak.timed("check", lambda: _distance_if_frozen(soak.scorer))
        expected = None if soak.is_pushed else 0.0
    else:
        source = soak.states[which] if how == "refresh" else soak.paths[which]
        found = soak.timed("refresh", lambda: soak.scorer.refresh(source, version=version))
        expected, soak.is_pushed = version, False
    if found != expected:
        soak.faults.append(f"{how}: returned {found}, expected {expected}")
    soak.has_ended.wait(draw.uniform(0.2, 1.0))


def _distance_if_frozen(scorer: VLLMScorer) -> float | None:
    """Return how far the canary moved, in nats; ``None``: the reference is not frozen."""
    try:
        return scorer.check_frozen()
    except FrozenError:
        return None


def give_wrong_input(soak: Soak, draw: random.Random) -> None:
    good = draw.choice(soak.groups)[0]
    calls: list[tuple[str, type[Exception], Callable[[], Any]]] = [
        ("sequence 1, token 2: id 100000", InputError, lambda: soak.scorer.score([good, [1, 2, 100_000]])),
        ("sequence 0: start is 0", InputError, lambda: soak.scorer.score([good], 0)),
        ("sequence 1 is empty", InputError, lambda: soak.scorer.score([good, []])),
        ("sequence 0 has 999 tokens", InputError, lambda: soak.scorer.score([[5] * 999])),
        ("temperature must be", InputError, lambda: soak.scorer.score([good], temperature=0.0)),
        ("k is 0", InputError, lambda: soak.scorer.score_topk([good], 0)),
        ("", WeightsError, lambda: push_weights(soak.scorer, {"no.such": torch.zeros(2)})),
        ("sample 0: no message is the assistant's", InputError, lambda: soak.rendered(soak.dialogs[0][:1])),
    ]
    message, kind, call = draw.choice(calls)
    try:
        soak.timed("wrong", call)
    except kind as error:
        if message not in str(error):
            soak.faults.append(f"wrong: expected {message!r} in {error}")
        with soak.lock:
            soak.counts["wrong"] += 1
    else:
        soak.faults.append(f"wrong: {message or kind.__name__} was not refused")
    soak.has_ended.wait(0.05)


def _distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).abs().max())


WORK = {
    "dialogs": score_dialogs,
    "groups": score_groups,
    "best": score_best,
    "weights": change_weights,
    "wrong": give_wrong_input,
}


def work(soak: Soak, kind: str, seed: int) -> None:
    """Do one kind of work until the end; an error that is not expected is a fault, and ends the soak."""
    draw = random.Random(seed)
    while not soak.has_ended.is_set():
        try:
            WORK[kind](soak, draw)
        except Exception as error:
            soak.faults.append(f"{kind}: {type(error).__name__}: {error}")
        if soak.faults:
            soak.has_ended.set()


def _pss(pid: int) -> int:
    """Return the bytes of a process's anonymous and shared pages, those of two processes half for each."""
    kib = dict(line.split()[:2] for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return (int(kib["Pss_Anon:"]) + int(kib["Pss_Shmem:"])) << 10


def with_children(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def held() -> dict[str, float]:
    """Return what this process and its children hold now."""
    me = psutil.Process()
    sums: dict[str, float] = defaultdict(float)
    for process in with_children(me):
        try:
            figures = {"pss_mib": _pss(process.pid) / MIB, "rss_mib": process.memory_info().rss / MIB}
            if process == me:
                figures["caller_pss_mib"] = figures["pss_mib"]
            figures |= {"fds": process.num_fds(), "threads": process.num_threads(), "processes": 1}
        except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            continue
        for name, figure in figures.items():
            sums[name] += figure
    shared = []
    for folder in SHARED_MEMORY.glob(f"{PREFIX}_{os.getpid()}_*"):
        with contextlib.suppress(OSError):  # a push that ends removes it meanwhile
            shared += [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {**sums, "shm_files": len(shared), "shm_mib": sum(shared) / MIB}


def cpu_seconds() -> tuple[float, float]:
    """Return how long the CPUs have worked, and how long for this process and its children, in seconds.

    What a machine outside of this virtual one has taken from it counts as work for others.
    """
    whole = psutil.cpu_times()
    busy = whole.user + whole.nice + whole.system + whole.irq + whole.softirq + whole.steal
    own = 0.0
    for process in with_children(psutil.Process()):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            own += times.user + times.system
    return busy, own


def watch(soak: Soak, seconds: float, out: Path) -> list[dict[str, float]]:
    """Sample until the end; return the windows, each of which is also a line of a file."""
    windows, began = [], time.monotonic()
    window_s = min(60.0, seconds / 10)
    with out.open("w") as lines:
        while not soak.has_ended.is_set() and time.monotonic() - began < seconds:
            samples, until = [], time.monotonic() + window_s
            since, (busy, own) = time.monotonic(), cpu_seconds()
            while time.monotonic() < until and not soak.has_ended.wait(max(0.2, window_s / 12)):
                samples.append(held())
            with soak.lock:
                taken, soak.latencies = soak.latencies, defaultdict(list)
                counts = dict(soak.counts)
            if not samples:
                break
            window = {name: statistics.median(one[name] for one in samples) for name in samples[0]}
            scoring = [1e3 * s for kind in ("dialogs", "groups", "best") for s in taken[kind]]
            window |= {"at_s": time.monotonic() - began, **_percentiles("", scoring)}
            busy_now, own_now = cpu_seconds()
            by_others = (busy_now - busy) - (own_now - own)
            window["others"] = max(0.0, by_others / (time.monotonic() - since) / psutil.cpu_count())
            window |= {f"calls_{kind}": number for kind, number in counts.items()}
            for kind, of_kind in taken.items():
                window |= _percentiles(f"{kind}_", [1e3 * s for s in of_kind])
            windows.append(window)
            lines.write(json.dumps(window) + "\n")
            lines.flush()
    return windows


def _percentiles(prefix: str, times_ms: list[float]) -> dict[str, float]:
    if len(times_ms) < 2:
        return {}
    cuts = statistics.quantiles(times_ms, n=100, method="inclusive")
    return {f"{prefix}p50_ms": cuts[49], f"{prefix}p99_ms": cuts[98]}


class Growth(NamedTuple):
    """How much a figure grew after the warm-up."""

    by_slope: float  # the median slope of all pairs of windows, times the time
    by_step: float  # the median of the last windows minus that of the first ones
    median: float
    first: float
    last: float


def growth(windows: list[dict[str, float]], name: str) -> Growth | None:
    """Return the growth of a figure; ``None``: a window lacks it, or there are less than two windows."""
    kept = [w for w in windows if w["at_s"] >= min(WARM_UP_S, windows[-1]["at_s"] / 2)]
    if len(kept) < 2 or any(name not in w for w in kept):
        return None
    points = [(w["at_s"], w[name]) for w in kept]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in itertools.combinations(points, 2)]
    values = [value for _, value in points]
    num = min(ENDS, len(values) // 2)
    return Growth(
        by_slope=statistics.median(slopes) * (points[-1][0] - points[0][0]),
        by_step=statistics.median(values[-num:]) - statistics.median(values[:num]),
        median=statistics.median(values),
        first=values[0],
        last=values[-1],
    )


def judge(windows: list[dict[str, float]], report: Report) -> bool:
    """Print the table of the figures; return whether all of them were measured and are flat."""
    table = make_table(
        "After the warm-up", "figure", "median", "first", "last", "by slope", "by step", "tolerance", ""
    )
    are_flat = True
    alone = [window for window in windows if window["others"] <= OTHERS_AT_MOST]
    for name, tolerance in TOLERANCES.items():
        grown = growth(alone if tolerance.unit == "ms" else windows, name)
        if grown is None:
            are_flat = False
            table.add_row(name, *("" for _ in range(6)), "NOT MEASURED")
            continue
        most = tolerance.fraction * grown.median + tolerance.amount
        is_flat = max(grown.by_slope, grown.by_step) <= most
        are_flat &= is_flat
        figures = (grown.median, grown.first, grown.last, grown.by_slope, grown.by_step, most)
        table.add_row(name, *(f"{one:,.1f}" for one in figures), "flat" if is_flat else "GROWS")
    report.table(table)
    if len(alone) < len(windows):
        report.line(
            f"In {len(windows) - len(alone)} of {len(windows)} windows other programs took more than "
            f"{OTHERS_AT_MOST:.0%} of the CPUs: their latencies were left out."
        )
    return are_flat


def plot(windows: list[dict[str, float]], path: Path) -> None:
    """Draw each figure of the verdict over time, divided by its median."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(TOLERANCES), 1, sharex=True, figsize=(8, 1.6 * len(TOLERANCES)))
    for axis, name in zip(axes, TOLERANCES, strict=True):
        points = [(window["at_s"] / 60, window[name]) for window in windows if name in window]
        axis.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1)
        axis.set_ylabel(name)
        axis.set_ylim(0, 1.15 * max((value for _, value in points), default=1) or 1)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def end(soak: Soak, threads: list[threading.Thread], stacks: Path) -> None:
    """Wait for the threads, then close the scorer. What does not end in time is a fault with its stack."""
    soak.has_ended.set()
    _join(soak, threads, stacks)
    closing = threading.Thread(target=soak.scorer.close, name="soak-close", daemon=True)
    closing.start()
    _join(soak, [closing], stacks)


def _join(soak: Soak, threads: list[threading.Thread], stacks: Path) -> None:
    until = time.monotonic() + ENDS_WITHIN_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    hanging = [thread for thread in threads if thread.is_alive()]
    if hanging:
        names = ", ".join(f"{thread.name} (thread 0x{thread.ident:016x})" for thread in hanging)
        soak.faults.append(f"did not end within {ENDS_WITHIN_S:g} s: {names}; the stacks are in {stacks}")
        with stacks.open("a") as file:
            faulthandler.dump_traceback(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("soak_out"), help="folder of the two files")
    parser.add_argument("--seed", type=int, default=0)
    add_markdown_option(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.markdown)
    report.line(machine_line())
    with tempfile.TemporaryDirectory(prefix="vllm_kl_soak_") as home:
        soak = Soak(Path(home), options.seed)
        threads = [
            threading.Thread(
                target=work, args=(soak, kind, options.seed + n), name=f"soak-{kind}", daemon=True
            )
            for n, kind in enumerate(WORK)
        ]
        for thread in threads:
            thread.start()
        windows = watch(soak, 60 * options.minutes, options.out / "soak.jsonl")
        end(soak, threads, options.out / "stacks.txt")
    plot(windows, options.out / "soak.png")
    report.line(", ".join(f"{number:,} {kind}" for kind, number in sorted(soak.counts.items())) + " calls")
    are_flat = judge(windows, report)
    for fault in soak.faults:
        report.line(f"fault: {fault}")
    report.line("flat" if are_flat else "not flat")
    raise SystemExit(int(bool(soak.faults) or not are_flat))


if __name__ == "__main__":
    main()
