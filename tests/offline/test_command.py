"""The command ``vllm-kl score`` as a user types it, and what is left of it when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from tests import local_ray
from tests.command import vllm_kl
from tests.offline import helpers
from tests.offline.helpers import BAD, check_same, start, table_of, until
from vllm_kl.cli import app
from vllm_kl.offline import command

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")


class TestOptions:
    def test_help_loads_no_ray_and_no_torch(self):
        code = (
            "import sys; from typer.testing import CliRunner; from vllm_kl.cli import app\n"
            "assert CliRunner().invoke(app, ['score', '--help']).exit_code == 0\n"
            "assert not {'ray', 'vllm', 'torch', 'torchrl', 'pyarrow'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize(
        ("args", "told"),
        [
            (["x.jsonl", "--model", "m"], "--out"),
            (["x.jsonl", "--model", "m", "--out", "o", "--engine", "dtype"], "NAME=VALUE"),
            (["x.jsonl", "--model", "m", "--out", "o", "--shard", "2/2"], "0 <= i < n"),
            (["x.jsonl", "--model", "m", "--out", "o", "--column", "a"], "NAME=YOURS"),
            (["x.jsonl", "--model", "m", "--out", "o", "--column", "answer=a"], "cannot be renamed"),
            (["x.jsonl", "--model", "m", "--out", "o", "--estimator", "k9"], "k9"),
            (["x.jsonl", "--model", "m", "--out", "o", "--policy-engine", "dtype=x"], "only with a policy"),
            (["x.jsonl", "--model", "m", "--out", "-", "--json"], "give one of them"),
        ],
    )
    def test_wrong_options_are_refused(self, args, told, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        found = CliRunner().invoke(app, ["score", *args], env={"COLUMNS": "200"})
        assert found.exit_code in (1, 2)
        assert isinstance(found.exception, SystemExit)
        assert told in found.stderr

    def test_a_model_that_nobody_has_is_named_without_a_traceback(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        done = vllm_kl("score", "x.jsonl", "--model", "no/such/model", "--out", "o")
        assert done.returncode == 1
        assert "no/such/model" in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_file_of_options_is_read_and_the_command_line_wins(self, tmp_path):
        (tmp_path / "score.yaml").write_text(
            "model: no/such\nout: o\nshard: 7/3\nengine: {max_model_len: 320}\ndata: [x.jsonl]\n"
        )
        done = vllm_kl("score", "--config", tmp_path / "score.yaml")
        assert "'7/3'" in done.stderr
        done = vllm_kl("score", "--config", tmp_path / "score.yaml", "--shard", "9/3")
        assert "'9/3'" in done.stderr
        (tmp_path / "score.yaml").write_text("modle: x\n")
        done = vllm_kl("score", "--config", tmp_path / "score.yaml")
        assert "unknown option 'modle'" in done.stderr

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            (b"limit: 2.5", "unable to parse string as an integer"),
            (b"topk: true", "unable to parse string as an integer"),
            (b"model: [a, b]", "model is ['a', 'b'], expected one value"),
            (b"data: [[a]]", "data is [['a']], expected values, or names and values"),
            (b"prefix: \xe9", "can't decode byte"),
            (b"model: 2001-13-45", "month must be in 1..12"),
            (b"1: 2\nfoo: 3", "unknown option 1"),
            (b"add-eos: true\nadd_eos: false", "has the option 'add_eos' twice"),
        ],
    )
    def test_a_file_of_options_is_as_strict_as_the_command_line(self, tmp_path, text, told):
        path = tmp_path / "score.yaml"
        path.write_bytes(text)
        found = CliRunner().invoke(
            app, ["score", "x.jsonl", "--model", "m", "--out", "o", "--config", str(path)]
        )
        assert found.exit_code == 2
        assert told in " ".join(found.output.replace("\u2502", " ").split())

    def test_a_file_of_options_means_what_the_command_line_means(self, tmp_path, monkeypatch):
        path, seen = tmp_path / "score.yaml", []
        path.write_text("data: one.jsonl\nmodel: m\nout: 5\nlimit: null\nengine: {a: 2020-01-02, b: [1]}\n")
        monkeypatch.setattr(command, "_work", lambda *given: seen.append(given) or ({}, 0))
        assert CliRunner().invoke(app, ["score", "--config", str(path)]).exit_code == 0
        ((model, options, files, *_),) = seen
        assert (model, files["data"], files["out"], files["limit"]) == ("m", ("one.jsonl",), "5", None)
        assert options["engine_options"] == {"a": "2020-01-02", "b": [1]}

    def test_a_chat_template_that_is_no_text_is_refused(self, tmp_path):
        (tmp_path / "template").write_bytes(b"\xe9")
        options = ["--model", "m", "--out", "o", "--chat-template", str(tmp_path / "template")]
        found = CliRunner().invoke(app, ["score", "x.jsonl", *options])
        assert (found.exit_code, "is not UTF-8" in found.output) == (1, True)


@pytest.mark.usefixtures("cluster")
class TestStreams:
    pytestmark = local_ray.MARKS

    @pytest.mark.nightly
    def test_rows_of_standard_input_come_back_on_standard_output(self, whole, ref_path):
        home, *_, table = whole
        with (home / "data.jsonl").open() as data:
            process = start("-", "-", ref_path, stdin=data)
            printed, told = process.communicate(timeout=300)
        assert process.returncode == 3, told
        rows = [json.loads(line) for line in printed.splitlines()]
        check_same(pa.Table.from_pylist(rows, table.schema), table)
        assert f"{len(rows)} rows in" in told

    @pytest.mark.nightly
    def test_a_reader_that_leaves_is_an_error_without_a_traceback(self, whole, ref_path):
        home, *_ = whole
        process = start(home / "data.jsonl", "-", ref_path)
        process.stdout.close()
        told = process.stderr.read()
        assert process.wait(timeout=300) == 1
        assert "the reader of standard output left" in told
        assert "Traceback" not in told
        assert "Exception ignored" not in told

    @pytest.mark.nightly
    def test_json_lines_hold_the_rows_of_parquet(self, whole, ref_path, tmp_path):
        home, *_, table = whole
        out = tmp_path / "out"
        process = start(home / "data.jsonl", out, ref_path, "--format", "jsonl", "--json")
        printed, told = process.communicate(timeout=300)
        assert process.returncode == 3, told
        (line,) = printed.splitlines()
        files = json.loads(line)["files"]
        assert files == sorted(map(str, out.glob("part-*.jsonl")))
        rows = [json.loads(line) for path in files for line in Path(path).read_text().splitlines()]
        check_same(pa.Table.from_pylist(rows, table.schema), table)


def files_of(out):
    return list(out.glob("part-*"))


def is_complete(out):
    manifest = out / "_manifest.json"
    return manifest.exists() and len(files_of(out)) == len(json.loads(manifest.read_text())["parts"])


MOMENTS = {
    "while the manifest is written": lambda out: (out / "_counts").exists(),
    "before the first file": lambda out: helpers.scoring_actors(),
    "between files": lambda out: len(files_of(out)) >= 3,
    "during a write": lambda out: list(out.glob(".part-*")),
    "after the last file": is_complete,
}


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
class TestKills:
    pytestmark = local_ray.MARKS

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_a_killed_driver_loses_nothing(self, whole, ref_path, tmp_path, moment):
        home, *_, table = whole
        data = home / "data.jsonl"
        out = tmp_path / "out"
        killed = start(data, out, ref_path)
        until(lambda: MOMENTS[moment](out), killed)
        engines = [process for _, of_actor in helpers.scoring_actors() for process in of_actor]
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        assert psutil.wait_procs(engines, timeout=60)[1] == []  # an engine ends with its owner
        before = {path: path.read_bytes() for path in files_of(out)}
        again = start(data, out, ref_path, "--json")
        printed, told = again.communicate(timeout=300)
        assert again.returncode == 3, told
        figures = json.loads(printed.splitlines()[-1])
        assert (figures["rows"], figures["rejected"]) == (table.num_rows, len(BAD))
        assert figures["files"] == sorted(map(str, files_of(out)))
        assert {path: path.read_bytes() for path in before} == before
        assert not list(out.glob(".part-*"))
        check_same(table_of(out), table)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
    def test_a_driver_that_ends_takes_a_ray_of_its_own_with_it(self, whole, ref_path, tmp_path, number):
        home, *_, table = whole
        out = tmp_path / "out"
        ended = start(home / "data.jsonl", out, ref_path, address="")
        until(lambda: len(files_of(out)) >= 3, ended)
        started = psutil.Process(ended.pid).children(recursive=True)
        assert len(started) > 5
        os.kill(ended.pid, number)
        _, told = ended.communicate(timeout=120)
        if number == signal.SIGINT:
            assert ended.returncode not in (0, 3)  # neither is all done
            assert "Traceback" not in told
        assert psutil.wait_procs(started, timeout=150)[1] == []  # Ray's agents last
        again = start(home / "data.jsonl", out, ref_path, address="")
        _, told = again.communicate(timeout=300)
        assert again.returncode == 3, told
        check_same(table_of(out), table)


@pytest.mark.nightly
class TestAddress:
    pytestmark = local_ray.MARKS

    def test_another_cluster_is_used_and_left_as_it_was(self, whole, ref_path, tmp_path):
        home, *_, table = whole
        with local_ray.second_cluster() as address:
            before = state_of(address)
            process = start(home / "data.jsonl", tmp_path / "out", ref_path, address=address)
            _, told = process.communicate(timeout=300)
            assert process.returncode == 3, told
            check_same(table_of(tmp_path / "out"), table)
            after = state_of(address)
            assert after["free"] == before["free"] == {"CPU": 4.0}
            assert before["actors"] == []
            assert set(after["actors"]) <= RAY_DATAS_OWN
            assert after["nodes"] == before["nodes"]

    def test_an_address_without_a_cluster_is_a_clear_error(self, whole, ref_path, tmp_path):
        home, *_ = whole
        process = start(home / "data.jsonl", tmp_path / "out", ref_path, address="127.0.0.1:1")
        _, told = process.communicate(timeout=60)  # Ray itself would wait for three minutes
        assert process.returncode == 1
        assert "no Ray cluster at 127.0.0.1:1" in told
        assert "Traceback" not in told


RAY_DATAS_OWN = {"_AutoscalingCoordinatorActor", "_StatsActor", "ActorLocationTracker"}  # one a cluster


def state_of(address):
    """Return the nodes, the actors that live, and the free CPUs of a cluster, as another driver sees them."""
    code = (
        "import json, ray, sys, time\n"
        "from ray._private.state import actors\n"
        "ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)\n"
        "living = lambda: [one for one in actors().values() if one['State'] != 'DEAD']\n"
        "end = time.monotonic() + 30\n"
        "free_cpus = lambda: ray.available_resources().get('CPU')\n"
        "while free_cpus() != ray.cluster_resources()['CPU'] and time.monotonic() < end: time.sleep(0.5)\n"
        "free = {'CPU': free_cpus()}\n"
        "nodes = [node['NodeID'] for node in ray.nodes() if node['Alive']]\n"
        "names = [one['ActorClassName'] for one in living()]\n"
        "print(json.dumps({'actors': names, 'free': free, 'nodes': nodes}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, address], stdout=subprocess.PIPE, check=True, timeout=120
    )
    return json.loads(done.stdout.splitlines()[-1])
