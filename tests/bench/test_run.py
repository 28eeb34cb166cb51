"""What a run makes of providers that fail, cannot be measured or are not checked. No engine is started."""

from __future__ import annotations

import functools
import os
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest

from vllm_kl.bench import run
from vllm_kl.bench.compare import figure_for
from vllm_kl.bench.floor import check_one_process, matrix_of
from vllm_kl.bench.limits import Limits
from vllm_kl.bench.memory import memory_bytes
from vllm_kl.bench.meters import peak_bytes
from vllm_kl.bench.process import ProviderProcess
from vllm_kl.bench.providers import find
from vllm_kl.bench.report import as_markdown, origin
from vllm_kl.bench.results import read_rows, rows_of
from vllm_kl.bench.run import Bench, Plan
from vllm_kl.bench.tables import result_tables
from vllm_kl.bench.traffic import from_shape
from vllm_kl.bench.types import Setup
from vllm_kl.errors import EngineError, ReadoutUnavailableError, VLLMKLError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SIZE = {"parameters": 100, "body": 50, "head": 30, "embedding": 0, "hidden": 1}
WARNING = "tests.bench.providers_of_a_user:warning"
FACTS = {
    "dtype": "float32",
    "vocab_size": 1000,
    "special_ids": [0],
    "size": SIZE | {"layers": 2, "attention": 8, "kv": 4},
    "limits": Limits(1e12, 1e10, None),
    "free_bytes": 1 << 40,
    "cpu": {"instructions": "AVX512, AVX512_BF16", "threads": 2},
    "check": "float64",
}


