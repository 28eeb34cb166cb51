"""Runs the example of GRPO on Ray: both of its loops, in both places of the KL. A real local Ray."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from tests import local_ray
from vllm_kl import push_weights

pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = [*local_ray.MARKS, pytest.mark.filterwarnings("ignore:GRPOTrainer is an experimental")]

FOLDER = Path(__file__).parents[1] / "examples" / "grpo_ray"
WITHIN = 2e-5  # nats: largest |KL - float64 KL| over some thousand tokens


@pytest.fixture(scope="module")
def train():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("train")


@pytest.mark.parametrize(("loop", "kl_in"), [("plain", "env"), ("trainer", "buffer")])
def test_every_kl_is_that_of_the_version_that_sampled(
    train, async_llm, tied_paths, tmp_path, monkeypatch, loop, kl_in
):
    import ray

    small = ["--updates", "3", "--prompts", "1", "--group", "4"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--loop", loop, "--kl-in", kl_in, *small])
    args = train.parse_arguments()
    model = str(tied_paths[0])
    first = push_weights(async_llm, AutoModelForCausalLM.from_pretrained(model))
    parts = train.Parts(args, model, async_llm, train.Check(tmp_path, model))
    try:
        parts.save()
        rows = []
        train.LOOPS[loop](parts, rows.append)
    finally:
        parts.close()
        ray.kill(ray.get_actor(train.collect.REFERENCE))
    assert len(rows) == 3
    assert parts.tracker.version == first + 3
    assert all(row.error < WITHIN for row in rows)
    sampled = [row.versions for row in rows]
    if loop == "trainer":  # in rounds: nothing is sampled while weights are pushed
        assert sampled == [[first + update] for update in range(3)]
    else:
        assert all(first <= version <= first + update for update in range(3) for version in sampled[update])
        assert all(row.staleness >= 0 for row in rows)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("loop", "kl_in"), [("plain", "env"), ("trainer", "buffer")])
def test_twenty_updates_raise_the_reward_and_leave_nothing_behind(tmp_path, loop, kl_in):
    command = [sys.executable, str(FOLDER / "train.py"), "--updates", "20", "--loop", loop, "--kl-in", kl_in]
    before = {process.pid for process in psutil.process_iter()}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    *updates, summary = done.stdout.splitlines()
    assert len(updates) == 20
    print(done.stdout)
    numbers = summary.replace(",", "").split()
    assert float(numbers[-2]) < WITHIN
    first, last = float(numbers[9]), float(numbers[11])
    assert last > first
    left = [
        process.cmdline()
        for process in psutil.process_iter()
        if process.pid not in before and str(tmp_path) in " ".join(process.environ().values())
    ]
    assert not left
