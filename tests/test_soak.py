"""The verdict of ``benchmarks/soak.py`` fails where it should: made-up windows, and a thread that hangs."""

from __future__ import annotations

import mmap
import os
import random
import threading
from types import SimpleNamespace

import pytest

from tests import scripts
from vllm_kl.bench.report import Report
from vllm_kl.errors import FrozenError


@pytest.fixture(scope="module")
def soak():
    with scripts.imported("benchmarks", "soak") as module:
        yield module


def hour(changed=None, minutes=60):
    """Windows of a sound run: caches fill for three minutes, then all is flat within noise."""
    draw, windows = random.Random(0), []
    for minute in range(1, minutes + 1):
        filling = max(0, 3 - minute) * 100
        window = {
            "at_s": 60.0 * minute,
            "others": 0.01,
            "pss_mib": 1475 - filling + draw.gauss(0, 3),
            "fds": 76 + draw.choice([0, 0, 1]),
            "threads": 56.0,
            "shm_files": 3.0,
            "shm_mib": 0.4,
            "p50_ms": draw.gauss(75, 8),
            "p99_ms": draw.choice([200, 260, 300, 850]),
        }
        windows.append(window | ({} if changed is None else changed(minute, window)))
    return windows


def test_an_hour_that_is_flat_within_noise_passes(soak):
    assert soak.judge(hour(), Report(None))


def test_a_run_of_ten_short_windows_passes(soak):
    windows = [window | {"at_s": window["at_s"] / 5} for window in hour(minutes=10)]
    assert soak.judge(windows, Report(None))


@pytest.mark.parametrize("minute", [25, 45, 57])
@pytest.mark.parametrize(
    ("name", "amount"), [("fds", 1000), ("threads", 3), ("shm_files", 3), ("pss_mib", 60), ("p50_ms", 60)]
)
def test_a_step_of_any_figure_at_any_time_is_growth(soak, name, amount, minute):
    windows = hour(lambda now, window: {name: window[name] + amount * (now >= minute)})
    grown = soak.growth(windows, name)
    assert grown.by_step == pytest.approx(amount, abs=12)
    assert not soak.judge(windows, Report(None))


@pytest.mark.parametrize(("name", "an_hour"), [("fds", 10), ("threads", 4), ("pss_mib", 40), ("shm_mib", 9)])
def test_a_leak_that_never_stops_is_growth(soak, name, an_hour):
    windows = hour(lambda now, window: {name: window[name] + an_hour * now / 60})
    assert soak.growth(windows, name).by_slope == pytest.approx(an_hour * 50 / 60, abs=4)
    assert not soak.judge(windows, Report(None))


def test_growth_while_caches_fill_is_none(soak):
    windows = hour(lambda now, window: {"pss_mib": window["pss_mib"] - max(0, 9 - now) * 50})
    assert soak.judge(windows, Report(None))


def test_latencies_beside_other_programs_are_not_judged(soak, capsys):
    def beside(minutes):
        return lambda now, window: {"p50_ms": 8 * window["p50_ms"], "others": 0.6} if now in minutes else {}

    assert soak.judge(hour(beside(range(30, 51))), Report(None))
    assert "In 21 of 60 windows other programs took more than 10% of the CPUs" in capsys.readouterr().out
    assert not soak.judge(hour(beside(range(61))), Report(None))  # then they are not measured
    assert not soak.judge(hour(lambda now, window: {"pss_mib": 1475 + now, "others": 0.6}), Report(None))


@pytest.mark.parametrize("since", [1, 30, 60])
def test_a_figure_that_a_window_lacks_is_not_measured_and_fails(soak, capsys, since):
    windows = hour()
    for window in windows[since - 1 :]:
        del window["p50_ms"]
    assert soak.growth(windows, "p50_ms") is None
    assert not soak.judge(windows, Report(None))
    assert "NOT MEASURED" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_of_less_than_two_windows_fails(soak, number):
    assert not soak.judge(hour(minutes=number), Report(None))


def test_a_thread_that_hangs_is_told_with_its_stack(soak, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "ENDS_WITHIN_S", 0.2)
    goes_on = threading.Event()

    def hang():
        goes_on.wait()

    threads = [threading.Thread(target=hang, name="soak-dialogs", daemon=True), threading.Thread(target=str)]
    for thread in threads:
        thread.start()
    run = SimpleNamespace(faults=[], has_ended=threading.Event(), scorer=SimpleNamespace(close=hang))
    soak.end(run, threads, tmp_path / "stacks.txt")
    goes_on.set()
    assert run.has_ended.is_set()
    of_threads, of_close = run.faults
    assert "soak-dialogs (thread 0x" in of_threads
    assert "soak-close (thread 0x" in of_close
    stacks = (tmp_path / "stacks.txt").read_text()
    assert f"Thread 0x{threads[0].ident:016x}" in stacks
    assert " in hang" in stacks


def changing_run(soak, how, check_frozen):
    scorer = SimpleNamespace(weight_version=4, check_frozen=check_frozen, refresh=lambda _, version: version)
    draw = SimpleNamespace(randrange=lambda _: 0, choice=lambda _: how, uniform=lambda *_: 0.0)
    run = SimpleNamespace(
        scorer=scorer, set_of={}, states=[None], paths=[None], faults=[], has_ended=threading.Event()
    )
    run.timed, run.is_pushed = (lambda _, call: call()), False
    return run, draw


def is_not_frozen():
    raise FrozenError("the engine serves version 4 of the weights, which no refresh() made")


@pytest.mark.parametrize(
    ("is_pushed", "check_frozen", "is_fault"),
    [
        (False, lambda: 0.0, False),
        (False, is_not_frozen, True),  # the last change was a refresh, which makes a frozen reference
        (True, is_not_frozen, False),
        (True, lambda: 0.0, True),
    ],
)
def test_a_reference_is_frozen_unless_the_last_change_was_a_push(soak, is_pushed, check_frozen, is_fault):
    run, draw = changing_run(soak, "check", check_frozen)
    run.is_pushed = is_pushed
    soak.change_weights(run, draw)
    assert bool(run.faults) is is_fault


def test_a_refresh_makes_the_reference_frozen_again(soak):
    run, draw = changing_run(soak, "refresh", is_not_frozen)
    run.is_pushed = True
    soak.change_weights(run, draw)
    assert not run.faults
    assert not run.is_pushed


def test_memory_is_what_the_process_has_written_and_not_the_pages_of_files(soak, tmp_path):
    tmp_path.joinpath("file").write_bytes(bytes(64 << 20))
    before = soak._pss(os.getpid())
    with (
        tmp_path.joinpath("file").open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages,
    ):
        read = sum(pages[place] for place in range(0, 64 << 20, mmap.PAGESIZE))
        of_a_file = soak._pss(os.getpid()) - before
    written = bytearray(b"1") * (64 << 20)
    of_memory = soak._pss(os.getpid()) - before
    del written
    assert read == 0
    assert of_a_file < 8 << 20
    assert of_memory > 56 << 20
