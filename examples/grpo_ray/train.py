"""Trains a policy with GRPO on Ray, with TorchRL's parts for many machines and one vLLM reference for all.

    python examples/grpo_ray/train.py --updates 20                  # a loop of its own, collectors never wait
    python examples/grpo_ray/train.py --updates 20 --loop trainer   # TorchRL's GRPOTrainer, in rounds

Two replicas of ``AsyncVLLM`` generate, two ``RayLLMCollector`` fill a ``RayReplayBuffer``, and this process
trains. Each update pushes the weights into both replicas: all serve them, or none. The KL of every sample is
checked against float64, with the weights of the version that sampled it. Without ``--model``, the example
uses the demo's small model, which is trained at the first run and cached.

On a machine without GPUs, Ray is told of GPUs that are not there, because ``AsyncVLLM`` asks Ray for them.
"""

from __future__ import annotations

import argparse
import os

# Nothing is compiled at the first request; Ray leaves the visible GPUs of actors without GPUs alone.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RL_LOGGING_LEVEL", "ERROR")

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import collect
import ray
import torch
from check import Check, Figures
from collect import (
    Collectors,
    make_buffer,
    make_collector,
    make_env,
    make_policy_engine,
    tokenizer_of,
)
from rich.console import Console
from tensordict import TensorDictBase
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss
from torchrl.trainers.algorithms.grpo import GRPOTrainer
from transformers import AutoModelForCausalLM

from vllm_kl import EnginePolicyVersion, VLLMReference, VLLMSyncScheme, check_collector
from vllm_kl.demo.env import set_up
from vllm_kl.demo.train import checkpoints

# Actors get the functions of collect.py with their arguments: other machines have no copy of this folder.
ray.cloudpickle.register_pickle_by_value(collect)


class Parts:
    """Everything that a loop needs: actors, trained model, loss, optimizer, and the sender of weights."""

    def __init__(self, args: argparse.Namespace, model: str, engine: Any, check: Check) -> None:
        self.args, self.check = args, check
        num_turns = args.prompts * args.group  # of a collector, per round
        self.per_update = args.collectors * num_turns
        # This round's samples and the previous one's, as far as collectors run ahead.
        self.buffer = make_buffer(
            model, 2 * self.per_update, self.per_update // args.steps, args.group, args.kl_in
        )
        envs = [
            partial(make_env, model, args.prompts, args.group, seed, args.kl_in)
            for seed in range(args.collectors)
        ]
        self.collectors = [make_collector(model, engine, env, num_turns, self.buffer) for env in envs]
        # from_pretrained returns the model in eval mode, which GRPOLoss needs.
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        actor = TransformersWrapper(
            self.model, tokenizer=tokenizer_of(model), input_mode="tokens", generate=False
        )
        # Every masking strategy counts the tokens that have a KL: RetrieveKL has set the recorded log-probs
        # of all others to NaN, which TorchRL leaves out.
        self.loss = GRPOLoss(
            actor, masking_strategy="generic", kl_to_ref_coeff=args.coeff, entropy_bonus=False
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.learning_rate)
        self.tracker = EnginePolicyVersion(engine)
        self.sender = VLLMSyncScheme(engine).create_sender()
        self.sender.register_model(self.model)

    def close(self) -> None:
        """End the collectors, the buffer and the reference, also if one of them is dead."""
        with contextlib.ExitStack() as stack:
            stack.callback(VLLMReference.close_service, collect.REFERENCE)
            stack.callback(self.buffer.shutdown)
            for collector in self.collectors:
                stack.callback(collector.shutdown)

    def save(self) -> None:
        """Keep the weights that the replicas serve, for the check."""
        self.check.save(self.model, self.tracker.version)


def train_in_a_loop(parts: Parts, report: Callable[[Figures], None]) -> None:
    """Train while the collectors collect."""
    for collector in parts.collectors:
        collector.start()
    for update in range(parts.args.updates):
        while parts.buffer.write_count < (update + 1) * parts.per_update:
            for collector in parts.collectors:
                check_collector(collector)  # raises what ended it
            time.sleep(0.05)
        batches = [parts.buffer.sample() for _ in range(parts.args.steps)]
        for batch in batches:
            loss = parts.loss(batch)
            parts.optimizer.zero_grad()
            (loss.loss_objective + loss.loss_kl_to_ref).backward()
            torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0, error_if_nonfinite=True)
            parts.optimizer.step()
        report(parts.check.figures(torch.cat(batches)))
        parts.sender.update_weights()
        parts.save()


