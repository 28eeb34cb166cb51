"""Requests with LoRA adapters, and the error of their scores."""

from __future__ import annotations

import torch

PROMPT = [7 * i % 200 for i in range(40)]  # more than a block, so that its KV is kept
GROUP = [[*PROMPT, 9, 4, 100 + k, 3 * k, 17] for k in range(4)]
SEQUENCES = [*GROUP, [5, 6, 7], list(range(3, 90))]


def lora_request(path, name="policy", int_id=1, **kwargs):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, int_id, str(path), **kwargs)


def error_of(scorer, truth, sequences=SEQUENCES, start=1):
    """Return the largest distance of log-probs from an oracle's, in nats."""
    scored = scorer.score(sequences, start)
    return max(
        float((row.double() - torch.tensor(truth.log_probs(ids)[start:], dtype=torch.float64)).abs().max())
        for ids, row in zip(sequences, scored, strict=True)
    )
