"""For models of ``tiny.build_architecture``: options of engines, random ids, and engines in a child."""

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


ALIVE = []  # the engines of the fixture ``child``: an engine starts ten times faster beside another


def start_in_child(model, readout, **options):
    """Start an engine, and keep it until the process ends. The fixture ``child`` runs it."""
    from vllm.model_executor.models import registry

    from vllm_kl.engines.start_engine import start

    # Else two processes per architecture look at its class.
    registry._run_in_subprocess = lambda inspect: inspect()
    ALIVE.append(start(model=model, readout=readout, options=options))
    return ALIVE[-1]


def random_ids(seed, length, vocab=VOCAB):
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length)]
