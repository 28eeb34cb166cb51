"""``score_batch`` lets a scorer compute the log-probs of a batch's kept tokens."""

from __future__ import annotations

import re

import torch

from vllm_kl.batch.alignment import scored_spans, spread
from vllm_kl.errors import InputError, MissingLogProbError, VLLMKLError
from vllm_kl.transforms.choose_scorer import serving_version
from vllm_kl.types import Origin, Scored, Scorer, TokenBatch


def score_batch(
    scorer: Scorer, batch: TokenBatch, adapter: int | None = 0, *, entropy: bool = False
) -> Scored:
    """Return the log-probs of the kept tokens, 0.0 elsewhere, and the weights that made them.

    The scorer reads out no row before the first kept token, prefills no token after the last kept one, and
    does not get a sample that keeps no token.

    Args:
        scorer: with ``entropy`` it has ``score_entropy_and_tell``.
        batch: the tokens.
        adapter: of the scorer; see :class:`Origin`.
        entropy: also return the entropies.
    """
    spans = scored_spans(batch.packed_keep, batch.lengths)
    sent = [i for i, (start, stop) in enumerate(spans) if start < stop]
    results: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    version: int | None = None
    if sent:
        ids, starts = [batch.token_ids[i][: spans[i][1]] for i in sent], [spans[i][0] for i in sent]
        try:
            results, entropies, version = _call_scorer(scorer, ids, starts, entropy)
        except (InputError, MissingLogProbError) as error:
            raise _of_samples(error, sent) from error
    else:
        version = serving_version(scorer)

    def placed(rows: list[torch.Tensor], what: str) -> torch.Tensor:
        scored = [rows[0].new_empty(0) if rows else torch.empty(0)] * len(batch)
        for i, row in zip(sent, rows, strict=True):
            scored[i] = row
        return spread(scored, spans, batch, what=what)

    return Scored(
        values=placed(results, "log-probs"),
        origin=Origin(version, adapter),
        entropies=placed(entropies, "entropies") if entropy else None,
    )


def _call_scorer(
    scorer: Scorer, token_ids: list[torch.Tensor], starts: list[int], entropy: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], int | None]:
    """Return log-probs, entropies if they are wanted, and the version of the weights."""
    entropies: list[torch.Tensor] = []
    if entropy:
        assert hasattr(scorer, "score_entropy_and_tell"), "the side has checked it"
        results, entropies, stats = scorer.score_entropy_and_tell(token_ids, starts)
    elif hasattr(scorer, "score_and_tell"):
        results, stats = scorer.score_and_tell(token_ids, starts)
    else:
        return scorer.score(token_ids, starts), entropies, serving_version(scorer)
    return results, entropies, None if stats is None else stats.weight_version


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
