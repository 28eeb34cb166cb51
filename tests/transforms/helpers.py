"""Batches with log-probs, and checks of the rows that a transform writes."""

from __future__ import annotations

import torch
from tensordict import TensorDict, lazy_stack

from tests.batches import ids_batch
from tests.oracle import KL_TOLERANCE
from vllm_kl import KLComputation

PAD, EOS = 256, 258
# EOS and pad ids inside prompts and responses; responses of one token and of none; an EOS as first token.
SEQUENCES = [[5, EOS, 9, PAD, 7, EOS], [EOS, 2, 3], [PAD, PAD, 4, 8, EOS, 16, 23], [11, 12]]
PROMPTS = [2, 2, 3, 2]
KEEP = [[t >= p for t in range(len(s))] for s, p in zip(SEQUENCES, PROMPTS, strict=True)]
# Log-probs of both sides of ``step``, and its mask.
GEN = [torch.tensor([0.0, -1.0, -2.0, -3.0]), torch.tensor([0.0, 0.0, -1.0])]
REF = [torch.tensor([0.0, -1.5, -1.0, -3.0]), torch.tensor([0.0, 0.0, -2.0])]
MASK = [torch.tensor([False, True, True, True]), torch.tensor([False, False, True])]


def rows(td, key):
    """Return an entry as one tensor per sample, whatever the layout."""
    return td.get(key, as_list=True)


def assert_rows(got, want, tolerance=KL_TOLERANCE):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), w, rtol=0, atol=tolerance)


def recorded_batch(policy_oracle):
    """A batch with the policy's recorded log-probs: NaN on prompts, as TorchRL leaves them."""
    values = [policy_oracle.log_probs(s) for s in SEQUENCES]
    full = [
        torch.tensor([v if k else float("nan") for v, k in zip(*vk, strict=True)])
        for vk in zip(values, KEEP, strict=True)
    ]
    td = ids_batch(SEQUENCES, PROMPTS, extra={("log_probs", "full"): full})
    td["next"] = lazy_stack([TensorDict(reward=torch.zeros(1, 1)) for _ in SEQUENCES])
    return td


def recorded(values, prompt=2):
    """A batch of one sequence with log-probs that somebody stored."""
    ids = torch.arange(5, 5 + len(values))
    return ids_batch([ids], [prompt], extra={("log_probs", "full"): [torch.tensor(values)]})


def step(reward=(1.0, 2.0)):
    """A step with both sides' log-probs in it, ragged."""
    return ids_batch(
        [[1, 2, 3, 4], [1, 2, 3]],
        extra={
            "gen": [TensorDict(full=row) for row in GEN],
            "ref": [TensorDict(full=row) for row in REF],
            "reward": [torch.tensor([r]) for r in reward],
            "kl_mask": MASK,
        },
    )


def compute(**kwargs):
    return KLComputation(("gen", "full"), ("ref", "full"), **kwargs)


def in_pieces(tokenizer, dialog):
    """Return ids and mask of a dialog, message by message: the assistant's words and their end are kept."""
    ids, mask = [], []

    def add(text, counts):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(piece)
        mask.extend([counts] * len(piece))

    for message in dialog:
        is_ours = message["role"] == "assistant"
        add(f"<|im_start|>{message['role']}\n", False)
        add(f"{message['content']}<|im_end|>", is_ours)
        add("\n", False)
    return ids, mask
