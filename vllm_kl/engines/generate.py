"""Scores with an engine that generates, through vLLM's public API. There are two read-outs.

``token_ids`` asks for the log-probs of given tokens at given rows (``prompt_logprob_token_ids``). vLLM
returns one tensor per request and computes the LM head on those rows only. It needs vLLM's V2 model runner,
which needs a GPU.

``flat`` works with every engine on every platform. It asks for ``prompt_logprobs=0`` (the log-prob of the
token itself, no ranks), ``flat_logprobs=True`` (no Python object per token) and ``detokenize=False``.

A prefix-cache hit that reaches past row ``start - 1`` hides rows that must be scored. The plugin's cap
prevents such hits. An engine without the cap returns ``None`` for ``token_ids``. For ``flat`` it returns
uninitialised memory in the hidden rows on the V1 runner (``v1/worker/gpu_model_runner.py``, 0.32), and leaves
these rows out on the V2 runner. So a result is accepted only if its hit ends at or before row ``start - 1``.
Every other request is sent again without the cache.

Each call has its own cache salt, so a call hits only KV that it computed itself. The cache of an engine that
also generates holds whole responses. It may also hold KV of older weights, or of an adapter that was
replaced: vLLM hashes an adapter's name and path, not its weights.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from vllm_kl.engines.length_dependence import dynamic_length, note_on, side_in
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
from vllm_kl.weights.live_weights import LiveWeights, lock_of
from vllm_kl.weights.loading import INITIAL
from vllm_kl.weights.replicas import ReplicaWeights, reachable_weights

DUMMY = "load_format='dummy': the weights are random numbers"  # a note for the user


class GenerateEngine:
    """Scores with ``generate(prompts, sampling_params)`` of a live engine.

    Args:
        engine: a ``vllm.LLM``, or an object whose ``generate`` takes token prompts and sampling parameters
            and returns vLLM's ``RequestOutput``s in order (TorchRL's ``AsyncVLLM``). Threads that score with
            one ``vllm.LLM`` take turns. vLLM itself does not allow another thread to generate with it at that
            time.
        generate: is called instead of ``engine.generate``: a policy's own call, which passes the policy's
            adapter.
        readout: ``"token_ids"``, ``"flat"`` or ``"auto"``.
        lora_request: the adapter to score with, a ``vllm.lora.request.LoRARequest``. ``None`` is the base
            model, or the adapter that ``generate`` passes.

    Raises:
        ReadoutUnavailableError: the engine cannot do ``readout``, takes no adapters, or wrapped its LM head
            for them.
        WeightsError: the engine would serve the adapter otherwise than it is written.
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
        # ``vllm.LLM.generate`` steps until its engine is idle, and returns all finished requests. Two threads
        # that call it at the same time would get each other's results.
        self._lock = contextlib.nullcontext() if llm_engine is None else lock_of(llm_engine)
        self.weights = reachable_weights(engine)
        self.info = _info(engine, name)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: Callable[[int], None] | None = None,
        alone: bool = False,
    ) -> list[ScoreResult]:
        with self._lock, self._without_leftovers():  # a call is always alone
            results = self._score(requests, share_prefix, on_done)
            if not isinstance(self.weights, LiveWeights):
                return results
            version = self.weights.version
            return [replace(result, weight_version=version) for result in results]

    def _score(
        self, requests: Sequence[ScoreRequest], share_prefix: bool, on_done: Callable[[int], None] | None
    ) -> list[ScoreResult]:
        results: list[ScoreResult | None] = []
        outputs = self._send(requests, share_prefix)
        # LiveWeights tell the version of the whole call afterwards.
        uncounted = self.weights.uncounted if isinstance(self.weights, ReplicaWeights) else INITIAL
        for request, output in zip(requests, outputs, strict=True):
            num_cached = output.num_cached_tokens or 0
            is_whole = num_cached <= request.start - 1 and self._readout.is_there(output)
            results.append(
                self._result(output, request, uncounted, num_cached_tokens=num_cached) if is_whole else None
            )
        redo = [i for i, result in enumerate(results) if result is None]
        if on_done is not None:
            on_done(len(requests) - len(redo))
        if redo:
            again = [requests[i] for i in redo]
            for i, request, output in zip(redo, again, self._send(again, read_cache=False), strict=True):
                results[i] = self._result(output, request, uncounted, rescored=True)
            if on_done is not None:
                on_done(len(redo))
        return results  # type: ignore[return-value]  # every None was filled

    def _result(
        self, output: Any, request: ScoreRequest, uncounted: str | None, **figures: Any
    ) -> ScoreResult:
        version, _ = versions_told(output.outputs[0], uncounted=uncounted, serving=None)
        return ScoreResult(values=self._readout.read(output, request), weight_version=version, **figures)

    @contextlib.contextmanager
    def _without_leftovers(self) -> Iterator[None]:
        """Abort the requests of a call that is interrupted (Ctrl-C).

        Otherwise ``vllm.LLM`` would return their outputs to its next caller.

        Raises:
            EngineError: the engine has unfinished requests of another call.
        """
        if self._llm_engine is None:
            yield
            return
        if num := self._llm_engine.get_num_unfinished_requests():
            raise EngineError(
                f"the vllm.LLM has {num} unfinished requests of an interrupted generate() call or of "
                "another thread. Its next call would return their outputs, too.\nAbort them "
                "(llm.llm_engine.abort_request), or make a new engine"
            )
        try:
            yield
        except BaseException:
            self._llm_engine.abort_request(
                list(self._llm_engine.output_processor.request_states), internal=True
            )
            raise

    def close(self) -> None:
        """Do nothing: the caller owns the engine."""

    def _send(self, requests: Sequence[ScoreRequest], read_cache: bool) -> list[Any]:
        try:
            return self._checked_adapter(self._generate_once(requests, read_cache))
        except ValueError as error:  # vLLM refuses a request; the engine goes on
            if isinstance(error, VLLMKLError):
                raise
            raise EngineError(f"vLLM refused: {error}") from error

    def _generate_once(self, requests: Sequence[ScoreRequest], read_cache: bool) -> list[Any]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        from vllm_kl.plugin.readout_request import Readout, pack

        common = {
            "max_tokens": 1,
            "temperature": 0.0,
            "detokenize": False,
            "skip_reading_prefix_cache": not read_cache,
        }
        salt = uuid.uuid4().hex
        prompts = [TokensPrompt(prompt_token_ids=r.token_ids.tolist(), cache_salt=salt) for r in requests]
        adapter = {"lora_request": self._lora_request} if self._names_adapter else {}
        if self._llm_engine is None:  # it takes one set of parameters for all prompts
            adapter = adapter if self._lora_request is not None else {}
            return self._generate(prompts, SamplingParams(**common, **self._readout.params(None)), **adapter)
        params = [
            SamplingParams(**common, **self._readout.params(r), extra_args=pack(Readout(start=r.start)))
            for r in requests
        ]
        # use_tqdm=False: no progress bar. lora_request=None is passed, too: ``generate`` may be a partial
        # with another.
        return self._generate(prompts, params, use_tqdm=False, **adapter)

    def _checked_adapter(self, outputs: list[Any]) -> list[Any]:
        """Return the outputs if each names the adapter that the caller asked for.

        Raises:
            WeightsError: an output names another adapter.
        """
        if self._names_adapter or self._lora_request is not None:
            want = identity(self._lora_request)
            for output in outputs:
                got = identity(getattr(output, "lora_request", None))
                if got != want:
                    raise WeightsError(
                        f"the engine scored with adapter {got}, expected {want} (name, id, path; None: the "
                        "base model). A function that wraps the engine's generate() must pass lora_request "
                        "on"
                    )
        return outputs


