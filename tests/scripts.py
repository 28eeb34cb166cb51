"""Imports a script that is no part of the package."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def imported(folder, name):
    """Yield the module of a script in ``benchmarks`` or ``examples``, which may import its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / folder)
        yield importlib.import_module(name)
