"""Scores with the ``pooling`` read-out: sends requests to vLLM's engine core, and gets log-probs as tensors.

The plugin's scoring class (:mod:`vllm_kl.plugin`) computes the log-probs inside the engine. vLLM's front end
(``LLM.encode``) would render, validate, copy and sort every request. The scorer has checked the requests
already, so this module bypasses the front end.

Source: ``LLMEngine.add_request`` and ``step``, ``v1/engine/llm_engine.py``, vLLM 0.32.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from vllm import PoolingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_kl.engines.placeholders import notes_on, placeholder_ids
from vllm_kl.errors import EngineError, WeightsError
from vllm_kl.plugin.head_files import HIDDEN_SIZE, WRITE
from vllm_kl.plugin.pooler import TASK
from vllm_kl.plugin.readout_request import Readout, pack
from vllm_kl.plugin.taken_engines import LEAVE
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult
from vllm_kl.weights.adapters import load_adapter
from vllm_kl.weights.live_weights import LiveWeights


class _Job(NamedTuple):
    key: Hashable
    request: ScoreRequest
    share_prefix: bool
    rescored: bool = False


class PoolingEngine:
    """Drives an engine whose model is a scoring class. Only one thread may use it.

    Args:
        engine: the engine.
        lora_request: the adapter to score with; ``None`` is the base model. The engine may wrap its LM head
            for adapters: the read-out uses the base model's head (:mod:`vllm_kl.plugin.lm_head`).

    Raises:
        WeightsError: the engine would serve the adapter otherwise than it is written.
    """

    def __init__(self, engine: LLMEngine, lora_request: Any = None) -> None:
        self._lora_request = lora_request
        if lora_request is not None:
            load_adapter(engine, lora_request)
        self._core = engine.engine_core
        # Each step reads the version. The engine is private: its workers need not be asked.
        self.weights = LiveWeights(engine, is_shared=False)
        config = engine.vllm_config
        # More requests would only wait in the scheduler, and hashing them would delay the first batch.
        self._max_in_core = 2 * config.scheduler_config.max_num_seqs
        self._ids = itertools.count()
        self._waiting: deque[_Job] = deque()
        self._in_core: dict[str, _Job] = {}
        placeholders = placeholder_ids(config.model_config.hf_config)
        self.info = EngineInfo(
            readout="pooling",
            vocab_size=config.model_config.get_vocab_size(),
            max_sequence_len=config.model_config.max_model_len,
            can=frozenset({"temperature", "ids", "top_k", "entropy"}),
            placeholders=placeholders,
            notes=notes_on(config.model_config, placeholders),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
        )

    def submit(self, key: Hashable, request: ScoreRequest, *, share_prefix: bool) -> None:
        self._waiting.append(_Job(key, request, share_prefix))

    def step(self) -> list[tuple[Hashable, ScoreResult | Exception]]:
        finished: list[tuple[Hashable, ScoreResult | Exception]] = []
        try:
            version = self.weights.version
        except WeightsError as error:  # the engine works again when it gets other weights
            keys = [job.key for job in (*self._waiting, *self._in_core.values())]
            self.cancel(keys)
            return [(key, error) for key in keys]
        while self._waiting and len(self._in_core) < self._max_in_core:
            self._send(self._waiting.popleft(), version)
        for output in self._core.get_output().outputs if self._in_core else ():
            if output.request_id not in self._in_core or (
                output.pooling_output is None and not output.finished
            ):
                continue
            job = self._in_core.pop(output.request_id)
            if output.pooling_output is None:
                finished.append((job.key, EngineError(f"vLLM ended a request: {output.finish_reason}")))
                continue
            values = output.pooling_output.numpy()
            if job.share_prefix and np.isnan(values[:, 0]).any():
                # Without the cap, or after a preemption, a hit can reach past row start - 1. Its rows were
                # not computed.
                self._send(job._replace(share_prefix=False, rescored=True), version)
                continue
            num_cached = 0 if output.prefill_stats is None else output.prefill_stats.num_cached_tokens
            figures = {"num_cached_tokens": num_cached, "rescored": job.rescored, "weight_version": version}
            finished.append((job.key, ScoreResult(values=values, **figures)))
        return finished

    def cancel(self, keys: Sequence[Hashable]) -> None:
        gone = set(keys)
        self._waiting = deque(job for job in self._waiting if job.key not in gone)
        ids = [request_id for request_id, job in self._in_core.items() if job.key in gone]
        for request_id in ids:
            del self._in_core[request_id]
        self._core.abort_requests(ids)

    def leave(self) -> None:
        self._core.collective_rpc(LEAVE)

    def hidden_size(self) -> int:
        """Return how many features a hidden state has. The workers know it after their first step."""
        return next(filter(None, self._core.collective_rpc(HIDDEN_SIZE)))

    def write_head(self, folder: str) -> list[Any]:
        """Let each worker write its part of the LM head to a folder; return what each one says of it."""
        return self._core.collective_rpc(WRITE, args=(folder,))

    def _send(self, job: _Job, version: int) -> None:
        request, request_id = job.request, str(next(self._ids))
        readout = Readout(
            start=request.start,
            temperature=request.temperature,
            top_k=request.top_k,
            num_ids=request.num_ids,
            ids=b"" if request.ids is None else request.ids.tobytes(),
            entropy=request.entropy,
            hidden_size=request.hidden_size,
        )
        params = PoolingParams(
            task=TASK, skip_reading_prefix_cache=not job.share_prefix, extra_kwargs=pack(readout)
        )
        self._in_core[request_id] = job
        core_request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=request.token_ids.tolist(),
            mm_features=None,
            sampling_params=None,
            pooling_params=params,
            arrival_time=time.time(),
            lora_request=self._lora_request,
            cache_salt=str(version),  # a hit never returns KV of other weights
            data_parallel_rank=None,
        )
        self._core.add_request(core_request)
