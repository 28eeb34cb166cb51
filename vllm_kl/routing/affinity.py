"""Chooses the replica that scores a prompt, so that equal prompts of later calls find their KV in its cache.

Rendezvous hashing gives each prompt an order of all replicas, which no state remembers: every caller finds
the same order, and a replica that comes or goes moves only the prompts that it gets or had. The module knows
neither Ray nor engines.

Source: D. G. Thaler, C. V. Ravishankar, "Using name-based mappings to increase hit rates", 1998.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping


def order(key: bytes, replicas: Iterable[str]) -> list[str]:
    """Return all replicas in the order in which the prompt of ``key`` prefers them.

    >>> order(b"a prompt", ["r0", "r1", "r2"]) == order(b"a prompt", ["r2", "r1", "r0"])
    True
    """
    return sorted(replicas, key=lambda replica: (_weight(key, replica), replica), reverse=True)


def choose(key: bytes, loads: Mapping[str, int], *, spill: int) -> str:
    """Return the first replica in the order of ``key`` whose load is near that of the least loaded one.

    Args:
        key: the prompt, or a hash of it.
        loads: what each replica still has to do, by the replica's id, in one unit (tokens or requests).
        spill: how much more than the least loaded replica the chosen one may have to do, in that unit. 0
            gives a least loaded replica; a huge number gives always the first of the order.

    Raises:
        ValueError: there is no replica.

    >>> first, second = order(b"a prompt", ["r0", "r1"])
    >>> choose(b"a prompt", {first: 8, second: 0}, spill=8) == first
    True
    >>> choose(b"a prompt", {first: 9, second: 0}, spill=8) == second
    True
    """
    most = min(loads.values()) + spill
    return max(
        (replica for replica, load in loads.items() if load <= most),
        key=lambda replica: (_weight(key, replica), replica),
    )


@functools.lru_cache(1 << 16)  # a caller cuts by the order of a key, and its router chooses by it
def _weight(key: bytes, replica: str) -> bytes:
    # The length in front keeps (b"a", "bc") and (b"ab", "c") apart.
    text = len(key).to_bytes(8, "big") + key + replica.encode()
    return hashlib.blake2b(text, digest_size=8).digest()
