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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from vllm_kl.engines.length_dependence import dynamic_length, note_on, side_in, side_of
from vllm_kl.engines.placeholders import notes_on, placeholder_ids
from vllm_kl.errors import (
    EngineError,
    MissingLogProbError,
    ReadoutUnavailableError,
    VLLMKLError,
    WeightsError,
)
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult
from vllm_kl.weights.adapters import identity
from vllm_kl.weights.live_weights import LiveWeights, lock_of
from vllm_kl.weights.loading import INITIAL
from vllm_kl.weights.replicas import (
    ReplicaWeights,
    check_adapter_on,
    reachable_weights,
    served_throughout,
    uncounted_in,
)

DUMMY = "load_format='dummy': the weights are random numbers"  # a note for the user
_CALLS_AT_ONCE = 256  # to all replicas of an AsyncVLLM; vLLM runs as many requests at once in each


class GenerateEngine:
    """Scores with ``generate(prompts, sampling_params)`` of a live engine.

    Args:
        engine: a ``vllm.LLM``, or an object whose ``generate`` takes token prompts and sampling parameters
            and returns vLLM's ``RequestOutput``s in order (TorchRL's ``AsyncVLLM``, whose replicas share the
            requests). Threads that score with one ``vllm.LLM`` take turns. vLLM itself does not allow another
            thread to generate with it at that time.
        generate: is called instead of ``engine.generate``: a policy's own call, which passes the policy's
            adapter.
        readout: ``"token_ids"``, ``"flat"`` or ``"auto"``.
        lora_request: the adapter to score with, a ``vllm.lora.request.LoRARequest``. ``None`` is the base
            model, or the adapter that ``generate`` passes.

    Raises:
        ReadoutUnavailableError: the engine cannot do ``readout``, takes no adapters, or wrapped its LM head
            for them.
        WeightsError: the engine would serve the adapter otherwise than it is written.
        EngineError: a replica died, or cannot be reached.
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
        self.shared = engine if llm_engine is None else llm_engine  # what holds the weights
        self.weights = reachable_weights(engine)
        config = _vllm_config(engine)
        name = _choose_readout(config, readout)
        self._readout = _TokenIds() if name == "token_ids" else _Flat()
        if config is not None:
            _check_returns_log_probs(config)
        check_adapter_on(engine, lora_request)  # loads it
        # ``vllm.LLM.generate`` steps until its engine is idle, and returns all finished requests. Two threads
        # that call it at the same time would get each other's results.
        self._lock = contextlib.nullcontext() if llm_engine is None else lock_of(llm_engine)
        self.info = _info(config, name, llm_engine)

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
            if self.weights is None:
                return results
            version = self.weights.version  # raises if it is not known, or if replicas disagree
            if isinstance(self.weights, ReplicaWeights):
                return results  # vLLM told the version of each
            return [replace(result, weight_version=version) for result in results]

    def _score(
        self, requests: Sequence[ScoreRequest], share_prefix: bool, on_done: Callable[[int], None] | None
    ) -> list[ScoreResult]:
        results: list[ScoreResult | None] = []
        replicas = self.weights if isinstance(self.weights, ReplicaWeights) else None
        with telling_versions(replicas) as told:
            outputs = self._send(requests, share_prefix)
        for request, output in zip(requests, outputs, strict=True):
            num_cached = output.num_cached_tokens or 0
            is_whole = num_cached <= request.start - 1 and self._readout.is_there(output)
            results.append(
                self._result(output, request, told, num_cached_tokens=num_cached) if is_whole else None
            )
        redo = [i for i, result in enumerate(results) if result is None]
        if on_done is not None:
            on_done(len(requests) - len(redo))
        if redo:
            again = [requests[i] for i in redo]
            with telling_versions(replicas) as told:
                outputs = self._send(again, read_cache=False)
            for i, request, output in zip(redo, again, outputs, strict=True):
                results[i] = self._result(output, request, told, rescored=True)
            if on_done is not None:
                on_done(len(redo))
        return results  # type: ignore[return-value]  # every None was filled

    def _result(self, output: Any, request: ScoreRequest, told: Told, **figures: Any) -> ScoreResult:
        version, _ = told(output.outputs[0])
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
        except Exception as error:  # vLLM refuses a request; the engine goes on
            cause = getattr(error, "cause", None)  # an error in a replica's actor
            if isinstance(error, VLLMKLError) or (cause is None and not isinstance(error, _refusals())):
                raise
            raise EngineError(f"vLLM refused: {cause or error}") from error

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
        if self._llm_engine is None and self._lora_request is None:
            adapter = {}
        if self.weights is None:  # it takes one set of parameters for all prompts
            return self._generate(prompts, SamplingParams(**common, **self._readout.params(None)), **adapter)
        params = [
            SamplingParams(**common, **self._readout.params(r), extra_args=pack(Readout(start=r.start)))
            for r in requests
        ]
        if self._llm_engine is None:  # the replicas' actors take one set of parameters for each call
            with ThreadPoolExecutor(min(len(requests), _CALLS_AT_ONCE)) as pool:
                return list(pool.map(lambda *given: self._generate(*given, **adapter), prompts, params))
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
    """Return the object with an engine's ``logprobs_mode``; ``None``: not known. No replica is asked.

    It is the model config of a ``vllm.LLM``, or the engine arguments of TorchRL's ``AsyncVLLM``.
    """
    return getattr(getattr(engine, "llm_engine", None), "model_config", None) or getattr(
        engine, "engine_args", None
    )


def _vllm_config(engine: Any) -> Any:
    """Return the ``VllmConfig`` of a ``vllm.LLM`` or of ``AsyncVLLM``'s replicas; ``None``: not known."""
    weights = reachable_weights(engine)
    if isinstance(weights, ReplicaWeights):
        return weights.config
    return getattr(getattr(engine, "llm_engine", None), "vllm_config", None)


