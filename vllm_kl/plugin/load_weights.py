"""Loads new weights into a live model, in each worker of an engine.

The plugin adds methods to vLLM's ``WorkerBase``. ``collective_rpc`` calls them by name in the workers'
processes, on a CPU and on a GPU. A load has two steps:

    prepare   loads a second model (:mod:`.second_model`) and compares it with the serving model
    adopt     copies the second model's tensors into the serving model (:mod:`.adopt_weights`)
    put_back  undoes it, where there are no files of the old weights

:data:`GIVE_BACK` gives the memory of dropped weights back to the system.

``prepare`` changes nothing in the serving model, and fails if anything is wrong with the weights. ``adopt``
begins when all workers have prepared.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from vllm_kl.environment import give_back_memory
from vllm_kl.plugin import adopt_weights
from vllm_kl.plugin.receive_weights import receive
from vllm_kl.plugin.second_model import CannotLoadBesideError, load_second_model
from vllm_kl.plugin.taken_engines import is_taken

# Names of the methods, for ``collective_rpc``.
PREPARE = "vllm_kl_prepare_weights"
ADOPT = "vllm_kl_adopt_weights"
PUT_BACK = "vllm_kl_put_back_weights"
DISCARD = "vllm_kl_discard_weights"
GIVE_BACK = "vllm_kl_give_back_memory"
SERVES = "vllm_kl_serves_what_is_prepared"
LAST_LOAD = "vllm_kl_last_load_of_others"
OBSTACLE = "vllm_kl_obstacle_to_a_load"

# vLLM's KV connectors (0.27 to 0.33) that later requests get no KV from: they hand a request's KV from a
# prefill engine to a decode engine, make dummy KV, or only write.
KEEP_NOTHING = (
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "MooncakeConnector",
    "MoRIIOConnector",
    "P2pNcclConnector",
    "DecodeBenchConnector",
    "ExampleHiddenStatesConnector",
)

# Attributes of a worker.
_PREPARED = "_vllm_kl_prepared"
_REPLACED = "_vllm_kl_replaced"  # the weights of before adopt()
# The loads by others since the last adopt(): the folder of each; None: not known.
_LOADS = "_vllm_kl_loads"


def install() -> None:
    """Add the methods to the workers of this process. Idempotent; imports no model."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, PREPARE, prepare)
    setattr(WorkerBase, ADOPT, adopt)
    setattr(WorkerBase, PUT_BACK, put_back)
    setattr(WorkerBase, DISCARD, discard)
    setattr(WorkerBase, GIVE_BACK, lambda worker: give_back_memory())
    setattr(WorkerBase, SERVES, serves_what_is_prepared)
    setattr(WorkerBase, LAST_LOAD, lambda worker: getattr(worker, _LOADS, [None])[-1:])
    if inspect.unwrap(WorkerBase.__init__) is WorkerBase.__init__:
        WorkerBase.__init__ = _noting_loads(WorkerBase.__init__)
    setattr(WorkerBase, OBSTACLE, obstacle)


