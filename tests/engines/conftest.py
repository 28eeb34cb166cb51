"""The process in which engines of these files start, and with which they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engines.helpers import start_child


@pytest.fixture(scope="package")
def child() -> Iterator[Callable[..., Any]]:
    with start_child() as call:
        yield call
