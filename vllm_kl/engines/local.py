"""Starts a vLLM engine in this process for scoring, with defaults that suit prefill on the platform at hand.

Runs in the child of :class:`~vllm_kl.engines.process.ProcessEngine`. Every default can be overridden by the caller
under vLLM's own name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch

from vllm_kl.engines.adapters import lora_options
from vllm_kl.engines.base import Driver, drive
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.errors import EngineError, OptionError, ReadoutUnavailableError, VLLMKLError
from vllm_kl.types import ScoreRequest, ScoreResult


def start(*, model: str, readout: str, options: dict[str, Any], lora_request: Any = None) -> Driver:
    """Return a running engine, warm: its first request compiles nothing.

    Raises:
        OptionError: an option does not exist, or would break scoring.
        ReadoutUnavailableError: this engine cannot do ``readout``.
        WeightsError: the adapter ``lora_request`` cannot be loaded, or would not be served as it is written.
    """
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    from vllm_kl.plugin.kernel import product_dtype
    from vllm_kl.plugin.native import missing_compiler
    from vllm_kl.plugin.text_only import naming_what_is_missing, text_options

    _check_options(options, {field.name for field in dataclasses.fields(EngineArgs)})
    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        # vLLM's int8 kernels (0.32) use AMX tiles without asking Linux for them, which kills the process.
        torch.cpu._init_amx()
    given = {**text_options(options), **lora_options(lora_request, options)}
    options = {**_defaults(is_cpu=current_platform.is_cpu()), **given}
    options.setdefault("max_num_seqs", min(512, options["max_num_batched_tokens"]))  # vLLM refuses more than tokens
    with naming_what_is_missing(given):
        config = EngineArgs(model=model, **options).create_model_config()  # refuses what is too long, or no model
    if "gpu_memory_utilization" not in options:
        options.setdefault("kv_cache_memory_bytes", _kv_bytes(config, options))
    reason = _why_not_pooling(config, options)
    if readout == "pooling" and reason:
        raise ReadoutUnavailableError(f"readout='pooling' is not available: {reason}. Use 'auto'")
    if readout == "pooling" or (readout == "auto" and not reason):
        driver: Driver = _start_pooling(model, config, options, lora_request)
    else:
        driver = _Blocking(_start_generate(model, config, readout, options, lora_request))
    drive(driver, [ScoreRequest(token_ids=np.zeros(2, np.int32), start=1)], share_prefix=False)
    notes = [f"no pooling read-out: {reason}"] if reason and readout == "auto" else []
    if driver.info.readout == "pooling" and (missing := missing_compiler()):
        notes.append(missing)
    if current_platform.is_cpu() and product_dtype(config.dtype) != config.dtype:
        notes.append(
            f"this CPU multiplies {str(config.dtype).removeprefix('torch.')} matrices one number at a time: dtype='float32' is "
            "two to three times as fast, for twice the memory"
        )
    driver.info = dataclasses.replace(driver.info, notes=(*driver.info.notes, *notes))
    return driver


def _start_pooling(model: str, config: Any, options: dict[str, Any], lora_request: Any) -> Driver:
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_kl import plugin
    from vllm_kl.engines.pooling import PoolingEngine
    from vllm_kl.plugin.models import BASE_ARCHITECTURES

    overrides = {
        "architectures": [plugin.enable(config.architecture)],
        BASE_ARCHITECTURES: list(config.hf_config.architectures or [config.architecture]),
    }
    # A pooling model's head is float32 by default. vLLM then copies the whole matrix at every call, and refuses a
    # quantized one.
    defaults = {"head_dtype": "model"}
    theirs = options.get("hf_overrides") or {}
    args = EngineArgs(
        model=model,
        **{
            **options,
            "runner": "pooling",
            "convert": "none",  # "embed" and "classify" would drop the LM head
            "model_impl": "auto",  # already resolved: the scoring class is a subclass of what it chose
            "hf_overrides": functools.partial(_override, theirs, defaults, overrides)
            if callable(theirs)
            else {**defaults, **theirs, **overrides},
        },
    )
    return PoolingEngine(LLMEngine.from_engine_args(args), lora_request)


def _override(theirs: Callable[[Any], Any], defaults: dict[str, Any], overrides: dict[str, Any], config: Any) -> Any:
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
    # An engine that generates refuses a prompt of max_model_len, for want of room for one more token. Give it that room:
    # the token is sampled and never fed back, so no position past the model's last is computed.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    llm = LLM(model, **{**options, "max_model_len": config.max_model_len + 1})
    return GenerateEngine(llm, readout=readout, lora_request=lora_request)


class _Blocking:
    """Steps an engine that knows only whole calls: a step is one call with everything that waits."""

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
        except (VLLMKLError, ValueError) as error:  # what vLLM refuses is a ValueError; its engine goes on
            if len(requests) > 1:  # one caller's failure is not the others'
                return [result for one in requests for result in self._score([one], share_prefix)]
            return [(keys[0], error if isinstance(error, VLLMKLError) else EngineError(f"vLLM refused: {error}"))]
        return list(zip(keys, results, strict=True))

    def cancel(self, keys: Sequence[Hashable]) -> None:
        gone = set(keys)
        self._waiting = [entry for entry in self._waiting if entry[0] not in gone]


def _check_options(options: dict[str, Any], known: set[str]) -> None:
    for name in options:
        if name == "model" or name not in known:
            close = difflib.get_close_matches(name, known - {"model"}, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise OptionError(f"unknown engine option {name!r}: vLLM's EngineArgs has none of this name.{hint}")
    for name in ("runner", "convert"):
        if name in options:
            raise OptionError(f"{name!r} follows from the read-out: pass readout= instead")
    if options.get("enable_prefix_caching") is False:
        raise OptionError(
            "enable_prefix_caching=False would make share_prefix meaningless; pass share_prefix=False instead"
        )


def _why_not_pooling(config: Any, options: dict[str, Any]) -> str:
    """Return why a model cannot be read out in the engine; empty if it can."""
    if config.is_encoder_decoder:
        return f"{config.architecture} is an encoder-decoder; only decoders can be scored in the engine"
    if config.runner_type != "generate":
        return f"{config.architecture} is not a model that generates text"
    if options.get("speculative_config"):
        return "vLLM's pooling engines do not speculate"
    return ""


def _is_cuda() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cuda_alike()


def _defaults(*, is_cpu: bool) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,  # ids come in, log-probs go out
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        # vLLM keeps few blocks of layers with a sliding window or a state, so that a group's second member finds none.
        "prefix_cache_retention_interval": None,
    }
    if is_cpu:
        return defaults | {
            "enforce_eager": True,  # compiling takes longer than it saves
            "max_num_batched_tokens": 4096,
            "block_size": 32,  # the smallest that the CPU takes: prompts are shared in whole blocks
        }
    return defaults | {
        "max_num_batched_tokens": 16384,
        # Graphs are captured for batches of a few hundred tokens; prefill batches have thousands.
        "compilation_config": {"cudagraph_mode": "NONE"},
    }


def _kv_bytes(config: Any, options: dict[str, Any]) -> int | None:
    """Return the KV memory that prefill needs: the longest sequence, and a few batches with their prompts.

    vLLM's own default takes most of the machine, which a scorer that never decodes has no use for.
    """
    from vllm.config import ParallelConfig

    if config.is_hybrid or config.is_attention_free:
        return None if _is_cuda() else 4 << 30
    parallel = ParallelConfig(tensor_parallel_size=options.get("tensor_parallel_size", 1))
    element = 1 if "fp8" in str(options.get("kv_cache_dtype", "auto")) else config.dtype.itemsize
    per_layer = 2 * config.get_num_kv_heads(parallel) * config.get_head_size() * element
    num_tokens = config.max_model_len + 8 * options["max_num_batched_tokens"]
    layers = config.get_num_layers(parallel)
    need = lambda n: int(1.1 * n * layers * per_layer) + (16 << 20)  # noqa: E731  # the margin covers rounding to blocks
    if not _is_cuda():
        return need(num_tokens)
    # vLLM does not check whether this fits. Weights take the rest.
    free, _ = torch.cuda.mem_get_info()
    return max(need(config.max_model_len), min(need(num_tokens), int(0.4 * free)))
