"""Turns an error at an engine's start, of vLLM, pydantic or transformers, into this package's error.

The message begins with the option that caused the error, if one did. It says the cure, if the error has a
known one. The end of the engine's log follows.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_kl.errors import EngineError, OptionError, VLLMKLError

_OTHER_WEIGHTS = (
    "its weights do not match its config (sizes, layers, tensors). Save both again, or correct hf_overrides"
)
# (pattern in an error of vLLM, transformers or huggingface_hub, cause and cure)
_CURES = (
    (
        r"Invalid repository ID.*\.gguf",
        "vLLM 0.32 itself loads no GGUF files. Pass the folder of the model that the file was made from",
    ),
    (
        r"couldn't connect to|LocalEntryNotFound|outgoing traffic has been disabled|offline mode|"
        r"Cannot find the requested files|"
        r"not a valid model identifier|Repository Not Found|RepositoryNotFound|is not a local folder|"
        r"Repo id must|HFValidationError|Invalid repository ID",
        "it is no folder here, it is not in the hub's cache, and it cannot be downloaded. Check the name, "
        "download it first, or pass the path of its folder (HF_HUB_OFFLINE=1 forbids downloads)",
    ),
    (
        r"does not recognize this architecture|are not supported for now|has no vLLM implementation|"
        r"failed to be inspected|"
        r"No model architectures are specified|Unrecognized model",
        "this vLLM cannot load the architecture. Try a newer vLLM, or model_impl='transformers' if "
        "transformers knows the architecture. TransformersWrapper(generate=False) as the reference works "
        "with every model of transformers",
    ),
    (
        r"no weights for|were not initialized from",
        "its checkpoint lacks weights that its config describes. Save the whole checkpoint again. If the LM "
        "head shares the weights of the embeddings, the config must say tie_word_embeddings=true",
    ),
    (
        r"Cannot find any model weights",
        "its folder has no weights in this load_format. Leave load_format out, or save the model as "
        "safetensors",
    ),
    (
        r"contains custom code",
        "its architecture is Python code in the checkpoint. Pass trust_remote_code=True if you trust this "
        "code",
    ),
    (
        r"backend tokenizer|Can't load tokenizer",
        "it has no tokenizer, and a scorer needs none. Leave skip_tokenizer_init and tokenizer out",
    ),
    (
        r"SafetensorError|PytorchStreamReader|UnpicklingError",
        "a weights file is damaged or incomplete. Download or save it again",
    ),
    (
        r"out of memory|OutOfMemory|can't allocate memory|Cannot allocate memory",
        "it needs more memory than there is. Pass a smaller max_model_len or max_num_batched_tokens, a "
        "16-bit dtype, or tensor_parallel_size",
    ),
    (
        r"is larger than the available KV cache memory|max seq len|No available memory for the cache",
        "the KV of one sequence does not fit. Pass a smaller max_model_len, or a larger "
        "kv_cache_memory_bytes, num_gpu_blocks_override or gpu_memory_utilization",
    ),
)
_LOG = "The end of its log:"
_WRAPPERS = re.compile(
    r"Engine core initialization failed|Worker failed with error|WorkerProc initialization failed|EngineDead"
)
# The last line of a traceback, with or without the prefix that vLLM's log puts before it.
_LAST_LINE = re.compile(r"(?:^|\] ?)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)(?:: .+)?)$")


def explain(error: Exception, *, model: str, options: Mapping[str, Any]) -> VLLMKLError:
    """Return this package's error for an error that vLLM raised at an engine's start.

    Args:
        error: the error.
        model: the caller's name or path of the model.
        options: the caller's engine options.
    """
    if isinstance(error, VLLMKLError):
        return error
    is_pydantic = type(error).__name__ == "ValidationError" and hasattr(error, "errors")
    text = _pydantic_text(error) if is_pydantic else f"{error}".strip() or _failed_line(error)
    text = re.sub(r"\s+", " ", text)
    known = f"{type(error).__name__}: {text}"
    cure = next((cure for pattern, cure in _CURES if re.search(pattern, known, re.IGNORECASE)), "")
    if not cure and any(
        frame.f_code.co_name == "load_weights" for frame, _ in traceback.walk_tb(error.__traceback__)
    ):
        cure = _OTHER_WEIGHTS
    option = _option_to_blame(error, text, options)
    message = f"vLLM failed: {text if is_pydantic or isinstance(error, (ValueError, OSError)) else known}"
    if cure:
        message = f"model {model!r}: {cure}. {message}"
    if option is not None:
        return OptionError(f"engine option {option}={options[option]!r} does not work. {message}")
    return EngineError(message)


def with_log(message: str, log: str, lines: int = 25) -> str:
    """Return a message, followed by the end of the engine's log.

    If the message says only that a process failed, the cause that the log names comes first. A message that
    has a log already is returned unchanged.
    """
    if _LOG in message:
        return message
    if (cause := root_cause(log)) and (_WRAPPERS.search(message) or "process died" in message):
        message = f"{cause}. {message}"
    end = "\n".join(log.splitlines()[-lines:])
    return f"{message.rstrip('.')}. {_LOG}\n{end or '(no log)'}"


def root_cause(log: str) -> str:
    """Return the error that made the engine fail, by its log; empty if the log has no traceback.

    It is the last error before the first one that only reports another process's failure.
    """
    cause = ""
    for line in log.splitlines():
        if match := _LAST_LINE.search(line.rstrip()):
            if _WRAPPERS.search(match[1]):
                break
            cause = match[1]
    return cause


def _pydantic_text(error: Any) -> str:
    """Return the message of each failed check, without all of vLLM's arguments, which pydantic prints."""
    messages: dict[str, str] = {}
    for found in error.errors(include_url=False):
        option = str(found["loc"][0]) if found["loc"] else ""  # loc[1:] are the types that pydantic tried
        got = f", got {found['input']!r}" if option else ""
        messages.setdefault(option, found["msg"].removeprefix("Value error, ") + got)
    return "; ".join(f"{option}: {message}" if option else message for option, message in messages.items())


def _failed_line(error: Exception) -> str:
    """Return the source line that raised an error, for an error without a text (a bare assertion)."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].line} ({Path(frames[-1].filename).name}, {frames[-1].name})" if frames else ""


def _option_to_blame(error: Any, text: str, options: Mapping[str, Any]) -> str | None:
    """Return the caller's option that an error is about; ``None`` if no option is.

    It is an option whose function raised the error, whose name pydantic gives or the text contains, or whose
    value the text quotes.
    """
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
    """Return the options whose values an error quotes, except values that are vLLM's defaults ("auto")."""
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
