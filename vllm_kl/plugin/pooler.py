"""Reads the log-probs out of a step's hidden states, and returns one float32 tensor per finished request.

A step computes one chunk of each of its requests. Row r of a request scores token r + 1. So of a chunk
``[low, high)`` the pooler reads the rows from ``max(start - 1, low)`` up to, but without, ``min(high, L -
1)``. It keeps them by their index in the request until the last chunk. A row that no step computed, because
its KV came from the cache, is NaN.

Source: ``GPUModelRunner._pool``, ``v1/worker/gpu_model_runner.py``, and
``v1/worker/gpu/pool/pooling_runner.py``, vLLM 0.32.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler

from vllm_kl.plugin.kernel import row_blocks
from vllm_kl.plugin.lm_head import Head, find_head
from vllm_kl.plugin.readout_request import Readout, unpack

TASK = "token_classify"  # the pooling task that both model runners accept


class _Span(NamedTuple):
    """The rows of one request that this step computed and that must be scored."""

    request: int  # index of the request in the step
    readout: Readout
    low: int  # index of the first row in the request
    high: int  # index after the last row
    offset: int  # index of the first row in the step's hidden states


class LogProbPooler(Pooler):
    """Reads log-probs out of a causal language model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that the model is no submodule of its own pooler
        self.head: Head | None = None  # found by the first step
        self.hidden_size: int | None = None  # features of a hidden state; known then, too

    def get_supported_tasks(self) -> set[str]:
        return {TASK}

    def get_pooling_updates(self, task: str) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor | None]:
        if self.head is None:
            self.head, self.hidden_size = find_head(self._model[0], hidden_states), hidden_states.shape[1]
        cursor, states = pooling_metadata.get_pooling_cursor(), pooling_metadata.pooling_states
        # Requests without a read-out of ours (vLLM's profile run) are scored from their second token on.
        readouts = [unpack(params.extra_kwargs) or Readout() for params in pooling_metadata.pooling_params]
        lengths, token_ids = pooling_metadata.prompt_lens.tolist(), pooling_metadata.prompt_token_ids_cpu
        highs, counts = cursor.seq_lens_cpu.tolist(), cursor.num_scheduled_tokens_cpu.tolist()

        spans, offset = defaultdict(list), 0
        for i, (readout, length, high, count) in enumerate(
            zip(readouts, lengths, highs, counts, strict=True)
        ):
            # The third limit: vLLM's profile run passes fewer ids than tokens.
            first, last = max(readout.start - 1, high - count), min(high, length - 1, token_ids.shape[1] - 1)
            if first < last:
                same = readout._replace(start=0, ids=b"")
                spans[same].append(_Span(i, readout, first, last, offset + first - (high - count)))
            offset += count
        for group in spans.values():
            values = self._read(hidden_states, token_ids, group)
            for span, rows in zip(group, values.split([s.high - s.low for s in group]), strict=True):
                states[span.request].hidden_states_cache.append((span.low, rows))

        return [
            _collect(state, readout, length) if high == length else None
            for state, readout, length, high in zip(states, readouts, lengths, highs, strict=True)
        ]

    def _read(self, hidden_states: torch.Tensor, token_ids: torch.Tensor, spans: list[_Span]) -> torch.Tensor:
        """Return ``[N, num_columns]`` float32, the rows of all spans.

        Args:
            hidden_states: of the step.
            token_ids: ``[B, T]`` of the step's requests, on the CPU.
            spans: spans with equal columns and temperature.
        """
        device = hidden_states.device
        readout = spans[0].readout
        # With numpy, whose indexing waits for no threads: a GPU idles meanwhile.
        requests, lows, highs, offsets = np.array([(s.request, s.low, s.high, s.offset) for s in spans]).T
        counts = highs - lows
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        rows = _moved(torch.from_numpy(np.repeat(offsets, counts) + within), device)
        ids = token_ids.numpy()[np.repeat(requests, counts), np.repeat(lows + 1, counts) + within]
        wanted = torch.from_numpy(ids)[:, None].long()
        if readout.num_ids:
            chosen = [
                s.readout.chosen_ids()[s.low + 1 - s.readout.start : s.high + 1 - s.readout.start]
                for s in spans
            ]
            wanted = torch.cat([wanted, torch.cat(chosen)], dim=1)
        wanted = _moved(wanted, device)
        values = torch.empty(len(rows), readout.num_columns, dtype=torch.float32, device=device)
        of_head = readout.num_columns - readout.hidden_size
        blocks = row_blocks(len(rows), hidden_states.shape[1], readout.top_k, on_a_gpu=hidden_states.is_cuda)
        for block in blocks:
            hidden = hidden_states[rows[block]]
            values[block, of_head:] = hidden[:, : readout.hidden_size]
            values[block, :of_head] = self.head.read(
                hidden,
                wanted[block],
                top_k=readout.top_k,
                temperature=readout.temperature,
                entropy=readout.entropy,
            )
        # Hidden states of a long sequence would need memory of the GPU that vLLM has not reserved.
        return values.cpu() if readout.hidden_size else values


def _moved(indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a CPU tensor on a device, without waiting for the work that the GPU still has to do."""
    return indices if device.type == "cpu" else indices.pin_memory().to(device, non_blocking=True)


def _collect(state: Any, readout: Readout, length: int) -> torch.Tensor:
    """Return a finished request's ``[L - start, num_columns]``, and drop its chunks."""
    chunks = state.hidden_states_cache
    num_rows = max(length - readout.start, 0)
    if len(chunks) == 1 and len(chunks[0][1]) == num_rows:
        values = chunks[0][1]
    else:
        device = chunks[0][1].device if chunks else "cpu"
        values = torch.full((num_rows, readout.num_columns), torch.nan, dtype=torch.float32, device=device)
        for low, rows in chunks:
            values[low + 1 - readout.start :][: len(rows)] = rows
    state.clean()
    return values
