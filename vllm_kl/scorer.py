"""Token ids in, reference log-probs out: read this file first.

``VLLMScorer.score`` checks the input, sends what must be computed to its engine, and checks what comes back:

    token_ids, start -> ScoreRequest -> ordered, each once (plan.py) -> engine (engines/) -> ScoreResult
        -> every row there, finite -> float32 tensors, in the caller's order

It knows nothing of tensordicts, chat templates, masks or padding; those are in ``batch/``.
"""

from __future__ import annotations

import contextlib
import logging
import numbers
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch

from vllm_kl.checks import (
    TokenIds,
    check_can,
    check_ids,
    check_lora_request,
    check_requests,
    check_results,
    check_temperature,
    check_timeout,
)
from vllm_kl.engines.base import Engine
from vllm_kl.engines.devices import Devices
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.make import make_engine
from vllm_kl.engines.placeholders import Placeholders, check_placeholders
from vllm_kl.engines.process import TIMEOUT_S
from vllm_kl.errors import InputError, OptionError, ReadoutUnavailableError, WeightsError
from vllm_kl.plan import plan
from vllm_kl.progress import show_progress
from vllm_kl.types import ReadoutName, ScoreRequest, ScoreResult, ScoreStats, TopK
from vllm_kl.weights.canary import Canary
from vllm_kl.weights.checkpoint import average
from vllm_kl.weights.collector_errors import check_collector
from vllm_kl.weights.live import Weights

logger = logging.getLogger("vllm_kl")


