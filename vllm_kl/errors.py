"""Defines every error that this package raises on purpose.

    VLLMKLError
    ├── InputError (ValueError)               a sequence, a mask or a tensordict entry cannot be scored
    ├── OptionError (TypeError)               an argument or engine option does not exist, or has no effect
    ├── ReadoutUnavailableError (ValueError)  the engine cannot do the requested read-out
    ├── MissingLogProbError (ArithmeticError) a token that must have a log-prob has no usable one
    ├── EngineError (RuntimeError)            the engine did not start, died or was closed
    ├── DriftError (ArithmeticError)          recorded log-probs are not those of the policy's engine
    ├── WeightsError (RuntimeError)           new weights were refused, or could not be loaded
    ├── FrozenError (ArithmeticError)         the weights of a reference changed, and no refresh() did it
    ├── StaleError (ValueError)               weights would re-score tokens that they may not have sampled
    └── CollectorError (RuntimeError)         a collector cannot be used, or an error ended its thread

Each error takes one message, so pickling keeps it whole (a queue, Ray, a process pool).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "CollectorError",
    "DriftError",
    "EngineError",
    "FrozenError",
    "InputError",
    "MissingLogProbError",
    "OptionError",
    "ReadoutUnavailableError",
    "StaleError",
    "VLLMKLError",
    "WeightsError",
]


class VLLMKLError(Exception):
    """The base of all errors of this package."""

    sample: int | None = None  # index in the batch of the sample that failed; None: not one sample alone


class InputError(VLLMKLError, ValueError):
    """A sequence, mask or tensordict entry cannot be scored. The message names the sample and the cure."""


class OptionError(VLLMKLError, TypeError):
    """An argument or an engine option does not exist, or would have no effect here."""


class ReadoutUnavailableError(VLLMKLError, ValueError):
    """The engine cannot do the requested read-out. The message says why."""


class MissingLogProbError(VLLMKLError, ArithmeticError):
    """A token that must have a log-prob has no usable one.

    An engine returned none, a recorded or stored log-prob is missing or is no log-prob, or a number is not
    finite.
    """


class EngineError(VLLMKLError, RuntimeError):
    """The engine did not start, died, or was closed."""


class DriftError(VLLMKLError, ArithmeticError):
    """Recorded log-probs are not those of the policy's engine: its weights or its sampling are different."""


class CollectorError(VLLMKLError, RuntimeError):
    """A collector, its policy or its recorded log-probs cannot be used; or an error ended its thread."""


class WeightsError(VLLMKLError, RuntimeError):
    """New weights were refused, or could not be loaded. The message says which weights the engine serves."""


class FrozenError(VLLMKLError, ArithmeticError):
    """A reference returns other log-probs than before: its weights, or the kernels, have changed."""


class StaleError(VLLMKLError, ValueError):
    """Weights would re-score tokens that they are not known to have sampled.

    The versions or the adapters differ, or a version is missing or is not a number.
    """


def shown(value: Any) -> str:
    """Return a value for a message, shortened. Python refuses to print an int of more than 4,300 digits."""
    try:
        text = repr(value)
    except ValueError:
        text = f"an int of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:57]}..."
