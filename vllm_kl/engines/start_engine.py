"""Starts a vLLM engine for scoring in this process, with defaults for prefill on this platform.

The child of :class:`~vllm_kl.engines.process.ProcessEngine` runs this module. A caller can override every
default under vLLM's own name of the option.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vllm_kl.engines.base import Driver, drive
from vllm_kl.engines.generate import DUMMY, GenerateEngine
from vllm_kl.engines.length_dependence import dynamic_length, note_on, rope_parameters, side_of, switch_length
from vllm_kl.engines.options import NAMES, check_names, check_options
from vllm_kl.errors import OptionError, ReadoutUnavailableError, VLLMKLError
from vllm_kl.plugin import allowed, cpu_norms
from vllm_kl.plugin.taken_engines import LEAVE
from vllm_kl.types import ScoreRequest, ScoreResult
from vllm_kl.weights.adapters import lora_options


def start(*, model: str, readout: str, options: dict[str, Any], lora_request: Any = None) -> Driver:
    """Return a running engine that has compiled everything: it has scored one short request.

    The arguments and errors are those of :class:`~vllm_kl.VLLMScorer`.
    """
    from vllm import EngineArgs
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.platforms import current_platform

    from vllm_kl.engines.memory import kv_cache_bytes
    from vllm_kl.engines.pooling import PoolingEngine
    from vllm_kl.plugin.text_only import naming_missing_package, text_options

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    options = check_options(options)
    check_names(options, known)
    is_cpu = current_platform.is_cpu()
    if is_cpu:
        _check_on_cpu(options)
    # vLLM shares RoPE among engines whose models have equal configs, although it may depend on the engine's
    # length.
    _ROPE_DICT.clear()
    given = {**text_options(options), **lora_options(lora_request, options)}
    with naming_missing_package(given):
        # vLLM refuses a max_model_len that is too long, and a folder without a model.
        config = EngineArgs(model=model, **{"skip_tokenizer_init": True, **given}).create_model_config()
    _check_model(config)
    _check_given(config, given, is_cpu=is_cpu)
    defaults = _defaults(config, given, is_cpu=is_cpu)
    defaults = {name: value for name, value in defaults.items() if name in known}
    options = {**defaults, **given, **_options_by_model(config, given, is_cpu=is_cpu)}
    # vLLM refuses more sequences than tokens.
    options.setdefault("max_num_seqs", min(512, options["max_num_batched_tokens"]))
    if options.get("kv_cache_memory_bytes") is None and "gpu_memory_utilization" not in options:
        options["kv_cache_memory_bytes"] = kv_cache_bytes(
            model, config, options, is_cuda=current_platform.is_cuda_alike()
        )
    if not is_cpu and options.get("kv_cache_memory_bytes") is not None:
        # vLLM ignores it beside a size of the KV cache, except that it refuses to start if less memory is
        # free: so its default, 0.92, refuses a GPU that another engine or a trainer uses, too.
        options.setdefault("gpu_memory_utilization", 0.01)
    if config.dtype == torch.float32:
        # Triton's default is TF32, which vLLM's attention would use: 1.5e-3 nats on an H100, not 3e-6.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    reason = _why_not_pooling(config)
    if readout == "pooling" and reason:
        raise ReadoutUnavailableError(f"readout='pooling' is not available: {reason}. Use 'auto'")
    if readout == "pooling" or (readout == "auto" and not reason):
        driver: Driver = _start_pooling(model, config, options, lora_request)
    else:
        driver = _Blocking(_start_generate(model, config, readout, options, lora_request))
    drive(driver, [ScoreRequest(token_ids=np.zeros(2, np.int32), start=1)], share_prefix=False)
    notes = [f"no pooling read-out: {reason}"] if reason and readout == "auto" else []
    notes += [note for note in _notes(config, given, options, driver.info.readout, is_cpu=is_cpu) if note]
    side = side_of(config.hf_text_config, config.max_model_len)
    notes = list(dict.fromkeys([*driver.info.notes, *notes]))
    hidden_size = driver.hidden_size() if isinstance(driver, PoolingEngine) else None
    driver.info = dataclasses.replace(
        driver.info, notes=tuple(notes), length_side=side, hidden_size=hidden_size
    )
    return driver


def _check_given(config: Any, given: dict[str, Any], *, is_cpu: bool) -> None:
    """Refuse options that this model, or this device, cannot have."""
    _check_overrides(config, given.get("hf_overrides"))
    if is_cpu:
        _check_kv_cache(config, given.get("kv_cache_dtype", "auto"))
    elif config.dtype == torch.float32 and given.get("enable_lora"):
        raise OptionError("vLLM has no LoRA kernels in float32 on a GPU: pass dtype='bfloat16'")


def _start_pooling(model: str, config: Any, options: dict[str, Any], lora_request: Any) -> Driver:
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_kl import plugin
    from vllm_kl.engines.pooling import PoolingEngine
    from vllm_kl.plugin.scoring_models import BASE_ARCHITECTURES

    overrides = {
        "architectures": [plugin.enable(config.architecture)],
        BASE_ARCHITECTURES: list(config.hf_config.architectures or [config.architecture]),
    }
    # vLLM's default for pooling models is a float32 head. It then copies the whole matrix in every call, and
    # refuses a quantised matrix.
    defaults = {"head_dtype": "model"}
    theirs = options.get("hf_overrides") or {}
    args = EngineArgs(
        model=model,
        **{
            **options,
            "runner": "pooling",
            "convert": "none",  # "embed" and "classify" drop the LM head
            "model_impl": "auto",  # the caller's model_impl chose the base class of the scoring class
            "hf_overrides": functools.partial(_override, theirs, defaults, overrides)
            if callable(theirs)
            else {**defaults, **theirs, **overrides},
        },
    )
    return PoolingEngine(LLMEngine.from_engine_args(args), lora_request)


def _override(
    theirs: Callable[[Any], Any], defaults: dict[str, Any], overrides: dict[str, Any], config: Any
) -> Any:
    config.update(defaults)
    config = theirs(config)
    config.update(overrides)
    return config


def _start_generate(
    model: str, config: Any, readout: str, options: dict[str, Any], lora_request: Any
) -> GenerateEngine:
    from vllm import LLM

    from vllm_kl import plugin

    plugin.enable(config.architecture)
    # An engine that generates refuses a prompt of max_model_len tokens: it needs room for one more token. So
    # it gets this room, unless the larger max_model_len would change all log-probs. The additional token is
    # sampled and never fed back, so no position past the model's last one is computed.
    text, length = config.hf_text_config, config.max_model_len
    room = int(side_of(text, length + 1) == side_of(text, length))
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    llm = LLM(model, **{**options, "max_model_len": length + room})
    return GenerateEngine(llm, readout=readout, lora_request=lora_request)


class _Blocking:
    """Makes a driver of an engine that only has ``score``: a step is one call with all waiting requests."""

    def __init__(self, engine: GenerateEngine) -> None:
        self._engine = engine
        self.info = engine.info
        self.weights = engine.weights
        self._waiting: list[tuple[Hashable, ScoreRequest, bool]] = []

    def submit(self, key: Hashable, request: ScoreRequest, *, share_prefix: bool) -> None:
        self._waiting.append((key, request, share_prefix))

    def step(self) -> list[tuple[Hashable, ScoreResult | Exception]]:
        finished: list[tuple[Hashable, ScoreResult | Exception]] = []
        waiting, self._waiting = self._waiting, []
        for share_prefix in (True, False):
            mine = [(key, request) for key, request, share in waiting if share is share_prefix]
            finished += self._score(mine, share_prefix) if mine else []
        return finished

    def _score(
        self, requests: list[tuple[Hashable, ScoreRequest]], share_prefix: bool
    ) -> list[tuple[Hashable, ScoreResult | Exception]]:
        keys = [key for key, _ in requests]
        try:
            results = self._engine.score([request for _, request in requests], share_prefix=share_prefix)
        except VLLMKLError as error:  # vLLM refuses at least one request; the engine goes on
            if len(requests) > 1:  # find that request: the others may be another caller's
                return [result for one in requests for result in self._score([one], share_prefix)]
            return [(keys[0], error)]
        return list(zip(keys, results, strict=True))

    def cancel(self, keys: Sequence[Hashable]) -> None:
        gone = set(keys)
        self._waiting = [entry for entry in self._waiting if entry[0] not in gone]

    def leave(self) -> None:
        self._engine.shared.collective_rpc(LEAVE)


def _why_not_pooling(config: Any) -> str:
    """Return why the pooling read-out cannot score a model; empty if it can."""
    if config.is_encoder_decoder:
        return f"{config.architecture} is an encoder-decoder; the pooling read-out scores decoders only"
    if config.runner_type != "generate":
        return f"{config.architecture} does not generate text"
    return ""


def _check_on_cpu(options: dict[str, Any]) -> None:
    if options.get("pipeline_parallel_size", 1) != 1:
        raise OptionError(
            f"pipeline_parallel_size={options['pipeline_parallel_size']} does not work on a CPU: vLLM 0.32 "
            "fails at the first batch. Use tensor_parallel_size"
        )


def _check_kv_cache(config: Any, dtype: str) -> None:
    """Refuse a KV cache dtype that vLLM's CPU attention (0.32) reads as another: an error of a nat."""
    works = {"auto", "fp8", "fp8_e4m3", "fp8_e5m2", str(config.dtype).removeprefix("torch.")}
    if dtype not in works:
        raise OptionError(
            f"kv_cache_dtype={dtype!r} does not work on a CPU with "
            f"dtype={str(config.dtype).removeprefix('torch.')!r}: vLLM's attention would read other numbers "
            f"than it wrote. Choose one of {', '.join(sorted(works))}"
        )


