"""New weights for a live model, in each of an engine's workers: methods that the plugin gives to vLLM's ``WorkerBase``.

``collective_rpc`` calls them by name, in whichever process a worker is, on the CPU and on a GPU. A load has two halves:

    prepare   a second model is loaded beside the one that serves, and compared with it (:mod:`.second_model`, :mod:`.adoption`)
    adopt     the serving model takes over its tensors

Whatever is wrong with the weights, or with this way of loading them, shows in the first half, in which nothing that serves is
touched. All workers have finished it before the first begins the second.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from vllm_kl.plugin import adoption
from vllm_kl.plugin.second_model import CannotLoadBesideError, load_second_model
from vllm_kl.plugin.taken import is_taken

# Names of the methods, for ``collective_rpc``.
PREPARE = "vllm_kl_prepare_weights"
ADOPT = "vllm_kl_adopt_weights"
DISCARD = "vllm_kl_discard_weights"
SERVES = "vllm_kl_serves_what_is_prepared"
LAST_LOAD = "vllm_kl_last_load_of_others"
READY = "vllm_kl_can_load_weights"

# Attributes of a worker.
_PREPARED = "_vllm_kl_prepared"
_LOADS = (
    "_vllm_kl_loads"  # by others, since weights were adopted: the folder of each, None where it is not known
)


def install() -> None:
    """Give every worker of this process the methods. Idempotent; imports no model."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, PREPARE, prepare)
    setattr(WorkerBase, ADOPT, adopt)
    setattr(WorkerBase, DISCARD, discard)
    setattr(WorkerBase, SERVES, serves_what_is_prepared)
    setattr(WorkerBase, LAST_LOAD, lambda worker: getattr(worker, _LOADS, [None])[-1:])
    if inspect.unwrap(WorkerBase.__init__) is WorkerBase.__init__:
        WorkerBase.__init__ = _noting_loads(WorkerBase.__init__)
    setattr(WorkerBase, READY, lambda worker: True)


def prepare(worker: Any, folder: str | None) -> list[str]:
    """Load a folder of safetensors files, named as in transformers' checkpoints, beside the weights that serve.

    Args:
        folder: ``None`` is the checkpoint that the engine was started with.

    Returns:
        Why the serving model cannot take them over; empty if it can.

    Raises:
        ValueError: a parameter got no weights; or what vLLM raises while it reads the checkpoint.
    """
    _freeze_heap(worker)
    discard(worker)
    model = worker.model_runner.get_model()
    try:
        found = adoption.compare(model, load_second_model(worker, folder))
    except CannotLoadBesideError as error:
        return [str(error)]
    if found.moved and _is_compiled(worker):
        found.obstacles.append(f"compiled code holds what can only be put in its place ({found.moved[0]})")
    setattr(worker, _PREPARED, found)
    return found.obstacles


def adopt(worker: Any) -> None:
    """Let the serving model take over what was prepared."""
    found = getattr(worker, _PREPARED)
    discard(worker)
    adoption.adopt(found)
    getattr(worker, _LOADS, []).clear()
    runner = worker.model_runner  # what vLLM's own reload_weights resets
    runner.reset_lora_state()
    runner.reset_encoder_cache()
    runner.reset_mm_cache()


def discard(worker: Any) -> None:
    """Forget what was prepared."""
    setattr(worker, _PREPARED, None)


def serves_what_is_prepared(worker: Any) -> bool:
    """Whether the serving model's weights are, bit for bit, those that were prepared, where a load leaves them as they are read."""
    found: adoption.Differences = getattr(worker, _PREPARED)
    return all(torch.equal(serving, loaded.to(serving.device)) for serving, loaded in found.plain)


def _noting_loads(init: Callable[..., None]) -> Callable[..., None]:
    """Return ``WorkerBase.__init__`` of workers that remember what others loaded into them.

    On a CPU, in an engine that is ours (:mod:`.taken`), ``reload_weights`` of a whole checkpoint loads it as a push does: vLLM's
    own (0.32) leaves experts and tied heads wrong there, by nats, without a word. All other loads are vLLM's own.
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
            # Refused, it has touched nothing.
            if is_folder and _is_mended(worker) and _load_whole(worker, weights_path):
                loads.append(worker.vllm_config.model_config.model)
                return None
            loads.append(None)  # also where it fails halfway
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


def _is_mended(worker: Any) -> bool:
    return worker.device.type == "cpu" and is_taken(worker)


def _load_whole(worker: Any, folder: str | None) -> bool:
    """Load a folder as a push does; return whether that can be done."""
    if prepare(worker, folder):
        discard(worker)
        return False
    adopt(worker)
    if folder is not None:  # as vLLM does: where the next reload reads, unless it is told
        config = worker.vllm_config.model_config
        config.model, config.model_weights, config.revision = folder, "", None
    return True


def _freeze_heap(worker: Any) -> None:
    """Keep the two collections of a load from taking a second: vLLM freezes the heap of its core, but not of its workers."""
    if multiprocessing.current_process().name.startswith("VllmWorker") and not hasattr(worker, _PREPARED):
        from vllm.utils.gc_utils import freeze_gc_heap

        freeze_gc_heap()


def _is_compiled(worker: Any) -> bool:
    from vllm.config import CompilationMode

    return worker.vllm_config.compilation_config.mode != CompilationMode.NONE
