"""The columns of a scored row's values: from the LM head, through engine and network, to the scorer.

A row has K chosen ids and k most likely ids:

    log_probs 1       the log-prob of the sequence's own token
    chosen K          the log-probs of the chosen ids
    top_ids k         the most likely ids, the best first
    top_log_probs k   their log-probs
    entropy 0 or 1    the entropy of the row's distribution
    hidden H or 0     the row's hidden state, as the LM head gets it
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np


class Column(NamedTuple):
    """A named block of columns."""

    name: str
    of: slice
    kind: np.dtype  # of its numbers on the wire; log-probs and entropies are in nats


def num_columns(num_ids: int, top_k: int, entropy: bool, hidden_size: int = 0) -> int:
    """Return how many columns a row has, which is asked for K chosen ids, k best ids, entropy and H features.

    >>> num_columns(num_ids=0, top_k=5, entropy=True)
    12
    """
    return 1 + num_ids + 2 * top_k + entropy + hidden_size


def blocks(num_ids: int, top_k: int, entropy: bool) -> list[Column]:
    """Return the blocks that are not empty, in their order. Hidden states do not go over the network.

    >>> [(block.name, block.of.start, block.of.stop) for block in blocks(0, 5, True)]
    [('log_probs', 0, 1), ('top_ids', 1, 6), ('top_log_probs', 6, 11), ('entropy', 11, 12)]
    """
    widths = {
        "log_probs": 1,
        "chosen": num_ids,
        "top_ids": top_k,
        "top_log_probs": top_k,
        "entropy": int(entropy),
    }
    ends = itertools.accumulate(widths.values())
    return [
        Column(name, slice(end - width, end), np.dtype("<i4" if name == "top_ids" else "<f4"))
        for (name, width), end in zip(widths.items(), ends, strict=True)
        if width
    ]
