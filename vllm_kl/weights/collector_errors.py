"""Collectors that were started: what ends their thread is told to whoever trains, in the thread that trains.

TorchRL 0.14's ``LLMCollector.start()`` collects in a thread. An error there ends the thread, and nobody is told: the buffer gets
nothing more, and who waits for it waits for ever. So an error of such a thread is remembered, and raised by the next call that a
trainer makes for the same collector: a push into its policy's engine, a refresh of its reference, or :func:`check_collector`.
"""

from __future__ import annotations

import functools
import threading
import traceback
import weakref
from typing import Any

from vllm_kl.errors import CollectorError

_FOLLOWED: weakref.WeakKeyDictionary[threading.Thread, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
# By collector, engine and scorer: what ended a thread, as text: the error itself holds frames, and they hold engines.
_ENDED: weakref.WeakKeyDictionary[Any, traceback.TracebackException] = weakref.WeakKeyDictionary()


def follow(collector: Any, *others: Any) -> None:
    """Remember what ends a collector's thread, if this is it: for the collector, and for what a trainer has of it."""
    thread = threading.current_thread()
    if getattr(collector, "_thread", None) is not thread:
        return
    _hook_threads()
    _FOLLOWED.setdefault(thread, weakref.WeakSet()).update(
        [collector, *(it for it in others if it is not None)]
    )


def check_collector(collector: Any) -> None:
    """Raise what ended the thread of a collector that was started, once. To be called where its samples are waited for.

    Raises:
        CollectorError: an error ended it, of a transform, the env or the policy; its traceback is a note of this one.

    >>> # collector.start()
    >>> # while len(buffer) < 64: check_collector(collector); time.sleep(0.1)
    """
    ended = _ENDED.get(collector)
    if ended is not None:
        for followed in [followed for followed, by in _ENDED.items() if by is ended]:
            del _ENDED[followed]
        error = CollectorError(
            "an error ended the thread of a collector that was started, and its buffer gets nothing more: "
            f"{ended.exc_type.__name__}: {ended}. Mend what it says, and call start() again"
        )
        error.add_note("".join(ended.format()))
        raise error


@functools.cache
def _hook_threads() -> None:
    before = threading.excepthook

    def remember(args: threading.ExceptHookArgs) -> None:
        ended = traceback.TracebackException.from_exception(args.exc_value)
        for followed in _FOLLOWED.pop(args.thread, ()):
            _ENDED[followed] = ended
        before(args)

    threading.excepthook = remember
