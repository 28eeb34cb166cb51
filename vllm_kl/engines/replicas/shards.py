"""Cuts the requests of a call into shards: whole groups, sized by tokens, one replica's prompts together.

A group is what follows one prompt. Its requests stay in one shard, because a replica computes the prompt
once. Only a group that exceeds a shard is split.

The key of a prompt is its first 2 ** k tokens, with the largest k. So a dialog whose prompt grows keeps its
key, and its replica, until it is twice as long; a key of the whole prompt would change with every turn
(benchmarks/simulate_fleet.py).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vllm_kl.engines.affinity import order
from vllm_kl.types import ScoreRequest

_PER_REPLICA = 8  # shards of a large call: the replica that ends last ends at most one shard late
_FEWEST_TOKENS = 1024  # a shard costs some milliseconds beside its scoring
_MOST_TOKENS = 32768


@dataclass(slots=True)
class Shard:
    """Some requests of a call, for one replica."""

    key: bytes  # of the first prompt's beginning
    places: list[int] = field(default_factory=list)  # indices of the requests in the call
    num_tokens: int = 0  # with each prompt once


def cut(requests: Sequence[ScoreRequest], replicas: Sequence[str]) -> list[Shard]:
    """Return the shards of a call.

    Args:
        requests: sorted, as :func:`vllm_kl.plan.plan` returns them: requests of one prompt are neighbours.
        replicas: the ids of the replicas. A shard has prompts of one preferred replica.
    """
    pieces = [piece for group in _groups(requests) for piece in _split(group, requests, len(replicas))]
    total = sum(piece.num_tokens for piece in pieces)
    most = _most_tokens(total, len(replicas))
    open_shards: dict[str, Shard] = {}
    shards = []
    for piece in pieces:
        preferred = order(piece.key, replicas)[0] if replicas else ""
        shard = open_shards.get(preferred)
        if shard is None or shard.num_tokens + piece.num_tokens > most:
            shard = open_shards[preferred] = Shard(piece.key)
            shards.append(shard)
        shard.places += piece.places
        shard.num_tokens += piece.num_tokens
    return shards


def _groups(requests: Sequence[ScoreRequest]) -> Iterator[list[int]]:
    """Yield the indices of the requests of each prompt."""

    def prompt(n: int) -> bytes:
        return requests[n].token_ids[: requests[n].start].tobytes()

    for _, group in itertools.groupby(range(len(requests)), key=prompt):
        yield list(group)


def _split(group: list[int], requests: Sequence[ScoreRequest], num_replicas: int) -> Iterator[Shard]:
    """Yield a group as one shard, or as several of the largest size."""
    first = requests[group[0]]
    beginning = first.token_ids[: 1 << (first.start.bit_length() - 1)]
    piece = Shard(_hash(beginning.tobytes()), num_tokens=first.start)
    for n in group:
        num_tokens = len(requests[n].token_ids) - first.start
        if piece.places and piece.num_tokens + num_tokens > _MOST_TOKENS:
            yield piece
            # The next piece has a key of its own, so it may go to another replica.
            piece = Shard(_hash(requests[n].token_ids.tobytes()), num_tokens=first.start)
        piece.places.append(n)
        piece.num_tokens += num_tokens
    yield piece


def _most_tokens(total: int, num_replicas: int) -> int:
    share = total // (_PER_REPLICA * max(num_replicas, 1))
    return min(max(share, _FEWEST_TOKENS), _MOST_TOKENS)


def _hash(ids: bytes) -> bytes:
    return hashlib.blake2b(ids, digest_size=16).digest()