def obstacle(worker: Any) -> str | None:
    """Return why no weights can be loaded into this worker's engine; ``None``: they can.

    vLLM (0.27 to 0.33) takes a KV connector that cannot drop its KV for one that has dropped it.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    if worker.vllm_config.kv_transfer_config is None:
        return None
    connector = get_kv_transfer_group()
    for part in getattr(connector, "_connectors", [connector]):  # those of a MultiConnector
        if type(part).reset_cache is KVConnectorBase_V1.reset_cache and not _keeps_nothing(type(part)):
            return (
                f"its KV connector, {type(part).__name__}, cannot drop the KV of the old weights, so the "
                "engine would generate from it. Make the engine with another connector, or without"
            )
    return None


def _keeps_nothing(connector: type) -> bool:
    return connector.__module__.startswith("vllm.") and connector.__name__ in KEEP_NOTHING


def prepare(worker: Any, source: str | dict[str, Any] | None) -> list[str]:
    """Load a second model beside the serving model, and compare both.

    Args:
        worker: vLLM's worker.
        source: the folder of safetensors files, named as in transformers' checkpoints; ``None``: the
            checkpoint that the engine was started with; a dict: the trainer sends these tensors, as in
            :func:`.receive_weights.receive`.

    Returns:
        Reasons why the serving model cannot adopt the weights; empty if it can.

    Raises:
        ValueError: a parameter got no weights. vLLM raises other errors while it reads the checkpoint.
    """
    _freeze_heap(worker)
    discard(worker)
    sent = receive(worker, source) if isinstance(source, dict) else None
    try:
        loaded = load_second_model(worker, None if isinstance(source, dict) else source, sent)
    except CannotLoadBesideError as error:
        return [str(error)]
    finally:
        for _ in sent or ():  # the trainer and the other workers wait for this one until the last tensor
            pass
    setattr(worker, _PREPARED, loaded)
    return _compared(worker).obstacles


def _compared(worker: Any) -> adopt_weights.Differences:
    """Compare the serving model with the prepared one."""
    found = adopt_weights.pair_tensors(worker.model_runner.get_model(), getattr(worker, _PREPARED))
    if found.moved and _is_compiled(worker):
        found.obstacles.append(
            f"compiled code holds values that can only be replaced, not copied ({found.moved[0]})"
        )
    return found


def adopt(worker: Any, is_kept: bool = False) -> None:
    """Copy the prepared weights into the serving model.

    Args:
        worker: vLLM's worker.
        is_kept: keep a copy of the old weights for :func:`put_back`, until :func:`discard`.
    """
    found = _compared(worker)  # again: a request since then may have made more of the old weights
    discard(worker)
    if found.obstacles:
        raise RuntimeError(found.obstacles[0])
    if is_kept:
        setattr(worker, _REPLACED, adopt_weights.saved(found))
    _adopt(worker, found)


def put_back(worker: Any) -> None:
    """Copy the old weights into the serving model again, if :func:`adopt` has replaced them."""
    if (found := getattr(worker, _REPLACED, None)) is not None:
        _adopt(worker, found)


def _adopt(worker: Any, found: adopt_weights.Differences) -> None:
    adopt_weights.adopt(found)
    getattr(worker, _LOADS, []).clear()
    runner = worker.model_runner  # vLLM's own reload_weights resets the same
    if hasattr(runner, "reset_lora_state"):  # since vLLM 0.27 or later
        runner.reset_lora_state()
    runner.reset_encoder_cache()
    runner.reset_mm_cache()


def discard(worker: Any) -> None:
    """Drop the prepared weights, and those that they replaced."""
    setattr(worker, _PREPARED, None)
    setattr(worker, _REPLACED, None)


def serves_what_is_prepared(worker: Any) -> bool:
    """Whether the serving weights equal the prepared weights bit for bit.

    It compares only weights that a load copies from the checkpoint unchanged.
    """
    found = _compared(worker)
    return all(torch.equal(serving, loaded.to(serving.device)) for serving, loaded in found.plain)


def _noting_loads(init: Callable[..., None]) -> Callable[..., None]:
    """Return a ``WorkerBase.__init__`` that makes workers note the loads of others.

    In a taken engine (:mod:`.taken_engines`) on a CPU, ``reload_weights`` of a folder loads as a push does:
    there vLLM's own ``reload_weights`` (0.32) silently leaves experts and tied heads wrong, by nats. All
    other loads stay vLLM's own.
    """

    @functools.wraps(init)
    def with_notes(worker: Any, *args: Any, **kwargs: Any) -> None:
        init(worker, *args, **kwargs)
        loads: list[str | None] = []
        setattr(worker, _LOADS, loads)
        reload_weights = getattr(worker, "reload_weights", None)
        start = getattr(worker, "start_weight_update", None)

        def reload_and_note(
            weights_iterator: Any = None, weights_path: str | None = None, **options: Any
        ) -> Any:
            is_folder = weights_iterator is None and options.get("is_checkpoint_format", True)
            # If _load_as_push() refuses the folder, it has changed nothing.
            if is_folder and _is_corrected(worker) and _load_as_push(worker, weights_path):
                loads.append(worker.vllm_config.model_config.model)
                return None
            loads.append(None)  # now: a load that fails halfway counts, too
            result = reload_weights(weights_iterator=weights_iterator, weights_path=weights_path, **options)
            if is_folder:
                loads[-1] = worker.vllm_config.model_config.model
            return result

        def start_and_note(*args: Any, **kwargs: Any) -> Any:
            loads.append(None)
            return start(*args, **kwargs)

        if reload_weights is not None:
            worker.reload_weights = reload_and_note
        if start is not None:
            worker.start_weight_update = start_and_note

    return with_notes


def _is_corrected(worker: Any) -> bool:
    return worker.device.type == "cpu" and is_taken(worker)


def _load_as_push(worker: Any, folder: str | None) -> bool:
    """Load a folder as a push does; return whether that was possible."""
    if prepare(worker, folder):
        discard(worker)
        return False
    adopt(worker)
    if folder is not None:  # as vLLM does: the next reload reads from here by default
        config = worker.vllm_config.model_config
        config.model, config.model_weights, config.revision = folder, "", None
    return True


def _freeze_heap(worker: Any) -> None:
    """Freeze the heap of a worker's process, once: else the two garbage collections of a load take a second.

    vLLM freezes the heap of its core process only.
    """
    if multiprocessing.current_process().name.startswith("VllmWorker") and not hasattr(worker, _PREPARED):
        from vllm.utils.gc_utils import freeze_gc_heap

        freeze_gc_heap()


def _is_compiled(worker: Any) -> bool:
    from vllm.config import CompilationMode

    return worker.vllm_config.compilation_config.mode != CompilationMode.NONE