def config_of(engine: Any) -> Any:
    """Return the object with an engine's ``logprobs_mode``; ``None``: not known.

    It is the model config of a ``vllm.LLM``, or the engine arguments of TorchRL's ``AsyncVLLM``.
    """
    return getattr(getattr(engine, "llm_engine", None), "model_config", None) or getattr(
        engine, "engine_args", None
    )


def _made_with(engine: Any, config: str, name: str) -> Any:
    """Return an option's value in an engine.

    Args:
        engine: the engine.
        config: the part of ``VllmConfig`` that holds the option.
        name: the option.

    Returns:
        The value; ``None``: not known.
    """
    llm_engine = getattr(engine, "llm_engine", None)
    made_with = (
        getattr(engine, "engine_args", None)
        if llm_engine is None
        else getattr(llm_engine.vllm_config, config)
    )
    return getattr(made_with, name, None)


def tells_versions() -> bool:
    """Whether the installed vLLM's outputs tell the versions of the weights that made them: since 0.32."""
    from vllm.outputs import CompletionOutput

    return "weight_versions" in CompletionOutput.__dataclass_fields__


def versions_told(
    completion: Any, *, uncounted: str | None, serving: int | None
) -> tuple[int | None, int | None]:
    """Return the versions of the weights that made a completion's first and last token, by vLLM's output.

    Args:
        uncounted: a label that stands for no known version, if there is one (``LiveWeights.uncounted``).
        serving: the version during the whole call, for vLLM before 0.32, whose outputs tell none.
    """
    if not tells_versions():
        return serving, serving
    labels = [span.version for span in completion.weight_versions or ()] or [""]
    numbers = {INITIAL: 0, uncounted: None}
    first, last = (
        numbers.get(label, int(label) if label.isdigit() else None) for label in (labels[0], labels[-1])
    )
    return first, last


