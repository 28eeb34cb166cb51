"""The ways to score that are compared. Each runs in a process of its own.

A provider is a generator: it starts, yields a :class:`~vllm_kl.bench.types.Running`, and ends what it has
started when it goes on. vLLM, torch and the peers are imported in the functions.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kl.bench.floor import floor
from vllm_kl.bench.models import make_tokenizer
from vllm_kl.bench.types import Provider, Running, Setup
from vllm_kl.errors import OptionError, ReadoutUnavailableError

LOGITS_OF_ONE = 2048  # tokens of a request in a step of vLLM's own ways
SLICE_BYTES = 1 << 30  # of the logits in float32 of a slice of transformers and TRL


@contextlib.contextmanager
def _installed(what: str, cure: str) -> Iterator[None]:
    """Import a peer's package: one that is not installed is not measured, and has not failed."""
    try:
        yield
    except ImportError as error:
        raise ReadoutUnavailableError(f"{what} cannot be imported ({error}): {cure}") from error


def ours(setup: Setup) -> Iterator[Running]:
    """``VLLMScorer``, with an engine of its own, or replicas."""
    from vllm_kl import VLLMScorer

    options = setup.engine_options(generates=False)  # an engine that generates makes room for its token
    if setup.replicas > 1:
        options["replicas"] = setup.replicas
    choices = {"readout": setup.readout, "share_prefix": setup.share_prefix}
    with VLLMScorer(setup.model, **choices, **options) as scorer:

        def told() -> dict[str, Any]:
            stats = scorer.stats
            return {
                "readout": scorer.readout,
                "engine_computed_tokens": stats.num_prompt_tokens - stats.num_cached_tokens,
                "num_rescored": stats.num_rescored,
            }

        engine = getattr(scorer._engine, "pid", None) if setup.num_processes == 1 else None
        yield Running(scorer.score, () if engine is None else (os.getpid(), engine), told)


def peer_options(setup: Setup) -> dict[str, Any]:
    """Return the options of an engine of vLLM's own ways: the mode and the steps of our engine.

    A request computes at most 2,048 tokens of a step, because vLLM holds the logits of all its tokens in a
    step (``_get_prompt_logprobs_dict``, ``v1/worker/gpu_model_runner.py``, 0.32).
    """
    options: dict[str, Any] = {"enforce_eager": True, "max_num_batched_tokens": 4096}
    if setup.device == "cuda":
        options = {"compilation_config": {"cudagraph_mode": "NONE"}, "max_num_batched_tokens": 16_384}
    options |= setup.engine_options(generates=True)
    if options["max_model_len"] > LOGITS_OF_ONE:  # vLLM refuses a limit above the longest sequence
        options.setdefault("long_prefill_token_threshold", LOGITS_OF_ONE)
    return options


