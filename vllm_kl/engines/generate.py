"""The ``flat`` read-out: prompt log-probs of an engine that generates, through vLLM's public API.

Works with every vLLM engine on every platform. It asks for ``prompt_logprobs=0`` (the token itself, no ranks),
``flat_logprobs=True`` (no object per token) and ``detokenize=False``.

Reading the prefix cache with ``prompt_logprobs`` leaves rows before the hit without a value: on vLLM's V1 runner they
are uninitialised memory (``v1/worker/gpu_model_runner.py``, 0.32), on V2 they are left out. So a hit is accepted only
where it ends at or before row ``start - 1``; other requests are sent again without the cache. A salt per call keeps
hits inside the call: the cache of an engine that also generates holds whole responses (every request would hit too
far), and may hold KV of older weights.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_kl.errors import MissingLogProbError
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult


class GenerateEngine:
    """Scores with ``generate(prompts, sampling_params)`` of a live engine that somebody else owns.

    Args:
        engine: a ``vllm.LLM``, or anything whose ``generate`` takes token prompts and sampling parameters and returns
            vLLM's ``RequestOutput``s in order (TorchRL's ``AsyncVLLM``).
        generate: used instead of ``engine.generate`` (a Ray actor's remote call, for example).
    """

    def __init__(self, engine: Any, generate: Callable[..., list] | None = None) -> None:
        self._generate = generate or engine.generate
        # Only vllm.LLM shows a progress bar unless told not to.
        llm_engine = getattr(engine, "llm_engine", None)
        self._options = {} if llm_engine is None else {"use_tqdm": False}
        model_config = getattr(llm_engine, "model_config", None)
        if model_config is None:
            self.info = EngineInfo(readout="flat", vocab_size=None, max_sequence_len=None)
        else:
            # An engine that generates refuses a prompt of max_model_len: it must have room for one more token.
            self.info = EngineInfo(
                readout="flat",
                vocab_size=model_config.get_vocab_size(),
                max_sequence_len=model_config.max_model_len - 1,
            )

    def score(self, requests: Sequence[ScoreRequest], *, share_prefix: bool) -> list[ScoreResult]:
        results: list[ScoreResult | None] = [
            None if num_cached > request.start - 1 else _read_rows(flat, request, num_cached)
            for request, (flat, num_cached) in zip(requests, self._send(requests, share_prefix), strict=True)
        ]
        redo = [i for i, result in enumerate(results) if result is None]
        if redo:
            again = [requests[i] for i in redo]
            for i, request, (flat, _) in zip(redo, again, self._send(again, read_cache=False), strict=True):
                results[i] = _read_rows(flat, request, 0, rescored=True)
        return results  # type: ignore[return-value]  # every None was filled

    def close(self) -> None:
        """Nothing to give back: the engine belongs to somebody else."""

    def _send(self, requests: Sequence[ScoreRequest], read_cache: bool) -> list[tuple[Any, int]]:
        """Return the ``FlatLogprobs`` of each request and the number of its tokens that came from the cache."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=not read_cache,
        )
        salt = uuid.uuid4().hex
        prompts = [TokensPrompt(prompt_token_ids=r.token_ids, cache_salt=salt) for r in requests]
        outputs = self._generate(prompts, params, **self._options)
        return [(output.prompt_logprobs, output.num_cached_tokens or 0) for output in outputs]


def _read_rows(flat: Any, request: ScoreRequest, num_cached: int, *, rescored: bool = False) -> ScoreResult:
    """Take the last rows: V1 returns one per prompt token but the first, V2 those after a hit."""
    want = request.token_ids[request.start :]
    if flat is None or len(flat.logprobs) < len(want):
        got = 0 if flat is None else len(flat.logprobs)
        raise MissingLogProbError(f"the engine returned {got} prompt log-probs, expected at least {len(want)}")
    if flat.token_ids[-len(want) :] != want:
        raise MissingLogProbError(
            "the engine returned prompt log-probs of other tokens than those sent: this vLLM orders them in a way "
            "that vllm_kl does not know"
        )
    log_probs = torch.tensor(flat.logprobs[-len(want) :], dtype=torch.float32)
    return ScoreResult(log_probs=log_probs, num_cached_tokens=num_cached, rescored=rescored)