def _check_overrides(config: Any, overrides: Any) -> None:
    """Refuse an override of RoPE that has no effect: in transformers 5 ``rope_parameters`` win over it."""
    for name in ("rope_theta", "partial_rotary_factor"):
        wanted = overrides.get(name) if isinstance(overrides, dict) else None
        used = [one[name] for one in rope_parameters(config.hf_text_config) if name in one]
        if wanted is not None and used and wanted not in used:
            raise OptionError(
                f"hf_overrides={{{name!r}: {wanted!r}}} has no effect: the model's config has "
                f"{name}={used[0]!r} in rope_parameters. Pass hf_overrides={{'rope_parameters': {{...}}}} "
                "with all RoPE parameters"
            )


def _check_model(config: Any) -> None:
    """Refuse a model that has no log-probs, or whose rows depend on the other rows of a batch.

    Raises:
        OptionError: the model's length does not work; or, in vLLM's transformers backend, rows would depend
            on others.
        ReadoutUnavailableError: the model is not causal.
    """
    text = config.hf_text_config
    if config.max_model_len < 2:
        raise OptionError(
            f"max_model_len={config.max_model_len} leaves no token to score: token 0 has no log-prob"
        )
    if getattr(text, "is_causal", True) is False:
        raise ReadoutUnavailableError(
            f"{config.architecture} has is_causal=False in its config: every token sees the later tokens, "
            "so no token has a log-prob given the earlier ones. It is a model for embeddings"
        )
    longest = min(filter(None, (switch_length(text), dynamic_length(text))), default=None)
    if longest is not None and longest < config.max_model_len and config.using_transformers_backend():
        raise OptionError(
            f"max_model_len={config.max_model_len} does not work with vLLM's transformers backend: above "
            f"{longest} tokens it computes RoPE for the longest sequence of a batch, so log-probs would "
            f"depend on other sequences. Pass max_model_len={longest}"
        )


