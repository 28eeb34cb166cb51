"""Writes the LM head's matrix to files: with it and hidden states another process has all logits.

Each worker of a tensor-parallel group writes its shard of the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# Names of the methods, for ``collective_rpc``.
WRITE = "vllm_kl_write_head"
HIDDEN_SIZE = "vllm_kl_hidden_size"


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
        ``("written", first token, factor of the logits, file, dtype, tokens)``; ``("no matrix", reason)``;
        ``("failed", error)``. An error that a worker raises would leave answers of other workers behind.
        ``None``: this worker has no head, because it is an earlier stage of a pipeline.
    """
    from vllm_kl.plugin.lm_head import MatrixHead

    head = getattr(_pooler(worker), "head", None)
    if head is None:
        return None
    if not isinstance(head, MatrixHead):
        return "no matrix", str(head.reason)
    weight = head.lm_head.weight[: head.num_tokens].detach().cpu().contiguous()
    file = Path(folder) / str(head.first_token)
    try:
        weight.view(torch.uint8).numpy().tofile(file)
    except OSError as error:
        return "failed", str(error)
    dtype = str(weight.dtype).removeprefix("torch.")
    return "written", head.first_token, head.scale, str(file), dtype, len(weight)


def read(file: str, dtype: str, num_tokens: int, hidden_size: int) -> torch.Tensor:
    """Return the shard in a file, ``[num_tokens, hidden_size]``.

    It is mapped memory, which outlives the file's name. safetensors is not used: a Ctrl-C inside its reader
    becomes a ValueError (0.8.0).
    """
    size = num_tokens * hidden_size
    return torch.from_file(file, shared=False, size=size, dtype=getattr(torch, dtype)).view(-1, hidden_size)


def _pooler(worker: Any) -> Any:
    """Return the worker's ``LogProbPooler``; ``None`` for another stage of a pipeline."""
    return getattr(worker.get_model(), "pooler", None)
