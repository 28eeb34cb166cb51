"""GRPO or distillation in plain PyTorch, with the second model behind HTTP: many trainers can share it.

    vllm-kl serve my-reference                                        # where vLLM is installed
    python examples/served_reference.py my-policy                     # GRPO with a KL to that reference
    python examples/served_reference.py my-policy --loss distill      # on-policy distillation of that teacher

The trainer needs torch, transformers and ``pip install vllm-kl``, which brings neither vLLM nor TorchRL. The
policy and the served model must have one tokenizer. The task is the demo's word problems.
"""

from __future__ import annotations

import argparse
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_kl.client import Client, TopK
from vllm_kl.demo.task import Problem, grade, make_problem

TEMPERATURE = 1.0  # of sampling, and so of both models' log-probs


@dataclass(frozen=True)
class Batch:
    """N responses: G to each of some prompts."""

    token_ids: list[torch.Tensor]  # N x [L] int64: prompt and response, without padding
    starts: list[int]  # N: index of the response's first token
    rewards: torch.Tensor  # [N] float32


def sample(policy: Any, tokenizer: Any, problems: list[Problem], group: int, max_new_tokens: int) -> Batch:
    """Return a group of responses of the policy to each problem."""
    token_ids, starts, rewards = [], [], []
    for problem in problems:
        messages = [{"role": "user", "content": problem.question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        rows = policy.generate(
            **prompt,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            num_return_sequences=group,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        start = prompt["input_ids"].shape[1]
        for row in rows:
            ends = (row[start:] == tokenizer.eos_token_id).nonzero()
            end = start + int(ends[0]) + 1 if len(ends) else len(row)  # EOS counts, what follows does not
            token_ids.append(row[:end])
            starts.append(start)
            rewards.append(grade(tokenizer.decode(row[start:end]), problem.answer))
    return Batch(token_ids, starts, torch.tensor(rewards))


def distributions(policy: Any, batch: Batch) -> list[torch.Tensor]:
    """Return the policy's log-probs of all V tokens, with a graph: N x ``[R, V]`` float32, nats."""
    padded = torch.nn.utils.rnn.pad_sequence(batch.token_ids, batch_first=True)
    lengths = torch.tensor([len(ids) for ids in batch.token_ids])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    logits = policy(input_ids=padded, attention_mask=mask.long()).logits.float() / TEMPERATURE
    # Row t - 1 has the log-probs of token t.
    return [
        row[start - 1 : length - 1].log_softmax(-1)
        for row, start, length in zip(logits, batch.starts, lengths.tolist(), strict=True)
    ]


def grpo_loss(
    rows: list[torch.Tensor], batch: Batch, ref_log_probs: list, group: int, coeff: float
) -> tuple[torch.Tensor, float]:
    """Return the loss of GRPO on the samples' own policy, and the mean KL to the reference in nats per token.

    The estimator of the KL is k3: ``exp(r) - r - 1`` with ``r = ref - policy`` (Schulman, 2020).
    """
    grouped = batch.rewards.view(-1, group)
    advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    losses, kls = [], []
    for row, ids, start, ref, advantage in zip(
        rows, batch.token_ids, batch.starts, ref_log_probs, advantages, strict=True
    ):
        log_probs = row.gather(1, ids[start:, None])[:, 0]
        ratio = (log_probs - log_probs.detach()).exp()  # 1, with the gradient of the log-prob
        distance = torch.from_numpy(ref.copy()) - log_probs
        kl = distance.exp() - distance - 1
        losses.append(-advantage * ratio + coeff * kl)
        kls.append(kl.detach())
    return torch.cat(losses).mean(), torch.cat(kls).mean().item()


def distillation_loss(rows: list[torch.Tensor], best: list[TopK]) -> tuple[torch.Tensor, float]:
    """Return the mean KL from the teacher to the policy, over the teacher's k best tokens and all the others.

    The others count as one token, so the KL is a lower bound of the whole one, and never negative.
    """
    kls = []
    for row, teacher in zip(rows, best, strict=True):
        theirs = torch.from_numpy(teacher.log_probs.copy())
        mine = row.gather(1, torch.from_numpy(teacher.token_ids.copy()).long())
        pairs = [torch.cat([side, _others(side)], dim=1) for side in (theirs, mine)]
        kls.append((pairs[0].exp() * (pairs[0] - pairs[1])).sum(1))
    loss = torch.cat(kls).mean()
    return loss, loss.item()


def _others(log_probs: torch.Tensor) -> torch.Tensor:
    """Return the log of the probability that is left beside some tokens, ``[R, 1]``."""
    return torch.log1p(-log_probs.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))


def train(args: argparse.Namespace) -> list[float]:
    """Train; return the mean KL of each update, in nats per token."""
    torch.manual_seed(args.seed)
    draw, kls = random.Random(args.seed), []
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    policy = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr)
    with Client(args.server) as client, ThreadPoolExecutor(1) as pool:
        print(f"served: {client.model()['model']}")
        for n in range(args.updates):
            problems = [make_problem(draw) for _ in range(args.prompts)]
            with torch.no_grad():
                batch = sample(policy, tokenizer, problems, args.group, args.max_new_tokens)
            ids = [row.numpy() for row in batch.token_ids]
            # The server scores while the policy computes.
            if args.loss == "grpo":
                scored = pool.submit(client.score, ids, batch.starts, temperature=TEMPERATURE)
                rows = distributions(policy, batch)
                loss, kl = grpo_loss(rows, batch, scored.result(), args.group, args.coeff)
            else:
                scored = pool.submit(client.score_topk, ids, args.topk, batch.starts, temperature=TEMPERATURE)
                loss, kl = distillation_loss(distributions(policy, batch), scored.result())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            kls.append(kl)
            print(f"update {n}: reward {batch.rewards.mean():.2f}, KL {kl:.4f} nats per token")
    if args.out:
        policy.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    return kls


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", help="path or name")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="of vllm-kl serve")
    parser.add_argument("--loss", choices=["grpo", "distill"], default="grpo")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=4, help="of an update")
    parser.add_argument("--group", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--coeff", type=float, default=0.1, help="of the KL in GRPO's loss")
    parser.add_argument("--topk", type=int, default=16, help="tokens of the teacher for each position")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder to save the policy in")
    return parser.parse_args(given)


if __name__ == "__main__":
    train(parse_arguments())
