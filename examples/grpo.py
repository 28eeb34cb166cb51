"""Trains a policy with GRPO: vLLM samples, a vLLM reference scores, and transformers trains.

    python examples/grpo.py --model PATH_OR_NAME --updates 10

After each update, the new weights are pushed to the policy's engine. The reference stays the model that the
policy starts from. The task is the demo's arithmetic: replace ``Problems`` and ``Grade`` by your own. Without
``--model``, the example uses the demo's small model, which is trained at the first run and cached. ``vllm-kl
demo --train 30`` runs the same loop, checks every KL against float64, and draws a plot.
"""

from __future__ import annotations

import argparse
import os

# For a short run on a CPU: the policy's engine runs in this process, and nothing is compiled at the first
# request.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

from contextlib import closing
from functools import partial
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from tensordict import TensorDictBase, set_list_to_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import StepCounter
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage
from transformers import AutoModelForCausalLM
from vllm import LLM

from vllm_kl import EnginePolicyVersion, RetrieveKL, VLLMReference, VLLMWeightUpdater
from vllm_kl.demo.env import Grade, Problems, collate
from vllm_kl.demo.train import checkpoints


def make_collector(
    args: argparse.Namespace, engine: Any, reference: VLLMReference, trained: Any
) -> LLMCollector:
    """Return a collector of groups of graded responses with log-probs under policy and reference."""
    num_envs = args.prompts * args.group
    env = ChatEnv.from_dataloader(
        DataLoader(Problems(seed=0), batch_size=1, collate_fn=collate),
        batch_size=(num_envs,),
        repeats=args.group,
        tokenizer=reference.tokenizer,
    )
    env = env.append_transform(StepCounter(max_steps=1)).append_transform(Grade())
    # The loss has the KL as a term, so the reward must not have it too.
    env = env.append_transform(RetrieveKL("from_collector", reference, add_to_reward=False))
    return LLMCollector(
        env,
        policy_factory=partial(
            vLLMWrapper,
            engine,
            tokenizer=reference.tokenizer,
            generate_kwargs={"max_new_tokens": 24, "temperature": 1.0},
        ),
        dialog_turns_per_batch=num_envs,
        total_dialog_turns=num_envs * args.updates,
        track_policy_version=EnginePolicyVersion(engine),
        weight_updater=VLLMWeightUpdater(engine, trained),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="the model that the policy starts from, and the reference")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=8, help="prompts per update")
    parser.add_argument("--group", type=int, default=8, help="responses per prompt, at least 2")
    parser.add_argument("--coeff", type=float, default=0.1, help="coefficient of the KL in the loss")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()
    if args.group < 2:
        parser.error("--group must be at least 2: GRPO compares the responses of a group")
    return args


def describe(update: int, batch: TensorDictBase) -> str:
    """Return the line of an update."""
    reward = fmean(reward.sum().item() for reward in batch.get(("next", "reward"), as_list=True))
    rows = zip(*(batch.get(("next", key), as_list=True) for key in ("kl_penalty", "kl_mask")), strict=True)
    kl = torch.cat([row[mask] for row, mask in rows]).mean()
    return (
        f"update {update}: sampled by version {int(batch[0]['next', 'policy_version'])}, "
        f"reward {reward:.3f}, KL to version {int(batch[0]['next', 'ref_version'])} of the reference "
        f"{kl:+.5f} nats per token"
    )


def main() -> None:
    """Collect, train and push; print one line per update."""
    args = parse_arguments()
    model = args.model or str(checkpoints(Console())[0])

    set_list_to_stack(True).set()
    # Engines and trainer use one precision, so that log-probs differ by weights and not by rounding.
    options = {"max_model_len": 256, "dtype": "float32"}
    if torch.cuda.is_available():
        options |= {"gpu_memory_utilization": 0.3}
    else:
        options |= {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True}
    # from_pretrained returns the model in eval mode, which GRPOLoss needs.
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with closing(VLLMReference(model, model, **options)) as reference:
        collector = make_collector(args, LLM(model, **options), reference, trained)
        actor = TransformersWrapper(
            trained, tokenizer=reference.tokenizer, input_mode="tokens", generate=False
        )
        loss_module = GRPOLoss(
            actor, masking_strategy="rlhf", kl_to_ref_coeff=args.coeff, entropy_bonus=False
        )
        optimizer = torch.optim.AdamW(trained.parameters(), lr=args.learning_rate)
        buffer = ReplayBuffer(
            storage=LazyStackStorage(2 * args.prompts * args.group),  # this batch and the previous one
            sampler=SamplerWithoutReplacement(),
            batch_size=args.group * args.prompts // 2,
        )
        buffer.append_transform(MCAdvantage(grpo_size=args.group))
        for update, batch in enumerate(collector):
            batch = batch.reshape(-1)
            buffer.extend(batch)
            for minibatch in buffer:
                loss = loss_module(minibatch)
                optimizer.zero_grad()
                (loss.loss_objective + loss.loss_kl_to_ref).backward()
                torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                optimizer.step()
            # Pushes the weights, empties the prefix cache and stamps a new version, which samples the next
            # batch.
            collector.update_policy_weights_()
            print(describe(update, batch))
        collector.shutdown()
        reference.check_frozen()


if __name__ == "__main__":
    main()
