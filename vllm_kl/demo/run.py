"""Collects GRPO groups with a vLLM policy and a vLLM reference, and checks every KL against float64.

    problems -> ChatEnv -> policy (vLLM, in this process) -> reward -> RetrieveKL("from_collector", reference) -> batches

The reference's engine runs in a process of its own.
"""

from __future__ import annotations

import functools
import logging
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from tensordict import NonTensorData, TensorDict, TensorDictBase, lazy_stack, set_list_to_stack
from torch.utils.data import DataLoader, IterableDataset
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Composite, Unbounded
from torchrl.envs import StepCounter, Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import vLLMWrapper
from transformers import AutoModelForCausalLM

from vllm_kl.demo import report, task, train
from vllm_kl.kl import kl_estimate
from vllm_kl.reference import VLLMReference
from vllm_kl.samples import Sample, samples_from_batch, write_samples
from vllm_kl.scorer import VLLMScorer
from vllm_kl.transforms import RetrieveKL

MAX_NEW_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo collects."""

    batches: int = 8
    prompts: int = 8  # per batch
    group: int = 8  # responses per prompt
    coeff: float = 0.1  # of the KL in the reward
    pad_output: bool = False
    seed: int = 0
    out: Path = Path("demo_out")


@dataclass(frozen=True, kw_only=True)
class Rollout(Sample):
    """One scored response; its reward is the task's, before the KL, and its KL is k1 as RetrieveKL wrote it."""

    batch: int
    group: int


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """Figures of one batch, as printed."""

    sequences: int
    response_tokens: int
    reward: float
    kl_k1: float  # mean per response token, nats
    kl_k3: float
    max_abs_err: float  # largest |KL - float64 KL| over the response tokens, nats
    tok_per_s: float  # tokens of the batch's sequences, generated and scored, per second


def run(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Run the demo; return the figures of ``--json``."""
    warnings.filterwarnings("ignore")  # upstream's notices and bars would tear ours
    logging.getLogger("torch").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    set_list_to_stack(True).set()
    config.out.mkdir(parents=True, exist_ok=True)
    reference_path, policy_path = train.checkpoints(console)
    oracle = Float64KL(policy_path, reference_path)  # before vLLM changes this process's threads
    with console.status("starting the reference's engine (vLLM, its own process)"):
        reference = VLLMReference(
            VLLMScorer(str(reference_path), dtype="float32", max_model_len=256, seed=config.seed, **_memory()),
            task.make_tokenizer(),
            pad_output=config.pad_output,
        )
    with reference.scorer:
        with console.status("starting the policy's engine (vLLM, this process)"):
            collector = make_collector(config, policy_path, reference)
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
    files = [
        str(config.out / "rollouts.jsonl"),
        str(report.plot(config.out / "kl.png", rows)),
    ]
    write_samples(files[0], rollouts)
    report.print_table(rows, rollouts, console)
    console.print(
        f"reference: read-out {readout!r}; of the last batch's {stats.num_prompt_tokens:,} tokens {stats.num_cached_tokens:,} "
        "were shared, not computed again",
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


class Problems(IterableDataset):
    """Endless word problems."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(self._seed)
        while True:
            problem = task.make_problem(rng)
            yield {"query": problem.question, "answer": problem.answer}


def _collate(items: list[dict[str, Any]]) -> TensorDictBase:
    return lazy_stack([TensorDict(query=i["query"], answer=NonTensorData(str(i["answer"]))) for i in items])


class Grade(Transform):
    """Writes the task's reward, ``[B, 1, 1]``: 1.0 for the right answer."""

    def __init__(self) -> None:
        super().__init__(in_keys=[("text", "response"), "answer"], out_keys=["reward"])

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        pairs = zip(tensordict["text", "response"], tensordict["answer"], strict=True)
        rewards = [task.grade(response, int(answer)) for response, answer in pairs]
        return next_tensordict.set("reward", torch.tensor(rewards).view(-1, 1, 1))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1, 1), dtype=torch.float32)
        return reward_spec


