"""What one request asks of the read-out, as it travels through vLLM.

vLLM hands ``PoolingParams.extra_kwargs`` and ``SamplingParams.extra_args`` on as they are, to the scheduler and to the
workers, in this process or serialized. So the request is a dict of plain values under one key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

KEY = "vllm_kl"


class Readout(NamedTuple):
    """What to return for each row ``start - 1 .. L - 2``."""

    start: int = 1  # first token to score
    temperature: float = 1.0
    top_k: int = 0  # best tokens per row
    num_ids: int = 0  # chosen tokens per row ...
    ids: bytes = b""  # ... int32, [L - start, num_ids]

    @property
    def num_columns(self) -> int:
        """Columns of the result: the token's log-prob, those of the chosen ids, then ids and log-probs of the best."""
        return 1 + self.num_ids + 2 * self.top_k

    def chosen_ids(self) -> torch.Tensor:
        """Return ``[L - start, num_ids]`` int64."""
        return torch.from_numpy(np.frombuffer(self.ids, np.int32).astype(np.int64)).view(-1, self.num_ids)


def pack(readout: Readout) -> dict[str, Any]:
    return {KEY: list(readout)}


def unpack(extra: dict[str, Any] | None) -> Readout | None:
    """Return what :func:`pack` packed; ``None`` for a request that is not ours."""
    values = (extra or {}).get(KEY)
    return None if values is None else Readout(*values)
