"""Reads and replaces the weights of all replicas on Ray Serve.

    all replicas prepare, and all commit, or none does     (weights/all_or_none.py)
        -> Serve keeps the folder and the version          each replica that starts later loads them

A replica that dies meanwhile is no failure: it comes back with what Serve keeps. Between a commit and its
keeping it may come back with the old weights; then its shards are asked again.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_kl import lifetime
from vllm_kl.errors import OptionError
from vllm_kl.weights.all_or_none import Outcome, commit, deferring_interrupts, get_ready
from vllm_kl.weights.checkpoint import Checkpoint, InitialCheckpoint, Skeleton, next_version

_LOOK_EVERY_S = 0.05
_KEPT_WITHIN_S = 30.0  # Serve's controller may be starting anew: no reason to wait for ever


class ReplicatedWeights:
    """The weights of all replicas.

    Args:
        on_each: calls a method of each replica that runs; returns the outcomes.
        keep: lets each replica call ``reconfigure`` with these values, also those that start later.
        is_changing: whether Serve is at this.
        make_skeleton: returns the names and shapes of the model's tensors. Not every model has them.
        start: the checkpoint of version 0.
        folder: where pushed weights are kept, for all machines to see; ``None``: this machine's memory.
    """

    def __init__(
        self,
        on_each: Callable[..., Sequence[Outcome]],
        keep: Callable[[dict[str, Any]], None],
        is_changing: Callable[[], bool],
        make_skeleton: Callable[[], Skeleton],
        start: InitialCheckpoint,
        folder: Path | None,
    ) -> None:
        self._on_each, self._keep, self._is_changing = on_each, keep, is_changing
        self._make_skeleton, self._start, self._folder = make_skeleton, start, folder
        self._served: Checkpoint | None = None  # the last push; a replica that starts loads it
        self._lock = threading.Lock()
        self._turns, self._num_calls, self._is_committing = threading.Condition(), 0, False
        self.version = self._last = 0  # that serves, and that Serve may have kept though it does not

    @functools.cached_property
    def skeleton(self) -> Skeleton:
        return self._make_skeleton()

    @property
    def source(self) -> str:
        return self._start.unchanged() if self._served is None else str(self._served.folder)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Let no push commit in the block, which is a call; several calls may run at a time."""
        with self._turns:
            self._turns.wait_for(lambda: not self._is_committing)
            self._num_calls += 1
        try:
            yield
        finally:
            with self._turns:
                self._num_calls -= 1
                self._turns.notify_all()

    @contextlib.contextmanager
    def _committing(self) -> Iterator[None]:
        """Wait for the calls that run; calls that come meanwhile wait for the end of the block."""
        try:
            with self._turns:
                self._is_committing = True
                self._turns.wait_for(lambda: not self._num_calls)
            yield
        finally:
            with self._turns:
                self._is_committing = False
                self._turns.notify_all()

    def next_version(self, version: int | None = None) -> int:
        return next_version(max(self.version, self._last), version)

    def load(self, checkpoint: Checkpoint, *, version: int | None = None) -> int:
        """Load a checkpoint into all replicas, or into none; return the version.

        Raises:
            WeightsError: a replica could not load it. All replicas serve the old weights.
            EngineError: no replica runs, and none came back in time.
        """
        with self._lock:
            version = self.next_version(version)
            checkpoint = self._for_all_machines(checkpoint)
            try:
                get_ready(self._run, "prepare", [[str(checkpoint.folder), version]])
                with self._committing(), deferring_interrupts():  # until the replicas are in step
                    commit(self._run, [], 1)
                    try:
                        self._keep({"version": version, "folder": str(checkpoint.folder)})
                    except BaseException:  # Ray ends, or a second Ctrl-C
                        self._last = version
                        self._on_each("put_back", "Serve did not take the new weights for replicas to come")
                        raise
                    self._served, self.version = checkpoint, version
            finally:
                self._on_each("end_push")
            self._wait_until_kept(version)
            return version

    def _wait_until_kept(self, version: int) -> None:
        """Wait until Serve has told all replicas what it keeps, a few at a time: these take no calls then."""
        deadline = time.monotonic() + _KEPT_WITHIN_S
        while time.monotonic() < deadline:
            kept = [is_done and kept for is_done, kept in self._on_each("kept")]
            if all(one == version for one in kept) and not self._is_changing():
                return
            time.sleep(_LOOK_EVERY_S)

    def _run(self, step: str, args: Sequence[list[Any]]) -> Mapping[int, Outcome]:
        return dict(enumerate(self._on_each(step, *args[0])))

    def _for_all_machines(self, checkpoint: Checkpoint) -> Checkpoint:
        if self._folder is None:
            return checkpoint
        lifetime.remove_orphans(self._folder)
        folder = lifetime.new_folder(self._folder)
        copied = Checkpoint(folder, is_ours=True)
        shutil.copytree(checkpoint.folder, folder, dirs_exist_ok=True)
        return copied

    def sleep(self) -> bool:
        raise OptionError("replicas cannot sleep: one that is restarted would be awake. close() ends them")

    def wake_up(self) -> None:
        """Do nothing: :meth:`sleep` is refused."""

    def release(self) -> None:
        """Free the memory of the pushed checkpoint."""
        if self._served is not None:
            self._served.delete()