class Process:
    """Stands in the place of a provider's process: a provider fails where a test says so."""

    faults: ClassVar[dict[str, Exception]] = {}

    def __init__(self, name, find, setup, log_folder):
        self._name = name
        if name in self.faults:
            raise self.faults[name]

    def told(self):
        return FACTS if self._name == "truth" else {}

    def score(self, sequences, starts):
        return [np.zeros(len(ids) - start) for ids, start in zip(sequences, starts, strict=True)]

    def time(self, sequences, starts):
        parts = {"floor_engine": 0.5, "floor_head": 0.5} if self._name == "floor" else {}
        return {"seconds": 1.0, "parts": parts, "joules": None}

    def notes(self):
        return ["dtype='float32' is faster"] if self._name in ("ours", "flat") else []

    def end(self):
        return {"peak_bytes": 1 << 20, "gpu_peak_bytes": 0}

    def kill(self):
        pass


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Return the function that runs providers, some with faults: it returns what was measured, and rows."""
    monkeypatch.setattr(run, "ProviderProcess", Process)

    def measure(
        *names,
        faults=None,
        are_asked_for=False,
        gpu=None,
        on_step=lambda *_: None,
        shapes=("8,4,2",),
        **settings,
    ):
        monkeypatch.setattr(Process, "faults", faults or {})
        monkeypatch.setitem(FACTS, "limits", Limits(1e12, 1e10, gpu))
        setup = Setup(model="m", dtype="auto", device="cuda" if gpu else "cpu", **settings)
        plan = Plan(
            setup=setup,
            traffics=[from_shape(shape, 4) for shape in shapes],
            providers=dict.fromkeys(names, setup),
            rounds=2,
            peer_rounds=1,
            log_folder=tmp_path,
            are_asked_for=are_asked_for,
        )
        lines = []
        calls = {"on_costs": lambda _: None, "on_shape": lambda _: None}
        calls |= {"on_line": lines.append, "on_step": on_step or (lambda *_: None)}
        measured = Bench(plan, **calls).run()
        return measured, {row["provider"]: row for row in rows_of(plan, measured, "m")}, lines

    return measure


class TestFloor:
    @pytest.mark.parametrize("name", ["tensor_parallel_size", "pipeline_parallel_size"])
    def test_a_model_in_several_processes_has_no_floor(self, name):
        with pytest.raises(ReadoutUnavailableError, match=f"with {name}=2 the model is in several processes"):
            check_one_process({name: 2})
        check_one_process({name: 1})

    @pytest.mark.parametrize(("others", "ratio"), [((), None), (("torchrl",), 1.0)])
    def test_a_run_without_torchrl_has_no_ratio_to_it(self, measure, others, ratio):
        _, rows, _ = measure("ours", *others)
        assert {row["ratio_to_torchrl"] for row in rows.values()} == {ratio}

    def test_a_head_that_is_no_matrix_has_no_floor(self):
        with pytest.raises(ReadoutUnavailableError, match="more than a matrix"):
            matrix_of(object())

    @pytest.mark.parametrize("are_asked_for", [True, False])
    def test_a_run_without_a_floor_has_not_failed_and_says_why(self, measure, are_asked_for):
        why = ReadoutUnavailableError("the head is no matrix")
        measured, rows, lines = measure("ours", "floor", faults={"floor": why}, are_asked_for=are_asked_for)
        assert measured.failures == {}
        assert rows["floor"]["not_measured"] == "the head is no matrix"
        assert rows["floor"]["tok_per_s"] is None
        assert rows["ours"]["tok_per_s"] == 4 * 12
        assert rows["ours"]["fraction_of_floor"] is None
        assert rows["ours"]["not_measured"] is None
        assert "floor is not measured: the head is no matrix" in lines


@pytest.mark.parametrize("num_names", [1, 2, 3, 4, 5])
def test_no_provider_has_the_better_turns(num_names):
    names = [str(n) for n in range(num_names)]
    orders = [run.order_of(names, n) for n in range(2 * num_names)]
    assert all(sorted(order) == names for order in orders)
    for one in names:
        assert [order[0] for order in orders].count(one) == [order[-1] for order in orders].count(one) == 2
        for other in set(names) - {one}:
            assert sum(order.index(one) < order.index(other) for order in orders) == num_names


class TestMemory:
    """Providers take turns within a round only if the memory holds all of their processes."""

    WHY = "because the memory does not hold all models at a time"

    @pytest.mark.parametrize(("free_gib", "take_turns"), [(6, True), (4, False)])
    def test_a_process_takes_more_than_its_weights(self, measure, monkeypatch, free_gib, take_turns):
        monkeypatch.setitem(FACTS, "free_bytes", free_gib << 30)
        measured, rows, lines = measure("ours", "flat")
        groups = [["ours", "flat"]] if take_turns else [["ours"], ["flat"]]
        assert measured.groups == rows["flat"]["groups"] == groups
        assert (f"providers run one after another, {self.WHY}" in lines) is not take_turns

    def test_those_that_fit_take_turns_and_the_first_groups_are_filled(self, measure, monkeypatch):
        takes = {"floor": 2, "ours": 3, "torchrl": 6, "flat": 6, "transformers": 4}
        monkeypatch.setattr(run, "memory_bytes", lambda kind, *_: takes[kind])
        monkeypatch.setitem(FACTS, "free_bytes", 15 / run._USED_SHARE)
        steps = []
        measured, rows, lines = measure(
            "ours", "torchrl", "flat", "transformers", "floor", on_step=lambda step, _: steps.append(step)
        )
        assert measured.groups == [["floor", "ours", "torchrl"], ["flat", "transformers"]]
        told = "providers in turns: floor, ours, torchrl; then flat, transformers"
        assert f"{told}, {self.WHY}" in lines
        first, second = ([s.split(",")[0] for s in steps if s.endswith(f"round {n}")] for n in (1, 2))
        assert first == ["floor", "ours", "torchrl", "flat", "transformers"]
        assert second == ["ours", "floor"]  # in another order; the others have one round
        assert steps.index("torchrl, 8,4,2: round 1") < steps.index("floor, 8,4,2: round 2")
        assert steps.index("floor, 8,4,2: round 2") < steps.index("flat starts")
        assert all(row["tok_per_s"] for row in rows.values())

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_estimates_are_above_what_was_measured_and_not_far(self, dtype):
        rows = read_rows(RESULTS / f"readout-{dtype}-amx.jsonl")
        size = {"parameters": 95_890_432, "layers": 6, "kv": 256}
        traffics = [from_shape(shape, 32) for shape in dict.fromkeys(row["shape"] for row in rows)]
        setup = Setup(model="96M", dtype=dtype, device="cpu", max_tokens=max(t.longest for t in traffics))
        for row in rows:
            if row["peak_bytes"] is not None:
                kind, facts = row["provider"], {"size": size, "vocab_size": 151_936, "dtype": dtype}
                estimate = memory_bytes(kind, setup, facts, traffics)
                assert row["peak_bytes"] < estimate < 1.7 * row["peak_bytes"], kind

    def test_where_the_size_is_not_known_providers_run_one_after_another(self, measure, monkeypatch):
        monkeypatch.setitem(FACTS, "size", None)
        measured, _, lines = measure("ours", "flat")
        assert measured.groups == [["ours"], ["flat"]]
        assert "providers run one after another, because the model's size is not known" in lines


class TestRatios:
    def test_rounds_of_providers_that_took_no_turns_are_not_paired(self, measure, monkeypatch):
        seconds = {"ours": [1.0, 4.0], "flat": [8.0, 2.0]}
        left = {}
        score = {"parts": {}, "joules": None}
        monkeypatch.setattr(Process, "time", lambda self, *_: score | {"seconds": left[self._name].pop(0)})
        monkeypatch.setattr(run, "PEERS", ())  # as many rounds as ours
        for free_gib, expected in ((6, statistics.median([8 / 1, 2 / 4])), (4, 5 / 2.5)):
            monkeypatch.setitem(FACTS, "free_bytes", free_gib << 30)
            left |= {name: [9.0, *runs] for name, runs in seconds.items()}  # a whole call warms up
            _, rows, _ = measure("ours", "flat")
            assert rows["ours"]["ratios"]["flat"] == expected

    def test_a_row_has_the_settings_of_its_own_provider(self, measure):
        _, rows, _ = measure("ours", "floor", "flat", share_prefix=False, replicas=2)
        settings = {name: (row["share_prefix"], row["replicas"]) for name, row in rows.items()}
        floor = dict.fromkeys(("floor", "floor_engine", "floor_head"), (False, None))
        assert settings == {"ours": (False, 2), "flat": (None, None), **floor}


class TestTruth:
    def test_shapes_that_were_computed_before_it_failed_stay_checked(self, measure, monkeypatch):
        def score(self, sequences, starts):
            if self._name == "truth" and len(sequences[0]) > 12:
                raise VLLMKLError("out of memory")
            return [np.zeros(len(ids) - start) for ids, start in zip(sequences, starts, strict=True)]

        monkeypatch.setattr(Process, "score", score)
        measured, rows, lines = measure("ours", shapes=("8,4,2", "16,4,2"))
        assert "the log-probs of 16,4,2 are NOT checked: out of memory" in lines
        assert "the log-probs are checked against the model in float64, by transformers" in lines
        assert [errors.keys() for errors in measured.errors.values()] == [{"ours"}, set()]
        assert measured.checks == {"8,4,2": "float64"}
        assert rows["ours"]["check"] is None  # of the last shape


@pytest.mark.parametrize("stop", [KeyboardInterrupt, EngineError])
def test_a_provider_that_does_not_start_leaves_no_process(monkeypatch, tmp_path, stop):
    """Ctrl-C while an engine starts: nobody else knows of its process yet."""
    started = []

    def answer(self):
        started.append(psutil.Process(self._process.pid))
        raise stop

    monkeypatch.setattr(ProviderProcess, "_answer", answer)
    with pytest.raises(stop):
        ProviderProcess("sleeping", never, Setup(model="m", dtype="float32", device="cpu"), tmp_path)
    assert psutil.wait_procs(started, timeout=30)[1] == []


def never():
    time.sleep(600)


class TestImpossible:
    """What is not installed, or what this machine cannot run, is not measured; it has not failed."""

    @pytest.mark.parametrize("are_asked_for", [True, False])
    def test_a_peer_is_not_measured_and_says_why(self, measure, are_asked_for):
        why = ReadoutUnavailableError("readout='token_ids' is not available")
        faults = {"token_ids": why}
        measured, rows, _ = measure("ours", "token_ids", faults=faults, are_asked_for=are_asked_for)
        assert measured.failures == {}
        assert rows["token_ids"]["not_measured"] == "readout='token_ids' is not available"

    def test_without_ours_there_is_nothing_to_tell(self, measure):
        measured, _, _ = measure("ours", faults={"ours": ReadoutUnavailableError("no such read-out")})
        assert measured.failures == {"ours": "no such read-out"}

    @pytest.mark.parametrize(
        ("name", "package", "cure"),
        [
            ("trl", "trl", "pip install 'trl>=1.16'"),
            ("sglang", "sglang", "pip install sglang"),
            ("torchrl", "torchrl", "pip install 'vllm-kl[torchrl]'"),
        ],
    )
    def test_a_package_that_is_missing_is_named_with_its_cure(self, monkeypatch, name, package, cure):
        for module in [module for module in sys.modules if module.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ReadoutUnavailableError, match=re.escape(cure)):
            next(find(name)(Setup(model="m", dtype="float32", device="cuda")))

    def test_a_head_of_triton_is_not_tried_on_a_cpu(self):
        with pytest.raises(ReadoutUnavailableError, match="needs a GPU"):
            next(find("trl")(Setup(model="m", dtype="float32", device="cpu")))


class TestWarmUp:
    """No first call counts, unless it is so long that another would take minutes."""

    @pytest.mark.parametrize(
        ("seconds", "calls"),
        [(1.0, {"ours": 3, "flat": 2, "my:own": 2}), (30.0, {"ours": 3, "flat": 1, "my:own": 1})],
    )
    def test_a_short_call_is_warmed_up_by_a_whole_call(self, measure, monkeypatch, seconds, calls):
        made = []

        def time(self, sequences, starts):
            made.append((self._name, sequences[0].tolist()))
            return {"seconds": seconds, "parts": {}, "joules": None}

        monkeypatch.setattr(Process, "time", time)
        _, rows, _ = measure(*calls)
        assert Counter(name for name, _ in made) == calls
        assert {name: len(rows[name]["seconds"]) for name in calls} == {"ours": 2, "flat": 1, "my:own": 1}
        for name in calls:  # new ids in each, so that no cache of an earlier call helps
            ids = [tuple(first) for of, first in made if of == name]
            assert len(set(ids)) == len(ids)


def test_the_parts_of_the_floor_have_the_operations_that_they_compute(measure):
    _, rows, _ = measure("floor")
    flop = {name: row["flop_per_s"] * row["s_p50"] for name, row in rows.items()}
    assert flop["floor_head"] == 2 * SIZE["head"] * 4 * 4
    assert flop["floor_engine"] == pytest.approx(flop["floor"] - flop["floor_head"])


class TestMfu:
    def test_it_is_the_share_of_all_gpus_that_a_provider_takes(self, measure):
        engine = {"tensor_parallel_size": 2}
        _, rows, _ = measure("ours", "sglang", "transformers", gpu="NVIDIA L4", engine=engine)
        peaks = {name: row["flop_per_s"] / row["mfu"] for name, row in rows.items()}
        for name, num_gpus in {"ours": 2, "sglang": 2, "transformers": 1}.items():
            assert peaks[name] == pytest.approx(num_gpus * 30.3e12)

    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            ({"gpu": "NVIDIA T4"}, "data sheet of NVIDIA T4"),
            ({"gpu": "NVIDIA L4", "replicas": 2}, "Ray chooses"),
        ],
    )
    def test_without_a_peak_a_row_has_the_reason(self, measure, settings, why):
        _, rows, _ = measure("ours", **settings)
        assert rows["ours"]["mfu"] is None
        assert why in rows["ours"]["no_mfu"]

    def test_a_cpu_has_none_and_needs_no_reason(self, measure):
        _, rows, _ = measure("ours")
        assert (rows["ours"]["mfu"], rows["ours"]["no_mfu"]) == (None, None)


def test_a_provider_that_failed_is_in_the_table_with_its_reason(measure):
    """A row has the same fields whether its provider failed or not."""
    measured, rows, _ = measure(
        "ours", "trl", faults={"trl": EngineError("no kernel for this head\nand more of it")}
    )
    assert measured.failures["trl"].startswith("no kernel")
    assert rows["trl"].keys() == rows["ours"].keys()
    (table, _) = result_tables(list(rows.values()))
    (line,) = [line for line in as_markdown(table).splitlines() if line.startswith("| trl")]
    assert "failed: no kernel for this head and ..." in line


def test_the_machine_is_looked_at_before_anything_is_measured(measure, monkeypatch):
    """What goes wrong there must not lose a run."""

    def broken():
        raise OSError("the driver does not answer")

    monkeypatch.setattr(run, "machine", broken)
    monkeypatch.setattr(Process, "time", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(OSError, match="does not answer"):
        measure("ours")


def test_rows_tell_the_instructions_and_the_threads_of_the_cpu(measure):
    """Machines that differ in them alone cannot be compared by seconds."""
    _, rows, _ = measure("ours")
    known = rows["ours"]["hardware"]
    assert (known["instructions"], known["threads"]) == ("AVX512, AVX512_BF16", 2)
    other = {"ours": rows["ours"] | {"hardware": known | {"instructions": "AVX2"}}}
    assert figure_for(list(rows.values()), list(other.values())) == "fraction_of_floor"
    assert "cores, AVX512, AVX512_BF16, 2 threads, " in origin(rows["ours"])


def test_what_providers_have_to_say_is_told_once(measure):
    _, _, lines = measure("ours", "flat")
    assert [line for line in lines if "is faster" in line] == ["ours: dtype='float32' is faster"]


def test_the_memory_of_all_processes_of_a_provider_counts(tmp_path):
    """Ours has its engine in a process of its own, beside the caller."""
    setup = Setup(model="m", dtype="float32", device="cpu")
    find_it = functools.partial(find, "tests.bench.providers_of_a_user:of_two_processes")
    process = ProviderProcess("two", find_it, setup, tmp_path)
    least = peak_bytes(os.getpid())  # this process is one of the two
    assert process.end()["peak_bytes"] > least + (10 << 20)


def test_files_of_the_users_folder_stand_in_the_place_of_no_module(tmp_path, monkeypatch):
    tmp_path.joinpath("colorsys.py").write_text("raise RuntimeError('not Python\\'s own')\n")
    own = "import colorsys\nfrom tests.bench.providers_of_a_user import constant\n"
    tmp_path.joinpath("own_providers.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    setup = Setup(model="m", dtype="float32", device="cpu")
    process = ProviderProcess("own", functools.partial(find, "own_providers:constant"), setup, tmp_path)
    process.end()
    path = list(sys.path)
    find("ours")
    assert sys.path == path  # where all providers are the package's, the folder is not in it


def test_a_warning_of_this_package_comes_from_the_process_and_stays_in_its_log(tmp_path):
    """Without --out the log is deleted, so the warning must reach the user."""
    setup = Setup(model="m", dtype="float32", device="cpu")
    process = ProviderProcess("warning", functools.partial(find, WARNING), setup, tmp_path)
    try:
        assert process.notes() == ["dtype='float32' is faster on this CPU"]
        assert process.notes() == []
    finally:
        process.kill()
    assert "is faster" in tmp_path.joinpath("warning.log").read_text()
