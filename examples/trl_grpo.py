"""TRL's GRPOTrainer, with the reference behind HTTP: the trainer holds one model instead of two.

    vllm-kl serve my-reference                          # where vLLM is installed
    python examples/trl_grpo.py my-policy --beta 0.04   # where TRL is: pip install trl vllm-kl

TRL 1.16 has no argument for it. ``ServedReference`` overrides the one method that asks the reference for its
log-probs; a test compares the numbers with those of the reference in the trainer's process.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from vllm_kl.client import Client
from vllm_kl.demo.task import grade, make_problem


class ServedReference(GRPOTrainer):
    """A GRPOTrainer whose reference is a server.

    Args:
        server: address of ``vllm-kl serve``, or a list of addresses.
        beta: the coefficient of the KL. That of ``GRPOConfig`` must be 0, else TRL loads a reference, too.
    """

    def __init__(self, *args: Any, server: str | list[str], beta: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.beta != 0.0:
            raise ValueError("give beta to ServedReference, and 0 to GRPOConfig: TRL loads a reference else")
        self.beta, self.ref_model, self._client = beta, server, Client(server)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        if model is not self.ref_model:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        log_probs = served_log_probs(
            self._client, input_ids, attention_mask, logits_to_keep, temperature=self.temperature
        )
        return log_probs, None, None


def served_log_probs(
    client: Client, input_ids: torch.Tensor, mask: torch.Tensor, num_kept: int, *, temperature: float
) -> torch.Tensor:
    """Return the log-probs of the completions of a padded batch, ``[B, num_kept]`` float32, nats.

    Args:
        input_ids, mask: ``[B, T]``; prompts are padded on the left, completions on the right.
        num_kept: the width of the completions. Padding gets 0.0.
        temperature: as TRL's, of sampling.
    """
    kept = mask.bool().cpu()
    ids = [row[is_real].numpy() for row, is_real in zip(input_ids.cpu(), kept, strict=True)]
    starts = kept[:, :-num_kept].sum(1).tolist()
    rows = client.score(ids, starts, temperature=temperature)
    log_probs = np.zeros((len(ids), num_kept), np.float32)
    for n, row in enumerate(rows):
        log_probs[n, : len(row)] = row
    return torch.from_numpy(log_probs).to(input_ids.device)


def is_right(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
    """Return 1.0 for each right answer: a reward function as TRL calls it."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [grade(text, number) for text, number in zip(texts, answer, strict=True)]


def main(given: list[str] | None = None) -> GRPOTrainer:
    """Train; return the trainer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", help="path or name")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="of vllm-kl serve")
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--out", default="trl-grpo")
    args = parser.parse_args(given)
    draw = random.Random(0)
    problems = [make_problem(draw) for _ in range(64)]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in problems]
    )
    trainer = ServedReference(
        args.policy,
        is_right,
        GRPOConfig(
            output_dir=args.out,
            beta=0.0,
            max_steps=args.steps,
            num_generations=args.group,
            per_device_train_batch_size=args.group,
            max_completion_length=16,
            logging_steps=1,
            report_to=[],
            bf16=torch.cuda.is_available(),  # TRL's default, which a CPU refuses
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=data,
        server=args.server,
        beta=args.beta,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
