"""Lets several replicas serve new weights, or none of them: prepare on all, commit on all, or put back.

all replicas prepare the new weights        one that cannot: none serves them
    -> all replicas commit                  one that fails: the others put the old weights back
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vllm_kl.errors import EngineError, WeightsError
from vllm_kl.weights.loading import NeedsNewEngineError

Outcome = tuple[bool, Any]  # whether a replica's step is done; its result or its error
# Runs a step on all replicas, each with its own arguments; returns the outcome of each.
Run = Callable[[str, Sequence[list[Any]]], Mapping[int, Outcome]]


def get_ready(run: Run, step: str, args: Sequence[list[Any]]) -> None:
    """Let all replicas get ready to commit.

    Raises:
        WeightsError, EngineError: a replica cannot. All keep the old weights.
    """
    if failed := errors_of(run(step, args)):
        raise refused(failed)


def commit(run: Run, args: list[Any], number: int) -> None:
    """Let all replicas serve what they prepared; if one cannot, put the old weights back on all.

    Args:
        run: runs a step.
        args: what the steps ``commit`` and ``put_back`` take first.
        number: how many replicas there are.

    Raises:
        WeightsError, EngineError: a replica could not serve the weights.
    """
    if failed := errors_of(run("commit", [args] * number)):
        reason = f"another replica failed: {next(iter(failed.values()))}"
        put_back = errors_of(run("put_back", [[*args, reason]] * number))
        raise _failed(failed, {i: error for i, error in put_back.items() if i not in failed})


def errors_of(outcomes: Mapping[int, Outcome]) -> dict[int, Exception]:
    """Return the errors of the replicas whose step is not done."""
    return {i: error for i, (is_done, error) in outcomes.items() if not is_done}


def refused(failed: Mapping[int, Exception]) -> Exception:
    """Return the error for replicas that could not get ready."""
    index, error = next(iter(failed.items()))
    if isinstance(error, NeedsNewEngineError):
        return error
    if isinstance(error, EngineError):
        return EngineError(f"replica {index} failed: {error}.\nAll replicas keep the old weights")
    return WeightsError(f"replica {index} refused the weights: {error}.\nAll replicas keep the old weights")


def _failed(failed: Mapping[int, Exception], lost: Mapping[int, Exception]) -> Exception:
    index, error = next(iter(failed.items()))
    message = f"replica {index} could not serve the weights: {error}. The others serve the old weights again"
    if lost:
        other, second = next(iter(lost.items()))
        message = (
            f"replica {index} could not serve the weights ({error}), and replica {other} could not put the "
            f"old weights back ({second}).\nPush again, or make a new engine"
        )
    return (EngineError if isinstance(error, EngineError) else WeightsError)(message)


@contextlib.contextmanager
def deferring_interrupts() -> Iterator[None]:
    """Let an interrupt (Ctrl-C) come at the end of the block; a second one comes at once.

    A replica may never answer. Only the main thread gets interrupts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def defer(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1 and callable(handler):
            handler(number, frame)

    handler = signal.signal(signal.SIGINT, defer)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if len(came) == 1 and callable(handler):
            handler(signal.SIGINT, None)
