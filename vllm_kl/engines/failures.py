"""Why an engine did not start, in one sentence: vLLM's, pydantic's and transformers' errors as this package's.

An error that speaks of one option names it first. What is known to have one cure says it. The log has the rest.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_kl.errors import EngineError, OptionError, VLLMKLError

_OTHER_WEIGHTS = (
    "its weights are not those that its config describes (sizes, layers, tensors). Save both again; or hf_overrides "
    "is wrong"
)
# What vLLM, transformers and huggingface_hub say, and what to do.
_CURES = (
    (
        r"Invalid repository ID.*\.gguf",
        "vLLM 0.32 loads no GGUF files of its own. Pass the folder of the model that the file was made from",
    ),
    (
        r"couldn't connect to|LocalEntryNotFound|outgoing traffic has been disabled|offline mode|Cannot find the requested files|"
        r"not a valid model identifier|Repository Not Found|RepositoryNotFound|is not a local folder|"
        r"Repo id must|HFValidationError|Invalid repository ID",
        "it is neither a folder here nor in the hub's cache, and it cannot be downloaded. Check the name, download it first, "
        "or pass the path of its folder (HF_HUB_OFFLINE=1 forbids downloads)",
    ),
    (
        r"does not recognize this architecture|are not supported for now|has no vLLM implementation|failed to be inspected|"
        r"No model architectures are specified|Unrecognized model",
        "this vLLM cannot load the architecture. A newer vLLM may, or model_impl='transformers' where transformers knows it; "
        "TransformersWrapper(generate=False) as the reference works with every model of transformers",
    ),
    (
        r"no weights for|were not initialized from",
        "its checkpoint lacks weights that its config describes. Save it again, whole; where the head is the embeddings, its "
        "config must say tie_word_embeddings=true",
    ),
    (
        r"Cannot find any model weights",
        "its folder has no weights of this load_format. Leave load_format out, or save the model as safetensors",
    ),
    (
        r"contains custom code",
        "its architecture is code beside its weights. Pass trust_remote_code=True if you trust it",
    ),
    (
        r"backend tokenizer|Can't load tokenizer",
        "it has no tokenizer, and an engine that is given ids needs none. Leave skip_tokenizer_init and tokenizer out",
    ),
    (
        r"SafetensorError|PytorchStreamReader|UnpicklingError",
        "a file of its weights is damaged or not complete. Download or save it again",
    ),
    (
        r"out of memory|OutOfMemory|can't allocate memory|Cannot allocate memory",
        "it needs more memory than there is. Pass a smaller max_model_len or max_num_batched_tokens, a 16-bit dtype, or "
        "tensor_parallel_size",
    ),
    (
        r"is larger than the available KV cache memory|max seq len|No available memory for the cache",
        "the KV of one sequence does not fit. Pass a smaller max_model_len, more kv_cache_memory_bytes or "
        "num_gpu_blocks_override, or more gpu_memory_utilization",
    ),
)
_LOG = "The end of its log:"
_WRAPPERS = re.compile(
    r"Engine core initialization failed|Worker failed with error|WorkerProc initialization failed|EngineDead"
)
# The last line of a traceback, with or without what vLLM's log writes before it.
_LAST_LINE = re.compile(r"(?:^|\] ?)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)(?:: .+)?)$")


def explain(error: Exception, *, model: str, options: Mapping[str, Any]) -> VLLMKLError:
    """Return this package's error for one that vLLM raised while an engine was started.

    Args:
        error: what was raised.
        model: the name or path that the caller gave.
        options: the engine options that the caller gave.
    """
    if isinstance(error, VLLMKLError):
        return error
    is_of_options = type(error).__name__ == "ValidationError" and hasattr(error, "errors")  # pydantic's
    text = _of_pydantic(error) if is_of_options else f"{error}".strip() or _where(error)
    text = re.sub(r"\s+", " ", text)
    known = f"{type(error).__name__}: {text}"
    cure = next((cure for pattern, cure in _CURES if re.search(pattern, known, re.IGNORECASE)), "")
    if not cure and any(
        frame.f_code.co_name == "load_weights" for frame, _ in traceback.walk_tb(error.__traceback__)
    ):
        cure = _OTHER_WEIGHTS
    name = _blamed(error, text, options)
    what = (
        text
        if is_of_options or isinstance(error, (ValueError, OSError))
        else f"{type(error).__name__}: {text}"
    )
    told = f"vLLM failed: {what}"
    if cure:
        told = f"model {model!r}: {cure}. {told}"
    if name is not None:
        return OptionError(f"engine option {name}={options[name]!r} does not work. {told}")
    return EngineError(told)


def with_log(told: str, log: str, lines: int = 25) -> str:
    """Return a message with the end of the engine's log; before it the cause, where the message is of what waited for it.

    A message that has a log already is returned as it is.
    """
    if _LOG in told:
        return told
    if (cause := root_cause(log)) and (_WRAPPERS.search(told) or "process died" in told):
        told = f"{cause}. {told}"
    end = "\n".join(log.splitlines()[-lines:])
    return f"{told.rstrip('.')}. {_LOG}\n{end or '(no log)'}"


def root_cause(log: str) -> str:
    """Return the last line of the first traceback that others were waiting for, or of the last one; empty if there is none."""
    cause = ""
    for line in log.splitlines():
        if match := _LAST_LINE.search(line.rstrip()):
            if _WRAPPERS.search(match[1]):
                break
            cause = match[1]
    return cause


def _of_pydantic(error: Any) -> str:
    """Return what each check found, without the input that pydantic prints, which is the whole of vLLM's arguments."""
    told: dict[str, str] = {}
    for found in error.errors(include_url=False):
        where = str(found["loc"][0]) if found["loc"] else ""  # then come the alternatives that it may be
        got = f", got {found['input']!r}" if where else ""
        told.setdefault(where, found["msg"].removeprefix("Value error, ") + got)
    return "; ".join(f"{where}: {what}" if where else what for where, what in told.items())


def _where(error: Exception) -> str:
    """Return the line that raised an error without a text: a bare assertion."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].line} ({Path(frames[-1].filename).name}, {frames[-1].name})" if frames else ""


def _blamed(error: Any, text: str, options: Mapping[str, Any]) -> str | None:
    """Return the option of the caller's that an error is about: a function that raised it, or named where it failed, or in its
    text, or by its value there."""
    codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    if raised := [name for name, value in options.items() if getattr(value, "__code__", None) in codes]:
        return raised[0]
    if hasattr(error, "errors"):
        places = {str(part) for found in error.errors(include_url=False) for part in found["loc"]}
        if named := places & options.keys():
            return min(named)
    elif not isinstance(error, (ValueError, NotImplementedError)):
        return None
    plain = re.sub(r"[\s-]+", "_", text.lower())
    named = [name for name in options if re.search(rf"(?<![a-z]){re.escape(name)}(?![a-z])", plain)]
    return max(named or _quoted(text, options), key=len, default=None)


def _quoted(text: str, options: Mapping[str, Any]) -> list[str]:
    """Return the options whose values an error quotes. One that is vLLM's default is no cause: "auto", "cpu"."""
    from vllm import EngineArgs

    given = {
        n: value
        for n, value in options.items()
        if isinstance(value, str) and value != getattr(EngineArgs, n, None)
    }
    return [
        n
        for n, v in given.items()
        if re.search(rf"(['\"`]){re.escape(v)}\1|[:=] ?{re.escape(v)}(?![\w-]|\.\w)", text)
    ]
