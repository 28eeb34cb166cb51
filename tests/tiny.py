"""Builds tiny models with random weights, scaled so that log-probs are far from uniform."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vllm_kl.demo.task import make_tokenizer
from vllm_kl.environment import on_a_gpu

MAX_MODEL_LEN = 320
ENGINE_OPTIONS = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
}
if on_a_gpu():  # else vLLM refuses a GPU that another test's engine uses, too
    ENGINE_OPTIONS["gpu_memory_utilization"] = 0.01


def build(path: Path, *, seed: int, pad_is_eos: bool = False, tie_word_embeddings: bool = False) -> Path:
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
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def build_adapter(
    path: Path,
    base: Path,
    *,
    seed: int,
    modules: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"),
    rank: int = 4,
) -> Path:
    """Save a LoRA adapter in PEFT's format, large enough to change log-probs by a nat; return the folder."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 0.15 * torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            tensors[f"base_model.model.{module}.lora_A.weight"] = draw(rank, weight.shape[1])
            tensors[f"base_model.model.{module}.lora_B.weight"] = draw(weight.shape[0], rank)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank + 1, "target_modules": list(modules)}
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def merge(path: Path, base: Path, adapter: Path) -> Path:
    """Save base model plus adapter as one float64 model: weight + alpha / r * B @ A; return the folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if (a := tensors.get(f"{module}.lora_A.weight")) is not None:
                b = tensors[f"{module}.lora_B.weight"]
                parameter += config["lora_alpha"] / config["r"] * (b.double() @ a.double())
    model.save_pretrained(path)
    return path


# Settings beyond _SIZES: factors, caps and windows that change the log-probs of a model this small.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # First: vLLM makes the process group of experts when a process starts its first engine, or never.
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "llama": {},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    },
    "granite": {
        "logits_scaling": 0.8,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
    },
    "cohere": {"logit_scale": 0.7, "tie_word_embeddings": True},
    "phi": {"num_key_value_heads": 2},
    "gpt_neox": {"num_key_value_heads": 2},  # transformers ignores it here, vLLM reads it
    "opt": {"num_key_value_heads": 2, "init_std": 0.12, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "olmo2": {},
}
# Architectures whose engines change the layout of weights, derive weights, or write weights themselves.
_SHARED_EXPERT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_MLA = {
    **_SHARED_EXPERT,
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_MAMBA2 = {"mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_head": 16, "mamba_chunk_size": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
KERNEL_LAYOUTS: dict[str, dict[str, Any]] = {
    "mixtral": ARCHITECTURES["mixtral"],
    "mixtral-padded": {**ARCHITECTURES["mixtral"], "intermediate_size": 48},  # kernels take multiples of 32
    "qwen3_moe": {"head_dim": 32, **_EXPERTS, "norm_topk_prob": True},
    "glm4_moe": {**_SHARED_EXPERT, "head_dim": 32},
    "gpt_oss": {
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v2": {**_MLA, "q_lora_rank": None, "topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek_v3": {**_MLA, "q_lora_rank": 24, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "granitemoehybrid": {
        **_MAMBA2,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_expand": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "position_embedding_type": "rope",
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M*-",
        "num_hidden_layers": 3,
        "head_dim": 32,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "chunk_size": 16,
        "time_step_min": 1e-9,  # the lower bound of time steps in transformers; vLLM has none
    },
    "falcon_h1": {
        **_MAMBA2,
        "head_dim": 32,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_conv": 4,
        "mamba_expand": 1,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 16,
        "conv_kernel": 4,
    },
}
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_TOP2 = {"num_experts": 4, "num_experts_per_tok": 2}
_GPT = {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 512}
# The other architectures of the table in docs/architectures.md.
MORE: dict[str, dict[str, Any]] = {
    # First, as "mixtral" above.
    "qwen2_moe": {**_TOP2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "mistral": {},
    "ministral": {**_WINDOW, "head_dim": 32},
    "starcoder2": {"sliding_window": 16, "use_bias": True},
    "stablelm": {"use_qkv_bias": True},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma3_text": {**_WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "glm": {"head_dim": 32},
    "glm4": {"head_dim": 32},
    "smollm3": {"no_rope_layers": [1, 0]},
    "seed_oss": {"head_dim": 32},
    "exaone4": {**_WINDOW, "sliding_window_pattern": 2, "head_dim": 32},
    "olmo": {},
    "olmo3": _WINDOW,
    "phi3": {"num_key_value_heads": 2},
    "hunyuan_v1_dense": {"head_dim": 32},
    "ernie4_5": {"head_dim": 32},
    "arcee": {},
    "helium": {"head_dim": 32},
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "logits_scaling": 0.8,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
    },
    "olmoe": _TOP2,
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 64,
        "moe_layer_start_index": 0,
        "moe_num_shared_experts": 1,
        "head_dim": 32,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 2], "head_dim": 32},
    "minimax": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
        "head_dim": 32,
    },
    "dots1": {**_SHARED_EXPERT, "head_dim": 32},
    "flex_olmo": _TOP2,
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 128,
        "head_dim": 32,
        "interleave_moe_layer_step": 1,
    },
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 16},
    "falcon": {"num_kv_heads": 1, "alibi": False, "new_decoder_architecture": False, "bias": False},
    "qwen3-tied": {"head_dim": 32, "tie_word_embeddings": True},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-yarn": {"rope_parameters": _YARN},
    "llama-llama3": {
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, **_LLAMA3}
    },
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "deepseek_v3-yarn": {
        **KERNEL_LAYOUTS["deepseek_v3"],
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
    },
}
_SIZES = {
    "vocab_size": 301,  # no multiple of 64, to which vLLM pads
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}


def build_architecture(
    path: Path, name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """Save a two-layer model without a tokenizer; return the folder. The last two ids are pad and EOS."""
    torch.manual_seed(seed)
    settings = {**_SIZES, **(ARCHITECTURES | KERNEL_LAYOUTS | MORE)[name], **overrides}
    ends = {"pad_token_id": settings["vocab_size"] - 2, "eos_token_id": settings["vocab_size"] - 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split("-")[0], **settings, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start at 0 and norms at 1: a test would not notice a missing one.
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for stored, buffer in [*model.named_buffers(), *model.named_parameters()]:
            # The bias of a router.
            if stored in model.state_dict() and "correction_bias" in stored and buffer.dim() < 3:
                buffer.add_(0.2 * torch.randn_like(buffer))
    model.to(dtype).save_pretrained(path)
    return path
