"""Turns at a shared engine: one thread uses it at a time, and weights stay while a step that they generated is not scored.

    generate (a policy's call) -> the step is open -> scored -> closed
    push                       -> waits for the open steps of other threads; generations that come meanwhile wait for it

A collector generates in one call and scores in another. Without the wait a push between the two would score tokens with weights
that did not sample them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Collection, Iterator

logger = logging.getLogger("vllm_kl")

# A step that nobody scores keeps nobody longer: its dialog failed in another transform, or is judged by something slow.
AT_MOST_S = 60.0
_LOOK_EVERY_S = 0.5


class EngineLock:
    """The lock of one engine. A thread that has it may take it again."""

    def __init__(self) -> None:
        self._lock = threading.Condition(threading.RLock())
        self._scorers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # who scores what it generates
        self._open: dict[threading.Thread, float] = {}  # who generated what it has not scored yet, and when
        self._replacing: set[threading.Thread] = set()  # who replaces weights, or waits for it

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextlib.contextmanager
    def if_free(self) -> Iterator[bool]:
        """Have the lock in the block if nobody else has it; tell whether."""
        is_mine = self._lock.acquire(blocking=False)
        try:
            yield is_mine
        finally:
            if is_mine:
                self._lock.release()

    def score_here(self) -> None:
        """What this thread generates is a step, open until :meth:`close_step`."""
        self._scorers.add(threading.current_thread())

    @contextlib.contextmanager
    def generating(self, asking: Collection[threading.Thread] = ()) -> Iterator[None]:
        """Have the lock in the block, after whoever waits to replace weights.

        Args:
            asking: other threads that wait for what is generated, or may: their steps are open too. Where one of them is open
                already, nobody is waited for: it may wait for this one.
        """
        with self._lock:
            self.close_step()  # one that was generated before, and never scored
            while self._replacing - {threading.current_thread()} and self._open.keys().isdisjoint(asking):
                self._lock.wait()
            yield
            for thread in {threading.current_thread(), *asking} & {*self._scorers}:
                self._open[thread] = time.monotonic()

    def close_step(self) -> None:
        """Let weights be replaced: this thread has scored what it generated."""
        with self._lock:
            self._open.pop(threading.current_thread(), None)
            self._lock.notify_all()

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Have the lock in the block, when no other thread has a step open."""
        with self._lock:
            self._replacing.add(threading.current_thread())
            try:
                self._wait_for_steps()
                yield
            finally:
                self._replacing.discard(threading.current_thread())
                self._lock.notify_all()

    def _wait_for_steps(self) -> None:
        while others := [t for t in self._open if t.is_alive() and t is not threading.current_thread()]:
            for thread in others:
                if time.monotonic() > self._open[thread] + AT_MOST_S:
                    del self._open[thread]
                    logger.warning(
                        "vllm_kl: weights are replaced though thread %s has generated a step that it has not scored in %g s; where "
                        "it is scored again after all, it is refused",
                        thread.name,
                        AT_MOST_S,
                    )
            self._lock.wait(_LOOK_EVERY_S)
