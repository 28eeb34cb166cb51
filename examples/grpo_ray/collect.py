"""Makes the parts of the program that run in Ray actors: policy engine, reference, collectors and buffer.

    AsyncVLLM, two replicas  <-  two RayLLMCollectors  ->  RayReplayBuffer  ->  the trainer in train.py
                                 one reference engine, shared

The task is the demo's arithmetic: replace ``Problems`` and ``Grade`` by your own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from tensordict import set_list_to_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import RayLLMCollector
from torchrl.data import LazyStackStorage, SamplerWithoutReplacement
from torchrl.data.replay_buffers.ray_buffer import RayReplayBuffer
from torchrl.envs import EnvBase, StepCounter
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import AsyncVLLM, vLLMWrapper
from torchrl.objectives.llm import MCAdvantage
from transformers import AutoTokenizer
from vllm import AsyncEngineArgs

from vllm_kl import EnginePolicyVersion, RetrieveKL, VLLMReference
from vllm_kl.demo.env import Grade, Problems, collate

REFERENCE = "grpo_ray_reference"  # the name under which all processes find the reference's engine


def engine_options() -> dict[str, Any]:
    """Return options of all engines: one precision, so that log-probs differ by weights, not by rounding."""
    options = {"dtype": "float32", "max_model_len": 256}
    if torch.cuda.is_available():
        return options | {"gpu_memory_utilization": 0.3}
    return options | {"kv_cache_memory_bytes": 256 << 20}


def tokenizer_of(model: str) -> Any:
    """Return the tokenizer of a model. Its chat template must mark the assistant's tokens."""
    return AutoTokenizer.from_pretrained(model)


def make_policy_engine(model: str, num_replicas: int) -> AsyncVLLM:
    """Start the replicas that generate."""
    args = AsyncEngineArgs(
        model=model,
        enforce_eager=True,
        enable_prefix_caching=True,
        # TorchRL's methods in vLLM's workers, which AsyncVLLM.from_pretrained sets, too.
        worker_extension_cls="torchrl.modules.llm.backends.vllm.vllm_async._AsyncvLLMWorker",
        **engine_options(),
    )
    return AsyncVLLM.launch(args, num_replicas=num_replicas)


def make_reference(model: str) -> VLLMReference:
    """Make the reference; runs in the actor that all collectors share."""
    return VLLMReference(model, tokenizer_of(model), **engine_options())


def make_kl(model: str) -> RetrieveKL:
    """Make the transform that computes the KL; the first that is made starts the reference's actor."""
    return RetrieveKL(
        "from_collector",
        ref_model_factory=partial(make_reference, model),
        add_to_reward=False,  # the loss has the KL as a term
        service_backend="ray",
        actor_name=REFERENCE,
    )


def make_env(model: str, num_prompts: int, group: int, seed: int, kl_in: str) -> EnvBase:
    """Make the env of a collector; runs in the collector's actor."""
    set_list_to_stack(True).set()
    env = ChatEnv.from_dataloader(
        DataLoader(Problems(seed), batch_size=1, collate_fn=collate),
        batch_size=(num_prompts * group,),
        repeats=group,
        input_mode="history",
        tokenizer=tokenizer_of(model),
    )
    env = env.append_transform(StepCounter(max_steps=1)).append_transform(Grade())
    return env.append_transform(make_kl(model)) if kl_in == "env" else env


def make_buffer(model: str, num_samples: int, batch_size: int, group: int, kl_in: str) -> RayReplayBuffer:
    """Make the buffer that collectors fill and the trainer reads."""
    buffer = RayReplayBuffer(
        storage=partial(LazyStackStorage, num_samples),
        sampler=SamplerWithoutReplacement,
        transform_factory=partial(MCAdvantage, grpo_size=group),
        batch_size=batch_size,
        remote_config={"num_cpus": 0},
    )
    if kl_in == "buffer":  # where TorchRL's own GRPO recipe has it: computed once, as samples come in
        buffer.append_transform(make_kl(model), invert=True)
    return buffer


def make_collector(
    model: str, engine: AsyncVLLM, env: Any, num_turns: int, buffer: RayReplayBuffer
) -> RayLLMCollector:
    """Make a collector that generates on the replicas and fills the buffer, ``num_turns`` at a time."""
    return RayLLMCollector(
        env,
        policy_factory=partial(
            vLLMWrapper,
            engine,
            tokenizer=tokenizer_of(model),
            input_mode="history",
            generate_kwargs={"max_new_tokens": 24, "temperature": 1.0},
        ),
        dialog_turns_per_batch=num_turns,
        total_dialog_turns=-1,  # until shutdown
        replay_buffer=buffer.client(),
        flatten_data=True,
        # Each sample gets the version of the weights that sampled it, as the replica tells it.
        track_policy_version=EnginePolicyVersion(engine),
        remote_config={"num_cpus": 0},
    )


class Collectors:
    """Several collectors as one, as GRPOTrainer wants it: in each round all collect at the same time."""

    init_random_frames = 0

    def __init__(self, collectors: list[RayLLMCollector], buffer: RayReplayBuffer) -> None:
        self._collectors = list(collectors)
        self.replay_buffer = buffer

    def __iter__(self) -> Iterator[None]:
        with ThreadPoolExecutor(len(self._collectors)) as pool:
            while True:
                list(pool.map(RayLLMCollector.next, self._collectors))
                yield None  # the samples are in the buffer

    def shutdown(self) -> None:
        """End the collectors. GRPOTrainer (TorchRL 0.14) calls it again when it is deleted."""
        while self._collectors:
            self._collectors.pop().shutdown()
