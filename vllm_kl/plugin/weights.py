"""New weights for a live model, in each of an engine's workers: methods that the plugin gives to vLLM's ``WorkerBase``.

``collective_rpc`` calls them by name, in whichever process a worker is, on the CPU and on a GPU. A load has two halves:

    prepare   a second model is loaded beside the one that serves, and compared with it (:mod:`.second_model`, :mod:`.adoption`)
    adopt     the serving model takes over its tensors

Whatever is wrong with the weights, or with this way of loading them, shows in the first half, in which nothing that serves is
touched. All workers have finished it before the first begins the second.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_kl.plugin import adoption
from vllm_kl.plugin.second_model import CannotLoadBesideError, load_second_model

# Names of the methods, for ``collective_rpc``.
PREPARE = "vllm_kl_prepare_weights"
ADOPT = "vllm_kl_adopt_weights"
DISCARD = "vllm_kl_discard_weights"
SERVES = "vllm_kl_serves_what_is_prepared"
SOURCE = "vllm_kl_source_of_weights"
READY = "vllm_kl_can_load_weights"

_PREPARED = "_vllm_kl_prepared"  # attribute of a worker


def install() -> None:
    """Give every worker of this process the methods. Idempotent; imports no model."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, PREPARE, prepare)
    setattr(WorkerBase, ADOPT, adopt)
    setattr(WorkerBase, DISCARD, discard)
    setattr(WorkerBase, SERVES, serves_what_is_prepared)
    setattr(WorkerBase, SOURCE, lambda worker: worker.vllm_config.model_config.model)
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
    discard(worker)
    model = worker.model_runner.get_model()
    try:
        found = adoption.compare(model, load_second_model(worker, folder))
    except CannotLoadBesideError as error:
        return [str(error)]
    if found.moves and _is_compiled(worker):
        found.obstacles.append("compiled code holds the packed products of linear layers")
    setattr(worker, _PREPARED, found)
    return found.obstacles


def adopt(worker: Any) -> None:
    """Let the serving model take over what was prepared."""
    found = getattr(worker, _PREPARED)
    discard(worker)
    adoption.adopt(found)
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


def _is_compiled(worker: Any) -> bool:
    from vllm.config import CompilationMode

    return worker.vllm_config.compilation_config.mode != CompilationMode.NONE
