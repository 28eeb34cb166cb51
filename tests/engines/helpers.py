"""For models of ``tiny.build_architecture``: options of engines, random ids, and engines in a child."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
from pathlib import Path

import pytest

from tests import tiny

VOCAB, PAD, EOS = 301, 299, 300
OPTIONS = {
    "max_model_len": tiny.MAX_MODEL_LEN,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 8 << 20,
    "block_size": 32,
}


ALIVE = []  # the engines of a child: one starts ten times faster beside another


@contextlib.contextmanager
def start_child():
    """Yield what calls a function of a test's file in a child process, and returns what it returns.

    vLLM's transformers backend changes transformers' classes where it runs, and an engine that ends destroys
    its process's groups, also under the engine that other tests share. So neither happens in the tests' own
    process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])  # the child imports the tests, and inherits the path
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        yield lambda function, *args: pool.apply_async(function, args).get(timeout=240)


def start_in_child(model, readout, **options):
    """Start an engine in the process that runs this, a child, and keep it until that ends."""
    from vllm.model_executor.models import registry

    from vllm_kl.engines.start_engine import start

    # Else two processes per architecture look at its class.
    registry._run_in_subprocess = lambda inspect: inspect()
    ALIVE.append(start(model=model, readout=readout, options=options))
    return ALIVE[-1]


def random_ids(seed, length, vocab=VOCAB):
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length)]
