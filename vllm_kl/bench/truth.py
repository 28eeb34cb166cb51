"""The process that knows the model: its size, its ids, the machine's speeds, and the true log-probs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kl.bench.limits import machine_limits
from vllm_kl.bench.models import save_random
from vllm_kl.bench.providers import load_model
from vllm_kl.bench.report import cpu_use
from vllm_kl.bench.types import Running, Setup
from vllm_kl.errors import OptionError, VLLMKLError

_ROOM = 1.3  # of the weights' size, for what the check computes
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def truth(setup: Setup) -> Iterator[Running]:
    """Yield the facts about the model and the machine, and the log-probs in float64, where the memory allows.

    Raises:
        OptionError: there is no such model.
    """
    import torch

    from vllm_kl.engines.memory import available_bytes

    free_bytes = available_bytes(setup.device == "cuda")
    if setup.shape is not None:
        save_random(setup.shape, Path(setup.model), max_tokens=setup.max_tokens, device=setup.device)
    config = _config(setup)
    text = config.get_text_config()
    own = str(getattr(text, "dtype", None) or getattr(config, "dtype", None) or "float32").removeprefix(
        "torch."
    )
    own = "float32" if own == "float64" else own  # vLLM has no wider one
    dtype = own if setup.dtype == "auto" else setup.dtype
    facts = {
        "dtype": dtype,
        "vocab_size": text.vocab_size,
        "special_ids": _special_ids(setup, text),
        "size": _size(config, text, setup),
        "cpu": cpu_use(),
        "free_bytes": free_bytes,  # before the model was loaded
        "limits": machine_limits(getattr(torch, dtype), setup.device),
        "check": "",
    }
    models: list[Any] = []
    left = ["float64", "float32", dtype]

    @torch.no_grad()
    def score(sequences: list[np.ndarray], starts: list[int]) -> list[Any]:
        while True:
            try:
                if not models:
                    facts["check"] = _widest(left, setup, facts["size"])
                    models.append(load_model(setup, facts["check"]))
                return [_one(models[0], ids, start) for ids, start in zip(sequences, starts, strict=True)]
            except torch.OutOfMemoryError:  # a GPU's: attention may take more than the weights
                if facts["check"] == dtype:
                    raise
            left[:] = left[left.index(facts["check"]) + 1 :]
            models.clear()
            gc.collect()
            torch.cuda.empty_cache()

    yield Running(score, told=lambda: facts)


def _one(model: Any, sequence: np.ndarray, start: int) -> Any:
    import torch

    ids = torch.from_numpy(sequence).to(model.device)
    logits = model(ids[None], logits_to_keep=len(ids) - start + 1, use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1).gather(-1, ids[start:, None])[:, 0].cpu()


def _config(setup: Setup) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(setup.model, **setup.loading)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(
            f"--model {setup.model}: neither a folder nor a name of a model: {reason}"
        ) from error


def _special_ids(setup: Setup, text: Any) -> list[int]:
    """Return the ids that stand for no text: of the configuration, and of the tokenizer if there is one."""
    from transformers import AutoTokenizer

    given = [value for name, value in text.to_dict().items() if name.endswith("token_id")]
    ids = {
        i for value in given for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(setup.model, **setup.loading)
    except (OSError, ValueError):
        return sorted(ids)
    return sorted(ids | set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder))


def _size(config: Any, text: Any, setup: Setup) -> dict[str, int] | None:
    """Return the numbers of weights, and the sizes of attention; ``None``: they are not known.

    The model is built without memory for its weights, so nothing is loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    trust = {name: value for name, value in setup.loading.items() if name == "trust_remote_code"}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **trust)
        head = model.get_output_embeddings().weight
        embedding = model.get_input_embeddings().weight
    except (ValueError, AttributeError, ImportError, RuntimeError):
        return None
    weights = dict(model.named_parameters())
    total = sum(weight.numel() for weight in weights.values())
    outside = embedding.numel() + (0 if head is embedding else head.numel())
    experts = sum(weight.numel() for name, weight in weights.items() if ".experts." in name)
    share = _experts_share(text)
    heads = getattr(text, "num_attention_heads", 0)
    width = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    return {
        "parameters": total,
        "body": total - outside - round(experts * (1 - share)),  # weights that one token is multiplied with
        "head": head.numel(),
        "embedding": 0 if head is embedding else embedding.numel(),  # of which rows are read
        "hidden": embedding.shape[-1],
        "layers": text.num_hidden_layers,
        "attention": heads * width,
        "kv": 2 * (getattr(text, "num_key_value_heads", None) or heads) * width,
    }


def _experts_share(text: Any) -> float:
    """Return the share of the experts' weights that one token meets."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    num = next((getattr(text, name) for name in names if getattr(text, name, None)), None)
    used = getattr(text, "num_experts_per_tok", None)
    return 1.0 if not num or not used else used / num


def _widest(dtypes: Sequence[str], setup: Setup, size: dict[str, int] | None) -> str:
    """Return the widest data type whose model fits into the memory; the last one is the model's own.

    Raises:
        VLLMKLError: even the model's own does not fit, or its size is not known.
    """
    from vllm_kl.engines.memory import available_bytes

    if size is None:
        raise VLLMKLError("transformers cannot build this model")
    free = available_bytes(setup.device == "cuda")
    dtype = dtypes[-1]
    for name in dtypes:
        if size["parameters"] * _BYTES[name] * _ROOM < free:
            return name
    raise VLLMKLError(
        f"the model in {dtype} takes {size['parameters'] * _BYTES[dtype] / 2**30:,.0f} GiB, and "
        f"{free / 2**30:,.0f} GiB are free"
    )
