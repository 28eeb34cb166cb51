"""The command ``vllm-kl score`` as a user types it, and what is left of it when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests import local_ray
from tests.command import vllm_kl
from tests.offline import helpers
from tests.offline.helpers import BAD, check_same, table_of

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")

ENGINE = [f"--engine={name}={json.dumps(value)}" for name, value in helpers.ENGINE.items()]


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
            (["x.jsonl", "--model", "no/such/model", "--out", "o"], "no/such/model"),
        ],
    )
    def test_wrong_options_are_refused(self, args, told, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        done = vllm_kl("score", *args)
        assert done.returncode in (1, 2)
        assert told in done.stderr
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


def start(data, out, model, *options):
    """Start the command in the cluster of this process."""
    address = ray.get_runtime_context().gcs_address
    args = ["score", data, "--model", model, "--out", out, "--address", address, "--num-gpus", 0, *ENGINE]
    args += ["--part-bytes", helpers.PART_BYTES, *options]
    code = "from vllm_kl.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition, process, timeout_s=240):
    """Wait until a condition is true; the process must live."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    return found


def files_of(out):
    return list(out.glob("part-*"))


def is_complete(out):
    manifest = out / "_manifest.json"
    return manifest.exists() and len(files_of(out)) == len(json.loads(manifest.read_text())["parts"])


MOMENTS = {
    "before the first file": lambda out: helpers.scoring_actors(),
    "between files": lambda out: len(files_of(out)) >= 3,
    "during a write": lambda out: list(out.glob(".part-*")),
    "after the last file": is_complete,
}
CI = ("between files",)


@pytest.mark.usefixtures("cluster")
class TestKills:
    pytestmark = local_ray.MARKS

    @pytest.mark.parametrize(
        "moment",
        [pytest.param(name, marks=() if name in CI else pytest.mark.nightly) for name in MOMENTS],
    )
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
