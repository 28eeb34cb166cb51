"""What is uploaded: the sdist and the wheel hold the package's files and no others, and the wheel works."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import vllm_kl
from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE
from tests.test_requirements import unmet
from vllm_kl import Sample, write_samples

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[1]
PROJECT = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md")
FILES = {
    str(path.relative_to(ROOT))
    for path in ROOT.joinpath("vllm_kl").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def run(*command, cwd):
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist, built from a copy: a build leaves files in its folder, which later builds take up."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in PROJECT:
        shutil.copy(ROOT / name, tree)
    for name in ("vllm_kl", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run(sys.executable, "-c", build, cwd=tree)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the sdist."""
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", out, sdist, cwd=out)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Python of an environment that has the wheel; what it depends on comes from this environment."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", "--no-compile")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, cwd=home)
    (packages,) = home.glob("lib/python*/site-packages")
    # Python adds these folders after its own, and does not read their .pth files: an editable install of
    # this package stays unseen.
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    packages.joinpath("dependencies.pth").write_text("\n".join(folders))
    return python


def test_the_sdist_holds_what_a_build_needs_and_no_tests(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in names if not name.startswith("vllm_kl.egg-info/")} == FILES | {*PROJECT} | made


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (told,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(told))
    about = told.removesuffix("/METADATA")
    assert {name for name in names if not name.startswith(f"{about}/")} == FILES
    assert {f"{about}/licenses/LICENSE", f"{about}/entry_points.txt"} <= names
    assert metadata["Version"] == vllm_kl.__version__
    assert metadata["License-Expression"] == "MIT"
    # What the requirements of this environment install is there anyway; test_requirements.py looks closer.
    assert unmet(metadata.get_all("Requires-Dist")) == []
    assert "vllm_kl/py.typed" in names


@pytest.mark.nightly
def test_the_installed_wheel_works_from_an_empty_folder(python, tmp_path):
    command = python.parent / "vllm-kl"
    assert "serve" in run(command, "--help", cwd=tmp_path)
    assert "--lengths" in run(command, "bench", "--help", cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path).startswith(f"vllm-kl {vllm_kl.__version__}\n")
    report = json.loads(run(command, "doctor", "--json", cwd=tmp_path).splitlines()[-1])
    assert report["ok"], report
    code = """
from importlib.metadata import entry_points, version
from vllm_kl.client import score
import vllm_kl
(plugin,) = entry_points(group="vllm.general_plugins", name="vllm_kl")
print(vllm_kl.__file__, version("vllm-kl"), plugin.load().__module__, score.__module__, sep="\\n")
"""
    file, *told = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(python.parents[1])
    assert told == [vllm_kl.__version__, "vllm_kl.plugin", "vllm_kl.client.client"]


