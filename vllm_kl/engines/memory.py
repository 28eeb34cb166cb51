"""Chooses the size of an engine's KV cache, and checks before any weight is loaded that it fits.

vLLM's default takes most of the machine's memory. A scorer never decodes, so it needs much less. And vLLM
does not check that the memory it is told to take is free.
"""

from __future__ import annotations

import bisect
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from safetensors import safe_open

from vllm_kl.errors import OptionError

_MARGIN = 16 << 20  # for rounding to blocks
# Text models in which every layer keeps KV of the same size, for all tokens or for those of a window. In
# other models layers share KV, some have none, or their KV has several sizes.
_EQUAL = """
    llama mistral ministral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen2_vl_text qwen2_5_vl_text
    qwen3_vl_text qwen3_vl_moe_text gemma gemma2 gemma3_text phi phi3 granite granitemoe cohere cohere2 olmo
    olmo2 olmo3 olmoe starcoder2 stablelm glm glm4 glm4_moe smollm3 seed_oss gpt_oss gpt_neox deepseek_v2
    deepseek_v3
"""
_EQUAL_LAYERS = frozenset(_EQUAL.split())
_ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HUB_TIMEOUT_S = 10.0
# For models whose layers keep a state, which decides the size of vLLM's blocks.
_BYTES_WITH_STATES = 4 << 30


def kv_cache_bytes(model: str, config: Any, options: dict[str, Any], *, is_cuda: bool) -> int | None:
    """Return the bytes of KV that prefill needs: the longest sequence, and a few batches with their prompts.

    ``None`` leaves the choice to vLLM.

    Raises:
        OptionError: the KV of one sequence of ``max_model_len`` tokens does not fit. The message has the
            longest length that fits.
    """
    if config.is_hybrid or config.is_attention_free:
        return None if is_cuda else _BYTES_WITH_STATES
    known = _weight_bytes(model, config, options)
    weights, ranks = known or 0, options.get("tensor_parallel_size", 1)
    if is_cuda:  # per device, as free memory and KV are
        weights //= ranks * options.get("pipeline_parallel_size", 1)
        weights, ranks = max(0, weights - int(options.get("cpu_offload_gb", 0) * 2**30)), 1
    free = max(0, available_bytes(is_cuda) - weights)
    least = lambda n: ranks * _sequence_bytes(config, options, n)  # noqa: E731
    if least(config.max_model_len) > free:
        fits = bisect.bisect_right(range(config.max_model_len), free, key=least) - 1
        own = "" if options.get("max_model_len") not in (None, -1) else ", the model's own length,"
        cure = f"Pass max_model_len={_round_down(fits)} or less" if fits >= 1 else "The weights alone fill it"
        raise OptionError(
            f"max_model_len={config.max_model_len}{own} needs {_gib(least(config.max_model_len))} of memory "
            f"for the KV of one sequence, but {_gib(free)} are available beside {_gib(weights)} of weights. "
            f"{cure}"
        )
    longest = _roomy_bytes(config, options, config.max_model_len)
    # If the size of the weights is not known, take no spare memory.
    num_spare = 0 if known is None else 8 * options["max_num_batched_tokens"]
    roomy = _roomy_bytes(config, options, config.max_model_len + num_spare)
    return int(min(max(longest, min(roomy, 0.4 * free / ranks)), free / ranks))


def _roomy_bytes(config: Any, options: dict[str, Any], num_tokens: int) -> int:
    """Return the bytes of KV if every layer kept all tokens, with a tenth more for rounding to blocks."""
    return int(1.1 * num_tokens * _num_layers(config, options) * _token_bytes(config, options)) + _MARGIN


def _sequence_bytes(config: Any, options: dict[str, Any], num_tokens: int) -> int:
    """Return the fewest bytes that one sequence's KV takes.

    0 if the size is known only after vLLM has made the model. Then vLLM itself refuses a length that does not
    fit.
    """
    layers, text = _num_layers(config, options), config.hf_text_config
    if text.model_type not in _EQUAL_LAYERS or not _element_bytes(config, options):
        return 0
    kinds = getattr(text, "layer_types", None) or []
    window = config.get_sliding_window() or getattr(text, "attention_chunk_size", None)
    windowed = (
        round(layers * sum(kind != "full_attention" for kind in kinds) / len(kinds)) if kinds else layers
    )
    if not window:
        windowed = 0
    # A layer with a window keeps one window and one batch.
    kept = min(num_tokens, (window or 0) + options["max_num_batched_tokens"])
    # MLA keeps one vector for key and value.
    per_layer = _token_bytes(config, options) // (2 if config.use_mla else 1)
    return per_layer * ((layers - windowed) * num_tokens + windowed * kept)


