"""``score_batch`` lets a scorer compute the log-probs of a batch's kept tokens."""

from __future__ import annotations

import re

import torch

from vllm_kl.batch.alignment import scored_spans, spread
from vllm_kl.errors import InputError, MissingLogProbError, VLLMKLError
from vllm_kl.transforms.choose_scorer import serving_version
from vllm_kl.types import Origin, Scored, Scorer, TokenBatch


def score_batch(scorer: Scorer, batch: TokenBatch, adapter: int | None = 0) -> Scored:
    """Return the log-probs of the kept tokens, 0.0 elsewhere, and the weights that made them.

    The scorer reads out no row before the first kept token, prefills no token after the last kept one, and
    does not get a sample that keeps no token.
    """
    spans = scored_spans(batch.packed_keep, batch.lengths)
    sent = [i for i, (start, stop) in enumerate(spans) if start < stop]
    results: list[torch.Tensor] = []
    version: int | None = None
    if sent:
        ids, starts = [batch.token_ids[i][: spans[i][1]] for i in sent], [spans[i][0] for i in sent]
        try:
            results, version = _call_scorer(scorer, ids, starts)
        except (InputError, MissingLogProbError) as error:
            raise _of_samples(error, sent) from error
    else:
        version = serving_version(scorer)
    scored = [results[0].new_empty(0) if results else torch.empty(0)] * len(batch)
    for i, result in zip(sent, results, strict=True):
        scored[i] = result
    return Scored(values=spread(scored, spans, batch, what="log-probs"), origin=Origin(version, adapter))


def _call_scorer(
    scorer: Scorer, token_ids: list[torch.Tensor], starts: list[int]
) -> tuple[list[torch.Tensor], int | None]:
    if hasattr(scorer, "score_and_tell"):
        results, stats = scorer.score_and_tell(token_ids, starts)
        return results, None if stats is None else stats.weight_version
    return scorer.score(token_ids, starts), serving_version(scorer)


def _of_samples(error: VLLMKLError, sent: list[int]) -> VLLMKLError:
    """Return the scorer's error with the batch's sample number instead of the scorer's own."""
    text = str(error)
    found = re.search(r"\b(?:sequence|sample) (\d+)", text)
    if found is None or int(found[1]) >= len(sent):
        return type(error)(text)
    sample = sent[int(found[1])]
    named = type(error)(f"{text[: found.start()]}sample {sample}{text[found.end() :]}")
    named.sample = sample
    return named
