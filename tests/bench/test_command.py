"""``vllm-kl bench`` as a user types it: one run of the whole command, which the tests share."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.bench.test_run import Process
from tests.command import vllm_kl
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl.bench.results import read_rows
from vllm_kl.errors import EngineError, OptionError

HERE = Path(__file__).parent
FIELDS = {"provider", "shape", "tok_per_s", "ratio_to_torchrl", "fraction_of_floor", "max_abs_err"}
BLOCK = 32  # tokens of a block of the prefix cache
SMALL = ("--engine", f"block_size={BLOCK}", "--engine", f"kv_cache_memory_bytes={16 << 20}")


@pytest.fixture(scope="module")
def run(ref_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    faulty = ("providers_of_a_user:constant", "providers_of_a_user:dying")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HERE)  # where a user's own providers are
        what = ("--model", ref_path, "--shapes", "65,8,4", "--sequences", 8, "--rounds", 2)
        providers = ("ours", "floor", "torchrl", *faulty)
        done = vllm_kl("bench", *what, *SMALL, "--providers", *providers, "--out", out, "--json")
    return out, done


@pytest.mark.timeout(600)
class TestRun:
    def test_the_last_line_is_json_with_the_promised_fields(self, run):
        figures = json.loads(run[1].stdout.splitlines()[-1])
        rows = {row["provider"]: row for row in figures["results"]}
        faulty = [f"providers_of_a_user:{name}" for name in ("constant", "dying")]
        assert list(rows) == ["ours", "floor", "floor_engine", "floor_head", "torchrl", *faulty]
        for row in rows.values():
            assert row.keys() >= FIELDS
            if row["provider"] in faulty:
                assert row["tok_per_s"] is None
                assert row["not_measured"].startswith("failed: ")
                continue
            assert row["shape"] == "65,8,4"
            assert row["tok_per_s"] == pytest.approx(8 * 73 / row["s_p50"])
            assert (row["fed_tokens"], row["scored_tokens"]) == (8 * 73, 8 * 8)
        ours, floor, torchrl = rows["ours"], rows["floor"], rows["torchrl"]
        pairs = [t / o for t, o in zip(torchrl["seconds"], ours["seconds"], strict=True)]
        assert ours["ratio_to_torchrl"] == pytest.approx(sum(pairs) / 2)
        assert torchrl["ratio_to_torchrl"] == 1.0
        assert 0 < ours["max_abs_err"] <= LOG_PROB_TOLERANCE
        assert torchrl["max_abs_err"] <= LOG_PROB_TOLERANCE
        assert (ours["check"], ours["dtype"], ours["readout"]) == ("float64", "float32", "pooling")
        pairs = [f / o for f, o in zip(floor["seconds"], ours["seconds"], strict=True)]
        assert ours["fraction_of_floor"] == pytest.approx(sum(pairs) / 2)
        low, high = min(pairs), max(pairs)
        assert ours["fraction_of_floor_p20"] == pytest.approx(low + 0.2 * (high - low))
        assert ours["fraction_of_floor_p80"] == pytest.approx(low + 0.8 * (high - low))
        assert floor["fraction_of_floor"] == 1.0
        assert floor["fraction_of_floor_p20"] is None
        assert ours["peak_bytes"] > 100 << 20

    def test_python_warns_of_nothing_that_was_left(self, run):
        assert "leaked" not in run[1].stderr

    def test_the_engine_computes_as_few_tokens_as_the_cost_card_says(self, run):
        """Guards against a loss of speed: a count, which does not depend on the machine."""
        row = json.loads(run[1].stdout.splitlines()[-1])["results"][0]
        # A prompt of 65 tokens is computed once; its siblings find the two whole blocks before its last one.
        assert row["computed_tokens"] == 2 * (73 + 3 * (8 + 1))
        assert row["engine_computed_tokens"] == row["computed_tokens"]
        assert row["num_rescored"] == 0

    def test_a_wrong_provider_is_refused_before_it_is_timed_and_one_that_dies_is_told(self, run):
        _, done = run
        failures = json.loads(done.stdout.splitlines()[-1])["failures"]
        assert "differ from the model's" in failures["providers_of_a_user:constant"]
        assert "not timed" in failures["providers_of_a_user:constant"]
        assert "exit status 9" in failures["providers_of_a_user:dying"]
        assert "the last words" in failures["providers_of_a_user:dying"]
        assert done.returncode == 1
        assert "providers_of_a_user:dying failed: its process ended" in done.stderr

    def test_each_step_is_a_line_with_its_time_where_there_is_no_terminal(self, run):
        steps = re.findall(r"^ +(\d+\.\d) s  (.*)$", run[1].stderr, flags=re.M)
        told = [what for _, what in steps]
        assert told[:2] == ["reading the model", "the model's own log-probs"]
        assert "ours, 65,8,4: round 2" in told
        assert [float(s) for s, _ in steps] == sorted(float(s) for s, _ in steps)

    def test_the_costs_come_before_the_figures(self, run):
        err = run[1].stderr
        assert err.index("bound of this machine") < err.index("checked against the model in float64")
        assert err.index("checked against the model in float64") < err.index("engine without LM head")

    def test_the_folder_has_rows_tables_a_picture_and_logs(self, run):
        out, done = run
        figures = json.loads(done.stdout.splitlines()[-1])
        assert figures["files"] == [str(out / name) for name in ("results.jsonl", "bench.md", "bench.png")]
        rows = [json.loads(line) for line in out.joinpath("results.jsonl").read_text().splitlines()]
        assert rows == figures["results"]
        assert rows[0].keys() >= {"hardware", "versions", "commit", "date", "model", "dtype", "unit"}
        table = out.joinpath("bench.md").read_text()
        assert "**P=65 R=8 G=4**" in table
        assert "| ours " in table
        assert "providers_of_a_user:dying failed" in table
        assert out.joinpath("bench.png").read_bytes().startswith(b"\x89PNG")
        assert out.joinpath("logs", "ours.log").exists()

    def test_a_run_compared_with_itself_is_not_worse(self, run):
        done = vllm_kl("bench", "compare", run[0], run[0], "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["ok"]
        assert "within the tolerance, tolerance 0.1" in done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "give --model PATH, or --shape"),
        (("--model", "m", "--shape", "tiny"), "give --model PATH, or --shape"),
        (("--shape", "512,6"), "expected hidden,layers,vocab"),
        (("--shape", "100,2,1000"), "multiple of 64"),
        (("--shape", "tiny", "--shapes", "256,128"), "expected P,R,G"),
        (("--shape", "tiny", "--shapes", "256,0,8"), "expected P,R,G"),
        (("--shape", "tiny", "--shapes", "9" * 5000 + ",8,1"), "expected P,R,G"),
        (("--shape", "tiny", "--shapes", "999999999,1,9"), "at most 100,000,000"),
        (("--shape", "9" * 5000 + ",8,512"), "expected hidden,layers,vocab"),
        (("--shape", "tiny", "--lengths", "none.jsonl"), "none.jsonl"),
        (("--shape", "tiny", "--shapes", "8,8,1", "--lengths", "f"), "give it or --shapes"),
        (("--shape", "tiny", "--lengths", "f", "--sequences", "8"), "--sequences has no effect"),
        (("--shape", "tiny", "--providers", "ours", "theirs"), "'theirs'"),
        (("--shape", "tiny", "--providers", "my providers:slow"), "or module:function"),
        (("--shape", "tiny", "--providers", "ours", "ours"), "given twice"),
        (("--shape", "tiny", "--providers", "flat", "--no-share"), "--no-share has no effect"),
        (("--shape", "tiny", "--providers", "floor", "--replicas", "2"), "--replicas has no effect"),
        (("--shape", "tiny", "--readouts", "fast"), "--readouts 'fast'"),
        (("--shape", "tiny", "--dtype", "int8"), "--dtype 'int8'"),
        (("--shape", "tiny", "--engine", "dtype=float32"), "give --dtype"),
        (("--shape", "tiny", "--engine", "replicas=2"), "give --replicas"),
        (("--shape", "tiny", "--engine", "readout=flat"), "give --readouts"),
        (("--shape", "tiny", "--engine", "block_size"), "expected NAME=VALUE"),
        (("--shape", "tiny", "--engine", "tensor_parallel_size=x"), "must be a whole number"),
        (("--shape", "tiny", "--engine", "tensor_parallel_size=0"), "at least 1 process"),
        (("--shape", "tiny", "--engine", "blok_size=16"), "Did you mean block_size"),
        (("compare", "a", "b"), "--rounds has no effect before compare"),
    ],
)
def test_a_wrong_option_is_named(options, told, invoke):
    done = invoke("bench", "--rounds", "1", *options)
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())


@pytest.fixture
def invoke(monkeypatch):
    """Run the command in this process; nothing heavy may start."""
    from typer.testing import CliRunner

    from vllm_kl.bench import command
    from vllm_kl.cli import app

    monkeypatch.setattr(command, "quiet_bench", lambda: None)  # it sets variables of this process
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_options_take_several_values_in_both_ways(invoke, monkeypatch):
    from vllm_kl.bench import command

    plans = []
    ran = {"failures": {}}
    monkeypatch.setattr(command, "_run", lambda plan, *_: plans.append(plan) or ran)
    shapes = ("8,4,2", "16,4,2")
    for given in (
        ("--shapes", *shapes),
        ("--shapes", shapes[0], "--shapes", shapes[1]),
        (f"--shapes={shapes[0]}", shapes[1]),
        ("--shapes", *shapes, "08,4,2"),
    ):
        done = invoke(
            "bench", "--shape", "tiny", *given, "--providers", "ours", "flat", "--readouts", "auto", "flat"
        )
        assert done.exit_code == 0, done.output
        assert [traffic.name for traffic in plans[-1].traffics] == list(shapes)
        assert list(plans[-1].providers) == ["ours", "ours[flat]", "flat"]
        assert plans[-1].providers["ours[flat]"].readout == "flat"


def test_rows_tell_the_rounds_that_peers_had(invoke, monkeypatch):
    from vllm_kl.bench import command

    plans = []
    monkeypatch.setattr(command, "_run", lambda plan, *_: plans.append(plan) or {"failures": {}})
    for rounds, expected in (("2", 2), ("7", 5)):
        invoke("bench", "--shape", "tiny", "--rounds", rounds, "--peer-rounds", "5")
        assert (plans[-1].rounds, plans[-1].peer_rounds) == (int(rounds), expected)


def test_each_argument_of_the_scorer_that_is_no_engine_option_is_refused():
    from vllm_kl import VLLMScorer
    from vllm_kl.bench.command import _NO_ENGINE_OPTIONS

    parameters = inspect.signature(VLLMScorer).parameters.values()
    own = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}
    assert own | {"dtype"} == _NO_ENGINE_OPTIONS.keys()


@pytest.mark.parametrize(
    ("providers", "failed", "code"),
    [
        ((), "transformers", 0),
        ((), "ours", 1),
        ((), "the run", 1),
        (("--providers", "ours", "transformers"), "transformers", 1),
        (("--readouts", "auto", "flat"), "ours[flat]", 1),
    ],
)
def test_only_ours_and_what_was_named_can_fail_a_run(providers, failed, code, invoke, monkeypatch):
    """Ctrl-C is a failure of the run."""
    from vllm_kl.bench import command

    monkeypatch.setattr(command, "_run", lambda *_: {"failures": {failed: "no"}})
    assert invoke("bench", "--shape", "tiny", *providers).exit_code == code


def test_before_anything_starts_it_says_what_runs_and_what_is_kept(invoke, monkeypatch, tmp_path):
    from vllm_kl.bench import command

    class Nothing:
        num_steps = staticmethod(lambda plan: 1)

        def __init__(self, plan, **_):
            raise OptionError("nothing is measured")

    monkeypatch.setattr(command, "Bench", Nothing)
    told = invoke("bench", "--shape", "tiny").stderr
    assert "providers: ours, " in told
    assert "--providers ours floor is the quick run" in told
    assert "nothing is kept but this output: --out FOLDER" in told
    told = invoke("bench", "--shape", "tiny", "--providers", "ours", "--out", str(tmp_path)).stderr
    assert "quick" not in told
    assert "kept" not in told


def test_rows_are_written_after_each_shape_so_a_late_end_loses_only_the_last(invoke, monkeypatch, tmp_path):
    from vllm_kl.bench import run

    class EndsLate(Process):
        def time(self, sequences, starts):
            if len(sequences[0]) > 12:
                raise SystemExit("killed")
            return super().time(sequences, starts)

    monkeypatch.setattr(run, "ProviderProcess", EndsLate)
    for name in ("bench.md", "bench.png"):
        tmp_path.joinpath(name).write_text("of an earlier run")
    what = ("--shape", "tiny", "--shapes", "8,4,2", "16,4,2", "--providers", "ours", "--out", str(tmp_path))
    assert invoke("bench", *what).exit_code == 1
    (row,) = read_rows(tmp_path)
    assert (row["provider"], row["shape"], row["tok_per_s"]) == ("ours", "8,4,2", 32 * 12)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["logs", "results.jsonl"]


def test_where_nothing_is_drawn_no_picture_of_an_earlier_run_stays(invoke, monkeypatch, tmp_path):
    from vllm_kl.bench import run

    monkeypatch.setattr(run, "ProviderProcess", Process)
    monkeypatch.setattr(Process, "faults", {"ours": EngineError("no engine")})
    tmp_path.joinpath("bench.png").write_text("of an earlier run")
    what = ("--shape", "tiny", "--shapes", "8,4,2", "--providers", "ours", "--out", str(tmp_path))
    assert invoke("bench", *what).exit_code == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bench.md", "logs", "results.jsonl"]


def test_an_installation_of_the_client_alone_is_told_what_is_missing(invoke, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = invoke("bench", "--shape", "tiny", "--providers", "ours")
    assert done.exit_code == 2
    assert "needs torch and transformers and vllm: pip install 'vllm-kl[gpu]'" in done.stderr


def test_the_command_is_there_without_torch_vllm_or_ray():
    """An installation of the client alone has the command, and its help."""
    code = (
        "import sys; from vllm_kl.cli import app; app(['bench', '--help'], standalone_mode=False); "
        "print({'torch', 'vllm', 'ray', 'tensordict', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--lengths" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_model_that_does_not_exist_is_named(tmp_path):
    missing = tmp_path / "no-model"
    done = vllm_kl("bench", "--model", missing, "--providers", "ours", "--shapes", "8,4,2")
    assert done.returncode == 2
    assert str(missing) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_every_provider_of_this_machine_agrees_with_float64_on_real_lengths(tmp_path):
    """The model has random weights and is made by the command; lines of lengths, read-outs, no sharing."""
    lengths = tmp_path / "lengths.jsonl"
    groups = [{"prompt": 40, "responses": [9, 1, 17]}, {"prompt": 7, "responses": [30]}]
    lengths.write_text("".join(json.dumps(group) + "\n" for group in groups))
    what = ("--shape", "128,2,2000", "--dtype", "float32", "--lengths", lengths, "--readouts", "auto", "flat")
    done = vllm_kl("bench", *what, "--no-share", *SMALL, "--rounds", 2, "--peer-rounds", 2, "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["provider"]: row for row in json.loads(done.stdout.splitlines()[-1])["results"]}
    assert {"ours", "ours[flat]", "torchrl", "flat", "transformers", "floor"} <= rows.keys()
    for row in rows.values():
        assert row["max_abs_err"] is None or row["max_abs_err"] <= LOG_PROB_TOLERANCE * 4
        assert row["ratio_to_torchrl"] > 0
        assert row["shape"] == "lengths.jsonl"
    assert rows["torchrl"]["ratio_to_torchrl"] == 1.0
    assert rows["ours"]["engine_computed_tokens"] == rows["ours"]["fed_tokens"] == 40 * 3 + 27 + 7 + 30


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_two_replicas_are_measured(tmp_path):
    tiny.build(tmp_path / "model", seed=3)
    what = (
        "--model",
        tmp_path / "model",
        "--shapes",
        "40,8,4",
        "--sequences",
        8,
        "--replicas",
        2,
        "--rounds",
        1,
    )
    done = vllm_kl("bench", *what, *SMALL, "--providers", "ours", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["results"]
    assert row["replicas"] == 2
    assert row["max_abs_err"] <= LOG_PROB_TOLERANCE