def _options_by_model(config: Any, given: dict[str, Any], *, is_cpu: bool) -> dict[str, Any]:
    """Return the options that the model's config decides, and update the config.

    Raises:
        OptionError: an option of the caller does not work with this model.
    """
    chosen: dict[str, Any] = {}
    if given.get("dtype", "auto") == "auto":
        # vLLM's choice for an engine that generates. For a pooling engine vLLM 0.32 chooses float16 instead
        # of bfloat16.
        chosen["dtype"] = str(config.dtype).removeprefix("torch.")
    if (why_not := _why_not_shared(config, is_cpu=is_cpu)) and given.get("enable_prefix_caching"):
        raise OptionError(f"enable_prefix_caching=True does not work here: {why_not}. Leave it out")
    if why_not:
        chosen["enable_prefix_caching"] = False
    if is_cpu and _amx_cannot_attend(config) and not {"attention_backend", "attention_config"} & given.keys():
        chosen["attention_backend"] = "CPU_MLA"
    longest = dynamic_length(config.hf_text_config)
    if longest is not None and config.max_model_len > longest and not config.using_transformers_backend():
        # vLLM 0.32 makes a table of positions that ends there, and reads the memory behind the table.
        if (given.get("max_model_len") or -1) > longest:
            raise OptionError(
                f"max_model_len={given['max_model_len']} does not work with 'dynamic' RoPE: vLLM has "
                f"positions for {longest} tokens, and reads other memory beyond. Pass "
                f"max_model_len={longest}. A TransformersWrapper scores longer sequences"
            )
        chosen["max_model_len"] = config.max_model_len = longest
    return chosen


