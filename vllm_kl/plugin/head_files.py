"""Writes the LM head's matrix to files: with it and hidden states another process has all logits.

Each worker of a tensor-parallel group writes its shard of the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

# Names of the methods, for ``collective_rpc``.
WRITE = "vllm_kl_write_head"
HIDDEN_SIZE = "vllm_kl_hidden_size"
# The file's only tensor.
WEIGHT = "weight"


def install() -> None:
    """Add the methods to the workers of this process. Idempotent."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, WRITE, write)
    setattr(WorkerBase, HIDDEN_SIZE, hidden_size)


def hidden_size(worker: Any) -> int | None:
    """Return how many features the LM head gets. Some models' configs do not tell it (OPT's projection).

    ``None``: this worker has no head, or has computed nothing yet.
    """
    return getattr(_pooler(worker), "hidden_size", None)


def write(worker: Any, folder: str) -> tuple[Any, ...] | None:
    """Write this worker's shard of the head.

    Returns:
        ``("written", first token, factor of the logits, file)``; ``("no matrix", reason)``; ``("failed",
        error)``. An error that a worker raises would leave answers of other workers behind. ``None``: this
        worker has no head, because it is an earlier stage of a pipeline.
    """
    from vllm_kl.plugin.lm_head import MatrixHead

    head = getattr(_pooler(worker), "head", None)
    if head is None:
        return None
    if not isinstance(head, MatrixHead):
        return "no matrix", str(head.reason)
    file = Path(folder) / f"{head.first_token}.safetensors"
    try:
        save_file({WEIGHT: head.lm_head.weight[: head.num_tokens].detach().contiguous()}, file)
    except (OSError, SafetensorError) as error:
        return "failed", str(error)
    return "written", head.first_token, head.scale, str(file)


def _pooler(worker: Any) -> Any:
    """Return the worker's ``LogProbPooler``; ``None`` for another stage of a pipeline."""
    return getattr(worker.get_model(), "pooler", None)
