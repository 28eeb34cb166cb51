"""The read-outs of an engine that generates, through vLLM's public API: ``token_ids`` and ``flat``.

``token_ids`` asks for the log-probs of given tokens at given rows (``prompt_logprob_token_ids``): a tensor per request,
and the LM head on those rows only. It needs vLLM's V2 model runner, which needs a GPU.

``flat`` works with every engine on every platform. It asks for ``prompt_logprobs=0`` (the token itself, no ranks),
``flat_logprobs=True`` (no object per token) and ``detokenize=False``.

A cache hit that reaches past row ``start - 1`` hides rows. With the plugin's cap in the engine's process there is none;
where there is no cap, ``token_ids`` returns ``None``, and ``flat`` has rows without a value: uninitialised memory on the V1
runner (``v1/worker/gpu_model_runner.py``, 0.32), left out on V2. So a result is accepted only if its hit ends at or before
row ``start - 1``; other requests are sent again without the cache. A salt per call keeps hits inside the call: the cache of
an engine that also generates holds whole responses, and may hold KV of older weights, or of an adapter that was loaded in the
place of another (vLLM hashes an adapter's name and path, not its weights).
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from vllm_kl.engines.base import OnDone
from vllm_kl.engines.lengths import dynamic_length, note_on, side_in
from vllm_kl.engines.placeholders import notes_on, placeholder_ids
from vllm_kl.errors import (
    EngineError,
    MissingLogProbError,
    ReadoutUnavailableError,
    VLLMKLError,
    WeightsError,
)
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult
from vllm_kl.weights.adapters import check_adapter, check_engine_args, identity
from vllm_kl.weights.live import LiveWeights, lock_of
from vllm_kl.weights.loading import INITIAL

DUMMY = "load_format='dummy': the weights are random numbers"  # what a user must know of it


class GenerateEngine:
    """Scores with ``generate(prompts, sampling_params)`` of a live engine.

    Args:
        engine: a ``vllm.LLM``, or anything whose ``generate`` takes token prompts and sampling parameters and returns
            vLLM's ``RequestOutput``s in order (TorchRL's ``AsyncVLLM``). Threads that score with one ``vllm.LLM`` take
            turns; vLLM itself does not allow generating with it at the same time.
        generate: used instead of ``engine.generate`` (a policy's own call, which names the policy's adapter itself).
        readout: ``"token_ids"``, ``"flat"`` or ``"auto"``.
        lora_request: the adapter whose log-probs these are, a ``vllm.lora.request.LoRARequest``; ``None`` is the base
            model, or, where ``generate`` is given, whatever that asks for.

    Raises:
        ReadoutUnavailableError: this engine cannot do ``readout``, takes no adapters, or has an LM head wrapped for them.
        WeightsError: the engine would not serve the adapter as it is written.
    """

    def __init__(
        self,
        engine: Any,
        generate: Callable[..., list] | None = None,
        *,
        readout: str = "auto",
        lora_request: Any = None,
    ) -> None:
        self._generate = generate or engine.generate
        self._names_adapter = generate is None
        self._lora_request = lora_request
        self._llm_engine = llm_engine = getattr(engine, "llm_engine", None)
        name = _choose_readout(llm_engine, readout)
        self._readout = _TokenIds() if name == "token_ids" else _Flat()
        _check_returns_log_probs(engine)
        _check_adapter(engine, lora_request)
        # ``vllm.LLM.generate`` steps until its engine is idle and returns whatever finished: two threads at a time would get
        # each other's results.
        self._lock = contextlib.nullcontext() if llm_engine is None else lock_of(llm_engine)
        self.weights = None if llm_engine is None else LiveWeights(llm_engine)
        self.info = _info(engine, name)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: OnDone | None = None,
        alone: bool = False,
    ) -> list[ScoreResult]:
        with self._lock, self._leaving_nothing():  # always alone
            results = self._score(requests, share_prefix, on_done)
            if self.weights is None:
                return results
            version = self.weights.version
            return [replace(result, weight_version=version) for result in results]

    def _score(
        self, requests: Sequence[ScoreRequest], share_prefix: bool, on_done: OnDone | None
    ) -> list[ScoreResult]:
        results: list[ScoreResult | None] = []
        for request, output in zip(requests, self._send(requests, share_prefix), strict=True):
            num_cached = output.num_cached_tokens or 0
            is_whole = num_cached <= request.start - 1 and self._readout.is_there(output)
            results.append(self._result(output, request, num_cached_tokens=num_cached) if is_whole else None)
        redo = [i for i, result in enumerate(results) if result is None]
        if on_done is not None:
            on_done(len(requests) - len(redo))
        if redo:
            again = [requests[i] for i in redo]
            for i, request, output in zip(redo, again, self._send(again, read_cache=False), strict=True):
                results[i] = self._result(output, request, rescored=True)
            if on_done is not None:
                on_done(len(redo))
        return results  # type: ignore[return-value]  # every None was filled

    def _result(self, output: Any, request: ScoreRequest, **figures: Any) -> ScoreResult:
        version, _ = versions_told(output.outputs[0], uncounted=INITIAL)
        return ScoreResult(values=self._readout.read(output, request), weight_version=version, **figures)

    @contextlib.contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """Take back what an interrupted call (Ctrl-C) added: ``vllm.LLM`` gives its next caller the outputs of all requests.

        Raises:
            EngineError: somebody else's interrupted call left requests.
        """
        if self._llm_engine is None:
            yield
            return
        if num := self._llm_engine.get_num_unfinished_requests():
            raise EngineError(
                f"the vllm.LLM has {num} unfinished requests, left by a call of generate() that was interrupted, or of another "
                "thread: its next call returns their outputs too. End them (llm.llm_engine.abort_request), or make a new engine"
            )
        try:
            yield
        except BaseException:
            self._llm_engine.abort_request(
                list(self._llm_engine.output_processor.request_states), internal=True
            )
            raise

    def close(self) -> None:
        """Nothing to give back: the engine belongs to somebody else."""

    def _send(self, requests: Sequence[ScoreRequest], read_cache: bool) -> list[Any]:
        try:
            return self._of_the_adapter(self._ask(requests, read_cache))
        except ValueError as error:  # what vLLM refuses; its engine goes on
            if isinstance(error, VLLMKLError):
                raise
            raise EngineError(f"vLLM refused: {error}") from error

    def _ask(self, requests: Sequence[ScoreRequest], read_cache: bool) -> list[Any]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        from vllm_kl.plugin.request import Readout, pack

        common = {
            "max_tokens": 1,
            "temperature": 0.0,
            "detokenize": False,
            "skip_reading_prefix_cache": not read_cache,
        }
        salt = uuid.uuid4().hex
        prompts = [TokensPrompt(prompt_token_ids=r.token_ids.tolist(), cache_salt=salt) for r in requests]
        adapter = {"lora_request": self._lora_request} if self._names_adapter else {}
        if self._llm_engine is None:  # takes one set of parameters for all
            adapter = adapter if self._lora_request is not None else {}
            return self._generate(prompts, SamplingParams(**common, **self._readout.params(None)), **adapter)
        params = [
            SamplingParams(**common, **self._readout.params(r), extra_args=pack(Readout(start=r.start)))
            for r in requests
        ]
        # Without use_tqdm=False a vllm.LLM shows a progress bar. None is passed, too: somebody may have bound another.
        return self._generate(prompts, params, use_tqdm=False, **adapter)

    def _of_the_adapter(self, outputs: list[Any]) -> list[Any]:
        """Return the outputs, or refuse those of other weights: each tells the adapter that made it."""
        if self._names_adapter or self._lora_request is not None:
            want = identity(self._lora_request)
            for output in outputs:
                got = identity(getattr(output, "lora_request", None))
                if got != want:
                    raise WeightsError(
                        f"the engine scored with adapter {got}, expected {want} (name, id, path; None: the base model). Whatever "
                        "wraps its generate() must pass lora_request on"
                    )
        return outputs


def config_of(engine: Any) -> Any:
    """Return what tells how an engine records log-probs: the config of a ``vllm.LLM``'s model, the arguments of TorchRL's
    ``AsyncVLLM``; ``None`` of what cannot be asked."""
    return getattr(getattr(engine, "llm_engine", None), "model_config", None) or getattr(
        engine, "engine_args", None
    )


def _made_with(engine: Any, config: str, name: str) -> Any:
    """Return an option that an engine was made with, in one of vLLM's configs; ``None`` of what cannot be asked."""
    llm_engine = getattr(engine, "llm_engine", None)
    made_with = (
        getattr(engine, "engine_args", None)
        if llm_engine is None
        else getattr(llm_engine.vllm_config, config)
    )
    return getattr(made_with, name, None)


