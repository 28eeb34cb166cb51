"""Trains one step with TorchRL's GRPOLoss and one with DistillationLoss, on the results of the transforms.

    python examples/losses.py --policy PATH_OR_NAME --reference PATH_OR_NAME --pad-output

A vLLM policy answers in groups, a vLLM reference scores the answers, and the steps train a transformers model
with the policy's weights. Both models must have the same tokenizer. Without arguments, the example uses the
demo's small models, which are trained at the first run and cached.
"""

from __future__ import annotations

import argparse
import os

# For a short run on a CPU: the policy's engine runs in this process, and nothing is compiled at the first
# request.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

from functools import partial
from typing import Any

import torch
from rich.console import Console
from tensordict import TensorDict, TensorDictBase, lazy_stack, set_list_to_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer, Unbounded
from torchrl.envs import StepCounter, Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from torchrl.objectives.llm import DistillationLoss, GRPOLoss, MCAdvantage
from transformers import AutoModelForCausalLM
from vllm import LLM

from vllm_kl import RetrieveKL, RetrieveLogProb, VLLMReference, kl_estimate
from vllm_kl.demo.train import checkpoints

# The demo's models are trained on questions like the first, but not on the second.
QUESTIONS = ["Tom has 3 apples and buys 4 more. How many now?", "Name a colour of the sea."]


class Brevity(Transform):
    """Rewards short answers, ``[B, 1, 1]``: minus their number of characters."""

    def __init__(self) -> None:
        super().__init__(in_keys=[("text", "response")], out_keys=["reward"])

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        lengths = [float(len(response)) for response in tensordict["text", "response"]]
        return next_tensordict.set("reward", -torch.tensor(lengths).view(-1, 1, 1))

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1, 1), dtype=torch.float32)
        return reward_spec


def collect(args: argparse.Namespace, reference: VLLMReference, options: dict[str, Any]) -> TensorDictBase:
    """Return one batch ``[questions * group]`` with both log-probs, the mask and advantages per group."""
    num_envs = len(QUESTIONS) * args.group
    loader = DataLoader(
        [{"query": question} for question in QUESTIONS],
        collate_fn=lambda items: lazy_stack([TensorDict(item) for item in items]),
    )
    env = ChatEnv.from_dataloader(
        loader, batch_size=(num_envs,), repeats=args.group, tokenizer=reference.tokenizer
    )
    env = env.append_transform(StepCounter(max_steps=1)).append_transform(Brevity())
    # The loss has the KL as a term, so the reward must not have it too.
    env = env.append_transform(RetrieveKL("from_collector", reference, add_to_reward=False))
    collector = LLMCollector(
        env,
        policy_factory=partial(
            vLLMWrapper,
            LLM(args.policy, **options),
            tokenizer=reference.tokenizer,
            pad_output=args.pad_output,
            generate_kwargs={"max_new_tokens": 24, "temperature": 1.0},
        ),
        dialog_turns_per_batch=num_envs,
        total_dialog_turns=num_envs,
    )
    buffer = ReplayBuffer(storage=LazyStackStorage(num_envs), batch_size=num_envs)
    buffer.append_transform(MCAdvantage(grpo_size=args.group))
    for batch in collector:
        buffer.extend(batch.reshape(-1))
    collector.shutdown()
    return buffer[:]


def step(model: torch.nn.Module, loss: torch.Tensor) -> None:
    """Take one step of gradient descent."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss.backward()
    optimizer.step()


def grpo(model: torch.nn.Module, data: TensorDictBase, tokenizer: Any, pad_output: bool) -> None:
    """Train one step on a collected batch; print TorchRL's KL and the KL of ``kl_estimate``."""
    # The actor reads the ids that were sampled. It would render a history to other ids.
    actor = TransformersWrapper(
        model, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=pad_output
    )
    # Every masking strategy counts the same tokens here: RetrieveKL has set the recorded log-probs of all
    # others to NaN, and TorchRL leaves these out.
    loss = GRPOLoss(actor, kl_to_ref_coeff=0.1, masking_strategy="generic")(data)
    step(model, loss.loss_objective + loss.loss_kl_to_ref)

    columns = [("next", "log_probs", "full"), ("next", "ref_log_probs", "full"), ("next", "kl_mask")]
    policy, ref, masks = (data.get(key, as_list=True) for key in columns)
    k3 = torch.cat(kl_estimate(list(policy), list(ref), list(masks), estimator="k3")).sum()
    num_tokens, num_columns = int(sum(mask.sum() for mask in masks)), len(masks) * max(map(len, masks))
    print(
        f"GRPOLoss: objective {loss.loss_objective:+.6f}, "
        f"kl_to_ref {loss.kl_to_ref:.8f} over {num_columns} columns"
    )
    print(f"  kl_estimate, k3: sum {k3:.6f} nats, {k3 / num_tokens:.6f} per token of {num_tokens}")
    print("  TorchRL averages over all columns, prompts and padding too: kl_to_ref * columns is that sum")


def distill(model: torch.nn.Module, data: TensorDictBase, teacher: VLLMReference) -> None:
    """Train one step towards the teacher; print TorchRL's KL and the KL of ``kl_estimate``."""
    # The loss tokenizes the dialogs itself, so the teacher must score the dialogs too, and not the sampled
    # ids.
    data = data.select("history", ("next", "done"))
    # RetrieveLogProb also writes the masks that the loss reads.
    data = RetrieveLogProb(teacher, log_probs_full_key=("teacher_log_probs", "full"))(data)
    student = TransformersWrapper(
        model, tokenizer=teacher.tokenizer, generate=False, pad_output=teacher.pad_output
    )
    with torch.no_grad():
        log_probs = student(data.select("history")).get(("log_probs", "full"), as_list=True)
    loss = DistillationLoss(student, kl_direction="reverse")(data)
    step(model, loss.loss_distill)

    columns = [("next", "teacher_log_probs", "full"), ("next", "kl_mask")]
    teacher_log_probs, masks = (list(data.get(key, as_list=True)) for key in columns)
    k3 = kl_estimate(list(log_probs), teacher_log_probs, masks, estimator="k3")
    means = torch.stack([row.sum() / mask.sum() for row, mask in zip(k3, masks, strict=True)])
    print(f"DistillationLoss: loss {loss.loss_distill:.6f}, kl_to_teacher {loss.kl_to_teacher:.6f}")
    print(f"  kl_estimate, k3: {means.mean():.6f}, the mean over samples of their means per token")


def main() -> None:
    """Collect a batch and train both steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy")
    parser.add_argument("--reference")
    parser.add_argument("--group", type=int, default=4, help="responses per question")
    parser.add_argument("--pad-output", action="store_true", help="dense batches instead of ragged ones")
    args = parser.parse_args()
    if args.policy is None or args.reference is None:
        reference_path, policy_path = map(str, checkpoints(Console()))
        args.policy, args.reference = args.policy or policy_path, args.reference or reference_path

    set_list_to_stack(True).set()
    # Engines and trainer use one precision, so that log-probs differ by models and not by rounding.
    options = {"max_model_len": 256, "dtype": "float32"}
    if not torch.cuda.is_available():
        options |= {"kv_cache_memory_bytes": 256 << 20, "enforce_eager": True}
    reference = VLLMReference(args.reference, args.reference, pad_output=args.pad_output, **options)
    trainer, student = (
        AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32) for _ in range(2)
    )
    data = collect(args, reference, options)
    grpo(trainer, data, reference.tokenizer, args.pad_output)
    distill(student, data, reference)
    reference.close()


if __name__ == "__main__":
    main()