@pytest.mark.nightly
def test_what_pip_installs_with_the_wheel_is_enough(wheel, tmp_path):
    """In a clean environment the wheel's own requirements bring the client, and a command that helps."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "clean", cwd=tmp_path)
    python = tmp_path / "clean" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", wheel, cwd=tmp_path)
    run(sys.executable, "-m", "pip", "--python", python, "check", cwd=tmp_path)
    command = python.parent / "vllm-kl"
    assert run(command, "--version", cwd=tmp_path).startswith(f"vllm-kl {vllm_kl.__version__}\n")
    for name in ("", "score", "serve", "bench", "view", "demo", "doctor"):
        assert "Usage" in run(command, *name.split(), "--help", cwd=tmp_path)
    code = "from vllm_kl.client import AsyncClient, Client, score; import vllm_kl; vllm_kl.errors"
    run(python, "-c", code, cwd=tmp_path)
    code = "import vllm_kl\ntry: vllm_kl.VLLMScorer\nexcept ImportError as error: print(error)"
    assert "pip install 'vllm-kl[" in run(python, "-c", code, cwd=tmp_path)


@pytest.fixture(scope="module")
def locked_python(wheel, tmp_path_factory):
    """Python of a new environment: the wheel, PyTorch, and the packages of the lock. No other package."""
    home = tmp_path_factory.mktemp("locked")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--quiet")
    torch = f"torch=={version('torch')}"
    run(*pip, "--extra-index-url", "https://download.pytorch.org/whl/cpu", torch, cwd=home)
    run(*pip, "--no-deps", "--requirement", ROOT / "requirements.lock", wheel, cwd=home)
    return home / "bin" / "python"


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_the_wheel_with_the_lock_scores_and_measures(locked_python, ref_path, ref_oracle, tmp_path):
    check_scored_file(locked_python, ref_path, ref_oracle, tmp_path)
    what = ("--shape", "tiny", "--shapes", "64,16,4", "--sequences", 8, "--rounds", 2)
    engine = ("--engine", f"kv_cache_memory_bytes={64 << 20}")
    command = (
        locked_python.parent / "vllm-kl",
        "bench",
        *what,
        *engine,
        "--providers",
        "ours",
        "floor",
        "--json",
    )
    rows = json.loads(run(*command, cwd=tmp_path).splitlines()[-1])["results"]
    ours = next(row for row in rows if row["provider"] == "ours")
    assert ours["tok_per_s"] > 0
    assert ours["fraction_of_floor"] > 0
    assert ours["check"] == "float64"


def test_the_installed_wheel_scores(python, ref_path, ref_oracle, tmp_path):
    """With an engine of its own: the plugin is found by its entry point, and compiles its kernel."""
    ids = [list(range(5, 60)), [5, 6, 7, 8]]
    code = f"""
import json, sys
import vllm_kl
with vllm_kl.VLLMScorer(sys.argv[1], **{tiny.ENGINE_OPTIONS!r}) as scorer:
    rows = scorer.score({ids!r})
print(json.dumps([vllm_kl.__file__, scorer.readout, [row.tolist() for row in rows]]))
"""
    file, readout, rows = json.loads(run(python, "-c", code, ref_path, cwd=tmp_path).splitlines()[-1])
    assert Path(file).is_relative_to(python.parents[1])
    assert readout == "pooling"
    for row, sequence in zip(rows, ids, strict=True):
        truth = ref_oracle.log_probs(sequence)[1:]
        assert max(abs(a - b) for a, b in zip(row, truth, strict=True)) < LOG_PROB_TOLERANCE


@pytest.mark.nightly
def test_the_installed_command_scores_a_file(python, ref_path, ref_oracle, tmp_path):
    check_scored_file(python, ref_path, ref_oracle, tmp_path)


def check_scored_file(python, ref_path, ref_oracle, tmp_path):
    """``vllm-kl score`` beside this Python gives the log-probs of the oracle."""
    row = {"prompt_ids": [5, 6, 7], "response_ids": [8, 9]}
    tmp_path.joinpath("data.jsonl").write_text(json.dumps(row) + "\n")
    engine = [f"--engine={name}={value}" for name, value in tiny.ENGINE_OPTIONS.items()]
    command = (python.parent / "vllm-kl", "score", "data.jsonl", "--model", ref_path, "--out", "out")
    run(*command, "--format", "jsonl", *engine, cwd=tmp_path)
    (part,) = tmp_path.glob("out/part-*.jsonl")
    written = json.loads(part.read_text())
    truth = ref_oracle.log_probs([5, 6, 7, 8, 9])[3:]
    assert max(abs(a - b) for a, b in zip(written["ref_log_probs"], truth, strict=True)) < LOG_PROB_TOLERANCE


def test_the_installed_wheel_has_its_files_of_data(python, tmp_path):
    write_samples(
        tmp_path / "samples.jsonl", [Sample(token_ids=[5, 6], log_probs=[-1.0], ref_log_probs=[-2.0])]
    )
    run(python.parent / "vllm-kl", "view", "samples.jsonl", "--html", "page.html", cwd=tmp_path)
    assert "<html" in tmp_path.joinpath("page.html").read_text()