def _refusals() -> tuple[type[Exception], ...]:
    """Return the errors with which vLLM refuses a request. Those of 0.32 are no ``ValueError``."""
    import vllm.exceptions

    return ValueError, getattr(vllm.exceptions, "VLLMClientError", ValueError)


def tells_versions() -> bool:
    """Whether the installed vLLM's outputs tell the versions of the weights that made them: since 0.32."""
    from vllm.outputs import CompletionOutput

    return "weight_versions" in CompletionOutput.__dataclass_fields__


# Returns the versions of the weights that made a completion's first and last token.
Told = Callable[[Any], tuple[int | None, int | None]]


@contextlib.contextmanager
def telling_versions(weights: LiveWeights | ReplicaWeights | None) -> Iterator[Told]:
    """Yield a function that tells which weights made a completion that the engine generated in the block.

    Call it after the block. vLLM's output tells the versions. Outputs of vLLM before 0.32 tell none: there it
    is the version that the engine, or every replica, served throughout the block; ``None`` if there was more
    than one. The caller holds the lock of a ``vllm.LLM``, so no push comes meanwhile.

    Raises:
        EngineError: a replica died, or cannot be reached.
    """
    uncounted, serving = INITIAL, None

    def told(completion: Any) -> tuple[int | None, int | None]:
        if not tells_versions():
            return serving, serving
        labels = [span.version for span in completion.weight_versions or ()] or [""]
        numbers = {INITIAL: 0, uncounted: None}
        first, last = (
            numbers.get(label, int(label) if label.isdigit() else None) for label in (labels[0], labels[-1])
        )
        return first, last

    if isinstance(weights, ReplicaWeights):
        before = [] if tells_versions() else weights.states()
        with weights.naming_failures():
            yield told
        after = weights.states()
        uncounted, serving = uncounted_in(after), served_throughout(before, after)
        return
    yield told
    if weights is not None:
        uncounted = weights.uncounted
        with contextlib.suppress(WeightsError):  # the version is not known
            serving = None if tells_versions() else weights.version


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


def _choose_readout(config: Any, readout: str) -> Literal["token_ids", "flat"]:
    """Return the read-out that an engine uses.

    Raises:
        ReadoutUnavailableError: the engine cannot do ``readout``.
    """
    if readout == "pooling":
        raise ReadoutUnavailableError(
            "readout='pooling' is not available on an engine that generates: its model has no pooler. Pass "
            "a path to VLLMScorer, or use 'auto'"
        )
    reason = _why_not_token_ids(config)
    if readout == "token_ids" and reason:
        raise ReadoutUnavailableError(f"readout='token_ids' is not available: {reason}. Use 'flat' or 'auto'")
    return "flat" if readout == "flat" or reason else "token_ids"


def _why_not_token_ids(config: Any) -> str:
    """Return why an engine cannot return log-probs of given ids; empty if it can."""
    if config is None:
        return "only a vllm.LLM or TorchRL's AsyncVLLM takes other parameters for each request"
    from vllm import SamplingParams

    if not hasattr(SamplingParams, "prompt_logprob_token_ids"):
        return "vLLM has prompt_logprob_token_ids since 0.31"
    if not config.use_v2_model_runner:
        return "prompt_logprob_token_ids needs vLLM's V2 model runner, which needs a GPU"
    return ""


def _check_returns_log_probs(config: Any) -> None:
    """Refuse an engine that returns logits, or computes the last row of a prompt only."""
    mode = config.model_config.logprobs_mode
    if not mode.endswith("logprobs"):
        raise ReadoutUnavailableError(
            f"this engine returns logits instead of log-probs: it was made with logprobs_mode={mode!r}. "
            "Make it with 'raw_logprobs', vLLM's default"
        )
    # With this option the V1 runner (0.32) asserts that no request asks for prompt log-probs. That ends the
    # engine.
    if config.cache_config.kv_sharing_fast_prefill:
        raise ReadoutUnavailableError(
            "this engine was made with kv_sharing_fast_prefill=True: it computes only the last row of a "
            "prompt, and a request for more rows ends it. Make the engine without this option"
        )


def _info(config: Any, readout: Literal["token_ids", "flat"], llm_engine: Any) -> EngineInfo:
    """Return what is known of an engine: nothing but the read-out, if its ``VllmConfig`` is not known."""
    can = frozenset({"ids"}) if readout == "token_ids" else frozenset()
    if config is None:
        return EngineInfo(readout=readout, vocab_size=None, max_sequence_len=None, can=can)
    model = config.model_config
    text, length = model.hf_text_config, model.max_model_len
    side = side_of(text, length) if llm_engine is None else side_in(llm_engine)
    placeholders = placeholder_ids(model.hf_config)
    notes = [*notes_on(model, placeholders)]
    if side is not None:
        notes.append(note_on(text, length, side))
    if config.load_config.load_format == "dummy":
        notes.append(DUMMY)
    return EngineInfo(
        readout=readout,
        vocab_size=model.get_vocab_size(),
        # An engine that generates refuses a prompt of max_model_len tokens: it needs room for one more token.
        # Beyond the length of "dynamic" RoPE vLLM has no positions (see engines/start_engine.py).
        max_sequence_len=min(length - 1, dynamic_length(text) or length),
        can=can,
        # vLLM's limit counts the prompt's own token.
        max_ids=model.max_logprobs - 1 if model.max_logprobs >= 0 else None,
        placeholders=placeholders,
        notes=tuple(notes),
        length_side=side,
        dtype=str(model.dtype).removeprefix("torch."),
    )