def _token_bytes(config: Any, options: dict[str, Any]) -> int:
    from vllm.config import ParallelConfig

    parallel = ParallelConfig(tensor_parallel_size=options.get("tensor_parallel_size", 1))
    element = _element_bytes(config, options) or config.dtype.itemsize
    return 2 * config.get_num_kv_heads(parallel) * config.get_head_size() * element


def _element_bytes(config: Any, options: dict[str, Any]) -> int:
    """Return the bytes of one number in the KV cache; 0: not known (packed, or the checkpoint decides)."""
    kind = options.get("kv_cache_dtype", "auto")
    if kind == "auto":
        return 0 if getattr(config.hf_config, "quantization_config", None) else config.dtype.itemsize
    return _ELEMENT_BYTES.get(kind, 0)


def _num_layers(config: Any, options: dict[str, Any]) -> int:
    from vllm.config import ParallelConfig

    return config.get_num_layers(ParallelConfig(tensor_parallel_size=options.get("tensor_parallel_size", 1)))


def _weight_bytes(model: str, config: Any, options: dict[str, Any]) -> int | None:
    """Return the bytes of a model's weights in memory; ``None``: not known before they are loaded."""
    is_quantised = getattr(config.hf_config, "quantization_config", None) is not None
    if options.get("quantization") and not is_quantised:  # vLLM quantises the weights as it loads them
        return None
    if Path(model).is_file():  # .gguf
        return Path(model).stat().st_size
    is_folder = Path(model).is_dir()
    folder = model if is_folder else _snapshot(model, config, options.get("download_dir"))
    num_bytes = _file_bytes(Path(folder)) if folder else 0
    if not num_bytes and not is_folder:
        num_bytes = _bytes_on_the_hub(model, config)
    if not num_bytes:
        return None
    stored = stored_dtype(folder or model, config)
    if stored is None or is_quantised:
        return num_bytes
    return num_bytes * config.dtype.itemsize // stored.itemsize


def _file_bytes(folder: Path) -> int:
    """Return the size of the weights files; 0: all or some are missing (an interrupted download)."""
    index = folder / "model.safetensors.index.json"  # the folder may hold other files with the same weights
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ()
    files = (
        [folder / name for name in names] or list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    )
    return sum(file.stat().st_size for file in files) if all(file.exists() for file in files) else 0


def _snapshot(model: str, config: Any, download_dir: str | None) -> str | None:
    """Return the folder of a hub model, even if its download is incomplete; ``None``: no such folder."""
    try:
        return snapshot_download(
            model, revision=config.revision, cache_dir=download_dir, local_files_only=True
        )
    except (OSError, ValueError):
        return None


def _bytes_on_the_hub(model: str, config: Any) -> int:
    """Return the size of a model's weights by the hub; 0: the hub cannot be reached, or does not know."""
    if constants.HF_HUB_OFFLINE:
        return 0
    try:
        info = HfApi().model_info(
            model,
            revision=config.revision,
            files_metadata=True,
            token=config.hf_token,
            timeout=_HUB_TIMEOUT_S,
        )
    except Exception:  # of huggingface_hub or httpx. vLLM meets the same problem later, and reports it
        return 0
    if info.safetensors is not None:  # counts no file that holds the same weights again
        return sum(num * _bits(kind) for kind, num in info.safetensors.parameters.items()) // 8
    return sum(file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".bin"))


def _bits(kind: str) -> int:
    """Return the bits of one number of a safetensors dtype ("BF16", "F8_E4M3", "BOOL")."""
    found = re.search(r"\d+", kind)
    return int(found[0]) if found else 8


def stored_dtype(model: str, config: Any) -> torch.dtype | None:
    """Return the dtype of a checkpoint's weights, by its config or its first tensor; ``None``: not known."""
    stored = getattr(config.hf_text_config, "dtype", None) or getattr(config.hf_config, "dtype", None)
    file = next(iter(sorted(Path(model).glob("*.safetensors"))), None)
    if stored is not None or file is None:
        return stored
    with safe_open(file, "pt") as tensors:
        return _STORED.get(tensors.get_slice(next(iter(tensors.keys()))).get_dtype())


def available_bytes(is_cuda: bool) -> int:
    """Return the free memory: of the GPU, or of the machine within the limit of this process's cgroup."""
    if is_cuda:
        return torch.cuda.mem_get_info()[0]
    found = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) << 10)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        found.append(int(limit) - int(used))
    return min(found, default=1 << 62)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _round_down(num_tokens: int) -> int:
    """Return a slightly smaller, round number."""
    roomy = max(1, int(0.9 * num_tokens))
    return roomy if roomy < 1024 else roomy // 1024 * 1024


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
