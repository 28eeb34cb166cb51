"""The requests of one call -> the requests an engine sees: each once, members of a group next to each other.

Siblings share the KV of their prompt only while it is in the cache, so they are sent in a row. Sequences that begin alike
are neighbours when sorted by their bytes, whatever order and groups the caller had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_kl.types import ScoreRequest, ScoreResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which request an engine gets, and which of its results belongs to which of the caller's."""

    requests: list[ScoreRequest]  # distinct, neighbours share prefixes
    result_of: list[int]  # per request of the caller: index into ``requests``

    def restore(self, results: Sequence[ScoreResult]) -> list[ScoreResult]:
        """Return a result per request of the caller, in the caller's order."""
        return [results[i] for i in self.result_of]


def plan(requests: Sequence[ScoreRequest]) -> Plan:
    """Order and de-duplicate.

    >>> import numpy as np
    >>> a, b = (ScoreRequest(token_ids=np.array(ids, np.int32), start=1) for ids in ([7, 8, 9], [7, 8]))
    >>> planned = plan([a, b, a])
    >>> [r.token_ids.tolist() for r in planned.requests], planned.result_of
    ([[7, 8], [7, 8, 9]], [1, 0, 1])
    """
    keys = [_key(request) for request in requests]
    first_of: dict[tuple, int] = {}
    for i, key in enumerate(keys):
        first_of.setdefault(key, i)
    place = {key: n for n, key in enumerate(sorted(first_of))}
    return Plan(requests=[requests[first_of[key]] for key in place], result_of=[place[key] for key in keys])


def _key(request: ScoreRequest) -> tuple:
    ids = b"" if request.ids is None else request.ids.tobytes()
    return request.token_ids.tobytes(), request.start, request.temperature, request.top_k, ids
