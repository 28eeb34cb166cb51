"""Token ids in, reference log-probs out: read this file first.

``VLLMScorer.score`` checks the input, sends what must be computed to its engine, and checks what comes back:

    token_ids, start -> ScoreRequest -> engine (engines/) -> ScoreResult -> every row there, finite -> float32 tensors

It knows nothing of tensordicts, chat templates, masks or padding; those are ``inputs.py`` and ``alignment.py``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any, get_args

import torch

from vllm_kl.engines.base import Engine
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.process import ProcessEngine
from vllm_kl.errors import MissingLogProbError, OptionError, ReadoutUnavailableError
from vllm_kl.requests import TokenIds, check_requests
from vllm_kl.types import EngineInfo, Readout, ScoreRequest, ScoreResult, ScoreStats

logger = logging.getLogger("vllm_kl")


class VLLMScorer:
    """Scores sequences with a vLLM engine: log-probs of given tokens, nothing generated.

    Args:
        model: path or name of a model: the scorer owns an engine, in a process of its own that ends with this one.
            Or a live ``vllm.LLM``: it is shared, and left running. Or an :class:`~vllm_kl.engines.base.Engine`.
        readout: how log-probs leave the engine. ``"flat"`` works with every engine; ``"auto"`` takes the best that
            the engine supports and says which in the log.
        share_prefix: let sequences of one call share the KV of a common prefix. Always exact: a cache hit that
            would hide a row is sent again.
        **engine_options: vLLM's engine options under their own names, for an owned engine.

    Raises:
        OptionError: an engine option does not exist, or was given for an engine that already runs.
        ReadoutUnavailableError: the engine cannot do this read-out; says why.
        EngineError: the engine did not start; with the end of its log.

    Attributes:
        stats: figures of the last call, or ``None``.
        weight_version: version of the engine's weights. 0: those it was started with; nothing here changes them.

    >>> # scorer = VLLMScorer("my-model", dtype="float32")
    >>> log_probs = scorer.score([[5, 6, 7, 8], [5, 6, 9]], start=2)
    >>> [tuple(t.shape) for t in log_probs]
    [(2,), (1,)]
    >>> scorer.stats.num_scored_tokens
    3
    """

    def __init__(
        self, model: Any, *, readout: Readout = "auto", share_prefix: bool = True, **engine_options: Any
    ) -> None:
        if readout not in get_args(Readout):
            raise ReadoutUnavailableError(
                f"readout={readout!r} does not exist; choose one of {', '.join(get_args(Readout))}"
            )
        self.share_prefix = share_prefix
        self.weight_version = 0
        self.stats: ScoreStats | None = None
        self._engine: Engine = _make_engine(model, readout, engine_options)
        logger.info("vllm_kl: read-out %s", self.readout)

    @property
    def readout(self) -> str:
        """The read-out in use: ``"flat"``, ``"token_ids"`` or ``"pooling"``."""
        return self._engine.info.readout

    def score(self, token_ids: Sequence[TokenIds], start: int | Sequence[int] | None = None) -> list[torch.Tensor]:
        """Return the log-probs of every sequence's tokens from ``start`` on.

        Args:
            token_ids: B sequences of ints (lists, arrays or 1-D tensors), of any lengths.
            start: index of the first token to score, one for all or one each, ``1 <= start <= len``; ``None`` is 1.
                ``start == len`` scores nothing and costs nothing.

        Returns:
            B float32 CPU tensors; element j of tensor i is
            ``log p(token_ids[i][start + j] | token_ids[i][:start + j])`` in nats, shape ``[len - start]``.

        Raises:
            InputError: an empty sequence, a start out of range, an id outside the vocabulary, a sequence longer than
                the engine takes. Names the sequence. Nothing was sent.
            MissingLogProbError: the engine returned no number, NaN or +inf for a token.
            EngineError: the engine died.
        """
        began = time.perf_counter()
        sequences, starts = check_requests(token_ids, start, self._engine.info)
        requests = {
            i: ScoreRequest(token_ids=ids.tolist(), start=first)
            for i, (ids, first) in enumerate(zip(sequences, starts, strict=True))
            if first < len(ids)
        }
        results = self._engine.score(list(requests.values()), share_prefix=self.share_prefix) if requests else []
        log_probs = [torch.empty(0)] * len(sequences)
        for (i, request), result in zip(requests.items(), results, strict=True):
            log_probs[i] = _checked(i, request, result)
        self.stats = ScoreStats(
            num_requests=len(requests),
            num_scored_tokens=sum(len(t) for t in log_probs),
            num_prompt_tokens=sum(len(r.token_ids) for r in requests.values()),
            num_cached_tokens=sum(r.num_cached_tokens for r in results),
            num_rescored=sum(r.rescored for r in results),
            readout=self.readout,
            wall_s=time.perf_counter() - began,
        )
        return log_probs

    def close(self) -> None:
        """End the owned engine and its processes; a shared engine is left running. Safe to call twice."""
        self._engine.close()

    def __enter__(self) -> VLLMScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> VLLMScorer:
        return self  # a copied transform scores with the same engine

    def __reduce__(self) -> Any:
        raise OptionError(
            "a VLLMScorer holds a running engine and cannot be pickled: make it in the other process (ref_model_factory), "
            "or keep it in a Ray actor (RetrieveKL(..., use_ray_service=True))"
        )


def _make_engine(model: Any, readout: Readout, engine_options: dict[str, Any]) -> Engine:
    if isinstance(model, (str, os.PathLike)):
        return ProcessEngine(os.fspath(model), readout=readout, options=engine_options)
    is_engine = isinstance(getattr(model, "info", None), EngineInfo)
    if not is_engine and not callable(getattr(model, "generate", None)):
        raise OptionError(f"model must be a path, a model name or a live vllm.LLM, got {type(model).__name__}")
    if engine_options:
        raise OptionError(
            f"engine options have no effect on an engine that already runs: {', '.join(engine_options)}. Give them "
            "where the engine is made."
        )
    if readout not in ("auto", "flat"):
        raise ReadoutUnavailableError(
            f"readout={readout!r} is not available on a shared engine in this version; use 'flat'"
        )
    return model if is_engine else GenerateEngine(model)


def _checked(i: int, request: ScoreRequest, result: ScoreResult) -> torch.Tensor:
    """Return the log-probs of sequence i, or refuse: -inf is a number (probability 0), NaN and +inf are not."""
    want = len(request.token_ids) - request.start
    if len(result.log_probs) != want:
        raise MissingLogProbError(
            f"sequence {i}: expected {want} log-probs, the engine returned {len(result.log_probs)}"
        )
    bad = torch.isnan(result.log_probs) | (result.log_probs == torch.inf)
    if bad.any():
        j = int(bad.nonzero()[0])
        raise MissingLogProbError(
            f"sequence {i}, token {request.start + j}: the engine returned {float(result.log_probs[j])} instead of a "
            f"log-prob ({int(bad.sum())} such tokens). The model's weights or activations overflow, or a row was lost."
        )
    return result.log_probs