class _TokenIds:
    def params(self, request: ScoreRequest) -> dict[str, Any]:
        wanted = request.token_ids[request.start :, None]
        if request.ids is not None:
            wanted = np.concatenate([wanted, request.ids], axis=1)
        return {"prompt_logprob_token_ids": wanted, "prompt_logprob_start": request.start - 1}

    def is_there(self, output: Any) -> bool:
        """Whether the output has log-probs. A request that was preempted and then hit more KV has none."""
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
        return True  # read() raises if rows are missing

    def read(self, output: Any, request: ScoreRequest) -> np.ndarray:
        """Return the last rows. V1 returns a row per token after the first, V2 only rows after a hit."""
        flat, want = output.prompt_logprobs, request.token_ids[request.start :].tolist()
        if flat is None or len(flat.logprobs) < len(want):
            got = 0 if flat is None else len(flat.logprobs)
            raise MissingLogProbError(
                f"the engine returned {got} prompt log-probs, expected at least {len(want)}"
            )
        if flat.token_ids[-len(want) :] != want:
            raise MissingLogProbError(
                "the engine returned prompt log-probs of other tokens than the prompt's: this vLLM orders "
                "the log-probs in a way that vllm_kl does not know"
            )
        return np.array(flat.logprobs[-len(want) :], dtype=np.float32)[:, None]


def _choose_readout(llm_engine: Any, readout: str) -> Literal["token_ids", "flat"]:
    """Return the read-out that an engine uses.

    Raises:
        ReadoutUnavailableError: the engine cannot do ``readout``.
    """
    if readout == "pooling":
        raise ReadoutUnavailableError(
            "readout='pooling' is not available on an engine that generates: its model has no pooler. Pass "
            "a path to VLLMScorer, or use 'auto'"
        )
    reason = _why_not_token_ids(llm_engine)
    if readout == "token_ids" and reason:
        raise ReadoutUnavailableError(f"readout='token_ids' is not available: {reason}. Use 'flat' or 'auto'")
    return "flat" if readout == "flat" or reason else "token_ids"


def _why_not_token_ids(llm_engine: Any) -> str:
    """Return why an engine cannot return log-probs of given ids; empty if it can."""
    if llm_engine is None:
        return "only a vllm.LLM takes other parameters for each request"
    from vllm import SamplingParams

    if not hasattr(SamplingParams, "prompt_logprob_token_ids"):
        return "vLLM has prompt_logprob_token_ids since 0.31"
    if not llm_engine.vllm_config.use_v2_model_runner:
        return "prompt_logprob_token_ids needs vLLM's V2 model runner, which needs a GPU"
    return ""


def _check_returns_log_probs(engine: Any) -> None:
    """Refuse an engine that returns logits, or computes the last row of a prompt only."""
    mode = getattr(config_of(engine), "logprobs_mode", "raw_logprobs")
    if not mode.endswith("logprobs"):
        raise ReadoutUnavailableError(
            f"this engine returns logits instead of log-probs: it was made with logprobs_mode={mode!r}. "
            "Make it with 'raw_logprobs', vLLM's default"
        )
    # With this option the V1 runner (0.32) asserts that no request asks for prompt log-probs. That ends the
    # engine.
    if _made_with(engine, "cache_config", "kv_sharing_fast_prefill"):
        raise ReadoutUnavailableError(
            "this engine was made with kv_sharing_fast_prefill=True: it computes only the last row of a "
            "prompt, and a request for more rows ends it. Make the engine without this option"
        )


def _check_adapter(engine: Any, lora_request: Any) -> None:
    """Refuse an engine, or an adapter on it, whose prompt log-probs would be wrong."""
    llm_engine = getattr(engine, "llm_engine", None)
    if llm_engine is not None:
        check_adapter(llm_engine, lora_request)
    elif hasattr(engine, "engine_args"):  # TorchRL's AsyncVLLM
        check_engine_args(engine.engine_args, lora_request)


def _info(engine: Any, readout: Literal["token_ids", "flat"]) -> EngineInfo:
    """Return what is known of an engine. Most fields are known of a ``vllm.LLM`` only."""
    llm_engine = getattr(engine, "llm_engine", None)
    config = getattr(llm_engine, "model_config", None)
    placeholders = placeholder_ids(_hf_config(engine))
    notes = [*notes_on(config, placeholders)]
    side = max_sequence_len = vocab_size = max_ids = None
    if config is not None:
        text, side, vocab_size = config.hf_text_config, side_in(llm_engine), config.get_vocab_size()
        # An engine that generates refuses a prompt of max_model_len tokens: it needs room for one more token.
        # Beyond the length of "dynamic" RoPE vLLM has no positions (see engines/start_engine.py).
        max_sequence_len = min(config.max_model_len - 1, dynamic_length(text) or config.max_model_len)
        if side is not None:
            notes.append(note_on(text, config.max_model_len, side))
        if config.max_logprobs >= 0:
            max_ids = config.max_logprobs - 1  # vLLM's limit counts the prompt's own token
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
    """Return the config of an engine's model; ``None``: not known."""
    if hasattr(engine, "llm_engine"):
        return engine.llm_engine.model_config.hf_config
    args = getattr(engine, "engine_args", None)  # TorchRL's AsyncVLLM
    if args is None:
        return None
    from vllm.transformers_utils.config import get_config

    return get_config(args.model, trust_remote_code=args.trust_remote_code, revision=args.revision)
