"""Starts a vLLM engine in this process for scoring, with defaults that suit prefill on the platform at hand.

Runs in the child of :class:`~vllm_kl.engines.process.ProcessEngine`. Every default can be overridden by the caller
under vLLM's own name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from typing import Any

from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.errors import OptionError, ReadoutUnavailableError


def start(*, model: str, readout: str, options: dict[str, Any]) -> GenerateEngine:
    """Return a running engine.

    Raises:
        OptionError: an option does not exist, or would break scoring.
        ReadoutUnavailableError: this engine cannot do ``readout``.
    """
    if readout not in ("auto", "flat"):
        raise ReadoutUnavailableError(
            f"readout={readout!r} is not available on an owned engine in this version; use 'auto' or 'flat'"
        )
    from vllm import LLM, EngineArgs
    from vllm.platforms import current_platform

    _check_options(options, {field.name for field in dataclasses.fields(EngineArgs)})
    options = {**_defaults(is_cpu=current_platform.is_cpu()), **options}
    # An engine that generates refuses a prompt of max_model_len, for want of room for one more token. Give it that room:
    # the token is sampled and never fed back, so no position past the model's last is computed.
    max_model_len = EngineArgs(model=model, **options).create_model_config().max_model_len  # refuses what is too long
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return GenerateEngine(LLM(model, **{**options, "max_model_len": max_model_len + 1}))


def _check_options(options: dict[str, Any], known: set[str]) -> None:
    for name in options:
        if name == "model" or name not in known:
            close = difflib.get_close_matches(name, known - {"model"}, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise OptionError(f"unknown engine option {name!r}: vLLM's EngineArgs has none of this name.{hint}")
    if options.get("enable_prefix_caching") is False:
        raise OptionError(
            "enable_prefix_caching=False would make share_prefix meaningless; pass share_prefix=False instead"
        )


def _defaults(*, is_cpu: bool) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,  # ids come in, log-probs go out
        "disable_log_stats": True,
        "enable_prefix_caching": True,
    }
    if is_cpu:
        # vLLM's default on the CPU is to take 92 % of the memory and refuse to start if that is not free.
        # [rows, vocabulary] logits are made in one piece per step: fewer rows keep them small.
        defaults |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "max_num_batched_tokens": 2048}
    return defaults
