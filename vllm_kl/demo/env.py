"""Builds the demo's env and collector: a vLLM policy answers word problems in groups, and the env grades.

    problems -> ChatEnv -> policy -> reward -> RetrieveKL("from_collector", reference) -> batches

The policy's engine runs in this process, the reference's engine in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tensordict import NonTensorData, TensorDict, TensorDictBase, lazy_stack, set_list_to_stack
from torch.utils.data import DataLoader, IterableDataset
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Composite, Unbounded
from torchrl.envs import StepCounter, Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import vLLMWrapper

from vllm_kl.demo import task
from vllm_kl.demo.types import DemoConfig
from vllm_kl.engines.devices import has_gpu
from vllm_kl.scorer import VLLMScorer
from vllm_kl.transforms.engine_policy_version import EnginePolicyVersion
from vllm_kl.transforms.retrieve_kl import RetrieveKL
from vllm_kl.transforms.vllm_reference import VLLMReference

MAX_NEW_TOKENS = 24


def set_up() -> None:
    """Prepare this process: TensorDict stacks lists, and other packages print no notices or progress bars."""
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    set_list_to_stack(True).set()


@contextlib.contextmanager
def started(
    config: DemoConfig, reference: Path, policy: Path, console: Console
) -> Iterator[tuple[VLLMReference, Any]]:
    """Start both engines; yield the reference and the policy's ``vllm.LLM``.

    Args:
        config: settings of the demo.
        reference, policy: folders of checkpoints.
        console: shows progress.
    """
    from vllm import LLM

    # Leaves room for two engines on one machine.
    memory = {"gpu_memory_utilization": 0.3} if has_gpu() else {"kv_cache_memory_bytes": 256 << 20}
    options = {"dtype": "float32", "max_model_len": 256, "seed": config.seed, **memory}
    with console.status("starting the reference's engine (vLLM, its own process)"):
        scorer = VLLMScorer(str(reference), **options)
    with scorer:
        with console.status("starting the policy's engine (vLLM, this process)"):
            engine = LLM(str(policy), enforce_eager=True, use_tqdm_on_load=False, **options)
        # TorchRL's wrapper cannot switch the progress bar off.
        engine.generate = functools.partial(engine.generate, use_tqdm=False)
        yield VLLMReference(scorer, task.make_tokenizer(), pad_output=config.pad_output), engine


class Problems(IterableDataset):
    """An endless stream of word problems."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(self._seed)
        while True:
            problem = task.make_problem(rng)
            yield {"query": problem.question, "answer": problem.answer}


def collate(items: list[dict[str, Any]]) -> TensorDictBase:
    """Return problems as a lazy stack, which may hold texts of different lengths."""
    return lazy_stack([TensorDict(query=i["query"], answer=NonTensorData(str(i["answer"]))) for i in items])


class Grade(Transform):
    """Writes the reward of the task, ``[B, 1, 1]``: 1.0 for a right answer, else 0.0."""

    def __init__(self) -> None:
        super().__init__(in_keys=[("text", "response"), "answer"], out_keys=["reward"])

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        pairs = zip(tensordict["text", "response"], tensordict["answer"], strict=True)
        rewards = [task.grade(response, int(answer)) for response, answer in pairs]
        return next_tensordict.set("reward", torch.tensor(rewards).view(-1, 1, 1))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1, 1), dtype=torch.float32)
        return reward_spec


def make_collector(
    engine: Any, kl: RetrieveKL, config: DemoConfig, weight_updater: Any = None
) -> LLMCollector:
    """Return a collector of batches ``[prompts * group]`` whose env has the transform ``kl``."""
    num_envs = config.prompts * config.group
    tokenizer = kl.ref_model.tokenizer
    env = ChatEnv.from_dataloader(
        DataLoader(Problems(config.seed), batch_size=1, collate_fn=collate),
        batch_size=(num_envs,),
        repeats=config.group,
        input_mode="history",
        tokenizer=tokenizer,
    )
    for transform in (StepCounter(max_steps=1), Grade(), kl):
        env = env.append_transform(transform)
    return LLMCollector(
        env,
        policy_factory=functools.partial(
            vLLMWrapper,
            engine,
            tokenizer=tokenizer,
            input_mode="history",
            generate=True,
            pad_output=kl.pad_output,
            generate_kwargs={"max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0},
        ),
        dialog_turns_per_batch=num_envs,
        total_dialog_turns=num_envs * config.batches,
        track_policy_version=EnginePolicyVersion(engine),
        weight_updater=weight_updater,
    )