def _amx_cannot_attend(config: Any) -> bool:
    """Return whether vLLM (0.32) would compute this model's MLA by AMX, which takes bfloat16 only."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    chooses_amx = "AMX_MLA" in AttentionBackendEnum.__members__ and torch.cpu._is_amx_tile_supported()
    return config.use_mla and config.dtype != torch.bfloat16 and chooses_amx


def _why_not_shared(config: Any, *, is_cpu: bool) -> str:
    """Return why sequences cannot share the KV of common prefixes; empty if they can."""
    if config.is_attention_free:
        return f"vLLM does not support prefix caching for {config.architecture}, which has no attention"
    if config.is_hybrid and is_cpu:
        # mamba_mixer2.py, 0.32: the CPU's scan returns last states only, and fails where a state inside a
        # batch is needed.
        return f"vLLM's CPU kernels cannot keep the states that {config.architecture} has beside its KV"
    return ""


def _notes(
    config: Any, given: dict[str, Any], options: dict[str, Any], readout: str, *, is_cpu: bool
) -> Iterator[str]:
    """Yield notes for the user of a running engine. Empty strings are no notes."""
    from vllm_kl.engines.memory import stored_dtype
    from vllm_kl.plugin.cpu_loops import missing_compiler
    from vllm_kl.plugin.cpu_products import has_products

    if readout == "pooling":
        yield missing_compiler()
    dtype = str(config.dtype).removeprefix("torch.")
    stored = stored_dtype(config.model, config) or config.dtype
    is_wide = stored in (torch.float32, torch.float64)
    if is_wide and config.dtype.itemsize < 4 and given.get("dtype", "auto") == "auto":
        yield (
            f"the checkpoint is {str(stored).removeprefix('torch.')}, and vLLM chose to serve it in "
            f"{dtype}: pass dtype='float32' for its own numbers, or dtype={dtype!r} if the policy is served "
            f"in {dtype}"
        )
    elif is_cpu and config.dtype.itemsize < 4 and not has_products(config.dtype):
        yield (
            f"this CPU multiplies {dtype} matrices one number at a time: dtype='float32' is two to three "
            "times as fast, with twice the memory"
        )
    if "auto" != (kept := str(given.get("kv_cache_dtype", "auto"))) != dtype:
        yield f"kv_cache_dtype={kept!r} rounds keys and values, so log-probs change: serve the policy with it"
    if why_not := _why_not_shared(config, is_cpu=is_cpu):
        yield f"prefixes are not shared: {why_not}"
    elif config.is_hybrid:
        yield (
            f"prefixes are shared in fewer, larger blocks: {config.architecture} has states beside its KV, "
            "which vLLM keeps for some blocks only"
        )
    yield note_on(config.hf_text_config, config.max_model_len)
    if (longest := dynamic_length(config.hf_text_config)) == config.max_model_len:
        yield f"sequences end at {longest} tokens: vLLM has no further positions for 'dynamic' RoPE"
    yield _difference_from_transformers(config)
    if options.get("load_format") == "dummy":
        yield DUMMY
    if new := sorted(options.keys() - NAMES):
        yield f"vllm_kl does not know these options of vLLM, and how they change log-probs: {', '.join(new)}"


def _difference_from_transformers(config: Any) -> str:
    """Return where vLLM (0.32) computes a model otherwise than transformers (5.19); empty if it does not."""
    text = config.hf_text_config
    if text.model_type == "nemotron_h" and text.time_step_min > 0:
        return (
            "transformers limits the time steps of Mamba layers to at least "
            f"time_step_min={text.time_step_min}, vLLM does not: log-probs differ where a step is smaller"
        )
    if text.model_type == "cohere2" and config.max_model_len > text.sliding_window:
        return (
            f"the sliding-window layers see {text.sliding_window + 1} tokens in vLLM, and "
            f"{text.sliding_window} in transformers: log-probs differ in longer sequences"
        )
    if text.model_type == "apertus":
        return "vLLM rounds the two factors of the xIELU activation to bfloat16, whatever the dtype is"
    return ""


def _defaults(config: Any, given: dict[str, Any], *, is_cpu: bool) -> dict[str, Any]:
    import vllm

    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,  # an engine gets token ids and returns log-probs
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        # None: keep the blocks of layers with a sliding window or a state, too. vLLM's default drops most of
        # them, so the second sequence of a group would find none.
        "prefix_cache_retention_interval": None,
    }
    if not is_cpu:
        return defaults | {
            "max_num_batched_tokens": 16384,
            # vLLM captures graphs for batches of a few hundred tokens. Prefill batches have thousands.
            "compilation_config": {"cudagraph_mode": "NONE"},
        }
    defaults |= {
        "enforce_eager": True,  # compilation takes longer than it saves
        "max_num_batched_tokens": 4096,
    }
    # A compiled engine has norms of its own. In an unknown vLLM the workers do not know our name.
    is_eager = given.get("enforce_eager", True)
    if is_eager and "kernel_config" not in given and allowed.is_known(vllm.__version__):
        defaults["ir_op_priority"] = {name: [cpu_norms.PROVIDER] for name in cpu_norms.OPERATIONS}
    if not (config.is_hybrid or config.is_attention_free):  # there vLLM chooses the block size by the states
        defaults["block_size"] = 32  # the CPU's smallest: sequences share whole blocks only
    return defaults
