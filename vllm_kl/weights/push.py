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
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.collectors.weight_update import WeightUpdaterBase
from torchrl.data import Composite
from torchrl.envs.llm.transforms import PolicyVersion
from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from vllm_kl.batch.outputs import declare
from vllm_kl.errors import OptionError, WeightsError
from vllm_kl.transforms.base import collector_of
from vllm_kl.transforms.from_collector import policy_of
from vllm_kl.transforms.watched_policy import POLICY_ADAPTER, POLICY_VERSION, UNKNOWN, generated_by, watch
from vllm_kl.types import Origin
from vllm_kl.weights.collector_errors import check_collector, follow
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
    engine = _inner(engine)
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
        return asyncio.run_coroutine_threadsafe(push_weights_async(engine, state_dict, version=version), loop).result()
    weights = weights_of(engine)
    check_collector(_followed(engine))
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
    engine = _inner(engine)
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


def _inner(engine: Any) -> Any:
    """Return the engine behind TorchRL's wrappers."""
    for name in ("scorer", "model"):  # VLLMReference, vLLMWrapper
        inner = getattr(engine, name, None)
        if inner is not None and (hasattr(inner, "weights") or hasattr(inner, "llm_engine") or _is_async(inner)):
            return inner
    return engine


def _followed(engine: Any) -> Any:
    """Return what stands for an engine where a collector's thread is followed."""
    return getattr(engine, "llm_engine", engine)


def _is_async(engine: Any) -> bool:
    return inspect.iscoroutinefunction(getattr(engine, "collective_rpc", None))


def _running_loop() -> Any:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class EnginePolicyVersion(PolicyVersion):
    """TorchRL's ``PolicyVersion`` that counts nothing: the policy's version is the one that its engine serves.

    Whoever pushes, and however often, before the collector exists or beside it: samples are stamped with the weights that made
    them, and with their adapter's id (``"policy_adapter"``, 0: the base model). TorchRL's own tracker
    (``track_policy_version=True``) begins at 0 and counts what goes through its collector.

    Args:
        engine: the policy's: a ``vllm.LLM``, or a ``vLLMWrapper`` of one. Where the collector's policy is a ``vLLMWrapper``, each
            sample's version is what vLLM's output says of it; else the one that serves when its step ends.

    Raises:
        WeightsError: nothing is known of the engine's weights, or which version serves.

    >>> # LLMCollector(env, policy_factory=policy, track_policy_version=EnginePolicyVersion(llm))
    """

    def __init__(self, engine: Any) -> None:
        self._weights = weights_of(engine)
        self._engine = _followed(_inner(engine))
        super().__init__(int)

    @property
    def version(self) -> int:
        """The version that the engine serves now. A run that is resumed sets it: its engine began again at 0.

        Raises:
            WeightsError: others loaded weights into the engine and gave them no version. When set: to less than the engine's, or
                the engine's weights are not those it was started with or that were pushed last.
        """
        version = self._weights.version
        if version is None:
            raise WeightsError(
                "others loaded weights into this engine and gave them no version: which one serves is not known. Call "
                "finish_update(engine) after each such load: it loads them again and counts them"
            )
        return version

    @version.setter
    def version(self, version: int) -> None:
        if version == self.version:
            return
        if not isinstance(self._weights, LiveWeights):
            raise WeightsError("the engine of a scorer counts for itself: push the resumed weights under their version")
        self._weights.take_over(version=version)

    def __deepcopy__(self, memo: dict[int, Any]) -> EnginePolicyVersion:
        return self  # a copied env asks the same engine

    def __reduce__(self) -> Any:
        raise OptionError(
            "an EnginePolicyVersion asks an engine of this process, and cannot go to another: use track_policy_version=True there"
        )

    def _increment_version(self, init: bool = False) -> int:
        return self.version

    def _reset_env_preprocess(self, tensordict: TensorDictBase | None) -> TensorDictBase | None:
        collector = collector_of(self)
        watch(policy_of(collector))
        follow(collector, self._engine)
        return super()._reset_env_preprocess(tensordict)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return self._stamp(next_tensordict, generated_by(tensordict.reshape(-1)))

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._stamp(tensordict_reset, None)

    def _stamp(self, td: TensorDictBase, sampled: list[Origin] | None) -> TensorDictBase:
        sampled = sampled or [Origin(self.version)] * td.numel()
        for key, values in zip((POLICY_VERSION, POLICY_ADAPTER), zip(*sampled, strict=True), strict=False):
            known = torch.tensor([UNKNOWN if value is None else value for value in values], device=td.device)
            td.set(key, known.reshape(td.shape))
        return td

    def transform_observation_spec(self, spec: Composite) -> Composite:
        declare(spec, POLICY_ADAPTER, trailing=(), dtype=torch.int64)
        return super().transform_observation_spec(spec)


