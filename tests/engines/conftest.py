"""One process in which the engines of these files start, and with which they end."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="package")
def child() -> Iterator[Callable[..., Any]]:
    """Call a function of a test's file in the child, with arguments; return what it returns.

    vLLM's transformers backend changes transformers' classes where it runs, and an engine that ends destroys
    its process's groups, also under the engine that other tests share. So neither happens in the tests' own
    process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])  # the child imports the tests, and inherits the path
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        yield lambda function, *args: pool.apply_async(function, args).get(timeout=200)