def train_with_grpo_trainer(parts: Parts, report: Callable[[Figures], None]) -> None:
    """Let TorchRL's trainer collect a round, train on all of it, and push."""
    batches: list[TensorDictBase] = []
    trainer = GRPOTrainer(
        collector=Collectors(parts.collectors, parts.buffer),
        total_frames=parts.args.updates * parts.per_update,
        loss_module=parts.loss,
        optimizer=parts.optimizer,
        replay_buffer=parts.buffer,
        weight_sync_sender=parts.sender,
        empty_replay_buffer_on_weight_update=True,
        progress_bar=False,
    )

    def keep(batch: TensorDictBase) -> TensorDictBase:
        batches.append(batch)
        return batch

    def report_round() -> None:
        report(parts.check.figures(torch.cat(batches)))
        batches.clear()

    trainer.register_op("process_optim_batch", keep)
    trainer.register_op("post_epoch", report_round)
    trainer.register_op("post_steps", parts.save)  # after the trainer's own push
    trainer.train()


LOOPS = {"plain": train_in_a_loop, "trainer": train_with_grpo_trainer}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="the model that the policy starts from, and the reference")
    parser.add_argument("--loop", choices=LOOPS, default="plain")
    parser.add_argument("--kl-in", choices=("env", "buffer"), default="env", help="where the KL is computed")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--replicas", type=int, default=2, help="engines that generate")
    parser.add_argument("--collectors", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8, help="prompts per collector and update")
    parser.add_argument("--group", type=int, default=8, help="responses per prompt, at least 2")
    parser.add_argument("--steps", type=int, default=2, help="steps of the optimizer per update")
    parser.add_argument("--coeff", type=float, default=0.1, help="coefficient of the KL in the loss")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--address", help="of a Ray cluster that runs; default: start one on this machine")
    parser.add_argument("--out", type=Path, help="folder for the checkpoint of each version")
    args = parser.parse_args()
    if args.group < 2:
        parser.error("--group must be at least 2: GRPO compares the responses of a group")
    if args.collectors * args.prompts * args.group % args.steps:
        parser.error("--steps must divide the samples of an update: collectors * prompts * group")
    return args


@contextlib.contextmanager
def started(args: argparse.Namespace, model: str) -> Iterator[Parts]:
    """Start all actors; end them whatever happens."""
    ray_options: dict[str, Any] = {"address": args.address}
    if args.address is None:
        ray_options = {"num_cpus": 4, "include_dashboard": False, "log_to_driver": False}
        if not torch.cuda.is_available():
            ray_options["num_gpus"] = args.replicas  # declared, not real
    with contextlib.ExitStack() as stack:
        ray.init(**ray_options)
        stack.callback(ray.shutdown)
        folder = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = make_policy_engine(model, args.replicas)
        stack.callback(engine.shutdown)
        parts = Parts(args, model, engine, Check(folder, model))
        stack.callback(parts.close)
        parts.save()
        yield parts


def main() -> None:
    """Train, and print one line per update."""
    args = parse_arguments()
    set_up()
    model = args.model or str(checkpoints(Console())[0])
    rows: list[Figures] = []

    def report(figures: Figures) -> None:
        rows.append(figures)
        print(f"update {len(rows)}: {figures}", flush=True)

    with started(args, model) as parts:
        LOOPS[args.loop](parts, report)
    first, last = (statistics.fmean(row.reward for row in some) for some in (rows[:5], rows[-5:]))
    print(
        f"{args.updates} updates, reward of the first and last five {first:.3f} and {last:.3f}, largest "
        f"|KL - float64| {max(row.error for row in rows):.1e} nats, of the reference alone "
        f"{max(row.reference_error for row in rows):.1e}"
    )


if __name__ == "__main__":
    main()
