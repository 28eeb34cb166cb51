"""Gives each prompt a key, and a dialog one key for all of its turns.

A prompt's key is its hash. A prompt that begins with an earlier one, as the next turn of a dialog does, takes
the key of that one. So prompts that only share a system prompt have different keys, and a dialog that grows
keeps its own. Where nothing is remembered of a dialog, because another process had its last turn, its key is
that of a new prompt: it finds a replica, but not its old one.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from typing import NamedTuple

import numpy as np

_BLOCK = 64  # tokens; beginnings are looked up at the ends of blocks, and shorter prompts are not remembered


class _Place(NamedTuple):
    """Where a prompt ends."""

    blocks: bytes  # hash of its whole blocks
    rest: bytes  # hash of the tokens after them


class _Known(NamedTuple):
    """What is remembered of a prompt."""

    key: bytes
    length: int  # of the rest


class Dialogs:
    """The prompts that had a key last. One thread at a time may use it. A pickled one is empty.

    Args:
        most: how many prompts are remembered; each takes about 0.7 kB.

    >>> dialogs = Dialogs()
    >>> first = np.arange(100, dtype=np.int32)
    >>> longer, other = np.append(first, [7, 8]), np.append(first[:99], [7, 8])
    >>> dialogs.key_of(first) == dialogs.key_of(longer)
    True
    >>> dialogs.key_of(first) == dialogs.key_of(other)
    False
    """

    def __init__(self, most: int = 1 << 14) -> None:
        self._most = most
        self._known: OrderedDict[_Place, _Known] = OrderedDict()
        # Of the known prompts with the same whole blocks: how many have a rest of a length.
        self._lengths: dict[bytes, Counter[int]] = {}

    def key_of(self, prompt: np.ndarray) -> bytes:
        """Return the key of a prompt: ``[P]`` ids."""
        prompt = prompt.astype(np.int32, copy=False)
        blocks, place = _hashes(prompt)
        if not blocks:
            return hash_of(prompt)
        key = self._found(prompt, blocks, place) or hash_of(prompt)
        self._keep(place, _Known(key, len(prompt) % _BLOCK))
        return key

    def __reduce__(self) -> tuple[type[Dialogs], tuple[int]]:
        return Dialogs, (self._most,)

    def _found(self, prompt: np.ndarray, blocks: list[bytes], place: _Place) -> bytes | None:
        """Return the key of this prompt, or of the longest one that it begins with."""
        if place in self._known:
            return self._known[place].key
        for n in range(len(blocks), 0, -1):
            after = prompt[n * _BLOCK :]
            known = self._lengths.get(blocks[n - 1], ())
            for length in sorted((one for one in known if one <= len(after)), reverse=True):
                beginning = _Place(blocks[n - 1], hash_of(after[:length]))
                if beginning in self._known:
                    return self._known[beginning].key
        return None

    def _keep(self, place: _Place, known: _Known) -> None:
        if place not in self._known:
            self._lengths.setdefault(place.blocks, Counter())[known.length] += 1
        self._known[place] = known
        self._known.move_to_end(place)
        if len(self._known) > self._most:
            old, forgotten = self._known.popitem(last=False)
            lengths = self._lengths[old.blocks]
            lengths[forgotten.length] -= 1
            if not +lengths:
                del self._lengths[old.blocks]


def _hashes(prompt: np.ndarray) -> tuple[list[bytes], _Place]:
    """Return the hashes of a prompt's first block, first two blocks, and so on; and where it ends."""
    found, state, data = [], hashlib.blake2b(digest_size=16), prompt.tobytes()
    size = _BLOCK * prompt.itemsize
    for end in range(size, len(data) + 1, size):
        state.update(data[end - size : end])
        found.append(state.digest())
    return found, _Place(found[-1] if found else b"", hash_of(prompt[len(found) * _BLOCK :]))


def hash_of(ids: np.ndarray) -> bytes:
    """Return a hash of ids: 16 bytes."""
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
