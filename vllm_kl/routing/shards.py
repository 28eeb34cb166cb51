"""Cuts the requests of a call into shards: whole groups, sized by tokens, one replica's prompts together.

A group is what follows one prompt. Its requests, which are neighbours, stay in one shard, because a replica
computes the prompt once. Only a group that exceeds a shard is split. What follows a prompt of a few tokens is
no group: there is nothing to share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vllm_kl.routing.affinity import order
from vllm_kl.routing.dialogs import Dialogs, hash_of


class Request(Protocol):
    """What is cut: a sequence, and the index of its first token to score."""

    @property
    def token_ids(self) -> np.ndarray: ...  # [L] int32
    @property
    def start(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the shards of a call are."""

    per_replica: int = 8  # of a large call: the replica that ends last ends at most one shard late
    fewest_tokens: int = 1024  # a shard costs some milliseconds beside its scoring
    most_tokens: int = 32768
    fewest_shared: int = 16  # tokens of a prompt: a block of vLLM's prefix cache


@dataclass(slots=True)
class Shard:
    """Some requests of a call, for one replica."""

    key: bytes  # of the first prompt
    places: list[int] = field(default_factory=list)  # indices of the requests in the call
    num_tokens: int = 0  # with each prompt once


def cut(
    requests: Sequence[Request], replicas: Sequence[str], dialogs: Dialogs, sizes: Sizes = Sizes()
) -> list[Shard]:
    """Return the shards of a call.

    Args:
        requests: sorted, as :func:`vllm_kl.plan.plan` returns them: requests of one prompt are neighbours.
        replicas: the ids of the replicas. A shard has prompts of one preferred replica.
        dialogs: gives the prompts their keys.
        sizes: how large they are.
    """
    groups = _groups(requests, sizes.fewest_shared)
    pieces = [piece for group in groups for piece in _split(group, requests, dialogs, sizes)]
    share = sum(piece.num_tokens for piece in pieces) // (sizes.per_replica * max(len(replicas), 1))
    most = min(max(share, sizes.fewest_tokens), sizes.most_tokens)
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


def _groups(requests: Sequence[Request], fewest_shared: int) -> Iterator[list[int]]:
    """Yield the indices of the requests of each prompt."""

    def prompt(n: int) -> bytes | int:
        start = requests[n].start
        return n if start < fewest_shared else requests[n].token_ids[:start].tobytes()

    for _, group in itertools.groupby(range(len(requests)), key=prompt):
        yield list(group)


def _split(group: list[int], requests: Sequence[Request], dialogs: Dialogs, sizes: Sizes) -> Iterator[Shard]:
    """Yield a group as one shard, or as several of the largest size."""
    first = requests[group[0]]
    is_shared = first.start >= sizes.fewest_shared
    key = dialogs.key_of(first.token_ids[: first.start]) if is_shared else hash_of(first.token_ids)
    piece = Shard(key, num_tokens=first.start)
    for n in group:
        num_tokens = len(requests[n].token_ids) - first.start
        if piece.places and piece.num_tokens + num_tokens > sizes.most_tokens:
            yield piece
            # The next piece has a key of its own, so it may go to another replica.
            piece = Shard(hash_of(requests[n].token_ids), num_tokens=first.start)
        piece.places.append(n)
        piece.num_tokens += num_tokens
    yield piece
