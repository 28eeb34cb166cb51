"""The floor: what a read-out would take that costs nothing beside PyTorch's product.

It is the same engine without its LM head, plus PyTorch's product of the LM head with the scored rows alone,
in the fastest of the tried ways. A faster product than PyTorch's can be below it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vllm_kl.bench.types import Running, Setup
from vllm_kl.errors import ReadoutUnavailableError

PARTS = ENGINE, HEAD = "floor_engine", "floor_head"  # they have rows of their own


def owner_of(name: str) -> str:
    """Return the provider whose process measured a row.

    >>> owner_of("floor_head"), owner_of("ours[flat]")
    ('floor', 'ours[flat]')
    """
    return "floor" if name in PARTS else name


def floor(setup: Setup) -> Iterator[Running]:
    """The engine without its LM head, then the head's product; ``score`` returns the seconds of both.

    Raises:
        ReadoutUnavailableError: the engine has several processes, or its head is no plain matrix.
    """
    from vllm_kl.engines.base import drive
    from vllm_kl.engines.start_engine import start as start_engine
    from vllm_kl.types import ScoreRequest

    options = setup.engine_options(generates=False)
    check_one_process(options)
    # The model must be in this process, also where the user has set the variable otherwise.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    driver: Any = start_engine(model=setup.model, readout="pooling", options=options)
    model = driver._core.engine_core.model_executor.driver_worker.worker.get_model()
    weight = matrix_of(model.pooler.head)
    model.pooler.head = _NoHead(weight.device)
    product = _product(weight)

    def run(sequences: list[np.ndarray], starts: list[int]) -> dict[str, float]:
        began = time.perf_counter()
        requests = [
            ScoreRequest(token_ids=ids.astype(np.int32), start=start)
            for ids, start in zip(sequences, starts, strict=True)
        ]
        drive(driver, requests, share_prefix=setup.share_prefix)
        engine_s = time.perf_counter() - began
        num_rows = sum(len(ids) - start for ids, start in zip(sequences, starts, strict=True))
        return {ENGINE: engine_s, HEAD: product(num_rows)}

    yield Running(run)


def check_one_process(options: Mapping[str, Any]) -> None:
    """Refuse an engine whose model is in other processes, where its head cannot be taken off."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if options.get(name, 1) != 1:
            raise ReadoutUnavailableError(
                f"with {name}={options[name]} the model is in several processes, and the floor takes the "
                "LM head off a model in its own process"
            )


def matrix_of(head: Any) -> Any:
    """Return the weight of the plugin's LM head, ``[V, H]``; refuse a head that is no plain matrix."""
    if not hasattr(head, "lm_head"):
        raise ReadoutUnavailableError(
            "this model's LM head is more than a matrix (a soft cap, a bias, quantised weights or code of "
            "its own), and the floor multiplies with a matrix alone"
        )
    return head.lm_head.weight[: head.num_tokens]


class _NoHead:
    """Stands in the place of the LM head, and computes nothing."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def read(self, hidden_N_H: Any, ids_N_K: Any, **_: Any) -> Any:
        import torch

        return torch.zeros(len(ids_N_K), 1, device=self._device)


def _product(weight: Any) -> Callable[[int], float]:
    """Return the function that multiplies rows with the head in the fastest way, and tells the seconds."""
    import torch

    few = min(len(weight), 32_768 if weight.is_cuda else 16_384)
    # A CPU without 16-bit products is faster if it widens the matrix to float32 slice by slice.
    dtype = min(
        (weight.dtype, torch.float32),
        key=lambda one: min(_multiply(weight[:few], 512, one, 512, 2048) for _ in range(3)),
    )
    heights = (512, 1024, 2048, 4096)
    widths = (4096, 8192, 16_384, 32_768) if weight.is_cuda else heights
    tiles = [(rows, columns) for rows in heights for columns in widths]
    best = min(tiles, key=lambda tile: min(_multiply(weight[:few], 4096, dtype, *tile) for _ in range(3)))
    return lambda num_rows: _multiply(weight, num_rows, dtype, *best)


def _multiply(weight: Any, num_rows: int, dtype: Any, rows: int, columns: int) -> float:
    """Multiply random rows with the matrix, ``rows`` by ``columns`` at a time; return the seconds."""
    import torch

    vocab_size, hidden_size = weight.shape
    hidden = torch.randn(num_rows, hidden_size, device=weight.device).to(weight.dtype)
    out = torch.empty(rows * columns, dtype=dtype, device=weight.device)
    is_widened = dtype != weight.dtype
    widened = torch.empty(columns if is_widened else 0, hidden_size, dtype=dtype, device=weight.device)
    wait = torch.accelerator.synchronize if weight.is_cuda else (lambda: None)
    wait()
    began = time.perf_counter()
    for low in range(0, num_rows, rows):
        block = hidden[low : low + rows].to(dtype)
        for first in range(0, vocab_size, columns):
            part = weight[first : first + columns]
            if is_widened:
                part = widened[: len(part)].copy_(part)
            torch.mm(block, part.T, out=out[: len(block) * len(part)].view(len(block), len(part)))
    wait()
    return time.perf_counter() - began
