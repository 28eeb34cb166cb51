"""Makes the models of the benchmarks: Qwen2 of several sizes, with the same random weights in every run.

One function makes one model; its keyword arguments go to ``Qwen2Config``. Nothing heavy is imported at the
top, because a script must set the environment variables of vLLM and torch before it imports them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vllm_kl.errors import OptionError

QWEN2_VOCAB = 151_936  # Qwen2.5's vocabulary, padding rows included


def tiny(*, vocab: int = 1_000, **config: Any) -> Any:
    """Return a model of two layers, whose computation costs next to nothing."""
    return _qwen2(hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1, vocab=vocab, **config)


def size_5m(**config: Any) -> Any:
    """Return a model of 5 M parameters."""
    return _qwen2(hidden=256, intermediate=768, layers=4, heads=4, kv_heads=2, vocab=8_192, **config)


def size_96m(**config: Any) -> Any:
    """Return a model of 96 M parameters, most of them in the embedding of a full-size vocabulary."""
    return _qwen2(hidden=512, intermediate=1536, layers=6, heads=8, kv_heads=2, vocab=QWEN2_VOCAB, **config)


def size_168m(**config: Any) -> Any:
    """Return a model of 168 M parameters."""
    return _qwen2(hidden=1024, intermediate=2816, layers=12, heads=16, kv_heads=4, vocab=32_000, **config)


def qwen25_05b(**config: Any) -> Any:
    """Return a model of the shape of Qwen2.5-0.5B: 494 M parameters."""
    return _qwen2(hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, vocab=QWEN2_VOCAB, **config)


def qwen25_7b(**config: Any) -> Any:
    """Return a model of the shape of Qwen2.5-7B, untied, but with the smaller models' vocabulary."""
    sizes = {"hidden": 3584, "intermediate": 18_944, "layers": 28, "heads": 28, "kv_heads": 4}
    return _qwen2(**sizes, vocab=QWEN2_VOCAB, tie_word_embeddings=False, **config)


def talker(tokenizer: Any, *, hidden: int, layers: int, **config: Any) -> Any:
    """Return a model for a tokenizer's vocabulary, with its ids of EOS and padding, and heads of size 64."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"intermediate": 3 * hidden, "heads": hidden // 64, "kv_heads": hidden // 128}
    config = {"tie_word_embeddings": False, **ids, **config}
    return _qwen2(hidden=hidden, layers=layers, vocab=len(tokenizer), **sizes, **config)


def _qwen2(
    *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **config: Any
) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    settings = {"bos_token_id": None, "tie_word_embeddings": True, **config}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **settings)).eval()


NAMED = {"tiny": tiny, "5M": size_5m, "96M": size_96m, "168M": size_168m, "0.5B": qwen25_05b, "7B": qwen25_7b}


def sizes_of(text: str) -> tuple[int, int, int] | None:
    """Return hidden size, layers and vocabulary of a text such as ``512,6,32000``; ``None``: it is a name.

    Raises:
        OptionError: it is neither.

    >>> sizes_of("512,6,32000")
    (512, 6, 32000)
    """
    if text in NAMED:
        return None
    if re.fullmatch(r"[0-9]{1,7},[0-9]{1,7},[0-9]{1,7}", text) is None:
        raise OptionError(
            f"--shape {text[:80]!r}: expected hidden,layers,vocab such as 512,6,32000, or one of "
            f"{', '.join(NAMED)}"
        )
    hidden, layers, vocab = map(int, text.split(","))
    if hidden % 64 or not hidden or not layers or vocab < 512:
        raise OptionError(
            f"--shape {text!r}: hidden must be a multiple of 64, layers at least 1, vocab at least 512"
        )
    return hidden, layers, vocab


def save_random(shape: str, folder: Path, *, max_tokens: int, device: str = "cpu") -> None:
    """Save a bfloat16 model with random weights, and a tokenizer.

    Args:
        shape: as :func:`sizes_of` takes it.
        max_tokens: the longest sequence that the model takes.
        device: where the weights are drawn; a large model takes minutes on a CPU.
    """
    import torch

    sizes = sizes_of(shape)
    config = {"max_position_embeddings": max(8192, max_tokens), "initializer_range": 0.06}
    with torch.device(device):
        if sizes is None:
            model = NAMED[shape](**config)
        else:
            hidden, layers, vocab = sizes
            num_heads = hidden // 64
            heads = {"heads": num_heads, "kv_heads": 1 if num_heads % 4 else num_heads // 4}
            widths = {"hidden": hidden, "intermediate": 3 * hidden, "layers": layers, "vocab": vocab}
            model = _qwen2(**widths, **heads, **config)
        model.bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> Any:
    """Return a tokenizer of two special tokens, for what asks for a tokenizer and is given token ids only."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    pad, end = "<|pad|>", "<|end|>"
    backend = Tokenizer(WordLevel({pad: 0, end: 1}, unk_token=pad))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=end)
