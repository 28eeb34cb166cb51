"""Tiny models, built here: random weights, scaled so that log-probs are far from uniform."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vllm_kl.demo.task import make_tokenizer

MAX_MODEL_LEN = 320


def build(path: Path, *, seed: int, pad_is_eos: bool = False) -> Path:
    """Save a two-layer Qwen2 model and its byte-level tokenizer; return the folder."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            initializer_range=0.12,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
