"""The carriers between the parent of a benchmark and the processes of its providers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Score = Callable[[list[np.ndarray], list[int]], Any]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a provider is to run."""

    model: str  # path or name
    dtype: str  # "bfloat16", "float16" or "float32"; "auto": the model's own, not known yet
    device: str  # "cpu" or "cuda"
    engine: Mapping[str, Any] = field(
        default_factory=dict
    )  # vLLM's options, for providers with a vLLM engine
    readout: str = "auto"  # of ours
    share_prefix: bool = True  # of ours
    replicas: int = 1  # of ours
    shape: str | None = None  # of a model with random weights, which is to be saved at ``model``
    max_tokens: int = 0  # the longest sequence
    num_gpus: int | None = 1  # that the provider takes, if the device is one; None: not known which

    def engine_options(self, *, generates: bool) -> dict[str, Any]:
        """Return the options of an engine of vLLM. One that generates samples a token after each sequence."""
        return {"max_model_len": self.max_tokens + generates, "dtype": self.dtype, **self.engine}

    @property
    def num_processes(self) -> int:
        """The processes that hold parts of the model in an engine of vLLM; on GPUs each has one of them."""
        sizes = (self.engine.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size"))
        return math.prod(map(int, sizes))

    @property
    def loading(self) -> dict[str, Any]:
        """The options of vLLM that transformers takes, too."""
        return {name: self.engine[name] for name in ("revision", "trust_remote_code") if name in self.engine}


@dataclass(frozen=True)
class Running:
    """A provider that has started.

    ``score(sequences, starts)`` takes int64 arrays ``[L]`` and the index of the first token to score of each.
    It returns for each sequence the log-probs of its tokens from there on, ``[L - start]``, nats. A provider
    of the floor returns the seconds of its parts by name instead.
    """

    score: Score
    # The processes whose memory counts; none: they are not known.
    pids: tuple[int, ...] = field(default_factory=lambda: (os.getpid(),))
    told: Callable[[], dict[str, Any]] = dict  # more facts for the row, after a call


Provider = Callable[[Setup], Iterator[Running]]
