"""Providers as a user writes them for ``vllm-kl bench --providers module:function``; all have a fault."""

from __future__ import annotations

import logging
import os

import numpy as np

from vllm_kl.bench.types import Running


def constant(setup):
    def score(sequences, starts):
        return [np.full(len(ids) - start, -1.0) for ids, start in zip(sequences, starts, strict=True)]

    yield Running(score)


def warning(setup):
    logging.getLogger("vllm_kl").warning("vllm_kl: dtype='float32' is faster on this CPU")
    yield from constant(setup)


def of_two_processes(setup):
    yield Running(lambda *_: [], pids=(os.getpid(), os.getppid()))


def dying(setup):
    def score(sequences, starts):
        print("the last words", flush=True)
        os._exit(9)

    yield Running(score)
