"""Packs what a request asks of the read-out into vLLM's parameters.

vLLM passes ``PoolingParams.extra_kwargs`` and ``SamplingParams.extra_args`` to the scheduler and the workers
unchanged. They may be other processes, so the values are plain and serialisable, under one key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_kl.columns import num_columns

KEY = "vllm_kl"


class Readout(NamedTuple):
    """What the read-out returns for each of the rows ``start - 1 .. L - 2``."""

    start: int = 1  # index of the first token to score
    temperature: float = 1.0
    top_k: int = 0  # number of best tokens per row
    num_ids: int = 0  # number of chosen tokens per row
    ids: bytes = b""  # the chosen tokens: int32, [L - start, num_ids]
    entropy: bool = False  # whether to return the entropy of each row's distribution
    hidden_size: int = 0  # features of the hidden state to return per row; 0: return none

    @property
    def num_columns(self) -> int:
        """The number of columns of a row's values."""
        return num_columns(self.num_ids, self.top_k, self.entropy, self.hidden_size)

    def chosen_ids(self) -> torch.Tensor:
        """Return ``[L - start, num_ids]`` int64."""
        return torch.from_numpy(np.frombuffer(self.ids, np.int32).astype(np.int64)).view(-1, self.num_ids)


def pack(readout: Readout) -> dict[str, Any]:
    return {KEY: list(readout)}


def unpack(extra: dict[str, Any] | None) -> Readout | None:
    """Return the read-out that :func:`pack` packed; ``None``: the request is not from this package."""
    values = (extra or {}).get(KEY)
    return None if values is None else Readout(*values)
