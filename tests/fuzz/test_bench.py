"""Arguments and files of ``vllm-kl bench``: a plan, a comparison, or exit code 2 and a text."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.fuzz.strategies import (
    CHANGES,
    INTS,
    JSON_VALUES,
    NASTY,
    SCALARS,
    TEXTS,
    fuzz,
    mutated,
    some_of,
    told,
)
from vllm_kl.bench.results import read_rows
from vllm_kl.bench.traffic import from_file
from vllm_kl.cli import app

HOME = tempfile.TemporaryDirectory(prefix="vllm_kl_fuzz_")  # removed when Python ends
PLANS: list = []  # what the last command would have measured


def ask(*args, codes):
    """Run ``vllm-kl bench`` without a measurement; return its exit code."""
    PLANS.clear()

    def run(plan, *_):
        PLANS.append(plan)
        return {"failures": {}}

    command = "vllm_kl.bench.command."
    # quiet_bench sets variables of this process.
    with mock.patch(f"{command}_run", run), mock.patch(f"{command}quiet_bench"):
        result = CliRunner().invoke(app, ["bench", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in codes, result.output
    assert result.exit_code == 0 or result.output.strip(), "a refusal without a text"
    return result.exit_code


def put(name, data):
    path = Path(HOME.name, name)
    path.write_bytes(data)
    return str(path)


NUMBERS = st.one_of(st.integers(0, 99).map(str), st.sampled_from(["9" * 5000, "٣", "-1", "1e3", "1000000"]))
LENGTHS = st.one_of(NUMBERS, TEXTS, st.lists(NUMBERS, min_size=2, max_size=4).map(",".join))
OPTIONS = {
    "--shape": st.one_of(LENGTHS, st.sampled_from(["tiny", "0.5B"])),
    "--shapes": LENGTHS,
    "--lengths": NASTY,
    "--sequences": NUMBERS,
    "--providers": st.one_of(st.sampled_from(["ours", "floor", "a:b", "a.b:c", ":", "a:", "../a:b"]), TEXTS),
    "--readouts": st.one_of(st.sampled_from(["auto", "flat"]), TEXTS),
    "--replicas": NUMBERS,
    "--dtype": st.one_of(st.sampled_from(["auto", "float32"]), TEXTS),
    "--engine": st.one_of(st.sampled_from(["block_size=16", "tensor_parallel_size=x", "dtype=a"]), TEXTS),
    "--rounds": NUMBERS,
    "--peer-rounds": NUMBERS,
    "--out": st.sampled_from(["\x00", "o" * 300, "FOLDER"]).map(lambda name: f"{HOME.name}/{name}"),
}


@fuzz(
    options=some_of(OPTIONS),
    few=60,
    share=0.1,
)
def test_any_arguments_are_planned_or_refused(options):
    words = [word for option in options for word in option]
    code = ask("--model", "m", *words, codes=(0, 2))
    if code == 0 and PLANS:
        (plan,) = PLANS
        assert plan.setup.max_tokens >= 2
        assert plan.providers
        for traffic in plan.traffics:
            assert 0 < traffic.scored_tokens < traffic.fed_tokens <= 100_000_000


RIGHT = st.fixed_dictionaries(
    {"prompt": st.integers(1, 99), "responses": st.lists(st.integers(1, 99), min_size=1)}
)
GROUPS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.one_of(st.integers(1, 9), INTS, JSON_VALUES),
        "responses": st.one_of(
            st.lists(st.integers(1, 9), min_size=1, max_size=3), st.lists(INTS), JSON_VALUES
        ),
        "x": SCALARS,
    },
)


def lines_of(values):
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


@fuzz(
    groups=st.one_of(st.lists(RIGHT, min_size=1, max_size=3), st.lists(GROUPS, max_size=3)),
    changes=st.one_of(st.just([]), CHANGES),
    more=st.sampled_from([b"", b"", b"", b"\xff", b"[" * 100_000, b'{"prompt": 1' + b"0" * 5000 + b"}"]),
)
def test_a_file_of_lengths_is_a_call_or_an_error(groups, changes, more):
    path = Path(put("lengths.jsonl", mutated(lines_of(groups), changes) + more))
    found = told(lambda: from_file(path), names="lengths.jsonl")
    if found is not None and not changes:
        assert found.groups == tuple((one["prompt"], tuple(one["responses"])) for one in groups)


FIGURES = st.one_of(st.floats(0.1, 9), st.none(), SCALARS)
ROWS = st.fixed_dictionaries(
    {
        "provider": st.one_of(st.sampled_from(["ours", "floor"]), TEXTS, JSON_VALUES),
        "shape": st.one_of(st.just("8,4,2"), TEXTS, JSON_VALUES),
        "tok_per_s": FIGURES,
    },
    optional={
        "fraction_of_floor": FIGURES,
        "max_abs_err": FIGURES,
        "hardware": JSON_VALUES,
        "model": JSON_VALUES,
        "engine": JSON_VALUES,
    },
)


@fuzz(
    before=st.lists(ROWS, max_size=2),
    after=st.lists(ROWS, max_size=2),
    changes=st.one_of(st.just([]), CHANGES),
    tolerance=st.one_of(st.just("0.1"), st.sampled_from(["nan", "-0", "1", "x", "inf"])),
    few=60,
    share=0.3,
)
def test_two_files_of_results_are_compared_or_refused(before, after, changes, tolerance):
    first = put("before.jsonl", mutated(lines_of(before), changes))
    second = put("after.jsonl", lines_of(after))
    told(lambda: read_rows(Path(first)), names="before.jsonl")
    for more in ((), ("--json",)):
        ask("compare", first, second, "--tolerance", tolerance, *more, codes=(0, 2, 3))
