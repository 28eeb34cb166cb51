"""One question on its way through the replicas: checked, planned, scored, checked again."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vllm_kl.checks import check_results, make_requests
from vllm_kl.client.wire_format import Answer, Question
from vllm_kl.engines.replicas.engine import Replicas
from vllm_kl.plan import plan
from vllm_kl.serving.limits import Limits
from vllm_kl.types import ScoreResult


class Job:
    """A question that was checked.

    Raises:
        InputError, ReadoutUnavailableError: as :meth:`vllm_kl.VLLMScorer.score`.
        TooLargeError: it exceeds a limit.
    """

    def __init__(self, question: Question, replicas: Replicas, limits: Limits) -> None:
        self._question, self._replicas = question, replicas
        num_tokens = sum(map(len, question.token_ids))
        rows = num_tokens - sum(question.starts)
        limits.check(
            sequences=len(question.token_ids),
            tokens=num_tokens + (sum(ids.size for ids in question.ids) if question.ids else 0),
            numbers=max(rows, 0) * question.num_columns,
        )
        self._requests = make_requests(
            replicas.info,
            question.token_ids,
            question.starts,
            temperature=question.temperature,
            ids=question.ids,
            top_k=question.top_k or None,
            entropy=question.entropy,
            placeholders=question.placeholders,
        )
        scored = [i for i, request in enumerate(self._requests) if request.start < len(request.token_ids)]
        self._unscored = [
            i for i, request in enumerate(self._requests) if request.start == len(request.token_ids)
        ]
        planned = plan([self._requests[i] for i in scored])
        self._planned = planned.requests
        self._asked_by: list[list[int]] = [[] for _ in self._planned]  # which sequences each request is for
        for i, place in zip(scored, planned.result_of, strict=True):
            self._asked_by[place].append(i)
        self.num_sequences, self.num_tokens = len(self._requests), num_tokens
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
            on_results(range(len(self._planned)), await self._replicas.ask_alone(self._planned))
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
        nothing = np.empty((0, self._question.num_columns), np.float32)
        return Answer(
            index=index,
            values=[r.values if r else nothing for r in results],
            num_ids=self._question.num_ids,
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
