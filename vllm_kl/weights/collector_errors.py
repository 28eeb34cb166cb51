"""Raises an error that ended a collector's thread in the thread of the trainer.

``LLMCollector.start()`` (TorchRL 0.14) collects in a background thread. An error there ends the thread
without a message to the trainer: the replay buffer gets no more samples, and a trainer that waits for them
waits for ever. This module remembers the error. The trainer's next push into the policy's engine, refresh of
the reference, or :func:`check_collector` raises it.
"""

from __future__ import annotations

import functools
import threading
import traceback
import weakref
from typing import Any

from vllm_kl.errors import CollectorError
from vllm_kl.weights.ray_collectors import actor_of, call_in_actor

_FOLLOWED: weakref.WeakKeyDictionary[threading.Thread, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()
# Collector, engine or scorer -> the error that ended the thread. As text, because an error holds frames, and
# frames engines.
_ENDED: weakref.WeakKeyDictionary[Any, traceback.TracebackException] = weakref.WeakKeyDictionary()


def follow(collector: Any, *others: Any) -> None:
    """If this thread is the collector's background thread, remember an error that ends it.

    Args:
        collector: the collector that calls this.
        others: the engine and the scorer that the collector uses. A call for one of them raises the error,
            too.
    """
    thread = threading.current_thread()
    if getattr(collector, "_thread", None) is not thread:
        return
    _hook_threads()
    _FOLLOWED.setdefault(thread, weakref.WeakSet()).update(
        [collector, *(it for it in others if it is not None)]
    )


def check_collector(collector: Any) -> None:
    """Raise the error that ended a collector's background thread, once. Call this while you wait for samples.

    Args:
        collector: an ``LLMCollector``, or TorchRL's ``RayLLMCollector``, whose actor is asked.

    Raises:
        CollectorError: an error of a transform, the env or the policy ended the thread. Its traceback is a
            note of the raised error. Or the process of a ``RayLLMCollector`` died.

    >>> # collector.start()
    >>> # while len(buffer) < 64: check_collector(collector); time.sleep(0.1)
    """
    if (actor := actor_of(collector)) is not None:
        call_in_actor(actor, check_collector)
        return
    ended = _ENDED.get(collector)
    if ended is not None:
        for followed in [followed for followed, by in _ENDED.items() if by is ended]:
            del _ENDED[followed]
        error = CollectorError(
            "an error ended the background thread of a collector, so its buffer gets no more samples: "
            f"{ended.exc_type.__name__}: {ended}. Mend the cause, and call start() again"
        )
        error.add_note("".join(ended.format()))
        raise error


@functools.cache
def _hook_threads() -> None:
    before = threading.excepthook

    def remember(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and args.thread is not None:
            ended = traceback.TracebackException.from_exception(args.exc_value)
            for followed in _FOLLOWED.pop(args.thread, ()):
                _ENDED[followed] = ended
        before(args)

    threading.excepthook = remember