class _Pusher:
    """Pushes to one engine, and keeps the versions of collectors that count for themselves in step with it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._collectors: list[weakref.ref[Any]] = []

    def register(self, collector: Any) -> None:
        self._collectors.append(weakref.ref(collector))
        watch(policy_of(collector))
        version = weights_of(self._engine).version
        for tracker in self._counting() if version is not None else ():
            tracker.version = version

    def push(self, weights: Any, *, collector_counts: bool = False) -> int:
        version = push_weights(self._engine, weights)
        for tracker in self._counting():
            tracker.version = version - collector_counts
        return version

    def _counting(self) -> list[PolicyVersion]:
        trackers = [getattr(reference(), "policy_version_tracker", None) for reference in self._collectors]
        return [
            t
            for t in trackers
            if isinstance(getattr(t, "version", None), int) and not isinstance(t, EnginePolicyVersion)
        ]


with warnings.catch_warnings():
    # TorchRL 0.14 deprecates the class, and its LLMCollector takes nothing else.
    warnings.simplefilter("ignore", DeprecationWarning)

    class VLLMWeightUpdater(WeightUpdaterBase):
        """TorchRL's ``weight_updater`` of an ``LLMCollector`` whose policy is a vLLM engine of this machine.

        ``collector.update_policy_weights_(model)`` pushes a model, a state dict or a tensordict. With
        :class:`EnginePolicyVersion` the collector's ``policy_version`` is the engine's version, always; with
        ``track_policy_version=True`` it is after that call, if no other collector shares the updater.

        Args:
            engine: as :func:`push_weights` takes it.
            model: pushed where ``update_policy_weights_()`` is given nothing.

        >>> updater = VLLMWeightUpdater(scorer)
        >>> # LLMCollector(env, policy=policy, weight_updater=updater, track_policy_version=EnginePolicyVersion(llm))
        """

        def __init__(self, engine: Any, model: Any = None) -> None:
            self._pusher = _Pusher(engine)
            self._model = model

        def register_collector(self, collector: Any) -> None:
            super().register_collector(collector)
            self._pusher.register(collector)

        def __call__(self, policy_or_weights: Any = None, worker_ids: Any = None) -> None:
            # collector.update_policy_weights_() comes here, and counts one version further itself (TorchRL 0.14).
            weights = self._get_server_weights() if policy_or_weights is None else policy_or_weights
            self._pusher.push(weights, collector_counts=True)
            self._call_post_hooks()

        def _sync_weights_with_worker(self, *, worker_id: Any = None, server_weights: Any) -> None:
            self._pusher.push(server_weights)

        def _get_server_weights(self) -> Any:
            if self._model is None:
                raise OptionError("no weights: pass them to update_policy_weights_, or a model to VLLMWeightUpdater")
            return self._model

        def _maybe_map_weights(self, policy_or_weights: Any) -> Any:
            return policy_or_weights  # push_weights reads modules, tensordicts and state dicts


class VLLMSyncScheme(WeightSyncScheme):
    """TorchRL's weight sync scheme for a vLLM engine of this machine: sender and receiver are one process.

    Args:
        engine: as :func:`push_weights` takes it.

    >>> sender = VLLMSyncScheme(scorer).create_sender()
    >>> # sender.register_model(trainer); sender.register_collector(collector); each step: sender.update_weights()
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(strategy="tensordict")
        self._engine = engine

    def create_sender(self) -> VLLMSender:
        """Return the trainer's side."""
        return VLLMSender(self._engine)

    def create_transport(self, **kwargs: Any) -> _Transport:
        """Return what carries weights: a push."""
        return _Transport(self._engine)


class _Transport:
    """TorchRL's seam for carrying weights; blocks until they serve."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def send_weights(self, weights: Any) -> None:
        push_weights(self._engine, weights)


class VLLMSender:
    """The trainer's side of :class:`VLLMSyncScheme`."""

    def __init__(self, engine: Any) -> None:
        self._pusher = _Pusher(engine)
        self._model: Any = None

    def register_model(self, model: Any) -> None:
        """Take the model whose weights are sent."""
        self._model = model

    def register_collector(self, collector: Any) -> None:
        """Keep a collector's ``policy_version`` in step with the engine."""
        self._pusher.register(collector)

    def update_weights(self, weights: Any = None) -> int:
        """Push ``weights``, or the registered model's; return the version that serves now."""
        if weights is None and self._model is None:
            raise OptionError("no weights: pass them, or register_model() first")
        return self._pusher.push(self._model if weights is None else weights)
