"""Pushes a trainer's weights into the engines that generate and score.

    state dict -> check against the engine's model -> write to shared memory   (weights/checkpoint.py)
        -> load in every worker -> empty the prefix cache -> set the version   (weights/live_weights.py)

A push by files needs no NCCL, no process group and no GPU. ``transport="nccl"`` (weights/nccl.py) sends the
tensors from the trainer's GPU to the workers' GPUs instead. vLLM's and TorchRL's own transfers load into the
serving model; call :func:`finish_update` after them.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from pathlib import Path
from typing import Any

from vllm_kl.errors import OptionError, WeightsError
from vllm_kl.weights import nccl
from vllm_kl.weights.collector_errors import check_collector
from vllm_kl.weights.live_weights import AsyncWeights, LiveWeights, Weights
from vllm_kl.weights.replicas import ReplicaWeights, is_replicated, replica_weights


def push_weights(
    engine: Any, state_dict: Any, *, version: int | None = None, transport: str = "files"
) -> int:
    """Load new weights into a vLLM engine; return their version.

    The prefix cache has no KV of the old weights afterwards. If the push fails or is interrupted, the engine
    keeps the old weights and their version; ``WeightsError``, below, has one exception. Pushes of several
    threads take turns, and each gets its own version.

    Args:
        engine: a ``vllm.LLM``, an ``AsyncLLM`` (from a thread other than its event loop's), TorchRL's
            ``AsyncVLLM`` (all replicas serve the new weights, or none does), a ``VLLMScorer``, a
            ``VLLMReference``, or a TorchRL ``vLLMWrapper`` of one of these.
        state_dict: a state dict with transformers' names, a module, or a tensordict; on any device, in any
            floating dtype. Wrappers of the model are removed: ``torch.compile``, DDP, FSDP, checkpointing,
            value heads, PEFT, TorchRL's modules. LoRA adapters are merged into new tensors. Sharded tensors
            are gathered, so every rank must call this function; or call torch's ``get_model_state_dict`` on
            every rank, with ``full_state_dict`` and ``cpu_offload``, and push on rank 0. Tied weights may be
            left out.
        version: the version of the new weights, above the present one; ``None`` takes the next number.
        transport: ``"files"`` in shared memory work everywhere. ``"nccl"`` sends the tensors from the
            trainer's GPU to the GPUs of an ``AsyncVLLM``, with vLLM 0.28 or later. The trainer needs a GPU
            that no worker uses.

    Returns:
        The version of the new weights.

    Raises:
        WeightsError: the weights are not of the engine's model, or are not plain (unmerged adapters other
            than LoRA, quantised weights, weights on other ranks); there is no room for them; the engine has
            not loaded the plugin, or is busy; or the load failed. The engine keeps the old weights, unless
            they could not be put back after a failed load: then the message says so, and the version of the
            engine's weights is not known. Or ``transport="nccl"`` cannot be used here.
        OptionError: there is no such ``transport``.
        EngineError: the engine died. The message names its last version.
        CollectorError: an error ended the thread of a collector that generates with the engine. Nothing was
            pushed.

    >>> before = scorer.weight_version
    >>> push_weights(scorer, weights) == scorer.weight_version == before + 1
    True
    """
    engine = _engine_behind(engine)
    check_transport(engine, transport)
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
    weights: Any = weights_of(engine)
    check_collector(followed(engine))
    state = weights.skeleton.checked(state_dict)
    weights.next_version(version)  # refuse a version before anything is written; load() gives the version
    if transport == "nccl":
        return weights.send(weights.skeleton.as_in_files(state), version=version)
    return weights.load(weights.skeleton.write(state), version=version)


def finish_update(engine: Any, *, version: int | None = None, source: Any = None, check: bool = True) -> int:
    """Complete a load of weights by vLLM or TorchRL; return the version of the new weights.

    Call this after vLLM's weight transfer or ``reload_weights``, or after TorchRL's NCCL senders. They leave
    KV of the old weights in the prefix cache, and do not set the version. In vLLM 0.32 they also leave old
    weights in some layers: experts and tied LM heads on a CPU, and tensors that a model copies itself. This
    function loads the same weights again, empties the cache and sets the version.

    Args:
        engine: a ``vllm.LLM``, TorchRL's ``AsyncVLLM``, or a TorchRL ``vLLMWrapper`` of one of these.
        version: as in :func:`push_weights`.
        source: the weights that were sent: the folder of a checkpoint, or an argument of
            :func:`push_weights`. ``None`` takes the folder that vLLM's ``reload_weights`` loaded.
        check: ``False`` only empties the cache and sets the version; the weights are neither checked nor
            loaded again.

    Raises:
        WeightsError: the engine is none of these; it has unfinished requests; it has other weights than the
            folder; or the weights that were sent cannot be loaded.
        EngineError: the engine died.

    >>> # llm.collective_rpc("reload_weights", kwargs={"weights_path": "step-7"})
    >>> # finish_update(llm, version=7)
    """
    weights = weights_of(engine)
    if not isinstance(weights, (LiveWeights, ReplicaWeights)):
        raise WeightsError(
            "finish_update() has no effect on an engine that a scorer owns: only push_weights() and "
            "refresh() load weights there"
        )
    if source is None:
        return weights.take_over(version=version, check=check)
    if not check:
        raise OptionError("check=False compares nothing: source has no effect")
    if isinstance(source, (str, os.PathLike)):
        return weights.load_folder(Path(source), version=version)
    return push_weights(engine, source, version=version)


async def push_weights_async(engine: Any, state_dict: Any, *, version: int | None = None) -> int:
    """Push weights as :func:`push_weights` does, into an ``AsyncLLM``, in its event loop.

    Running requests finish with the old weights; requests that come meanwhile wait for the new weights. If
    this call is cancelled, a load that has begun goes on: ask the engine for its version.

    Args:
        engine: a ``vllm.v1.engine.async_llm.AsyncLLM`` of this event loop.
        state_dict, version: as in :func:`push_weights`.

    Returns:
        The version of the new weights.

    Raises:
        WeightsError: as in :func:`push_weights`; the engine keeps the old weights.
        EngineError: the engine died. The message names its last version.

    >>> # version = await push_weights_async(engine, trainer.state_dict())
    """
    weights = AsyncWeights(engine)
    state = await asyncio.to_thread(lambda: weights.skeleton.checked(state_dict))
    await weights.next_version(version)
    return await weights.load(await asyncio.to_thread(weights.skeleton.write, state), version=version)


def check_transport(engine: Any, transport: str) -> None:
    """Refuse a way of sending weights that does not reach an engine.

    Raises:
        OptionError: there is no such way.
        WeightsError: NCCL does not reach this kind of engine, or this vLLM cannot send by NCCL.
    """
    if transport not in ("files", "nccl"):
        raise OptionError(f"transport={transport!r}: expected 'files' or 'nccl'")
    if transport == "nccl":
        engine = _engine_behind(engine)
        if _is_async(engine) or not isinstance(weights_of(engine), ReplicaWeights):
            raise WeightsError(
                f"transport='nccl' reaches the replicas of TorchRL's AsyncVLLM only, and this is a "
                f"{type(engine).__name__}. Leave transport= out: files reach every engine"
            )
        nccl.check_installed()


def check_pushable(engine: Any, transport: str = "files") -> None:
    """Refuse an engine that :func:`push_weights` cannot push to.

    Raises:
        OptionError, WeightsError: as in :func:`check_transport`; or the engine is of another kind.
    """
    check_transport(engine, transport)
    if not _is_async(_engine_behind(engine)):
        weights_of(engine)


def weights_of(engine: Any) -> Weights:
    """Return the object that reads and replaces an engine's weights.

    Raises:
        WeightsError: the engine is of another kind.
    """
    engine = _engine_behind(engine)
    weights = getattr(engine, "weights", None)  # a VLLMScorer
    if weights is not None:
        return weights
    if is_replicated(engine):
        return replica_weights(engine)
    llm_engine = getattr(engine, "llm_engine", None)
    if llm_engine is None:
        if why := getattr(getattr(engine, "scorer", engine), "why_no_push", None):  # of a Ray service
            raise WeightsError(why)
        raise WeightsError(
            f"expected a vllm.LLM, an AsyncLLM, TorchRL's AsyncVLLM or a VLLMScorer, got "
            f"{type(engine).__name__}"
        )
    return LiveWeights(llm_engine)


def _engine_behind(engine: Any) -> Any:
    """Return the engine behind TorchRL's wrappers."""
    for name in ("scorer", "model"):  # VLLMReference, vLLMWrapper
        inner = getattr(engine, name, None)
        if inner is not None and (
            hasattr(inner, "weights")
            or hasattr(inner, "llm_engine")
            or _is_async(inner)
            or is_replicated(inner)
        ):
            return inner
    return engine


def followed(engine: Any) -> Any:
    """Return the object by which :mod:`vllm_kl.weights.collector_errors` knows an engine."""
    engine = _engine_behind(engine)
    return getattr(engine, "llm_engine", engine)


def _is_async(engine: Any) -> bool:
    return inspect.iscoroutinefunction(getattr(engine, "collective_rpc", None))


def _running_loop() -> Any:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
