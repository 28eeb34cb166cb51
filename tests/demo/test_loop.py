"""Checks versions and KL of ``vllm-kl demo --train``."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.command import vllm_kl
from vllm_kl import read_samples

UPDATES = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("train")
    done = vllm_kl(
        "demo", "--train", UPDATES, "--prompts", 4, "--group", 4, "--out", out, "--log", "csv", "--json"
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def log_probs(run):
    """Return a function: log-probs of a sample's response by the checkpoint of a version, in float64."""
    out, _, _ = run
    models = {
        version: AutoModelForCausalLM.from_pretrained(out / "checkpoints" / str(version), dtype=torch.float64)
        for version in range(UPDATES + 1)
    }

    @torch.no_grad()
    def log_probs(version, sample):
        ids, mask = torch.tensor(sample.token_ids), torch.tensor(sample.mask)
        rows = models[version](ids[None]).logits[0].log_softmax(-1)
        return rows[:-1].gather(-1, ids[1:, None])[:, 0][mask[1:]]

    return log_probs


@pytest.mark.nightly
@pytest.mark.timeout(600)
class TestTraining:
    def test_the_last_line_is_json_with_the_promised_figures(self, run):
        out, figures, _ = run
        assert list(figures)[:8] == [
            "updates",
            "reward_first5",
            "reward_last5",
            "kl_first",
            "kl_last",
            "max_abs_err",
            "seconds",
            "versions",
        ]
        assert figures["updates"] == UPDATES
        assert figures["versions"] == list(range(UPDATES))
        assert figures["ref_version"] == 0
        assert figures["files"] == [str(out / name) for name in ("rollouts.jsonl", "train.png", "log")]

    def test_the_kl_begins_at_zero_and_grows(self, run):
        _, figures, _ = run
        assert 0 <= figures["kl_first"] < 1e-4 < figures["kl_last"]

    def test_the_log_has_the_figures_of_each_update_under_its_version(self, run):
        out, _, _ = run
        samples = read_samples(out / "rollouts.jsonl")
        for name, value_of in (
            ("vllm_kl/kl_k1_token_mean_nats", lambda mine: statistics.fmean(v for s in mine for v in s.kl)),
            ("demo/reward", lambda mine: statistics.fmean(s.reward for s in mine)),
            ("vllm_kl/policy_version_max", lambda mine: mine[0].policy_version),
        ):
            lines = (out / "log" / "grpo" / "scalars" / f"{name}.csv").read_text().splitlines()
            logged = dict(map(float, line.split(",")) for line in lines)
            mine = {v: [s for s in samples if s.policy_version == v] for v in range(UPDATES)}
            assert logged == {v: pytest.approx(value_of(mine[v]), abs=1e-6) for v in mine}

    def test_every_updates_kl_is_that_of_its_own_checkpoint(self, run, log_probs):
        """Computes the KL again, apart from the demo; the checkpoints of other versions give another."""
        out, figures, _ = run
        samples = read_samples(out / "rollouts.jsonl")
        errors, others = ({version: [] for version in range(UPDATES)} for _ in range(2))
        for sample in samples:
            own = log_probs(sample.policy_version, sample)
            torch.testing.assert_close(torch.tensor(sample.log_probs).double(), own, rtol=0, atol=2e-5)
            kl = own - log_probs(0, sample)  # the policy begins as a copy of the reference
            errors[sample.policy_version].append((torch.tensor(sample.kl).double() - kl).abs().max())
            other = log_probs((sample.policy_version + 1) % UPDATES, sample)
            others[sample.policy_version].append(
                (torch.tensor(sample.log_probs).double() - other).abs().max()
            )
        assert len(samples) == 16 * UPDATES
        # Of one answer whose tokens are all nearly certain, two checkpoints may say the same.
        assert min(float(torch.stack(rows).max()) for rows in others.values()) > 1e-3
        worst = max(float(torch.stack(rows).max()) for rows in errors.values())
        assert worst <= 2e-5
        assert worst == pytest.approx(figures["max_abs_err"], abs=1e-7)

    def test_updates_make_the_better_answers_of_a_group_likelier(self, run, log_probs):
        """Checks the sign of the reward from the grade to the weights that serve next."""
        out, _, _ = run
        groups = defaultdict(list)
        for sample in read_samples(out / "rollouts.jsonl"):
            groups[sample.policy_version, sample.query].append(sample)
        gain = 0.0
        for (version, _), group in groups.items():
            mean = statistics.fmean(sample.reward for sample in group)
            for sample in group:
                moved = log_probs(version + 1, sample).sum() - log_probs(version, sample).sum()
                gain += (sample.reward - mean) * float(moved)
        assert gain > 0.1

    def test_the_table_and_the_picture_are_there(self, run):
        out, _, shown = run
        assert "staleness" in shown
        assert f"policy: version 0 to {UPDATES}" in " ".join(shown.split())
        assert (out / "train.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", 2, "--batches", 3], "has no effect with --train"),
        (["--train", 2, "--group", 1], "must be at least 2"),
        (["--train", 0], "--train"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(arguments, message):
    done = vllm_kl("demo", *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_example_trains_any_model(policy_path):
    example = Path(__file__).parents[2] / "examples" / "grpo.py"
    arguments = ["--model", policy_path, "--updates", "2", "--prompts", "2", "--group", "2"]
    done = subprocess.run([sys.executable, example, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (line for line in done.stdout.splitlines() if line.startswith("update "))
    assert first.startswith("update 0: sampled by version 0, reward ")
    assert second.startswith("update 1: sampled by version 1, reward ")
    assert abs(float(first.split("reference ")[1].split()[0])) < 1e-4
