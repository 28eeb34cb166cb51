"""Scores token ids with a vLLM engine: one log-prob per token. Read this file first.

``VLLMScorer.score`` checks the input, sends requests to its engine, and checks the results:

    token_ids, start
        -> checks.py: ids and starts are valid      -> one ScoreRequest per sequence
        -> plan.py:   duplicates dropped, sorted    -> the engine (engines/) -> one ScoreResult per request
        -> checks.py: every row is there, no NaN    -> float32 tensors, in the caller's order

This module handles plain token ids only. ``batch/`` handles tensordicts, chat templates, masks and padding.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args, overload

import torch

from vllm_kl.arrays import starts_of
from vllm_kl.checks import (
    TokenIds,
    check_can,
    check_kl,
    check_lora_request,
    check_requests,
    check_results,
    check_temperature,
    check_timeout,
    make_requests,
)
from vllm_kl.columns import num_columns
from vllm_kl.engines.base import Engine, GivesHead, OfReplicas
from vllm_kl.engines.devices import Devices
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.http_server import HttpServer
from vllm_kl.engines.make_engine import make_engine
from vllm_kl.engines.placeholders import Placeholders, check_placeholders
from vllm_kl.engines.process import TIMEOUT_S
from vllm_kl.engines.stock_server import StockServer
from vllm_kl.errors import InputError, OptionError, ReadoutUnavailableError, WeightsError
from vllm_kl.exact_kl import LMHead, Side, check_device, common_vocab_size, exact_kl, groups
from vllm_kl.plan import plan
from vllm_kl.progress import show_progress
from vllm_kl.types import EngineInfo, ReadoutName, ScoreRequest, ScoreResult, ScoreStats, TopK, end_to_end
from vllm_kl.weights.canary import Canary
from vllm_kl.weights.checkpoint import average
from vllm_kl.weights.collector_errors import check_collector
from vllm_kl.weights.live_weights import Weights

logger = logging.getLogger("vllm_kl")


class VLLMScorer:
    """Returns the log-probs of tokens that the caller gives. It generates nothing.

    Args:
        model: the path or name of a model, a live ``vllm.LLM``, TorchRL's ``AsyncVLLM``, the address of a
            server (``vllm-kl serve``) such as ``"http://127.0.0.1:8000"`` or a list of such addresses, or an
            :class:`~vllm_kl.engines.base.Engine`. For a path or name, the scorer starts its own engine in a
            child process, which ends when this process ends. A ``vllm.LLM`` and an ``AsyncVLLM`` are shared:
            :meth:`close` leaves them running.
        readout: how the engine returns log-probs. ``"pooling"`` (own engines only) computes them inside the
            engine, at prefill speed. ``"token_ids"`` (shared engines on a GPU) asks vLLM for the needed rows
            and tokens only. ``"flat"`` works with every engine. ``"auto"`` takes the first of the three that
            the engine supports, and logs which one it took. Of servers, ``"http-flat"`` is that of a stock
            vLLM server.
        canary: score a fixed sequence now and remember its log-probs, so that :meth:`check_frozen` can prove
            later that the weights have not changed. ``None`` means yes, unless ``model`` is an
            :class:`~vllm_kl.engines.base.Engine`.
        share_prefix: let sequences with the same beginning share its KV. The log-probs stay exact: a cache
            hit ends before the first scored row.
        temperature: the log-probs are those of ``softmax(logits / temperature)``. Give the temperature that
            the tokens were sampled at. vLLM's own prompt log-probs ignore it, so a read-out that cannot apply
            it refuses it.
        lora_request: a ``vllm.lora.request.LoRARequest``: the adapter to score with. ``None`` scores with the
            base model. A shared engine must have been made with ``enable_lora=True``; several scorers with
            different adapters may share it. :attr:`weight_version` is always the version of the base model.
            The canary is scored with the adapter.
        placeholders: what to do with an id that stands for an image, a video or audio in a multimodal model.
            ``"refuse"`` raises an error. ``"as_text"`` scores the id as an ordinary token.
        timeout_s: for own engines: how many seconds a start, a score, a push or a refresh may pass without a
            sign of life from the engine. After that the scorer ends the engine and raises an error with the
            engine's log. The engine gives a sign every second while it computes, and none while it starts or
            loads weights. For a server: how long it may say nothing. ``None`` waits for ever.
        devices: for own engines: the GPUs to run on, ``tensor_parallel_size * pipeline_parallel_size`` of
            them. Give UUIDs, or indices among the GPUs that this process sees (``CUDA_VISIBLE_DEVICES``,
            which Ray sets for its actors). ``None`` takes the first GPUs. ``devices=1`` keeps a reference off
            the policy's GPU, if the policy runs on GPU 0.
        replicas: for own engines: how many engines score, as replicas on Ray Serve (``pip install
            'vllm-kl[ray]'``). A call is cut between them, and all of them serve a refresh or a push, or none
            does. They run in the Ray cluster that this process is in or ``RAY_ADDRESS`` names; else on this
            machine. ``"auto"`` starts one and adds others while there is more to do. A mapping has ``min``,
            ``max``, ``cpus`` and ``gpus`` of one replica, and ``weights_folder``, which all machines of the
            cluster share. ``None`` starts one engine without Ray.
        **engine_options: for own engines: vLLM's engine options, under vLLM's names. A vision-language model
            serves text only (``language_model_only=True``), unless an option says otherwise.

    Raises:
        OptionError: an engine option does not exist, cannot work (see :mod:`vllm_kl.engines.options`), or was
            given for an engine that already runs; ``model`` is a folder that does not exist or holds no
            checkpoint; the KV cache is too small for ``max_model_len``; or ``replicas`` cannot be, or Ray is
            not installed.
        ReadoutUnavailableError: the engine cannot do this read-out; the read-out cannot apply this
            temperature; the engine takes no adapters; or vLLM has wrapped the LM head for adapters, which
            makes prompt log-probs wrong.
        WeightsError: the adapter cannot be loaded, or the engine would leave out a part of it.
        EngineError: the engine did not start. The message ends with the engine's log.

    Attributes:
        stats: :class:`~vllm_kl.types.ScoreStats` of the last call of any thread; ``None`` before the first
            call.

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
        replicas: Any = None,
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
        self._sleep: Literal["awake", "asleep", "unsure"] = "awake"
        self._engine: Engine = make_engine(
            model,
            readout,
            engine_options,
            check_lora_request(lora_request),
            check_timeout(timeout_s),
            devices,
            replicas,
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
        """The read-out in use: ``"pooling"``, ``"token_ids"``, ``"flat"`` or ``"http-flat"``."""
        return self._engine.info.readout

    @property
    def weights(self) -> Weights:
        """The object that reads the version of the engine's weights and replaces the weights.

        Raises:
            WeightsError: the scorer cannot read or replace the weights of this kind of engine.
        """
        weights: Weights | None = getattr(self._engine, "weights", None)
        if weights is None:
            raise WeightsError(
                f"the weights of a {type(self._engine).__name__} cannot be read or replaced here: make the "
                "scorer with a model's path or with a vllm.LLM"
            )
        return weights

    @property
    def weight_version(self) -> int | None:
        """The version of the engine's weights. 0: those that it started with. ``None``: not known."""
        weights = getattr(self._engine, "weights", None)
        return None if weights is None else weights.version

    @property
    def info(self) -> EngineInfo:
        """The engine's properties: its vocabulary, and the longest sequence that it scores."""
        return self._engine.info

    def check(self, token_ids: Sequence[TokenIds], start: int | Sequence[int] | None = None) -> None:
        """Refuse what :meth:`score` would refuse, and send nothing.

        Args:
            token_ids, start: as in :meth:`score`.

        Raises:
            InputError: as in :meth:`score`.

        >>> scorer.check([[5, 6, 7]], start=2)
        """
        check_requests(token_ids, start, self._engine.info, self._placeholders)

    @overload
    def score(
        self,
        token_ids: Sequence[TokenIds],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        progress: bool = False,
        entropy: Literal[False] = False,
    ) -> list[torch.Tensor]: ...

    @overload
    def score(
        self,
        token_ids: Sequence[TokenIds],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        progress: bool = False,
        entropy: Literal[True],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...

    @overload
    def score(
        self,
        token_ids: Sequence[TokenIds],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        progress: bool = False,
        entropy: bool,
    ) -> list[torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]: ...

    def score(
        self,
        token_ids: Sequence[TokenIds],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        progress: bool = False,
        entropy: bool = False,
    ) -> list[torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the log-probs of every sequence's tokens from ``start`` on.

        Args:
            token_ids: B sequences of ints (lists, arrays or 1-D tensors), of any lengths.
            start: the index of the first token to score, one for all sequences or one for each;
                ``1 <= start <= len``. ``None`` is 1. ``start == len`` scores nothing and costs nothing.
            temperature: replaces the scorer's temperature in this call.
            progress: show a progress bar on standard error.
            entropy: also return the entropy of the distribution that each token was scored with.

        Returns:
            B float32 CPU tensors; element j of tensor i is
            ``log p(token_ids[i][start + j] | token_ids[i][:start + j])`` in nats, shape ``[len - start]``.

            With ``entropy=True`` a pair: these tensors, and B float32 CPU tensors of the same shapes. Their
            element j of tensor i is ``-sum_v p(v) log p(v)`` in nats over the vocabulary, with
            ``p(v) = p(v | token_ids[i][:start + j])``: from 0 to the logarithm of the vocabulary's size.

        Raises:
            InputError: a sequence is empty or longer than the engine takes; a start is out of range; an id is
                outside the vocabulary, or stands for an image; the temperature is not positive. The message
                names the sequence. Nothing was sent.
            ReadoutUnavailableError: the read-out cannot apply this temperature, or return the entropy.
            MissingLogProbError: the engine returned no number, NaN or a number above 0 for a token; or an
                entropy that is infinite or below 0.
            EngineError: the engine died, or a replica of an ``AsyncVLLM`` died or cannot be reached: the
                message names the replica.
            WeightsError: the replicas of an ``AsyncVLLM`` serve different versions of the weights.

        >>> log_probs, entropies = scorer.score([[5, 6, 7], [5, 6]], entropy=True)
        >>> [row.shape == entropy.shape for row, entropy in zip(log_probs, entropies)]
        [True, True]
        """
        values, _ = self._read(token_ids, start, temperature, progress, entropy=entropy)
        log_probs = [row[:, 0].clone() for row in values]
        return (log_probs, [row[:, -1].clone() for row in values]) if entropy else log_probs

    def score_and_tell(
        self, token_ids: Sequence[TokenIds], start: int | Sequence[int] | None = None
    ) -> tuple[list[torch.Tensor], ScoreStats]:
        """Score as :meth:`score` does; return the log-probs, and the figures of this call.

        ``weight_version`` of the figures is the version of the weights that made these log-probs.
        :attr:`stats` may already be of a later call, of another thread.

        >>> log_probs, stats = scorer.score_and_tell([[5, 6, 7]])
        >>> log_probs[0].shape, stats.num_scored_tokens, stats.weight_version == scorer.weight_version
        (torch.Size([2]), 2, True)
        """
        values, stats = self._read(token_ids, start, None, False)
        return [row[:, 0].clone() for row in values], stats

    def score_entropy_and_tell(
        self, token_ids: Sequence[TokenIds], start: int | Sequence[int] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], ScoreStats]:
        """Score as :meth:`score` does with ``entropy=True``; return log-probs, entropies and the figures.

        See :meth:`score_and_tell`.

        >>> log_probs, entropies, stats = scorer.score_entropy_and_tell([[5, 6, 7]])
        >>> log_probs[0].shape == entropies[0].shape, stats.num_scored_tokens
        (True, 2)
        """
        values, stats = self._read(token_ids, start, None, False, entropy=True)
        return [row[:, 0].clone() for row in values], [row[:, -1].clone() for row in values], stats

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
            token_ids, start, temperature, progress: as in :meth:`score`.
            ids: for each sequence the tokens to score, ``[len - start, K]`` ints (a tensor, an array or
                nested lists). Row j belongs to the position of token ``start + j``. K is the same for all
                sequences.

        Returns:
            B float32 CPU tensors ``[len - start, K]``; element (j, n) of tensor i is
            ``log p(ids[i][j][n] | token_ids[i][:start + j])`` in nats.

        Raises:
            InputError: as in :meth:`score`; or ``ids`` has another shape, or an id outside the vocabulary.
            ReadoutUnavailableError: the read-out returns log-probs of the sequence's own tokens only.

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
        entropy: bool = False,
    ) -> list[TopK]:
        """Return the k most likely tokens at every position from ``start`` on, with their log-probs.

        Args:
            token_ids, start, temperature, progress, entropy: as in :meth:`score`.
            k: how many tokens per position, from 1 to the size of the vocabulary.

        Returns:
            B :class:`~vllm_kl.types.TopK`: ids and log-probs of the k tokens, ``[len - start, k]``, most
            likely first; log-probs of the sequence's own tokens, ``[len - start]``; and with ``entropy`` the
            entropies, ``[len - start]``. Log-probs and entropies are float32 CPU tensors, in nats. Two tokens
            may change places if their logits differ by less than the model's dtype resolves.

        Raises:
            InputError: as in :meth:`score`; or k is out of range.
            ReadoutUnavailableError: the read-out returns log-probs of the sequence's own tokens only.

        >>> best, = scorer.score_topk([[5, 6, 7]], k=3)
        >>> best.token_ids.shape, bool((best.log_probs.diff() <= 0).all())
        (torch.Size([2, 3]), True)
        """
        values, _ = self._read(token_ids, start, temperature, progress, top_k=k, entropy=entropy)
        return [
            TopK(
                token_ids=row[:, 1 : 1 + k].long(),
                log_probs=row[:, 1 + k : 1 + 2 * k].clone(),
                target_log_probs=row[:, 0].clone(),
                entropy=row[:, -1].clone() if entropy else None,
            )
            for row in values
        ]

    def hidden_states(
        self,
        token_ids: Sequence[TokenIds],
        start: int | Sequence[int] | None = None,
        *,
        head: LMHead | None = None,
        progress: bool = False,
    ) -> list[torch.Tensor]:
        """Return the hidden states that predict every token from ``start`` on.

        With :meth:`lm_head` they give the whole distribution of each token, for example the teacher's in the
        process of a trainer: H numbers per token are sent, not the V of its logits. They are what the model
        gives to ``compute_logits``. A model that changes them there has no :meth:`lm_head`.

        Args:
            token_ids, start, progress: as in :meth:`score`.
            head: refuse hidden states of other weights than this LM head's.

        Returns:
            B float32 CPU tensors ``[len - start, H]``. Row j of tensor i predicts token ``start + j``. Their
            numbers are those of the model's dtype, of any temperature. All of them lie in memory: 4 H bytes a
            token.

        Raises:
            InputError, MissingLogProbError, EngineError: as in :meth:`score`.
            WeightsError: as in :meth:`score`; or the weights are not those of ``head``.
            ReadoutUnavailableError: the read-out is another one than ``"pooling"``, or a server's.

        >>> hidden, = scorer.hidden_states([[5, 6, 7]])
        >>> hidden.shape == (2, scorer.info.hidden_size)
        True
        """
        rows = self._hidden_rows(token_ids, start, head, progress=progress)
        return [row.clone() for row in rows]

    def lm_head(self) -> LMHead:
        """Return a copy of the LM head of the engine's present weights, which makes logits of hidden states.

        It takes memory of this process: ``V * H`` numbers of the model's dtype.

        Raises:
            EngineError: the engine died or was closed, or could not write the head.
            WeightsError: the engine is asleep.
            ReadoutUnavailableError: the scorer does not own one engine with the read-out ``"pooling"``; or
                the model's logits are not hidden states times a matrix (a soft cap, a bias, a quantised
                head).

        >>> scorer.lm_head().weight.shape == (scorer.info.vocab_size, scorer.info.hidden_size)
        True
        """
        self._check_awake()
        if not isinstance(self._engine, GivesHead):
            raise ReadoutUnavailableError(
                f"the LM head of a {type(self._engine).__name__} cannot be read: make the scorer with a "
                "model's path and without replicas"
            )
        weight, scale, version = self._engine.read_head()
        return LMHead(weight=weight, scale=scale, weight_version=version)

    def exact_kl(
        self,
        reference: VLLMScorer,
        token_ids: Sequence[TokenIds],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        vocab_size: int | None = None,
        device: torch.device | str | int | None = None,
        progress: bool = False,
    ) -> list[torch.Tensor]:
        """Return the exact KL of this model to a reference, over the whole vocabulary, at every token.

        No token is sampled, so there is no noise, and no logits leave an engine: both engines send hidden
        states, at most 128 MiB or one sequence at a time, and this process multiplies them with both LM heads
        (:mod:`vllm_kl.exact_kl`). On a CPU that takes several times as long as :meth:`score`.

        Args:
            reference: a scorer of the other model, with the same tokenizer. It may be this one.
            token_ids, start, progress: as in :meth:`score`.
            temperature: of both models; ``None`` takes that of each scorer.
            vocab_size: compare the distributions over the first so many tokens, each divided by its sum: for
                two heads that are padded to different sizes. ``None`` takes all tokens.
            device: where this process computes; ``None`` is the CPU.

        Returns:
            B float32 CPU tensors ``[len - start]``; element j of tensor i is
            ``sum_v p(v) (log p(v) - log q(v))`` in nats, of this scorer's p and the reference's q, given
            ``token_ids[i][:start + j]``. It is not below 0.

        Raises:
            InputError: as in :meth:`score`, of both engines; or the heads have different sizes.
            OptionError: PyTorch cannot use ``device`` here; or ``reference`` is no scorer.
            ReadoutUnavailableError, EngineError: as in :meth:`lm_head`.
            MissingLogProbError: as in :meth:`score`; or logits overflow.
            WeightsError: as in :meth:`score`; or the weights of a scorer changed during the call.

        >>> kl, = scorer.exact_kl(scorer, [[5, 6, 7]])  # of a model to itself
        >>> kl.shape, bool((kl < 1e-5).all())
        (torch.Size([2]), True)
        """
        if not isinstance(reference, VLLMScorer):
            raise OptionError(f"reference is a {type(reference).__name__}: make it a VLLMScorer")
        scorers = (self, reference)
        temperatures = [
            check_temperature(scorer.temperature if temperature is None else temperature)
            for scorer in scorers
        ]
        for scorer in scorers:  # both, before either computes
            check_can(scorer.info, 1.0, hidden_states=True)
            scorer.check(token_ids, start)
        place = check_device(device)
        vocab_size = common_vocab_size([scorer.info.vocab_size or 0 for scorer in scorers], vocab_size)
        heads = [scorer.lm_head() for scorer in scorers]
        heads = [replace(head, weight=head.weight[:vocab_size].to(place)) for head in heads]
        starts = starts_of(start, len(token_ids))
        num_rows = [len(ids) - first for ids, first in zip(token_ids, starts, strict=True)]
        found: list[torch.Tensor] = []
        with show_progress(len(token_ids), enabled=progress) as on_done:
            for group in groups(num_rows, max(head.weight.shape[1] for head in heads)):
                ids, first, begin = token_ids[group], starts[group], group.start
                p, q = (
                    Side(head, end_to_end(scorer._hidden_rows(ids, first, head, first=begin)), used)
                    for scorer, head, used in zip(scorers, heads, temperatures, strict=True)
                )
                kl = exact_kl(p, q, vocab_size).split(num_rows[group])
                check_kl(kl, first, begin)
                found += kl
                if on_done is not None:
                    on_done(len(kl))
        return found

    def _hidden_rows(
        self,
        token_ids: Sequence[TokenIds],
        start: int | Sequence[int] | None,
        head: LMHead | None,
        *,
        progress: bool = False,
        first: int = 0,
    ) -> list[torch.Tensor]:
        """Return B x ``[len - start, H]``. Errors count the sequences from ``first`` on."""
        values, stats = self._read(token_ids, start, 1.0, progress, hidden_states=True, first=first)
        if head is not None and stats.weight_version not in (None, head.weight_version):
            raise WeightsError(
                f"weights changed after the LM head was read, from version {head.weight_version} to "
                f"{stats.weight_version}. Read it again"
            )
        return [row[:, 1:] for row in values]

    def _read(
        self,
        token_ids: Sequence[TokenIds],
        start: int | Sequence[int] | None,
        temperature: float | None,
        progress: bool,
        *,
        ids: Sequence[Any] | None = None,
        top_k: int | None = None,
        entropy: bool = False,
        hidden_states: bool = False,
        first: int = 0,
    ) -> tuple[list[torch.Tensor], ScoreStats]:
        """Score B sequences; return the values of each, and the figures of the call.

        Values are float32 ``[len - start, columns]``, with the columns of ``ScoreResult.values``.
        Errors count the sequences from ``first`` on.
        """
        began = time.perf_counter()
        self._check_awake()
        asked = make_requests(
            self._engine.info,
            token_ids,
            start,
            temperature=self.temperature if temperature is None else temperature,
            ids=ids,
            top_k=top_k,
            entropy=entropy,
            hidden_states=hidden_states,
            placeholders=self._placeholders,
        )
        requests = {
            i: request for i, request in enumerate(asked, first) if request.start < len(request.token_ids)
        }
        planned = plan(list(requests.values()))
        results = []
        if planned.requests:
            with show_progress(len(planned.requests), enabled=progress) as on_done:
                try:
                    results = self._engine.score(
                        planned.requests, share_prefix=self.share_prefix, on_done=on_done
                    )
                except InputError as error:  # of a server that knows more of its model than this process
                    if error.sample is None:
                        raise
                    i = list(requests)[planned.result_of.index(error.sample)]
                    raise InputError(f"sequence {i}: {error}") from None
        scored = dict(zip(requests, check_results(requests, planned.restore(results)), strict=True))
        values = [
            scored[i] if i in scored else torch.empty(0, num_columns(*request.asked))
            for i, request in enumerate(asked, first)
        ]
        stats = self._figures(list(requests.values()), planned.requests, results, began)
        self.stats = stats
        return values, stats

    def _figures(
        self, wanted: list[ScoreRequest], sent: list[ScoreRequest], results: list[ScoreResult], began: float
    ) -> ScoreStats:
        """Return the figures of a call: what its caller wanted, what was sent, what came back."""
        versions = {result.weight_version for result in results}
        if len(versions) > 1:
            found = sorted(map(str, versions))
            raise WeightsError(
                f"the engine's weights changed during the call: versions {found}. Score again. On a "
                "vllm.LLM, push with push_weights(), which waits until the call has ended"
            )
        num_prompt_tokens = sum(len(request.token_ids) for request in wanted)
        num_sent_tokens = sum(len(request.token_ids) for request in sent)
        return ScoreStats(
            num_requests=len(wanted),
            num_scored_tokens=num_prompt_tokens - sum(request.start for request in wanted),
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=num_prompt_tokens - num_sent_tokens + sum(r.num_cached_tokens for r in results),
            num_rescored=sum(r.rescored for r in results),
            readout=self.readout,
            wall_s=time.perf_counter() - began,
            weight_version=versions.pop() if versions else None,
        )

    def check_frozen(self, tolerance: float = 0.0) -> float:
        """Prove that the engine's weights are those of its start, or of the last :meth:`refresh`.

        The engine scores a fixed sequence, alone and without the prefix cache. Its log-probs are compared
        with those that the same sequence had at the start or after the refresh.

        Args:
            tolerance: how far a log-prob may move, in nats. 0.0 asks for the same bits, which the same
                kernels give.

        Returns:
            The largest distance of a log-prob from the remembered one, in nats.

        Raises:
            FrozenError: a log-prob moved; weights were pushed; or the scorer remembers nothing
                (``canary=False``).

        >>> scorer.check_frozen()
        0.0
        """
        return self._canary.check(tolerance)

    def refresh(
        self, source: Any, *, ema: float | None = None, version: int | None = None, tolerance: float = 0.0
    ) -> int:
        """Replace the reference's weights on purpose; return the new :attr:`weight_version`.

        The steps: check the new weights; prove that the old weights have not changed (:meth:`check_frozen`);
        let the engine finish its requests; load the new weights and give them their version. Calls of other
        threads wait meanwhile. Afterwards no request reads KV of the old weights: each request's cache salt
        has the version in it.

        Args:
            source: a state dict in transformers' names, a module that has one, or the folder of a checkpoint.
            ema: load ``ema * old + (1 - ema) * source``, averaged in float32 in this process. ``None`` loads
                ``source``.
            version: the version of the new weights; ``None`` takes the next number.
            tolerance: as in :meth:`check_frozen`, for the proof of the old weights.

        Raises:
            WeightsError: ``source`` is not of the engine's model, or could not be loaded: the engine keeps
                the old weights. Or the engine is shared with a policy.
            FrozenError: the old weights have changed: nothing was loaded. Or the new weights give NaN.
            CollectorError: an error ended the thread of a collector that scores with this scorer. Nothing was
                loaded.

        >>> before = scorer.weight_version
        >>> scorer.refresh(weights) == scorer.weight_version == before + 1
        True
        """
        check_collector(self)
        if isinstance(self._engine, GenerateEngine):
            raise WeightsError(
                "this scorer shares its engine with a policy: a refresh would change the policy as well. "
                "Call push_weights(engine, ...) if you want that, or make a scorer that owns its engine, "
                "VLLMScorer(path)"
            )
        if ema is not None and not 0.0 < ema < 1.0:
            raise OptionError(f"ema must lie between 0 and 1, got {ema!r}")
        weights = self.weights
        skeleton = weights.skeleton
        state = skeleton.read(source) if isinstance(source, (str, os.PathLike)) else skeleton.checked(source)
        if ema is not None:
            state = average(skeleton.read(weights.source), state, ema)
        weights.next_version(version)  # refuse a version before anything is written; load() gives the version
        checkpoint = skeleton.write(state)
        with self._canary.accepting_new_weights(tolerance):
            return weights.load(checkpoint, version=version)

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Free the engine's GPU memory while the block runs: ``with scorer.asleep(): train()``.

        The engine moves its weights to CPU memory and drops its KV cache. It must have been made with
        ``enable_sleep_mode=True``. Scoring inside the block raises an error. On a CPU the block frees
        nothing, and warns.

        Raises:
            WeightsError: the engine was made without ``enable_sleep_mode=True``.

        >>> # scorer = VLLMScorer("my-model", enable_sleep_mode=True)
        >>> # with scorer.asleep():
        >>> #     trainer.step()
        """
        try:
            has_slept = self.weights.sleep()
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C, which the engine may not have heard of
                self._wake_up()
            raise
        if has_slept:
            self._sleep = "asleep"
        else:
            warnings.warn(
                "asleep() does nothing on a CPU: the engine has no GPU memory to give back", stacklevel=3
            )
        try:
            yield
        finally:
            if has_slept:
                self._wake_up()

    def _wake_up(self) -> None:
        self._sleep = "asleep"  # calls of other threads are refused meanwhile
        try:
            self.weights.wake_up()
        except BaseException:  # such as Ctrl-C before the engine has answered: the next call asks again
            self._sleep = "unsure"
            raise
        self._sleep = "awake"

    def _score_alone(self, request: ScoreRequest) -> list[ScoreResult]:
        """Return the result of the engine, or of each of its replicas."""
        self._check_awake()
        if isinstance(self._engine, OfReplicas):
            return [results[0] for results in self._engine.score_on_each([request])]
        return self._engine.score([request], share_prefix=False, alone=True)

    def _check_awake(self) -> None:
        if self._sleep == "asleep":
            raise WeightsError("the engine is asleep: score after the block of asleep()")
        if self._sleep == "unsure":
            self._wake_up()

    def close(self) -> None:
        """End the scorer's own engine and its processes; leave a shared engine running.

        A second call does nothing.
        """
        self._engine.close()

    def __enter__(self) -> VLLMScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> VLLMScorer:
        return self  # TorchRL copies transforms: the copy scores with the same engine

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._engine, (HttpServer, StockServer)):
            return vars(self)
        raise OptionError(
            "a VLLMScorer holds a running engine and cannot be pickled: make it in the other process "
            "(ref_model_factory), keep it in a Ray actor (RetrieveKL(..., service_backend='ray')), or serve "
            "it (vllm-kl serve) and make a scorer of its address"
        )
