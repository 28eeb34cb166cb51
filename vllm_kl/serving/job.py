"""One question on its way through the replicas: checked, planned, scored, checked again."""

from __future__ import annotations

import asyncio
import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vllm_kl.checks import check_can, check_ids, check_requests, check_results, check_temperature
from vllm_kl.client.wire_format import Answer, Question
from vllm_kl.engines.replicas.engine import Replicas
from vllm_kl.errors import InputError
from vllm_kl.plan import plan
from vllm_kl.serving.limits import Limits
from vllm_kl.types import ScoreRequest, ScoreResult


class Job:
    """A question that was checked.

    Raises:
        InputError, ReadoutUnavailableError: as :meth:`vllm_kl.VLLMScorer.score`.
        TooLargeError: it exceeds a limit.
    """

    def __init__(self, question: Question, replicas: Replicas, limits: Limits) -> None:
        info, self._question, self._replicas = replicas.info, question, replicas
        num_tokens = sum(map(len, question.token_ids))
        num_ids = question.ids[0].shape[1] if question.ids else 0
        rows = num_tokens - sum(question.starts)
        limits.check(
            sequences=len(question.token_ids),
            tokens=num_tokens + (sum(ids.size for ids in question.ids) if question.ids else 0),
            numbers=max(rows, 0) * (1 + num_ids + 2 * question.top_k + question.entropy),
        )
        if question.top_k > (info.vocab_size or question.top_k):
            raise InputError(f"top_k is {question.top_k}, expected at most {info.vocab_size}")
        temperature = check_temperature(question.temperature)
        wanted = {"ids": question.ids is not None, "top_k": question.top_k > 0, "entropy": question.entropy}
        check_can(info, temperature, **wanted)
        sequences, starts = check_requests(question.token_ids, question.starts, info, question.placeholders)
        chosen = [None] * len(sequences)
        if question.ids is not None:
            chosen = check_ids(question.ids, sequences, starts, info)
        self._requests = [
            ScoreRequest(
                token_ids=ids,
                start=start,
                temperature=temperature,
                ids=of,
                top_k=question.top_k,
                entropy=question.entropy,
            )
            for ids, start, of in zip(sequences, starts, chosen, strict=True)
        ]
        lengths = [len(ids) for ids in sequences]
        self._unscored = [i for i, start in enumerate(starts) if start == lengths[i]]
        scored = [i for i, start in enumerate(starts) if start < lengths[i]]
        planned = plan([self._requests[i] for i in scored])
        self._planned = planned.requests
        self._asked_by: list[list[int]] = [[] for _ in self._planned]  # which sequences each request is for
        for i, place in zip(scored, planned.result_of, strict=True):
            self._asked_by[place].append(i)
        self.num_sequences, self.num_tokens, self.num_ids = len(sequences), num_tokens, num_ids
        self.num_computed_tokens = 0
        self.queued_s = 0.0

    async def run(self, on_answer: Callable[[Answer], None]) -> None:
        """Score; call ``on_answer`` with the sequences that finished. Cancelling this frees the replicas."""
        if self._unscored or not self._requests:
            on_answer(self.answer(self._unscored, [None] * len(self._unscored)))
        if not self._planned:
            return

        def on_results(places: Sequence[int], results: Sequence[ScoreResult]) -> None:
            pairs = [(i, r) for n, r in zip(places, results, strict=True) for i in self._asked_by[n]]
            lengths = (len(self._planned[n].token_ids) for n in places)
            self.num_computed_tokens += sum(lengths) - sum(result.num_cached_tokens for result in results)
            on_answer(self.answer([i for i, _ in pairs], [result for _, result in pairs]))

        if self._question.alone:
            results = await asyncio.to_thread(self._replicas.score_on_each, self._planned)
            on_results(range(len(self._planned)), results[0])
            return
        call = self._replicas.call(
            self._planned, share_prefix=self._question.share_prefix, on_results=on_results
        )
        await call.run()
        self.queued_s = call.queued_s

    def answer(
        self, index: list[int], results: Sequence[ScoreResult | None], origin: dict[str, Any] | None = None
    ) -> Answer:
        """Return the answer about some sequences, whose results are checked; ``None``: nothing to score."""
        found = {i: (self._requests[i], result) for i, result in zip(index, results, strict=True) if result}
        if not self._question.allow_nan:  # NaN is an error
            check_results({i: request for i, (request, _) in found.items()}, [r for _, r in found.values()])
        columns = 1 + self.num_ids + 2 * self._question.top_k + self._question.entropy
        return Answer(
            index=index,
            values=[r.values if r else np.empty((0, columns), np.float32) for r in results],
            num_ids=self.num_ids,
            top_k=self._question.top_k,
            has_entropy=self._question.entropy,
            num_cached_tokens=[r.num_cached_tokens if r else 0 for r in results],
            rescored=[bool(r and r.rescored) for r in results],
            origin=origin or {},
        )


def joined(answers: Sequence[Answer], origin: dict[str, Any]) -> Answer:
    """Return one answer with the sequences of all, in their order."""
    rows = sorted(
        ((i, n, answer) for answer in answers for n, i in enumerate(answer.index)), key=operator.itemgetter(0)
    )
    first = answers[0]
    return dataclasses.replace(
        first,
        index=[i for i, _, _ in rows],
        values=[answer.values[n] for _, n, answer in rows],
        num_cached_tokens=[answer.num_cached_tokens[n] for _, n, answer in rows],
        rescored=[answer.rescored[n] for _, n, answer in rows],
        origin=origin,
    )
