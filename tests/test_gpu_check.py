"""``make gpu-check``, as a machine without a GPU can run it: every part, one file, and what fails is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_check():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import gpu_check

        yield gpu_check


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_every_part_runs_on_a_cpu_and_is_in_the_file(tmp_path):
    out = tmp_path / "gpu-check.md"
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--small", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=840)
    text = out.read_text()
    assert done.returncode == 0, done.stdout + done.stderr + text
    assert text.startswith("# GPU check: 4 of 4 parts done\n")
    for line in (
        *("| torch ", "| CPU ", "| commit ", "| tests ", "| architectures ", "| lm-head ", "| readout-tiny "),
        *("| llama ", "| ours ", "| flat ", "| transformers ", "| floor ", "**peak memory**"),
    ):
        assert line in text, line
    # Each test of the GPU by its name, and what came of it.
    assert "test_the_kernel_agrees_with_float64" in text
    assert "failed" not in text


def run(gpu_check, tmp_path, script, timeout_s=60.0):
    command = [sys.executable, "-c", script]  # sys.argv: -c, --markdown, the file
    return gpu_check.run("part", command, tmp_path, timeout_s)


def test_a_part_that_fails_keeps_its_tables_and_tells_the_end_of_its_log(gpu_check, tmp_path):
    script = (
        "import sys; open(sys.argv[2], 'w').write('| a table |'); print('before'); "
        "raise MemoryError('of the GPU')"
    )
    outcome = run(gpu_check, tmp_path, script)
    assert outcome.markdown == "| a table |"
    assert outcome.error.startswith("exit status 1\nbefore\n")
    assert outcome.error.endswith("MemoryError: of the GPU")
    written = gpu_check.written({"part": outcome, "next": run(gpu_check, tmp_path, "pass")}, 3)
    assert written.startswith("# GPU check: 2 of 3 parts done")
    assert [
        line.split()[1:4:2] for line in written.splitlines() if line.startswith(("| part ", "| next "))
    ] == [
        ["part", "outcome"],
        ["part", "failed"],
        ["next", "passed"],
    ]
    assert "MemoryError: of the GPU\n```" in written


def test_a_part_that_hangs_ends_with_all_that_it_started(gpu_check, tmp_path):
    script = (
        "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    )
    outcome = run(gpu_check, tmp_path, script, timeout_s=3.0)
    status, pid = outcome.error.split("\n")
    assert status == "not done after 3 s"
    deadline = time.monotonic() + 10
    while is_running(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(pid))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_failed_part_does_not_keep_the_next_from_running(gpu_check, tmp_path, monkeypatch, capsys):
    commands = {"one": [sys.executable, "-c", "raise SystemExit(3)"], "two": [sys.executable, "-c", "pass"]}
    monkeypatch.setattr(gpu_check, "commands", lambda small: commands)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--small", "--out", str(tmp_path / "out.md")])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 1
    assert "exit status 3" in (tmp_path / "out.md").read_text()
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:4:2]] == [
        "one: failed",
        "two: passed",
    ]


def test_without_a_gpu_it_says_so_and_tests_that_were_all_skipped_have_not_passed(
    gpu_check, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gpu_check, "on_a_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "there is no NVIDIA GPU here. --small" in capsys.readouterr().err
    monkeypatch.setattr(gpu_check, "on_a_gpu", lambda: True)
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_it(): pytest.skip('needs a GPU')")
    command = [sys.executable, "-m", "pytest", str(tmp_path / "test_it.py"), "--rootdir", str(tmp_path)]
    outcome = gpu_check.run("tests", command, tmp_path, 60)
    assert outcome.error.startswith("no test ran")


def test_the_gpus_tests_are_listed_one_by_one(gpu_check):
    report = (
        '<testsuites><testsuite><testcase name="a" time="1.25"/><testcase name="b" time="0.5">'
        '<failure message="off by 1&#10;more"/></testcase><testcase name="c" time="0">'
        '<skipped message="needs [gpu] | more"/></testcase></testsuite></testsuites>'
    )
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in gpu_check.tests_table(report).splitlines()
        if line
    ]
    assert rows[2:] == [
        ["a", "passed", "1.2", ""],
        ["b", "failure", "0.5", "off by 1"],
        ["c", "skipped", "0.0", "needs [gpu] / more"],
    ]


def test_the_makefile_makes_an_environment_of_its_own_or_takes_the_one_that_is_named():
    # What `make test` passes on would make this one print more.
    environment = {
        name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"
    }

    def planned(*variables):
        command = ["make", "-n", "gpu-check", *variables]
        return subprocess.run(
            command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True, env=environment
        ).stdout

    own, given = planned(), planned("GPU_PYTHON=my/python", "ARGS=--small")
    assert "--editable '.[gpu,test]'" in own
    assert ".venv-gpu/bin/python benchmarks/gpu_check.py" in own
    assert given.split() == ["my/python", "benchmarks/gpu_check.py", "--small"]
