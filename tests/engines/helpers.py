"""Options of engines of the models of ``tiny.build_architecture``, and random ids for them."""

from __future__ import annotations

import random

from tests import tiny

VOCAB, PAD, EOS = 301, 299, 300
OPTIONS = {
    "max_model_len": tiny.MAX_MODEL_LEN,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 8 << 20,
    "block_size": 32,
}


def random_ids(seed, length, vocab=VOCAB):
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length)]
