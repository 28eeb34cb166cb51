"""Trains the demo's model from scratch and saves two checkpoints: the reference, and later the policy.

The user's cache folder keeps the checkpoints. Their key is a hash of the source of this module and of
``task``.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import shutil
import tempfile
from pathlib import Path

import platformdirs
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from vllm_kl.demo import task

STEPS = 480
REFERENCE_STEP = 360  # the policy is trained on from here to STEPS
# Training stops before the schedule ends, so that some answers are still wrong.
SCHEDULE_STEPS = 600
BATCH = 32
LEARNING_RATE = 1.5e-3


def cache_dir() -> Path:
    """Return the folder of the checkpoints that this source code makes."""
    source = inspect.getsource(task) + inspect.getsource(inspect.getmodule(cache_dir))
    return (
        platformdirs.user_cache_path("vllm_kl") / f"demo-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    )


def checkpoints(console: Console) -> tuple[Path, Path]:
    """Return the folders of the reference and of the policy; train both first if they are not cached."""
    home = cache_dir()
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix="demo-", dir=home.parent))
        try:
            _train(making, console)
            making.rename(home)  # atomic: the folder is complete or missing
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return home / "reference", home / "policy"


def _train(home: Path, console: Console) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = task.make_tokenizer()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=SCHEDULE_STEPS, pct_start=0.1
    )
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("training", total=STEPS, loss=float("nan"))
        for step in range(1, STEPS + 1):
            loss = _loss(model, *_batch(rng, tokenizer))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, loss=loss.item())
            for name, at in (("reference", REFERENCE_STEP), ("policy", STEPS)):
                if step == at:
                    model.save_pretrained(home / name)
                    tokenizer.save_pretrained(home / name)


def _batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids ``[BATCH, T]`` and the mask of the assistant's tokens, padded on the right."""
    chats = [
        [{"role": "user", "content": p.question}, {"role": "assistant", "content": p.solution}]
        for p in (task.make_problem(rng) for _ in range(BATCH))
    ]
    rendered = tokenizer.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding=True,
        return_tensors="pt",
    )
    return rendered["input_ids"], torch.as_tensor(rendered["assistant_masks"]).bool()


def _loss(model: Qwen2ForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the assistant's tokens, nats. The padding must be on the right."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits[mask[:, 1:]], ids[:, 1:][mask[:, 1:]])