class VLLMScorer:
    """Scores sequences with a vLLM engine: log-probs of given tokens, nothing generated.

    Args:
        model: path or name of a model: the scorer owns an engine, in a process of its own that ends with this one.
            Or a live ``vllm.LLM``: it is shared, and left running. Or an :class:`~vllm_kl.engines.base.Engine`.
        readout: how log-probs leave the engine. ``"pooling"`` (an owned engine) reads them inside the engine, at prefill
            speed; ``"token_ids"`` (a shared engine on a GPU) asks vLLM for the rows and tokens that are needed;
            ``"flat"`` works with every engine. ``"auto"`` takes the first of these that the engine supports, and says
            which in the log.
        canary: remember what a fixed sequence scores now, so that :meth:`check_frozen` can prove that the weights did not move;
            ``None``: unless ``model`` is an :class:`~vllm_kl.engines.base.Engine`.
        share_prefix: let sequences share the KV of a common prefix. Always exact: a cache hit ends before the first
            row that is scored.
        temperature: log-probs are those of ``softmax(logits / temperature)``, as sampled at that temperature. vLLM's own
            prompt log-probs ignore it; read-outs that cannot apply it refuse.
        lora_request: a ``vllm.lora.request.LoRARequest``: the adapter whose log-probs these are; ``None`` is the base model.
            A shared engine must have been made with ``enable_lora=True``. Any number of scorers may share it: one of the base
            model, one of each adapter. ``weight_version`` is the base model's; the canary is scored with the adapter.
        placeholders: what happens to ids that stand for an image, a video or audio in a multimodal model: ``"refuse"``, or
            ``"as_text"``, which scores them as the ordinary tokens that they are not.
        timeout_s: of an owned engine: the longest time, in seconds, that a start, a score, a push or a refresh waits without a
            sign of life; then the engine is ended, and the error has its log. While it computes, an engine gives one every second;
            while it starts, or loads weights, none. ``None`` waits for ever.
        devices: of an owned engine: the GPUs that it runs on, as many as ``tensor_parallel_size`` times ``pipeline_parallel_size``:
            indices among those that this process sees (``CUDA_VISIBLE_DEVICES``, which Ray sets for its actors), or UUIDs;
            ``None``: the first. ``devices=1`` keeps a reference off the GPU of the policy.
        **engine_options: vLLM's engine options under their own names, for an owned engine. A vision-language model serves text
            only (``language_model_only=True``), unless they say otherwise.

    Raises:
        OptionError: an engine option does not exist, cannot work (see :mod:`vllm_kl.engines.options`), or was given for an engine
            that already runs; a folder that does not exist, or is no checkpoint; a ``max_model_len`` whose KV does not fit.
        ReadoutUnavailableError: the engine cannot do this read-out, or the read-out this temperature; the engine takes no
            adapters, or its LM head is wrapped for them, which spoils prompt log-probs; says why.
        WeightsError: the adapter cannot be loaded, or would not be served as it is written.
        EngineError: the engine did not start; with the end of its log.

    Attributes:
        stats: figures of the last call, of whichever thread, or ``None``.

    >>> # scorer = VLLMScorer("my-model", dtype="float32")
    >>> log_probs = scorer.score([[5, 6, 7, 8], [5, 6, 9]], start=2)
    >>> [tuple(t.shape) for t in log_probs]
    [(2,), (1,)]
    >>> scorer.stats.num_scored_tokens
    3
    """

    def __init__(
        self,
        model: Any,
        *,
        readout: ReadoutName = "auto",
        share_prefix: bool = True,
        temperature: float = 1.0,
        canary: bool | None = None,
        lora_request: Any = None,
        placeholders: Placeholders = "refuse",
        timeout_s: float | None = TIMEOUT_S,
        devices: Devices | None = None,
        **engine_options: Any,
    ) -> None:
        if readout not in get_args(ReadoutName):
            raise ReadoutUnavailableError(
                f"readout={readout!r} does not exist; choose one of {', '.join(get_args(ReadoutName))}"
            )
        self.share_prefix = share_prefix
        self.temperature = check_temperature(temperature)
        self._placeholders = check_placeholders(placeholders)
        self.stats: ScoreStats | None = None
        self._is_asleep = False
        self._engine: Engine = make_engine(
            model,
            readout,
            engine_options,
            check_lora_request(lora_request),
            check_timeout(timeout_s),
            devices,
        )
        self._canary = Canary(self._score_alone, self._engine.info)
        try:
            check_can(self._engine.info, self.temperature)
            if canary or (canary is None and self._engine is not model):
                self._canary.remember()
        except BaseException:
            self.close()
            raise
        logger.info("vllm_kl: read-out %s", self.readout)
        for note in self._engine.info.notes:
            logger.warning("vllm_kl: read-out %s; %s", self.readout, note)

    @property
    def readout(self) -> str:
        """The read-out in use: ``"flat"``, ``"token_ids"`` or ``"pooling"``."""
        return self._engine.info.readout

    @property
    def weights(self) -> Weights:
        """What the engine's weights can be asked, and told; see :mod:`vllm_kl.weights.live`.

        Raises:
            WeightsError: the engine is one whose weights are not known here.
        """
        weights = getattr(self._engine, "weights", None)
        if weights is None:
            raise WeightsError(
                f"nothing is known of the weights of a {type(self._engine).__name__} on this engine: an engine that the scorer "
                "owns, or a vllm.LLM, can be asked"
            )
        return weights

    @property
    def weight_version(self) -> int | None:
        """Version of the weights that serve now. 0: those that the engine was started with; ``None``: not known."""
        weights = getattr(self._engine, "weights", None)
        return None if weights is None else weights.version

    def score(
        self,
        token_ids: Sequence[TokenIds],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        progress: bool = False,
    ) -> list[torch.Tensor]:
        """Return the log-probs of every sequence's tokens from ``start`` on.

        Args:
            token_ids: B sequences of ints (lists, arrays or 1-D tensors), of any lengths.
            start: index of the first token to score, one for all or one each, ``1 <= start <= len``; ``None`` is 1.
                ``start == len`` scores nothing and costs nothing.
            temperature: of this call, instead of the scorer's.
            progress: show a bar on standard error while the engine works.

        Returns:
            B float32 CPU tensors; element j of tensor i is
            ``log p(token_ids[i][start + j] | token_ids[i][:start + j])`` in nats, shape ``[len - start]``.

        Raises:
            InputError: an empty sequence, a start out of range, an id outside the vocabulary, one that stands for an image, a
                sequence longer than the engine takes, a temperature that is not positive. Names the sequence. Nothing was sent.
            ReadoutUnavailableError: a temperature that the read-out cannot apply.
            MissingLogProbError: the engine returned no number, NaN or a number above 0 for a token.
            EngineError: the engine died.
        """
        values, _ = self._read(token_ids, start, temperature, progress)
        return [row[:, 0].clone() for row in values]

    def score_and_tell(
        self, token_ids: Sequence[TokenIds], start: int | Sequence[int] | None = None
    ) -> tuple[list[torch.Tensor], ScoreStats]:
        """As :meth:`score`; also return the figures of this very call, with the version of the weights that it scored with."""
        values, stats = self._read(token_ids, start, None, False)
        return [row[:, 0].clone() for row in values], stats

    def score_ids(
        self,
        token_ids: Sequence[TokenIds],
        ids: Sequence[Any],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        progress: bool = False,
    ) -> list[torch.Tensor]:
        """Return the log-probs of chosen tokens at every position from ``start`` on.

        Args:
            token_ids: as :meth:`score` takes them.
            ids: per sequence the tokens to score: ``[len - start, K]`` ints (tensor, array or nested lists), row j for the
                position of token ``start + j``. K is the same for all sequences.
            start, temperature, progress: as :meth:`score` takes them.

        Returns:
            B float32 CPU tensors ``[len - start, K]``; element (j, n) of tensor i is
            ``log p(ids[i][j][n] | token_ids[i][:start + j])`` in nats.

        Raises:
            InputError: as :meth:`score`; ids of another shape, or outside the vocabulary.
            ReadoutUnavailableError: the read-out returns the sequence's own tokens only.

        >>> chosen, = scorer.score_ids([[5, 6, 7]], [[[6, 9], [7, 9]]])
        >>> torch.equal(chosen[:, 0], scorer.score([[5, 6, 7]])[0])
        True
        """
        values, _ = self._read(token_ids, start, temperature, progress, ids=ids)
        return [row[:, 1:].clone() for row in values]

    def score_topk(
        self,
        token_ids: Sequence[TokenIds],
        k: int,
        start: int | Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        progress: bool = False,
    ) -> list[TopK]:
        """Return the k best tokens at every position from ``start`` on, and the log-probs of the sequence's own.

        Args:
            token_ids, start, temperature, progress: as :meth:`score` takes them.
            k: how many, ``1 <= k <=`` the vocabulary.

        Returns:
            B :class:`~vllm_kl.types.TopK`: ids and log-probs ``[len - start, k]``, best first, and ``[len - start]`` of the
            sequence's own tokens; float32 CPU tensors, nats. Two tokens whose logits differ by less than the model's
            dtype resolves may change places.

        Raises:
            InputError: as :meth:`score`; k out of range.
            ReadoutUnavailableError: the read-out returns the sequence's own tokens only.

        >>> best, = scorer.score_topk([[5, 6, 7]], k=3)
        >>> best.token_ids.shape, bool((best.log_probs.diff() <= 0).all())
        (torch.Size([2, 3]), True)
        """
        if not isinstance(k, numbers.Integral) or k < 1 or (self._engine.info.vocab_size or k) < k:
            raise InputError(
                f"k is {k!r}, expected 1 <= k <= {self._engine.info.vocab_size or 'the vocabulary'}"
            )
        values, _ = self._read(token_ids, start, temperature, progress, top_k=k)
        return [
            TopK(
                token_ids=row[:, 1 : 1 + k].long(),
                log_probs=row[:, 1 + k :].clone(),
                target_log_probs=row[:, 0].clone(),
            )
            for row in values
        ]

    def _read(
        self,
        token_ids: Sequence[TokenIds],
        start: int | Sequence[int] | None,
        temperature: float | None,
        progress: bool,
        *,
        ids: Sequence[Any] | None = None,
        top_k: int = 0,
    ) -> tuple[list[torch.Tensor], ScoreStats]:
        """Return B float32 tensors ``[len - start, 1 + K + 2 * top_k]``, see :class:`~vllm_kl.types.ScoreResult`; and figures."""
        began = time.perf_counter()
        self._check_awake()
        info = self._engine.info
        temperature = self.temperature if temperature is None else check_temperature(temperature)
        check_can(info, temperature, ids=ids is not None, top_k=top_k > 0)
        sequences, starts = check_requests(token_ids, start, info, self._placeholders)
        chosen = [None] * len(sequences) if ids is None else check_ids(ids, sequences, starts, info)
        asked = [
            ScoreRequest(token_ids=sequence, start=first, temperature=temperature, ids=rows, top_k=top_k)
            for sequence, first, rows in zip(sequences, starts, chosen, strict=True)
        ]
        requests = {i: request for i, request in enumerate(asked) if request.start < len(request.token_ids)}
        planned = plan(list(requests.values()))
        results = []
        if planned.requests:
            with show_progress(len(planned.requests), enabled=progress) as on_done:
                results = self._engine.score(
                    planned.requests, share_prefix=self.share_prefix, on_done=on_done
                )
        scored = dict(zip(requests, check_results(requests, planned.restore(results)), strict=True))
        values = [scored[i] if i in scored else torch.empty(0, r.num_columns) for i, r in enumerate(asked)]
        versions = {result.weight_version for result in results}
        if len(versions) > 1:
            found = sorted(map(str, versions))
            raise WeightsError(
                f"the engine's weights changed during the call: versions {found}. push_weights() waits for it"
            )
        num_prompt_tokens = sum(len(r.token_ids) for r in requests.values())
        num_sent_tokens = sum(len(r.token_ids) for r in planned.requests)
        stats = ScoreStats(
            num_requests=len(requests),
            num_scored_tokens=num_prompt_tokens - sum(r.start for r in requests.values()),
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=num_prompt_tokens - num_sent_tokens + sum(r.num_cached_tokens for r in results),
            num_rescored=sum(r.rescored for r in results),
            readout=self.readout,
            wall_s=time.perf_counter() - began,
            weight_version=versions.pop() if versions else None,
        )
        self.stats = stats  # for people: other threads replace it
        return values, stats

    def check_frozen(self, tolerance: float = 0.0) -> float:
        """Prove that the weights are those that the scorer started with, or that a refresh made.

        A fixed sequence is scored alone and uncached, and compared with what it scored at the start or after the refresh.

        Args:
            tolerance: nats that a log-prob may differ. 0.0 asks for the same bits, which the same kernels give.

        Returns:
            The largest difference, nats.

        Raises:
            FrozenError: the numbers moved; other weights were pushed; or nothing was remembered (``canary=False``).

        >>> scorer.check_frozen()
        0.0
        """
        return self._canary.check(tolerance)

    def refresh(
        self, source: Any, *, ema: float | None = None, version: int | None = None, tolerance: float = 0.0
    ) -> int:
        """Replace the reference's weights on purpose.

        In this order: the new weights are checked, the old ones prove that they are the old ones, what is being scored is
        finished, the new ones are loaded and stamped with their version. Calls that come in the meantime wait. KV of the old
        weights cannot be read: requests are salted with the version.

        Args:
            source: a state dict in transformers' names, a module that has one, or the folder of a checkpoint.
            ema: ``ema * old + (1 - ema) * source``, averaged in float32 in this process; ``None`` takes ``source`` as it is.
            version: of the new weights; ``None`` is the next.
            tolerance: as :meth:`check_frozen` takes it, for the old weights' proof.

        Returns:
            The new :attr:`weight_version`.

        Raises:
            WeightsError: the source does not fit, or could not be loaded: the old weights go on being served. Or the engine
                is shared with a policy.
            FrozenError: the old weights had moved, and nothing was loaded; or the new ones give NaN.
            CollectorError: an error has ended the thread of a collector that scores with this; nothing was loaded.
        """
        check_collector(self)
        if isinstance(self._engine, GenerateEngine):
            raise WeightsError(
                "this scorer shares its engine with whatever generates there: a refresh would change the policy as well. Use "
                "push_weights(engine, ...) if that is what you want, or a scorer that owns its engine"
            )
        if ema is not None and not 0.0 < ema < 1.0:
            raise OptionError(f"ema must lie between 0 and 1, got {ema!r}")
        weights = self.weights
        skeleton = weights.skeleton
        state = skeleton.read(source) if isinstance(source, (str, os.PathLike)) else skeleton.checked(source)
        if ema is not None:
            state = average(skeleton.read(weights.source), state, ema)
        weights.next_version(version)  # refuses before anything is written; load() chooses
        checkpoint = skeleton.write(state)
        with self._canary.replacing(tolerance):
            return weights.load(checkpoint, version=version)

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Give the engine's GPU memory to others while the block runs: ``with scorer.asleep(): train()``.

        Its weights wait in the host's memory, its KV is dropped. The engine must have been made with
        ``enable_sleep_mode=True``. On a CPU there is nothing to give: a warning says so, once. Scoring in the block is refused.

        Raises:
            WeightsError: the engine cannot sleep.
        """
        self._is_asleep = self.weights.sleep()
        if not self._is_asleep:
            warnings.warn(
                "asleep() does nothing on a CPU: the engine has no GPU memory to give back", stacklevel=3
            )
        try:
            yield
        finally:
            if self._is_asleep:
                self.weights.wake_up()
                self._is_asleep = False

    def _score_alone(self, request: ScoreRequest) -> ScoreResult:
        self._check_awake()
        return self._engine.score([request], share_prefix=False, alone=True)[0]

    def _check_awake(self) -> None:
        if self._is_asleep:
            raise WeightsError("the engine is asleep: score when the block of asleep() has ended")

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
