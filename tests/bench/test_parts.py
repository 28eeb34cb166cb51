"""What the benchmark is made of: lengths, costs, the check, energy, the comparison, the tables of pages."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from vllm_kl.bench import limits as machine
from vllm_kl.bench import truth as of_truth
from vllm_kl.bench.check import TOLERANCES, check
from vllm_kl.bench.command import WORSE
from vllm_kl.bench.compare import compare, figure_for
from vllm_kl.bench.cost import cost_of
from vllm_kl.bench.data_sheets import peak_flop_per_s
from vllm_kl.bench.limits import Limits
from vllm_kl.bench.meters import EnergyMeter
from vllm_kl.bench.report import as_markdown
from vllm_kl.bench.results import read_rows
from vllm_kl.bench.tables import caption, cost_table, result_tables
from vllm_kl.bench.traffic import Traffic, from_file, from_shape, usable_ids
from vllm_kl.bench.truth import _widest, truth
from vllm_kl.bench.types import Setup
from vllm_kl.errors import InputError, MissingLogProbError, OptionError, VLLMKLError
from vllm_kl.offline.dry_run import shared_tokens

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", params=[0.12, 0.01])
def scored(request, tmp_path_factory):
    """Log-probs of a model with large or with tiny logits, and those of all of its positions."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        initializer_range=request.param,
    )
    path = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(config).save_pretrained(path)
    (running,) = truth(Setup(model=str(path), dtype="auto", device="cpu"))
    sequences, starts = from_shape("20,30,2", 2).draw(usable_ids(300, [0]), 1)
    all_of = [row.numpy() for row in running.score(sequences, [1, 1])]
    right = [row.numpy() for row in running.score(sequences, starts)]
    assert running.told()["check"] == "float64"
    return all_of, right