def versions_told(completion: Any, *, uncounted: str | None) -> tuple[int | None, int | None]:
    """Return the versions of the weights that made a completion's first and last token, as vLLM's output says.

    Args:
        uncounted: the stamp that says nothing, if one does (``LiveWeights.uncounted``).
    """
    told = [span.version for span in completion.weight_versions or ()] or [""]
    numbers = {INITIAL: 0, uncounted: None}
    first, last = (
        numbers.get(label, int(label) if label.isdigit() else None) for label in (told[0], told[-1])
    )
    return first, last


class _TokenIds:
    def params(self, request: ScoreRequest) -> dict[str, Any]:
        wanted = request.token_ids[request.start :, None]
        if request.ids is not None:
            wanted = np.concatenate([wanted, request.ids], axis=1)
        return {"prompt_logprob_token_ids": wanted, "prompt_logprob_start": request.start - 1}

    def is_there(self, output: Any) -> bool:
        """A preempted request that hits more when it resumes has no log-probs."""
        return output.prompt_token_id_logprobs is not None

    def read(self, output: Any, request: ScoreRequest) -> np.ndarray:
        values = output.prompt_token_id_logprobs
        if values is None:
            raise MissingLogProbError("the engine returned no prompt log-probs")
        return np.array(values, dtype=np.float32)


