"""Trains the policy with GRPO on the demo's problems, and checks every KL against float64.

    collect -> check against float64 -> replay buffer, advantages -> GRPOLoss, AdamW -> push -> collect

The trained model starts as a copy of the reference, so the KL starts at zero. The loop saves a checkpoint of
each version. After each batch it compares the KL with the KL of that version's checkpoint, which transformers
computes in float64.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensordict import TensorDictBase
from torchrl.data import LazyStackStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage
from transformers import AutoModelForCausalLM

from vllm_kl.demo import report, train
from vllm_kl.demo.env import make_collector, set_up, started
from vllm_kl.demo.log import Log
from vllm_kl.demo.run import Float64KL, read_rollouts, summarize
from vllm_kl.demo.types import Rollout, TrainConfig, UpdateRow
from vllm_kl.diagnostics import mismatch
from vllm_kl.transforms.retrieve_kl import RetrieveKL
from vllm_kl.transforms.weight_updater import VLLMWeightUpdater
from vllm_kl.view.samples import write_samples


def run_training(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Train the policy; return the figures of ``--json``."""
    began = time.perf_counter()
    set_up()
    checkpoints = config.out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    reference_path, _ = train.checkpoints(console)
    # from_pretrained returns the model in eval mode, which GRPOLoss needs.
    model = AutoModelForCausalLM.from_pretrained(reference_path, dtype=torch.float32)
    model.save_pretrained(checkpoints / "0")
    with started(config, reference_path, reference_path, console) as (reference, engine):
        kl = RetrieveKL("from_collector", reference, add_to_reward=False)  # the loss has the KL as a term
        collector = make_collector(engine, kl, config, VLLMWeightUpdater(engine, model))
        trainer = Trainer(model, reference.tokenizer, config)
        log = Log(config, kl)
        rows: list[UpdateRow] = []
        rollouts: list[Rollout] = []
        with _progress(console) as progress:
            bar = progress.add_task("", total=config.batches, reward=float("nan"), kl=float("nan"))
            start = time.perf_counter()
            for data in collector:
                data, wall_s = data.reshape(-1), time.perf_counter() - start
                batch = list(read_rollouts(data, len(rows), config.group, reference))
                # One pair of versions: nothing updates the weights during a collection.
                (versions,) = {(r.policy_version, r.ref_version) for r in batch}
                oracle = Float64KL(checkpoints / str(versions[0]), reference_path)
                row = UpdateRow(
                    policy_version=versions[0],
                    ref_version=versions[1],
                    collected=summarize(batch, oracle, wall_s),
                    mismatch=trainer.mismatch(data),
                    **trainer.update(data, versions[0]),
                )
                collector.update_policy_weights_()
                model.save_pretrained(checkpoints / str(collector.policy_version))
                log(row)
                rows.append(row)
                rollouts += batch
                progress.update(bar, advance=1, reward=row.collected.reward, kl=row.collected.kl_k3)
                start = time.perf_counter()
        collector.shutdown()
        log.close()
        reference.scorer.check_frozen()
    files = [
        str(config.out / "rollouts.jsonl"),
        str(report.plot(config.out / "train.png", [row.collected for row in rows], rows)),
    ]
    if config.log is not None:
        files.append(str(config.out / "log"))
    write_samples(files[0], rollouts)
    report.print_updates(rows, console)
    console.print(
        f"reference: version {rows[-1].ref_version}, its numbers did not move; policy: version "
        f"{rows[0].policy_version} to {collector.policy_version}, all checkpoints in {checkpoints}",
        highlight=False,
    )
    return summary(rows, time.perf_counter() - began, files)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("GRPO"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]:.3f}, KL {task.fields[kl]:.4f}"),
        TimeRemainingColumn(),
        console=console,
    )


class Trainer:
    """The trained model, its loss, its optimizer and its replay buffer."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, config: TrainConfig) -> None:
        self._model = model
        self._max_grad_norm = config.max_grad_norm
        self._actor = TransformersWrapper(
            model, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=config.pad_output
        )
        self._loss = GRPOLoss(
            self._actor, masking_strategy="rlhf", kl_to_ref_coeff=config.coeff or None, entropy_bonus=False
        )
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
        self._buffer = ReplayBuffer(
            storage=LazyStackStorage(config.batches_kept * config.prompts * config.group),
            sampler=SamplerWithoutReplacement(),
            batch_size=config.minibatch,
        )
        self._buffer.append_transform(MCAdvantage(grpo_size=config.group))

    @torch.no_grad()
    def mismatch(self, data: TensorDictBase) -> float:
        """Return ``token_mult_prob_error - 1`` of a batch ``[B]``: sampler against trained model."""
        own = self._actor(data.select("tokens", "masks"))
        sampled, scored = (batch.get(("log_probs", "full"), as_list=True) for batch in (data, own))
        found = mismatch(sampled, scored, data.get(("next", "kl_mask"), as_list=True))
        return found.metrics["token_mult_prob_error"] - 1

    def update(self, data: TensorDictBase, version: int) -> dict[str, float]:
        """Add a batch ``[B]`` to the buffer, train once on the whole buffer, and return figures."""
        self._buffer.extend(data)
        losses, clipped = [], []
        for minibatch in self._buffer:
            out = self._loss(minibatch)
            loss = sum(value for name, value in out.items() if name.startswith("loss_"))
            self._optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                self._model.parameters(), self._max_grad_norm, error_if_nonfinite=True
            )
            self._optimizer.step()
            losses.append(loss.item())
            clipped.append(out.clip_fraction.item())
        kept = self._buffer[:]["next", "policy_version"]
        return {
            "staleness": version - torch.as_tensor(kept).double().mean().item(),
            "loss": statistics.fmean(losses),
            "clip_fraction": statistics.fmean(clipped),
        }


def summary(rows: list[UpdateRow], seconds: float, files: list[str]) -> dict[str, Any]:
    """Return the figures of the whole run; KL is k3's mean per response token, nats."""
    return {
        "updates": len(rows),
        "reward_first5": statistics.fmean(row.collected.reward for row in rows[:5]),
        "reward_last5": statistics.fmean(row.collected.reward for row in rows[-5:]),
        "kl_first": rows[0].collected.kl_k3,
        "kl_last": rows[-1].collected.kl_k3,
        "max_abs_err": max(row.collected.max_abs_err for row in rows),
        "seconds": seconds,
        "versions": [row.policy_version for row in rows],
        "ref_version": rows[-1].ref_version,
        "files": files,
    }
