"""Reads engine options that are written ``NAME=VALUE``, on a command line or in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from vllm_kl.errors import OptionError


def parse_engine_options(given: Iterable[str]) -> dict[str, Any]:
    """Return vLLM's engine options by name. A value that is JSON is read as JSON, any other is text.

    Raises:
        OptionError: an option has no ``=``, or is given twice.

    >>> parse_engine_options(["dtype=float32", "max_model_len=2048", "enforce_eager=true"])
    {'dtype': 'float32', 'max_model_len': 2048, 'enforce_eager': True}
    """
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise OptionError(f"engine option {text!r}: expected NAME=VALUE, such as dtype=float32")
        if name in options:
            raise OptionError(f"engine option {name!r} is given twice")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options