class _Flat:
    def params(self, request: ScoreRequest | None) -> dict[str, Any]:
        return {"prompt_logprobs": 0, "flat_logprobs": True}

    def is_there(self, output: Any) -> bool:
        return True  # read() says what is missing

    def read(self, output: Any, request: ScoreRequest) -> np.ndarray:
        """Take the last rows: V1 returns one per prompt token but the first, V2 those after a hit."""
        flat, want = output.prompt_logprobs, request.token_ids[request.start :].tolist()
        if flat is None or len(flat.logprobs) < len(want):
            got = 0 if flat is None else len(flat.logprobs)
            raise MissingLogProbError(
                f"the engine returned {got} prompt log-probs, expected at least {len(want)}"
            )
        if flat.token_ids[-len(want) :] != want:
            raise MissingLogProbError(
                "the engine returned prompt log-probs of other tokens than those sent: this vLLM orders them in a way "
                "that vllm_kl does not know"
            )
        return np.array(flat.logprobs[-len(want) :], dtype=np.float32)[:, None]


def _choose_readout(llm_engine: Any, readout: str) -> Literal["token_ids", "flat"]:
    """Return the read-out that an engine uses.

    Raises:
        ReadoutUnavailableError: the engine cannot do ``readout``.
    """
    if readout == "pooling":
        raise ReadoutUnavailableError(
            "readout='pooling' is not available on an engine that generates: its model has no pooler. Pass a path to "
            "VLLMScorer, or use 'auto'"
        )
    reason = _why_not_token_ids(llm_engine)
    if readout == "token_ids" and reason:
        raise ReadoutUnavailableError(f"readout='token_ids' is not available: {reason}. Use 'flat' or 'auto'")
    return "flat" if readout == "flat" or reason else "token_ids"