class TestCheck:
    """A provider that reads other rows, or has a sign wrong, is not timed, however flat the model is."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_models_own_log_probs_pass(self, scored, dtype):
        _, right = scored
        assert check([row.astype(np.float32) for row in right], right, dtype) < 1e-6

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("shift", [-1, 1])
    def test_log_probs_one_place_beside_their_own_are_refused(self, scored, dtype, shift):
        all_of, right = scored
        moved = [np.roll(row, shift)[19:] for row in all_of]
        with pytest.raises(MissingLogProbError, match="not timed"):
            check(moved, right, dtype)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_wrong_sign_is_refused(self, scored, dtype):
        with pytest.raises(MissingLogProbError, match="not timed"):
            check([-row for row in scored[1]], scored[1], dtype)

    @pytest.mark.parametrize(("dtype", "off"), [("float32", 0.2), ("bfloat16", 5.0)])
    def test_a_single_log_prob_that_is_far_off_is_refused(self, dtype, off):
        truth = [-np.random.default_rng(0).exponential(10, 512)]
        scored = [np.where(np.arange(512) == 3, truth[0] - off, truth[0])]
        assert np.abs(scored[0] - truth[0]).mean() < TOLERANCES[dtype]
        with pytest.raises(MissingLogProbError, match="a log-prob differs from the model's by .*; not timed"):
            check(scored, truth, dtype)

    def test_a_missing_row_and_nan_are_refused(self, scored):
        _, right = scored
        with pytest.raises(MissingLogProbError, match="shapes"):
            check([row[1:] for row in right], right, "float32")
        with pytest.raises(MissingLogProbError, match="2 of 60 log-probs are not finite"):
            check([np.where(np.arange(len(row)) == 3, np.nan, row) for row in right], right, "float32")


class TestTraffic:
    def test_sequences_of_a_group_share_their_prompt_and_nothing_else(self):
        traffic = from_shape("5,3,2", 3)
        sequences, starts = traffic.draw(usable_ids(1000, [7, 9]), 0)
        assert (len(sequences), starts, traffic.longest) == (4, [5] * 4, 8)
        assert (sequences[0][:5] == sequences[1][:5]).all()
        assert (sequences[0][:5] != sequences[2][:5]).any()
        assert not np.isin(sequences, [7, 9]).any()

    def test_two_shapes_of_a_run_have_no_ids_in_common(self):
        """Engines live through all shapes, so they would find the ids of one in the cache of another."""
        ids = usable_ids(100_000, [0])
        short, long = (from_shape(shape, 4).draw(ids, 3)[0] for shape in ("8,4,2", "64,4,2"))
        assert (long[0][:8] == short[0][:8]).sum() < 3
        again = from_shape("64,4,2", 4).draw(ids, 3)[0]
        assert all((one == other).all() for one, other in zip(long, again, strict=True))

    def test_counts_are_those_of_plain_loops(self):
        traffic = Traffic(name="t", groups=((10, (4, 1, 6)), (3, (2,))))
        assert traffic.fed_tokens == 30 + 11 + 5
        assert traffic.scored_tokens == 13
        assert traffic.computed_tokens == 10 + 11 + 2 * 1 + 5
        drawn = list(zip(*traffic.draw(usable_ids(5000, [0]), 0), strict=True))
        assert traffic.computed_tokens == traffic.fed_tokens - shared_tokens(drawn)

    @pytest.mark.parametrize(
        ("shape", "num", "groups"),
        [
            ("9,300,4", 8, ((9, (256, 256)),)),
            ("9,3,1", 8, ((9, (3,)), (9, (3,)))),
            ("9,3,1", 1, ((9, (3,)),)),
        ],
    )
    def test_two_sequences_are_checked_where_there_are_two(self, shape, num, groups):
        assert from_shape(shape, num).few().groups == groups

    def test_a_file_of_lengths_is_one_call_and_a_wrong_line_is_named(self, tmp_path):
        file = tmp_path / "lengths.jsonl"
        file.write_text('{"prompt": 5, "responses": [2, 3]}\n\n{"prompt": 4, "responses": [1]}\n')
        assert from_file(file).groups == ((5, (2, 3)), (4, (1,)))
        for line in (
            '{"prompt": 5}',
            '{"prompt": 0, "responses": [1]}',
            '{"prompt": 5, "responses": []}',
            "5",
            "{",
        ):
            file.write_text(f'{{"prompt": 5, "responses": [2]}}\n{line}\n')
            with pytest.raises(InputError, match="line 2: got"):
                from_file(file)
        file.write_text("\n")
        with pytest.raises(OptionError, match="empty"):
            from_file(file)

    @pytest.mark.parametrize("content", [b"\xff", b"[" * 9999, b'{"prompt": 1' + b"0" * 5000 + b"}"])
    def test_a_file_that_is_no_text_or_no_json_is_refused(self, tmp_path, content):
        file = tmp_path / "lengths.jsonl"
        file.write_bytes(content)
        with pytest.raises((OptionError, InputError), match=r"lengths\.jsonl"):
            from_file(file)
        with pytest.raises((OptionError, InputError), match=r"lengths\.jsonl"):
            read_rows(file)

    def test_a_call_that_the_memory_cannot_hold_is_refused(self, tmp_path):
        file = tmp_path / "lengths.jsonl"
        file.write_text('{"prompt": 90000000, "responses": [1, 1]}\n')
        for call in (lambda: from_file(file), lambda: from_shape("90000000,1,2", 2)):
            with pytest.raises(OptionError, match="180,000,002 tokens, at most 100,000,000"):
                call()


def test_the_cost_counts_a_shared_prompt_once_and_the_head_on_scored_rows():
    size = {"parameters": 100, "body": 50, "head": 30, "layers": 2, "attention": 8, "kv": 4}
    size |= {"embedding": 0, "hidden": 10}
    traffic = Traffic(name="t", groups=((10, (4, 4)),))
    limits = Limits(1e3, 1e9, None)
    shared = cost_of(traffic, size, "bfloat16", limits)
    attended = 10 * 10 / 2 + 2 * (10 * 4 + 4 * 4 / 2)
    assert shared.flop == 2 * 50 * 19 + 2 * 30 * 8 + 4 * 2 * 8 * attended
    assert shared.bytes == 2 * (100 + 2 * 4 * 19)
    assert (shared.bound, shared.least_s) == ("compute", shared.flop / 1e3)
    alone = cost_of(traffic, size, "bfloat16", limits, share_prefix=False)
    assert (shared.computed_tokens, alone.computed_tokens) == (19, 28)
    assert alone.flop - shared.flop == 2 * 50 * 9 + 4 * 2 * 8 * 50
    assert cost_of(traffic, None, "bfloat16", limits).flop is None
    assert cost_of(traffic, size, "bfloat16", limits, num_devices=2).least_s == shared.least_s / 2


def test_the_bound_reads_of_an_embedding_only_the_rows_of_the_tokens():
    size = {"parameters": 5100, "body": 50, "head": 30, "layers": 2, "attention": 8, "kv": 4}
    size |= {"embedding": 5000, "hidden": 5}
    one = Traffic(name="t", groups=((1, (1,)),))
    known = (size, "bfloat16", Limits(1e3, 1e9, None))
    assert cost_of(one, *known).bytes == pytest.approx(2 * (100 + 2 * 5 + 2 * 4 * 2), rel=1e-3)
    many = Traffic(name="t", groups=((9000, (1000,)),))
    assert cost_of(many, *known).bytes == pytest.approx(2 * (5100 + 2 * 4 * 10_000), rel=1e-3)


@pytest.mark.parametrize(
    ("free_gb", "expected"), [(12, "float64"), (6, "float32"), (3, "bfloat16"), (2, "takes 2 GiB")]
)
def test_the_check_takes_the_widest_type_that_the_memory_holds(free_gb, expected, monkeypatch):
    monkeypatch.setattr("vllm_kl.engines.memory.available_bytes", lambda is_cuda: free_gb * 10**9)
    known = (["float64", "float32", "bfloat16"], Setup(model="m", dtype="bfloat16", device="cpu"))
    if expected.startswith("takes"):
        with pytest.raises(VLLMKLError, match=expected):
            _widest(*known, {"parameters": 10**9})
    else:
        assert _widest(*known, {"parameters": 10**9}) == expected


@pytest.mark.parametrize(
    ("dtype", "too_wide", "expected"),
    [
        ("bfloat16", (), ["float64"]),
        ("bfloat16", ("float64",), ["float64", "float32"]),
        ("bfloat16", ("float64", "float32"), ["float64", "float32", "bfloat16"]),
        ("float32", ("float64",), ["float64", "float32"]),
        ("float32", ("float64", "float32"), None),
    ],
)
def test_a_check_that_the_memory_of_a_gpu_does_not_hold_is_done_in_a_narrower_type(
    dtype, too_wide, expected, monkeypatch, ref_path
):
    """Attention in float64 takes more than the weights, which are all that the estimate knows."""
    loaded = []

    def load_model(setup, dtype):
        loaded.append(dtype)
        return dtype

    def one(model, ids, start):
        if model in too_wide:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return np.zeros(len(ids) - start)

    monkeypatch.setattr(of_truth, "load_model", load_model)
    monkeypatch.setattr(of_truth, "_one", one)
    monkeypatch.setattr(of_truth, "machine_limits", lambda *_: None)
    setup = Setup(model=str(ref_path), dtype=dtype, device="cpu", max_tokens=16)
    with contextlib.contextmanager(of_truth.truth)(setup) as running:
        calls = [np.arange(6)] * 2, [2, 2]
        if expected is None:
            with pytest.raises(torch.OutOfMemoryError):
                running.score(*calls)
            return
        for _ in range(2):
            assert len(running.score(*calls)) == 2
        assert loaded == expected
        assert running.told()["check"] == expected[-1]


def test_a_model_in_float64_is_scored_in_the_widest_type_of_vllm(ref_path, tmp_path, monkeypatch):
    monkeypatch.setattr(of_truth, "machine_limits", lambda *_: None)
    config = json.loads((ref_path / "config.json").read_text())
    tmp_path.joinpath("config.json").write_text(json.dumps({**config, "dtype": "float64"}))
    setup = Setup(model=str(tmp_path), dtype="auto", device="cpu", max_tokens=16)
    with contextlib.contextmanager(of_truth.truth)(setup) as running:
        assert running.told()["dtype"] == "float32"


def test_energy_is_the_difference_of_the_counters_also_where_one_ran_over(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    zone.joinpath("name").write_text("package-0\n")
    zone.joinpath("max_energy_range_uj").write_text("10000000\n")
    counter = zone / "energy_uj"
    counter.write_text("9000000\n")
    meter = EnergyMeter(powercap=tmp_path)
    counter.write_text("9500000\n")
    assert meter() == 0.5
    counter.write_text("1500000\n")
    assert meter() == 2.0
    assert EnergyMeter(powercap=tmp_path / "none")() is None


def test_no_joule_is_counted_twice(tmp_path):
    """psys holds the package, and the package holds its cores; the memory is beside them."""
    counters = []
    for zone, name in {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "psys"}.items():
        folder = tmp_path / f"intel-rapl:{zone}"
        folder.mkdir()
        folder.joinpath("name").write_text(f"{name}\n")
        counters.append(folder / "energy_uj")
        counters[-1].write_text("0\n")
    meter = EnergyMeter(powercap=tmp_path)
    for counter, microjoules in zip(counters, (3_000_000, 2_000_000, 500_000, 9_000_000), strict=True):
        counter.write_text(f"{microjoules}\n")
    assert meter() == 3.5


class Nvml:
    """Stands in the place of NVML on a machine with four GPUs."""

    NVMLError = RuntimeError

    def __init__(self):
        self.millijoules = [0, 0, 0, 0]

    def nvmlDeviceGetCount(self):
        return len(self.millijoules)

    def nvmlDeviceGetHandleByIndex(self, gpu):
        return gpu

    def nvmlDeviceGetHandleByUUID(self, gpu):
        raise self.NVMLError(f"no GPU {gpu}")

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        return self.millijoules[gpu]


@pytest.mark.parametrize(
    ("num_gpus", "seen", "joules"),
    [
        (1, None, 1),
        (2, None, 3),
        (2, "3,1", 10),
        (2, " 3, +1", 10),
        (1, "GPU-8a", None),
        (None, None, None),
    ],
)
def test_the_energy_of_all_gpus_of_a_provider_counts(num_gpus, seen, joules, monkeypatch, tmp_path):
    nvml = Nvml()
    monkeypatch.setattr("vllm_kl.bench.meters._nvml", lambda: nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    meter = EnergyMeter(num_gpus, tmp_path)
    nvml.millijoules = [1000, 2000, 4000, 8000]
    assert meter() == joules


def test_the_peaks_are_those_of_dense_products():
    assert peak_flop_per_s("NVIDIA H100 80GB HBM3", "float32") == 67e12
    assert peak_flop_per_s("NVIDIA H100 80GB HBM3", "bfloat16") == 989.5e12
    assert peak_flop_per_s("NVIDIA L4", "float16") == 121e12
    assert peak_flop_per_s("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16") is None


def row(provider="ours", shape="8,4,2", **figures):
    known = {"tok_per_s": 100.0, "fraction_of_floor": 0.8, "max_abs_err": 1e-6, "hardware": {"CPU": "a"}}
    return {"provider": provider, "shape": shape, **known, **figures}


class TestCompare:
    def test_within_the_tolerance_is_not_worse_and_the_message_has_the_tolerance(self):
        (one,) = compare([row()], [row(tok_per_s=91.0)], tolerance=0.1, figure="tok_per_s")
        assert not one.is_worse
        assert one.message == (
            "ours, 8,4,2: tok_per_s 100 -> 91, 0.910 of before; within the tolerance, tolerance 0.1"
        )

    @pytest.mark.parametrize(
        ("after", "told"),
        [
            ([row(tok_per_s=89.0)], "worse, tolerance 0.1"),
            ([row(max_abs_err=1e-3)], "max_abs_err 1.0e-06 -> 1.0e-03"),
            ([row(max_abs_err=None)], "the second run was not checked"),
            ([row("flat")], "the second run has none"),
        ],
    )
    def test_slower_less_exact_and_missing_are_worse(self, after, told):
        (one,) = compare([row(), row("floor")], after, tolerance=0.1, figure="tok_per_s")
        assert one.is_worse
        assert told in one.message

    @pytest.mark.parametrize(
        ("name", "first", "second"),
        [
            ("model", "qwen-0.5b", "qwen-7b"),
            ("parameters", 1, 2),
            ("dtype", "float32", "bfloat16"),
            ("fed_tokens", 1, 2),
            ("share_prefix", True, False),
            ("replicas", 1, 2),
            ("engine", {}, {"block_size": 16}),
            ("readout", "pooling", "flat"),
        ],
    )
    def test_runs_of_different_things_are_refused(self, name, first, second):
        runs = [row(**{name: first})], [row(**{name: second})]
        with pytest.raises(OptionError) as refusal:
            compare(*runs, tolerance=0.1, figure="tok_per_s")
        told = f"ours, 8,4,2: {name} is {first!r} in the first run and {second!r} in the second"
        assert str(refusal.value).startswith(told)

    @pytest.mark.parametrize(
        ("before", "figure", "told"),
        [
            ([], "tok_per_s", "has no rows: give the folder of --out"),
            ([row("floor")], "tok_per_s", "measured the floor alone, and nothing to compare: .* ours floor$"),
            ([row(tok_per_s=None)], "tok_per_s", "has no tok_per_s: run it with --providers ours$"),
            ([row(ratio_to_torchrl=None)], "ratio_to_torchrl", "run it with --providers ours torchrl$"),
        ],
    )
    def test_a_run_that_has_nothing_to_compare_is_told_how_to_get_it(self, before, figure, told):
        with pytest.raises(OptionError, match=told):
            compare(before, [row()], tolerance=0.1, figure=figure)

    def test_the_folder_of_a_model_does_not_matter(self):
        """The same model lies elsewhere on another machine."""
        (one,) = compare(
            [row(model="/data/qwen")], [row(model="/home/me/qwen")], tolerance=0.1, figure="tok_per_s"
        )
        assert not one.is_worse

    def test_seconds_of_two_machines_are_not_compared(self):
        assert figure_for([row()], [row()]) == "tok_per_s"
        assert figure_for([row()], [row(hardware={"CPU": "b"})]) == "fraction_of_floor"
        assert figure_for([row()], [row(hardware={})]) == figure_for([], []) == "fraction_of_floor"
        told = row()["hardware"] | {"threads": 2}  # an earlier version did not tell them
        assert figure_for([row()], [row(hardware=told)]) == "tok_per_s"
        assert figure_for([row(hardware=told)], [row(hardware=told | {"threads": 4})]) == "fraction_of_floor"
        with_gpu = told | {"GPU": "NVIDIA L4"}
        assert figure_for([row(hardware=with_gpu)], [row(hardware=with_gpu)]) == "tok_per_s"
        for pair in ([told, with_gpu], [with_gpu, told], [with_gpu, told | {"GPU": "NVIDIA H200"}]):
            assert figure_for(*([row(hardware=one)] for one in pair)) == "fraction_of_floor"

    def test_the_command_exits_with_its_own_code_where_a_run_is_worse(self, tmp_path):
        from typer.testing import CliRunner

        from vllm_kl.cli import app

        for name, figure in (("a", 100.0), ("b", 80.0)):
            tmp_path.joinpath(name).write_text(json.dumps(row(tok_per_s=figure)) + "\n")
        command = ["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]
        worse = CliRunner().invoke(app, command)
        assert (worse.exit_code, "0.800 of before; worse, tolerance 0.1" in worse.output) == (WORSE, True)
        assert CliRunner().invoke(app, [*command, "--tolerance", "0.25"]).exit_code == 0
        missing = CliRunner().invoke(app, [*command, "--by", "ratio_to_torchrl"])
        assert (missing.exit_code, "has no ratio_to_torchrl" in missing.stderr) == (2, True)

    def test_a_file_that_holds_no_results_is_named(self, tmp_path):
        with pytest.raises(OptionError, match="expected a file of results"):
            read_rows(tmp_path)
        tmp_path.joinpath("results.jsonl").write_text('{"prompt": 3}\n')
        with pytest.raises(InputError, match="line 1: no row"):
            read_rows(tmp_path)

    @pytest.mark.parametrize(
        "figures",
        [
            {"tok_per_s": "1"},
            {"tok_per_s": 0},
            {"max_abs_err": float("nan")},
            {"provider": ["ours"]},
            {"hardware": [None]},
        ],
    )
    def test_rows_that_cannot_be_compared_are_named(self, tmp_path, figures):
        file = tmp_path / "results.jsonl"
        file.write_text(json.dumps(row() | figures) + "\n")
        with pytest.raises(InputError, match="line 1"):
            read_rows(tmp_path)


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("tables")


class TestTablesOfPages:
    def test_the_figures_of_both_readmes_are_those_of_their_files(self, tables):
        for page in tables.PAGES:
            text = page.read_text()
            assert tables.with_tables(text) == text, f"{page}: python benchmarks/tables.py"
            assert tables._BLOCK.search(text)
        assert tables.without_table() == []

    def test_what_stands_in_a_table_is_no_markup(self):
        """Rich would take "[flat]" for a style, and Markdown a line in a cell for the end of the cell."""
        why = "failed: a | b; install vllm-kl[ray]"
        shape = "[red]a.jsonl"
        rows = [row("ours", shape, s_p50=1.0), row("ours[flat]", shape, s_p50=2.0)]
        rows.append(row("torchrl", shape, not_measured=why))
        (table,) = result_tables(rows)
        costs = cost_table({shape: cost_of(from_shape("8,4,2", 2), None, "float32", Limits(1e3, 1e9, None))})
        console = Console(width=140)
        with console.capture() as shown:
            console.print(table, costs)
        for text in ("ours[flat]", why):
            assert text in shown.get()
        assert shown.get().count(shape) == 2
        assert as_markdown(table).startswith(f"**{shape}**\n")
        lines = as_markdown(table).splitlines()
        assert [re.split(r"(?<!\\)\|", line)[1].strip() for line in lines[-3:]] == [
            "ours",
            "ours[flat]",
            "torchrl",
        ]
        assert why.replace("|", "\\|") in lines[-1]

    def test_the_spread_of_the_fractions_stands_beside_their_median(self):
        spread = {"fraction_of_floor_p20": 0.8, "fraction_of_floor_p80": 1.0}
        rows = [row("ours", "8,4,2", fraction_of_floor=0.9, **more) for more in (spread, {})]
        lines = as_markdown(result_tables(rows)[0]).splitlines()[-2:]
        assert [line.split("|")[-3].strip() for line in lines] == ["0.90 (0.80 to 1.00)", "0.90"]

    def test_a_file_of_tables_is_markdown_with_one_line_a_row(self):
        for file in (BENCHMARKS / "results").glob("*.md"):
            tables = re.findall(r"(?:^\|.*\n)+", file.read_text(), re.M)
            assert tables, file
            for table in tables:
                head, line, *rows = table.splitlines()
                assert re.fullmatch(r"[|-]+", line), f"{file}: {head}"
                assert len({row.count("|") for row in (head, line, *rows)}) == 1, f"{file}: {head}"

    @pytest.mark.parametrize(
        ("known", "told"),
        [
            ({"model": "96M", "parameters": 95_890_432}, "model 96M (96 M random weights)"),
            ({"model": "512,6,32000", "parameters": None}, "model 512,6,32000 (random weights)"),
            ({"model": "/data/qwen", "parameters": 7_615_616_512}, "model qwen (7,616 M weights)"),
            ({"model": "qwen", "parameters": None}, "model qwen (size not known)"),
        ],
    )
    def test_a_page_names_the_model_of_its_figures(self, known, told):
        rows = read_rows(BENCHMARKS / "results" / "readout-bfloat16-amx.jsonl")
        assert f"; {told}, bfloat16, 32 sequences" in caption([rows[0] | known])

    def test_a_page_tells_the_rounds_of_other_ways_where_there_are_any(self):
        rows = read_rows(BENCHMARKS / "results" / "readout-bfloat16-amx.jsonl")
        assert ", 20 rounds, of other ways 5; " in caption(rows)
        assert ", 20 rounds; " in caption([row for row in rows if row["provider"] in ("ours", "floor")])
        assert ", of other ways 5" in caption([row | {"provider": "mine:score"} for row in rows])

    def test_a_page_says_where_providers_did_not_take_turns(self):
        rows = read_rows(BENCHMARKS / "results" / "readout-h200.jsonl")
        assert caption(rows).endswith(", 64 sequences, 5 rounds; providers run one after another")
        of_one_group = {"groups": [["floor", "ours"]]}
        assert "providers" not in caption([rows[0] | of_one_group])
        of_two = {"groups": [["floor", "ours"], ["flat"]]}
        assert caption([rows[0] | of_two]).endswith("; providers in turns: floor, ours; then flat")

    def test_a_changed_figure_is_found_and_written_anew(self, tables):
        text = tables.PAGES[0].read_text()
        row = re.search(r"^\| P=256 R=128 G=8 .*$", text, flags=re.M)[0]
        changed = text.replace(row, re.sub(r"\d+(\.\d+)? \|$", "7.77 |", row))
        assert changed != text
        assert tables.with_tables(changed) == text


def test_a_provider_has_one_color_in_all_parts_of_the_picture(monkeypatch, tmp_path):
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    from vllm_kl.bench.plot import plot

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    parts = ("floor", "floor_engine", "floor_head")  # the bars leave them out, so they have other places
    lines = {"group": 2, "prompt_tokens": 8, "response_tokens": 4, "fraction_of_floor": 0.5}
    rows = [row(name, tok_per_s=9.0, **lines) for name in ("ours", *parts, "torchrl", "transformers")]
    plot(tmp_path / "bench.png", rows)
    groups, lengths, floors = drawn[0].axes
    points = {line.get_label(): to_hex(line.get_color()) for line in groups.lines}
    assert points == {line.get_label(): to_hex(line.get_color()) for line in lengths.lines}
    bars = {bar.get_label(): to_hex(bar.patches[0].get_facecolor()) for bar in floors.containers}
    assert bars == {name: points[name] for name in ("ours", "torchrl", "transformers")}
    assert len(set(points.values())) == 4


def test_the_fastest_of_several_products_is_what_a_cpu_does_at_most(monkeypatch):
    """A square is not the fastest product of every CPU, and a bound that work exceeds is none."""
    shapes = [(10, 10, 10), (40, 5, 20)]
    seconds = {(shape, dtype): 1.0 for shape in shapes for dtype in (torch.float32, torch.bfloat16)}
    seconds[shapes[1], torch.bfloat16] = 0.5
    monkeypatch.setattr(machine, "_ON_A_CPU", shapes)
    monkeypatch.setattr(machine, "_product", lambda dtype, shape, device: (shape, dtype))
    monkeypatch.setattr(machine, "_best", lambda work: seconds.get(work, 1.0) if type(work) is tuple else 1.0)
    found = machine.machine_limits(torch.bfloat16, "cpu")
    assert found.flop_per_s == 2 * 40 * 5 * 20 / 0.5
    assert found.gpu is None
    assert machine.machine_limits(torch.float32, "cpu").flop_per_s == 2 * 40 * 5 * 20


def test_a_product_is_that_of_a_layer():
    work = machine._product(torch.float32, (3, 4, 5), "cpu")
    assert work().shape == (3, 5)