def with_kv_cache(setup: Setup, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the size of the KV cache, by the rule of our engine.

    Raises:
        OptionError: the KV of the longest sequence does not fit into the memory.
    """
    from vllm import EngineArgs

    from vllm_kl.engines.memory import kv_cache_bytes

    if not options.keys().isdisjoint(("kv_cache_memory_bytes", "gpu_memory_utilization")):
        return options
    config = EngineArgs(model=setup.model, **options).create_model_config()
    size_bytes = kv_cache_bytes(setup.model, config, options, is_cuda=setup.device == "cuda")
    if size_bytes is None:
        return options
    # Beside a size vLLM uses the share only to refuse a GPU that has less free.
    share = {"gpu_memory_utilization": 0.01} if setup.device == "cuda" else {}
    return {**options, **share, "kv_cache_memory_bytes": size_bytes}


def _shared_llm(setup: Setup) -> Any:
    import vllm

    # A token is sampled after the longest sequence, and never computed.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    settings = with_kv_cache(setup, peer_options(setup))
    llm = vllm.LLM(setup.model, **settings)
    generate = llm.generate
    llm.generate = lambda *a, **k: generate(*a, **{"use_tqdm": False, **k})
    return llm


def torchrl(setup: Setup) -> Iterator[Running]:
    """TorchRL's ``vLLMWrapper``: dicts of ``prompt_logprobs``."""
    import torch

    with _installed("TorchRL's vLLMWrapper", "pip install 'vllm-kl[torchrl]'"):
        from tensordict import TensorDict, lazy_stack, set_list_to_stack
        from torchrl.modules.llm import vLLMWrapper
        from torchrl.modules.llm.policies import Masks, Tokens

    set_list_to_stack(True).set()
    settings = {
        "input_mode": "tokens",
        "generate": False,
        "pad_output": False,
        "tokenizer": _tokenizer(setup),
    }
    wrapper = vLLMWrapper(_shared_llm(setup), **settings)

    def score(sequences: list[np.ndarray], starts: list[int]) -> list[Any]:
        ids = [torch.from_numpy(row) for row in sequences]
        masks = [Masks(all_attention_mask=torch.ones_like(row, dtype=torch.bool)) for row in ids]
        rows = [TensorDict(tokens=Tokens(full=s), masks=m) for s, m in zip(ids, masks, strict=True)]
        found = wrapper(lazy_stack(rows)).get(("log_probs", "full"), as_list=True)
        return [row[start:] for row, start in zip(found, starts, strict=True)]

    yield Running(score, _pids(setup))


def _pids(setup: Setup) -> tuple[int, ...]:
    """Return this process, with the engine in it; none if the engine has several."""
    return (os.getpid(),) if setup.num_processes == 1 else ()


def _tokenizer(setup: Setup) -> Any:
    """Return the model's tokenizer, or any: TorchRL wants one, and only token ids are scored."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(setup.model, **setup.loading)
    except (OSError, ValueError):
        return make_tokenizer()


def _native(setup: Setup, readout: str) -> Iterator[Running]:
    """vLLM's own way, through its public API, and as vLLM does it by default: without shared prefixes."""
    from vllm_kl import VLLMScorer

    scorer = VLLMScorer(_shared_llm(setup), readout=readout, share_prefix=False)
    yield Running(scorer.score, _pids(setup), told=lambda: {"readout": scorer.readout})


def flat(setup: Setup) -> Iterator[Running]:
    """vLLM's leanest prompt log-probs: ``flat_logprobs=True, prompt_logprobs=0, detokenize=False``."""
    yield from _native(setup, "flat")


def token_ids(setup: Setup) -> Iterator[Running]:
    """vLLM's ``prompt_logprob_token_ids``, which needs its V2 model runner and so a GPU."""
    yield from _native(setup, "token_ids")


def load_model(setup: Setup, dtype: str) -> Any:
    """Return the model by transformers, on the device."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=getattr(torch, dtype), **setup.loading)
    return model.to(setup.device).eval()


def _padded(setup: Setup, read: Callable[[Any, Any, int], Any]) -> Iterator[Running]:
    """Score with transformers, in slices of like sequences whose logits take at most 1 GiB."""
    import torch

    model = load_model(setup, setup.dtype)
    vocab_size = model.config.get_text_config().vocab_size

    @torch.no_grad()
    def score(sequences: list[np.ndarray], starts: list[int]) -> list[Any]:
        scored: dict[int, Any] = {}
        for part in slices(list(map(len, sequences)), starts, SLICE_BYTES // (vocab_size * 4)):
            ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(sequences[i]) for i in part], True)
            first = min(starts[i] for i in part)
            found = read(model, ids.to(setup.device), first).cpu()
            for row, i in zip(found, part, strict=True):
                scored[i] = row[starts[i] - first : len(sequences[i]) - first]
        return [scored[i] for i in range(len(sequences))]

    yield Running(score)


def slices(lengths: Sequence[int], starts: Sequence[int], most_rows: int) -> Iterator[list[int]]:
    """Yield the indices of sequences of like lengths, each once.

    The sequences of a slice are padded to its longest, and scored from its smallest start on. A slice has at
    most ``most_rows`` rows of logits, or one sequence.
    """
    part: list[int] = []
    first = 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], starts[i])):
        first = min(first, starts[i]) if part else starts[i]
        if part and (len(part) + 1) * (lengths[i] - first + 1) > most_rows:
            yield part
            part, first = [], starts[i]
        part.append(i)
    if part:
        yield part


def transformers(setup: Setup) -> Iterator[Running]:
    """transformers: a padded batch, and logits of the scored rows only."""

    def read(model: Any, ids: Any, start: int) -> Any:
        logits = model(ids, logits_to_keep=ids.shape[1] - start + 1, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0]

    yield from _padded(setup, read)


def trl(setup: Setup) -> Iterator[Running]:
    """TRL's fused head (1.16), a kernel of Triton, called as TRL's trainers call it."""
    if setup.device != "cuda":
        raise ReadoutUnavailableError("TRL's fused head is a kernel of Triton, which needs a GPU")
    with _installed("TRL 1.16's fused head", "pip install 'trl>=1.16'"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    yield from _padded(setup, fused_reader(ChunkedLogProbFunction))


def fused_reader(function: Any) -> Callable[[Any, Any, int], Any]:
    """Return how to score with TRL's function, whose arguments behind the first four differ by version.

    Raises:
        ReadoutUnavailableError: this TRL has an argument that is not known here.
    """
    known = {
        "temperature": 1.0,
        "chunk_size": 32_768,
        "final_logit_softcapping": None,
        "logit_scale": 1.0,
        "outputs": (),
    }
    _, _, _, _, _, *names = inspect.signature(function.forward).parameters
    if unknown := [name for name in names if name not in known]:
        raise ReadoutUnavailableError(
            f"this TRL's fused head has the argument {unknown[0]!r}, which TRL 1.16 has not"
        )

    def read(model: Any, ids: Any, start: int) -> Any:
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[:, start - 1 : -1]
        targets = ids[:, start:]
        weight = model.get_output_embeddings().weight
        given = (known[name] for name in names)
        found = function.apply(hidden.flatten(0, 1), weight, None, targets.flatten(), *given)
        return found[0].view(targets.shape)

    return read


def sglang_options(setup: Setup) -> dict[str, Any]:
    """Return the options of SGLang's engine."""
    return {
        "model_path": setup.model,
        "dtype": setup.dtype,
        # SGLang refuses a prompt of context_length - 6 tokens (managers/scheduler.py and utils.py, 0.5).
        "context_length": setup.max_tokens + 8,
        # SGLang's default, "fcfs", computes the prompt of each response of a batch. "lpm" computes one of a
        # group first, so that the others find its prompt in the cache (managers/schedule_policy.py, 0.5).
        "schedule_policy": "lpm",
        "tp_size": setup.engine.get("tensor_parallel_size", 1),
        "pp_size": setup.engine.get("pipeline_parallel_size", 1),
        "skip_tokenizer_init": True,
        "log_level": "error",
        **setup.loading,
    }


def sglang(setup: Setup) -> Iterator[Running]:
    """SGLang's engine with ``logprob_start_len``: it shares prefixes and skips the prompts' logits."""
    with _installed("SGLang", "pip install sglang, in an environment of its own"):
        import sglang as package

    # The eight more tokens of the context may be beyond the model's length. None of them is computed.
    os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    engine = package.Engine(**sglang_options(setup))

    try:
        yield Running(partial(ask_sglang, engine), pids=())
    finally:
        engine.shutdown()


def ask_sglang(engine: Any, sequences: list[np.ndarray], starts: list[int]) -> list[np.ndarray]:
    """Return the log-probs of each sequence from its start on, by SGLang's engine."""
    asked = {"input_ids": [row.tolist() for row in sequences], "return_logprob": True}
    first = [start - 1 for start in starts]
    answers = engine.generate(sampling_params={"max_new_tokens": 0}, logprob_start_len=first, **asked)
    rows = [[entry[0] for entry in answer["meta_info"]["input_token_logprobs"]] for answer in answers]
    # The first entry is of the token before, and empty.
    return [
        np.asarray(row[len(row) - (len(ids) - start) :], np.float32)
        for row, ids, start in zip(rows, sequences, starts, strict=True)
    ]


PROVIDERS: dict[str, Provider] = {
    made.__name__: made for made in (ours, torchrl, flat, token_ids, sglang, transformers, trl, floor)
}
# Other ways to score; they are slow, so they take part in fewer rounds.
PEERS = frozenset(PROVIDERS) - {"ours", "floor"}
NEED_A_GPU = frozenset({"token_ids", "sglang", "trl"})


def num_gpus_of(name: str, setup: Setup) -> int | None:
    """Return how many GPUs a provider takes; ``None``: Ray chooses those of replicas."""
    if name in ("transformers", "trl", "floor"):
        return 1
    return None if name == "ours" and setup.replicas > 1 else setup.num_processes


def usable(device: str) -> list[str]:
    """Return the providers that this machine can run, by what is installed."""
    packages = {"trl": "trl", "sglang": "sglang", "torchrl": "torchrl"}
    names = [name for name in PROVIDERS if name not in packages or find_spec(packages[name]) is not None]
    return [name for name in names if device == "cuda" or name not in NEED_A_GPU]


def find(name: str) -> Provider:
    """Return a provider by its name, or one of the user's by ``module:function``.

    The user's module may be in this folder. The folder comes last in ``sys.path``: a ``queue.py`` in it must
    not stand in the place of Python's own.

    Raises:
        OptionError: there is none.
    """
    if name in PROVIDERS:
        return PROVIDERS[name]
    module, colon, function = name.partition(":")
    sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function) if colon else None
    except (ImportError, AttributeError) as error:
        raise OptionError(f"--providers {name}: {error}") from error
    if found is None:
        raise _unknown(name)
    return found


def _unknown(name: str) -> OptionError:
    return OptionError(
        f"--providers {name[:80]!r}: expected {', '.join(PROVIDERS)}, or module:function of your own"
    )


def check_names(names: Sequence[str]) -> None:
    """Refuse names that cannot be, without an import of the user's own modules."""
    for name in names:
        module, _, function = name.partition(":")
        is_own = all(part.isidentifier() for part in (*module.split("."), function))
        if name not in PROVIDERS and not is_own:
            raise _unknown(name)
    if doubled := sorted({name for name in names if list(names).count(name) > 1}):
        raise OptionError(f"--providers: {', '.join(doubled)} is given twice")
