"""Collects GRPO groups with a vLLM policy and a vLLM reference, and checks every KL against float64."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tensordict import TensorDictBase
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from vllm_kl.demo import report, task, train
from vllm_kl.demo.env import make_collector, set_up, started
from vllm_kl.demo.types import BatchRow, DemoConfig, Rollout
from vllm_kl.kl import kl_estimate
from vllm_kl.transforms.retrieve_kl import RetrieveKL
from vllm_kl.transforms.vllm_reference import VLLMReference
from vllm_kl.view.samples import samples_from_batch, write_samples


def run(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Run the demo; return the figures of ``--json``."""
    set_up()
    config.out.mkdir(parents=True, exist_ok=True)
    reference_path, policy_path = train.checkpoints(console)
    oracle = Float64KL(policy_path, reference_path)  # first, because vLLM changes the threads of this process
    with started(config, reference_path, policy_path, console) as (reference, engine):
        collector = make_collector(
            engine, RetrieveKL("from_collector", reference, coeff=config.coeff), config
        )
        rows: list[BatchRow] = []
        rollouts: list[Rollout] = []
        with Progress(console=console) as progress:
            bar = progress.add_task("collecting", total=config.batches)
            began = time.perf_counter()
            for data in collector:
                wall_s = time.perf_counter() - began
                batch = list(read_rollouts(data.reshape(-1), len(rows), config.group, reference))
                rows.append(summarize(batch, oracle, wall_s))
                rollouts += batch
                progress.update(bar, advance=1)
                began = time.perf_counter()
        policy_version = collector.policy_version
        collector.shutdown()
        readout, stats = reference.scorer.readout, reference.scorer.stats
    files = [str(config.out / "rollouts.jsonl"), str(report.plot(config.out / "kl.png", rows))]
    write_samples(files[0], rollouts)
    report.print_table(rows, rollouts, console)
    console.print(
        f"reference: read-out {readout!r}; of the last batch's {stats.num_prompt_tokens:,} tokens "
        f"{stats.num_cached_tokens:,} were shared, not computed again",
        highlight=False,
    )
    return summary(rows, policy_version, files)


def summary(rows: list[BatchRow], policy_version: Any, files: list[str]) -> dict[str, Any]:
    """Return the figures of the whole run; means are per response token."""
    tokens = sum(row.response_tokens for row in rows)
    return {
        "batches": len(rows),
        "sequences": sum(row.sequences for row in rows),
        "response_tokens": tokens,
        "mean_kl_k1": sum(row.kl_k1 * row.response_tokens for row in rows) / tokens,
        "mean_kl_k3": sum(row.kl_k3 * row.response_tokens for row in rows) / tokens,
        "max_abs_err": max(row.max_abs_err for row in rows),
        "tok_per_s": sum(row.tok_per_s for row in rows) / len(rows),
        "policy_version": policy_version,
        "files": files,
    }


def read_rollouts(
    data: TensorDictBase, batch: int, group: int, reference: VLLMReference
) -> Iterator[Rollout]:
    """Yield the scored responses of one collected batch, ``[B]``."""
    samples = samples_from_batch(data, reference.tokenizer, ref_version=reference.scorer.weight_version)
    for i, sample in enumerate(samples):
        reward = task.grade(data["text", "response"][i], int(data["answer"][i]))
        yield Rollout(batch=batch, group=i // group, **{**vars(sample), "reward": reward})


class Float64KL:
    """Computes the KL of two checkpoints on given ids in float64, with transformers."""

    def __init__(self, policy_path: Path, reference_path: Path) -> None:
        self._models = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
            for path in (policy_path, reference_path)
        ]

    def __call__(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """Return k1 of all scored tokens of the rollouts, end to end, ``[N]`` float64, nats."""
        policy, reference = self.log_probs(rollouts)
        return policy - reference

    @torch.no_grad()
    def log_probs(self, rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probs of policy and reference of the same tokens, each ``[N]`` float64, nats."""
        rows = [torch.tensor(rollout.token_ids) for rollout in rollouts]
        ids_B_T = pad_sequence(rows, batch_first=True)  # on the right: in a causal model, no token sees it
        policy, reference = (
            model(ids_B_T).logits[:, :-1].log_softmax(-1).gather(-1, ids_B_T[:, 1:, None])[..., 0]
            for model in self._models
        )
        mask_B_T = pad_sequence([torch.tensor(rollout.mask) for rollout in rollouts], batch_first=True)
        mask_B_T = mask_B_T[:, 1:]  # column t - 1 of the log-probs belongs to token t
        return policy[mask_B_T], reference[mask_B_T]


def summarize(rollouts: list[Rollout], oracle: Float64KL, wall_s: float) -> BatchRow:
    """Return the figures of one batch."""
    policy, reference, k1 = (
        torch.tensor([value for rollout in rollouts for value in getattr(rollout, name)])
        for name in ("log_probs", "ref_log_probs", "kl")
    )
    k3 = kl_estimate(policy, reference, torch.ones_like(policy, dtype=torch.bool), estimator="k3")
    return BatchRow(
        sequences=len(rollouts),
        response_tokens=len(k1),
        reward=sum(r.reward for r in rollouts) / len(rollouts),
        kl_k1=k1.mean().item(),
        kl_k3=k3.mean().item(),
        max_abs_err=(k1 - oracle(rollouts)).abs().max().item(),
        tok_per_s=sum(len(r.token_ids) for r in rollouts) / wall_s,
    )
