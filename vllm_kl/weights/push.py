"""A trainer's weights into the engines that generate and score: the plain call, and TorchRL's two ways to make it.

    state dict -> checked against the engine's model -> shared memory -> every worker -> cache emptied -> version stamped

See :mod:`vllm_kl.weights.checkpoint` for the first half and :mod:`vllm_kl.weights.live` for the second. Nothing here needs NCCL,
a process group or a GPU. Where trainer and engine have GPUs of their own and a model is large, vLLM's and TorchRL's NCCL ways
(``update_weights``, ``VLLMWeightSyncScheme``) are faster, and :func:`finish_update` after them does what they leave out.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from pathlib import Path
from typing import Any

from vllm_kl.errors import OptionError, WeightsError
from vllm_kl.weights.collector_errors import check_collector
from vllm_kl.weights.live import AsyncWeights, LiveWeights, Weights


def push_weights(engine: Any, state_dict: Any, *, version: int | None = None) -> int:
    """Make a vLLM engine serve other weights; return their version.

    Afterwards no KV of the old weights is left. All or nothing: whatever fails or is interrupted, the old weights and their version
    serve. Pushes at the same time take turns, and get a version each.

    Args:
        engine: a ``vllm.LLM``, an ``AsyncLLM`` (from a thread other than its event loop's), a ``VLLMScorer``, a
            ``VLLMReference``, or a TorchRL ``vLLMWrapper`` of one of these.
        state_dict: tensors in transformers' names, on any device, in any floating dtype; or a module, or a tensordict. Wrappers
            are seen through: ``torch.compile``, DDP, FSDP, checkpointing, value heads, a merged PEFT model, TorchRL's modules.
            What is sharded is gathered, for which every rank must call; or call torch's ``get_model_state_dict`` on every
            rank, with ``full_state_dict`` and ``cpu_offload``, and push on rank 0. Tied weights may be left out.
        version: of the new weights, above the one that serves; ``None`` is the next.

    Returns:
        The version that serves now.

    Raises:
        WeightsError: the state dict is not that of the engine's model, or cannot be made so (adapters that are not merged,
            quantised weights, parts of weights that are on other ranks), there is no room for it, the engine has not loaded the
            plugin or is busy (nothing was touched), or it could not be loaded (the old weights were put back).
        EngineError: the engine died; says which version it served last.
        CollectorError: an error has ended the thread of a collector that generates with the engine; nothing was pushed.

    >>> before = scorer.weight_version
    >>> push_weights(scorer, weights) == scorer.weight_version == before + 1
    True
    """
    engine = _engine_behind(engine)
    if _is_async(engine):
        handler = getattr(engine, "output_handler", None)
        if handler is None or handler.done():
            raise WeightsError(
                "the AsyncLLM's event loop is not known before its first request: await push_weights_async()"
            )
        loop = handler.get_loop()
        if loop is _running_loop():
            raise WeightsError(
                "push_weights would block the event loop that the AsyncLLM needs: await push_weights_async()"
            )
        return asyncio.run_coroutine_threadsafe(
            push_weights_async(engine, state_dict, version=version), loop
        ).result()
    weights = weights_of(engine)
    check_collector(followed(engine))
    state = weights.skeleton.checked(state_dict)
    weights.next_version(version)  # refuses before anything is written; load() chooses
    return weights.load(weights.skeleton.write(state), version=version)


def finish_update(engine: Any, *, version: int | None = None, source: Any = None, check: bool = True) -> int:
    """Let an engine serve weights that came another way: vLLM's weight transfer or ``reload_weights``, TorchRL's NCCL senders.

    Those leave KV of the old weights in the prefix cache, the version as it was and, in vLLM 0.32, some layers without
    their new weights: experts and tied LM heads on a CPU, tensors that a model copies itself. Afterwards all of it is of the
    new ones: what was sent is loaded again.

    Args:
        engine: a ``vllm.LLM``, or a TorchRL ``vLLMWrapper`` of one.
        version: as :func:`push_weights` takes it.
        source: what was sent: a checkpoint's folder, or what :func:`push_weights` takes. ``None``: the folder that vLLM's
            ``reload_weights`` was told.
        check: ``False`` compares nothing and mends nothing: it empties the cache, stamps the version, and believes the rest.

    Returns:
        The version that serves now.

    Raises:
        WeightsError: the engine is none of these; requests are unfinished; the engine holds other weights than the folder, or what
            was sent cannot be loaded.
        EngineError: the engine died.

    >>> # llm.collective_rpc("reload_weights", kwargs={"weights_path": "step-7"}); finish_update(llm, version=7)
    """
    weights = weights_of(engine)
    if not isinstance(weights, LiveWeights):
        raise WeightsError(
            "nobody but push_weights() and refresh() can load weights into the engine that a scorer owns"
        )
    if source is None:
        return weights.take_over(version=version, check=check)
    if not check:
        raise OptionError("check=False compares nothing: source has no effect")
    if isinstance(source, (str, os.PathLike)):
        return weights.load_folder(Path(source), version=version)
    return push_weights(engine, source, version=version)


async def push_weights_async(engine: Any, state_dict: Any, *, version: int | None = None) -> int:
    """As :func:`push_weights`, for an ``AsyncLLM``, in its event loop.

    Requests in flight finish with the old weights; requests that come in the meantime wait for the new ones. When it is cancelled,
    a load that has begun goes on to its end: ask the engine for its version.
    """
    weights = AsyncWeights(engine)
    state = await asyncio.to_thread(lambda: weights.skeleton.checked(state_dict))
    await weights.next_version(version)
    return await weights.load(await asyncio.to_thread(weights.skeleton.write, state), version=version)


def weights_of(engine: Any) -> Weights:
    """Return what is known of an engine's weights.

    Raises:
        WeightsError: nothing is.
    """
    engine = _engine_behind(engine)
    weights = getattr(engine, "weights", None)  # a VLLMScorer
    if weights is not None:
        return weights
    llm_engine = getattr(engine, "llm_engine", None)
    if llm_engine is None:
        raise WeightsError(
            f"expected a vllm.LLM, an AsyncLLM or a VLLMScorer, got {type(engine).__name__}. TorchRL's AsyncVLLM and Ray actors "
            "have their own way: vLLMUpdaterV2"
        )
    return LiveWeights(llm_engine)


def _engine_behind(engine: Any) -> Any:
    """Return the engine behind TorchRL's wrappers."""
    for name in ("scorer", "model"):  # VLLMReference, vLLMWrapper
        inner = getattr(engine, name, None)
        if inner is not None and (
            hasattr(inner, "weights") or hasattr(inner, "llm_engine") or _is_async(inner)
        ):
            return inner
    return engine


def followed(engine: Any) -> Any:
    """Return what stands for an engine where a collector's thread is followed."""
    engine = _engine_behind(engine)
    return getattr(engine, "llm_engine", engine)


def _is_async(engine: Any) -> bool:
    return inspect.iscoroutinefunction(getattr(engine, "collective_rpc", None))


def _running_loop() -> Any:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