def _why_not_token_ids(llm_engine: Any) -> str:
    """Return why an engine cannot return log-probs of given ids; empty if it can."""
    if llm_engine is None:
        return "only a vllm.LLM takes parameters for each request"
    if not llm_engine.vllm_config.use_v2_model_runner:
        return "prompt_logprob_token_ids needs vLLM's V2 model runner, which needs a GPU"
    return ""


def _check_returns_log_probs(engine: Any) -> None:
    """Refuse an engine that returns logits, or computes the last row of a prompt only."""
    mode = getattr(config_of(engine), "logprobs_mode", "raw_logprobs")
    if not mode.endswith("logprobs"):
        raise ReadoutUnavailableError(
            f"this engine returns logits instead of log-probs: it was made with logprobs_mode={mode!r}. Make it with "
            "'raw_logprobs', vLLM's default"
        )
    # V1's runner (0.32) asserts that nobody asks for prompt log-probs there, which ends the engine.
    if _made_with(engine, "cache_config", "kv_sharing_fast_prefill"):
        raise ReadoutUnavailableError(
            "this engine was made with kv_sharing_fast_prefill=True: it computes the last row of a prompt only, and would end "
            "where more are asked for. Make it without"
        )


def _check_adapter(engine: Any, lora_request: Any) -> None:
    """Refuse an adapter that the engine would not serve as it is written."""
    llm_engine = getattr(engine, "llm_engine", None)
    if llm_engine is not None:
        check_adapter(llm_engine, lora_request)
    elif hasattr(engine, "engine_args"):  # TorchRL's AsyncVLLM
        check_engine_args(engine.engine_args, lora_request)


def _info(engine: Any, readout: Literal["token_ids", "flat"]) -> EngineInfo:
    """Return what is known of an engine: all of a ``vllm.LLM``, little of one in an actor."""
    llm_engine = getattr(engine, "llm_engine", None)
    config = getattr(llm_engine, "model_config", None)
    placeholders = placeholder_ids(_hf_config(engine))
    notes = [*notes_on(config, placeholders)]
    side = max_sequence_len = vocab_size = max_ids = None
    if config is not None:
        text, side, vocab_size = config.hf_text_config, side_in(llm_engine), config.get_vocab_size()
        # An engine that generates refuses a prompt of max_model_len: it must have room for one more token.
        # Beyond "dynamic" RoPE's length vLLM has no positions (see engines/local.py).
        max_sequence_len = min(config.max_model_len - 1, dynamic_length(text) or config.max_model_len)
        if side is not None:
            notes.append(note_on(text, config.max_model_len, side))
        if config.max_logprobs >= 0:
            max_ids = config.max_logprobs - 1  # the token itself is one of vLLM's limit
    if _made_with(engine, "load_config", "load_format") == "dummy":
        notes.append(DUMMY)
    return EngineInfo(
        readout=readout,
        vocab_size=vocab_size,
        max_sequence_len=max_sequence_len,
        can=frozenset({"ids"}) if readout == "token_ids" else frozenset(),
        max_ids=max_ids,
        placeholders=placeholders,
        notes=tuple(notes),
        length_side=side,
    )


def _hf_config(engine: Any) -> Any:
    """Return the config of an engine's model; ``None``: it is out of reach, in an actor."""
    if hasattr(engine, "llm_engine"):
        return engine.llm_engine.model_config.hf_config
    args = getattr(engine, "engine_args", None)  # TorchRL's AsyncVLLM
    if args is None:
        return None
    from vllm.transformers_utils.config import get_config

    return get_config(args.model, trust_remote_code=args.trust_remote_code, revision=args.revision)
