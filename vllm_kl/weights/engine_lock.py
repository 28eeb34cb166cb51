"""Locks a shared engine: one thread uses it at a time, and a push waits until every generated step is scored.

    a thread generates     -> its step is open
    the thread scores      -> its step is closed
    another thread pushes  -> waits until all open steps are closed; threads that want to generate wait for it

A collector generates in one call and scores in another. If a push came between the two calls, the new weights
would score tokens that the old weights sampled.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Collection, Iterator

logger = logging.getLogger("vllm_kl")

# A push waits no longer for an open step: its dialog failed in another transform, or a slow reward model
# judges it.
AT_MOST_S = 60.0
_LOOK_EVERY_S = 0.5


class EngineLock:
    """The lock of one engine. A thread that holds it may take it again."""

    def __init__(self) -> None:
        self._lock = threading.Condition(threading.RLock())
        self._scorers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # threads that score their steps
        self._open: dict[threading.Thread, float] = {}  # threads with an open step -> when they generated it
        self._replacing: set[threading.Thread] = set()  # threads that replace the weights, or wait to do so

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextlib.contextmanager
    def if_free(self) -> Iterator[bool]:
        """Hold the lock in the block if no other thread holds it; yield whether this thread has it."""
        is_mine = self._lock.acquire(blocking=False)
        try:
            yield is_mine
        finally:
            if is_mine:
                self._lock.release()

    def score_here(self) -> None:
        """Treat each generation of this thread as a step, which is open until :meth:`close_step`."""
        self._scorers.add(threading.current_thread())

    @contextlib.contextmanager
    def generating(self, asking: Collection[threading.Thread] = ()) -> Iterator[None]:
        """Wait for threads that replace the weights; hold the lock in the block, which generates.

        Args:
            asking: other threads that wait, or may wait, for this generation. Their steps are open too. If
                the step of one of them is open already, this thread waits for no push: the push would wait
                for that step, and the step's thread may wait for this one.
        """
        with self._lock:
            self.close_step()  # the step before, if it was never scored
            while self._replacing - {threading.current_thread()} and self._open.keys().isdisjoint(asking):
                self._lock.wait()
            yield
            for thread in {threading.current_thread(), *asking} & {*self._scorers}:
                self._open[thread] = time.monotonic()

    def close_step(self) -> None:
        """Close this thread's step, because it is scored: another thread may replace the weights."""
        with self._lock:
            self._open.pop(threading.current_thread(), None)
            self._lock.notify_all()

    @contextlib.contextmanager
    def replacing(self) -> Iterator[None]:
        """Wait until no other thread has an open step; hold the lock in the block."""
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
                        "vllm_kl: weights are replaced, although thread %s has generated a step that it "
                        "has not scored in %g s. If the new weights score the step later, the samples are "
                        "refused as stale",
                        thread.name,
                        AT_MOST_S,
                    )
            self._lock.wait(_LOOK_EVERY_S)
