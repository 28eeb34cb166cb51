"""Collects groups of responses with a vLLM policy, and computes their per-token KL to a vLLM reference.

    python examples/collect.py --policy PATH_OR_NAME --reference PATH_OR_NAME --batches 2

Both models must have the same tokenizer. Without arguments, the example uses the demo's small models, which
are trained at the first run and cached.
"""

from __future__ import annotations

import argparse
import os

# For a short run on a CPU: the policy's engine runs in this process, and nothing is compiled at the first
# request.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

from functools import partial

import torch
from rich.console import Console
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import StepCounter
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import vLLMWrapper
from vllm import LLM

from vllm_kl import RetrieveKL, VLLMReference
from vllm_kl.demo.train import checkpoints

QUESTIONS = [
    "Tom has 3 apples and buys 4 more. How many now?",
    "Ann has 9 books and loses 2. How many now?",
    "Mia has 5 coins and finds 8 more. How many now?",
    "Ben has 7 pens and gives away 6. How many now?",
]


def main() -> None:
    """Collect batches and print their KL."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy")
    parser.add_argument("--reference")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--group", type=int, default=4, help="responses per question")
    args = parser.parse_args()
    if args.policy is None or args.reference is None:
        reference_path, policy_path = map(str, checkpoints(Console()))
        args.policy, args.reference = args.policy or policy_path, args.reference or reference_path

    set_list_to_stack(True).set()
    options = {"max_model_len": 256}
    if not torch.cuda.is_available():
        options |= {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True}
    reference = VLLMReference(args.reference, args.reference, **options)

    num_envs = len(QUESTIONS) * args.group
    loader = DataLoader(
        [{"query": question} for question in QUESTIONS],
        collate_fn=lambda items: lazy_stack([TensorDict(item) for item in items]),
    )
    env = ChatEnv.from_dataloader(
        loader, batch_size=(num_envs,), repeats=args.group, tokenizer=reference.tokenizer
    )
    env = env.append_transform(StepCounter(max_steps=1))
    env = env.append_transform(RetrieveKL("from_collector", reference, coeff=0.1))
    collector = LLMCollector(
        env,
        policy_factory=partial(
            vLLMWrapper,
            LLM(args.policy, **options),
            tokenizer=reference.tokenizer,
            generate_kwargs={"max_new_tokens": 24, "temperature": 1.0},
        ),
        dialog_turns_per_batch=num_envs,
        total_dialog_turns=num_envs * args.batches,
    )
    for i, batch in enumerate(collector):
        batch = batch.view(-1)
        masks = batch.get(("masks", "all_assistant_mask"), as_list=True)
        kl = [
            row[kept]
            for row, kept in zip(batch.get(("next", "kl_penalty"), as_list=True), masks, strict=True)
        ]
        print(
            f"batch {i}: {len(kl)} responses, {sum(map(len, kl))} tokens, "
            f"mean KL {torch.cat(kl).mean():+.4f} nats per token"
        )
        worst = max(range(len(kl)), key=lambda j: kl[j].sum())
        print(
            f"  furthest from the reference: {batch['text', 'response'][worst]!r}, {kl[worst].sum():+.2f} "
            "nats"
        )
    collector.shutdown()
    reference.close()


if __name__ == "__main__":
    main()