def make_collector(config: DemoConfig, policy_path: Path, reference: VLLMReference) -> LLMCollector:
    """Return a collector whose env has the KL appended before the collector exists."""
    from vllm import LLM

    num_envs = config.prompts * config.group
    env = ChatEnv.from_dataloader(
        DataLoader(Problems(config.seed), batch_size=1, collate_fn=_collate),
        batch_size=(num_envs,),
        repeats=config.group,
        input_mode="history",
        tokenizer=reference.tokenizer,
    )
    env = env.append_transform(StepCounter(max_steps=1))
    env = env.append_transform(Grade())
    env = env.append_transform(RetrieveKL("from_collector", reference, coeff=config.coeff))
    engine = LLM(
        str(policy_path),
        dtype="float32",
        max_model_len=256,
        seed=config.seed,
        enforce_eager=True,
        use_tqdm_on_load=False,
        **_memory(),
    )
    engine.generate = functools.partial(engine.generate, use_tqdm=False)  # the wrapper cannot ask for quiet
    return LLMCollector(
        env,
        policy_factory=functools.partial(
            vLLMWrapper,
            engine,
            tokenizer=reference.tokenizer,
            input_mode="history",
            generate=True,
            pad_output=config.pad_output,
            generate_kwargs={"max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0},
        ),
        dialog_turns_per_batch=num_envs,
        total_dialog_turns=num_envs * config.batches,
        track_policy_version=True,
    )


def _memory() -> dict[str, Any]:
    """Return engine options under which two engines fit on one machine."""
    return {"gpu_memory_utilization": 0.3} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 256 << 20}


def read_rollouts(data: TensorDictBase, batch: int, group: int, reference: VLLMReference) -> Iterator[Rollout]:
    """Yield the responses of one collected batch, ``[B]``."""
    samples = samples_from_batch(data, reference.tokenizer, ref_version=reference.scorer.weight_version)
    for i, sample in enumerate(samples):
        reward = task.grade(data["text", "response"][i], int(data["answer"][i]))
        yield Rollout(batch=batch, group=i // group, **{**vars(sample), "reward": reward})


class Float64KL:
    """The KL of two checkpoints on given ids, in float64, by transformers."""

    def __init__(self, policy_path: Path, reference_path: Path) -> None:
        self._models = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
            for path in (policy_path, reference_path)
        ]

    @torch.no_grad()
    def __call__(self, token_ids: list[int], num_response: int) -> torch.Tensor:
        """Return k1 of the last ``num_response`` tokens, ``[R]`` float64, nats."""
        ids = torch.tensor([token_ids])
        policy, reference = (
            model(ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0] for model in self._models
        )
        return (policy - reference)[len(token_ids) - 1 - num_response :]


def summarize(rollouts: list[Rollout], oracle: Float64KL, wall_s: float) -> BatchRow:
    """Return the figures of one batch."""
    policy = [torch.tensor(r.log_probs) for r in rollouts]
    reference = [torch.tensor(r.ref_log_probs) for r in rollouts]
    masks = [torch.ones_like(p, dtype=torch.bool) for p in policy]
    k1 = [torch.tensor(r.kl) for r in rollouts]
    k3 = kl_estimate(policy, reference, masks, estimator="k3")
    errors = [(kl - oracle(r.token_ids, len(kl))).abs().max().item() for kl, r in zip(k1, rollouts, strict=True)]
    return BatchRow(
        sequences=len(rollouts),
        response_tokens=sum(len(p) for p in policy),
        reward=sum(r.reward for r in rollouts) / len(rollouts),
        kl_k1=torch.cat(k1).mean().item(),
        kl_k3=torch.cat(k3).mean().item(),
        max_abs_err=max(errors),
        tok_per_s=sum(len(r.token_ids) for r in rollouts) / wall_s,
    )
