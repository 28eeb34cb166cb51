"""Orders the requests of one call for an engine, and drops duplicates.

Sequences with a common beginning share its KV only while that KV is in the prefix cache, so they must follow
each other. Sorting by the bytes of the token ids puts them next to each other, whatever order the caller had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kl.types import ScoreRequest, ScoreResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The requests for an engine, and where the caller's requests are among them."""

    requests: list[ScoreRequest]  # distinct and sorted
    result_of: list[int]  # for each request of the caller: its index in ``requests``

    def restore(self, results: Sequence[ScoreResult]) -> list[ScoreResult]:
        """Return one result per request of the caller, in the caller's order."""
        return [results[i] for i in self.result_of]


def plan(requests: Sequence[ScoreRequest]) -> Plan:
    """Sort the requests and drop duplicates.

    >>> import numpy as np
    >>> a, b = (ScoreRequest(token_ids=np.array(ids, np.int32), start=1) for ids in ([7, 8, 9], [7, 8]))
    >>> planned = plan([a, b, a])
    >>> [r.token_ids.tolist() for r in planned.requests], planned.result_of
    ([[7, 8], [7, 8, 9]], [1, 0, 1])
    """
    keys = [_key(request) for request in requests]
    first_of: dict[tuple[Any, ...], int] = {}
    for i, key in enumerate(keys):
        first_of.setdefault(key, i)
    place = {key: n for n, key in enumerate(sorted(first_of))}
    return Plan(requests=[requests[first_of[key]] for key in place], result_of=[place[key] for key in keys])


def _key(request: ScoreRequest) -> tuple[Any, ...]:
    ids = b"" if request.ids is None else request.ids.tobytes()
    asked = (request.temperature, request.top_k, request.entropy, request.hidden_size)
    return request.token_ids.tobytes(), request.start, *asked, ids
