"""Providers as a user writes them for ``vllm-kl bench --providers module:function``; all have a fault."""

from __future__ import annotations

import os

import numpy as np

from vllm_kl.bench.types import Running


def constant(setup):
    def score(sequences, starts):
        return [np.full(len(ids) - start, -1.0) for ids, start in zip(sequences, starts, strict=True)]

    yield Running(score)


def dying(setup):
    def score(sequences, starts):
        print("the last words", flush=True)
        os._exit(9)

    yield Running(score)
