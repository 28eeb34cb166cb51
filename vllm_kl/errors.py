"""Every error that this package raises on purpose.

    VLLMKLError
    ├── InputError (ValueError)           a sequence, a mask or a tensordict entry that cannot be scored
    ├── OptionError (TypeError)           an argument or engine option that does not exist or has no effect
    ├── ReadoutUnavailableError (ValueError)  the engine cannot do the requested read-out
    ├── MissingLogProbError (ArithmeticError) the engine returned no usable number for a token
    ├── EngineError (RuntimeError)        the engine did not start, died or was closed
    ├── DriftError (ArithmeticError)      recorded log-probs are not those of the policy's engine
    ├── WeightsError (RuntimeError)       new weights were refused, or could not be loaded; says which are serving
    ├── FrozenError (ArithmeticError)     the numbers of a reference moved, which nobody asked for
    ├── StaleError (ValueError)           tokens of an older policy version would be scored with newer weights
    └── CollectorError (RuntimeError)     ``from_collector`` found no collector, no policy or no recorded log-probs

Each takes one message, so each survives pickling (a queue, Ray, a process pool).
"""

from __future__ import annotations

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

    sample: int | None = None  # of the batch that was scored, where it is one that failed


class InputError(VLLMKLError, ValueError):
    """A sequence, a mask or a tensordict entry that cannot be scored. Names the sample and the cure."""


class OptionError(VLLMKLError, TypeError):
    """An argument or an engine option that does not exist, or that would have no effect here."""


class ReadoutUnavailableError(VLLMKLError, ValueError):
    """The engine cannot do the requested read-out. Says why."""


class MissingLogProbError(VLLMKLError, ArithmeticError):
    """The engine returned no usable number for a token that must have one."""


class EngineError(VLLMKLError, RuntimeError):
    """The engine did not start, died, or was closed."""


class DriftError(VLLMKLError, ArithmeticError):
    """Recorded log-probs are not those of the policy's engine: its weights moved, or it sampled otherwise."""


class CollectorError(VLLMKLError, RuntimeError):
    """``from_collector`` found no collector, no policy or no recorded log-probs."""


class WeightsError(VLLMKLError, RuntimeError):
    """New weights were refused, or could not be loaded. Says which weights go on being served."""


class FrozenError(VLLMKLError, ArithmeticError):
    """A reference returns other numbers than it did: its weights, or what computes with them, moved."""


class StaleError(VLLMKLError, ValueError):
    """Tokens that an older version of the policy sampled would be scored with newer weights."""
