"""Is the main program of an owned engine's process: ``python -m vllm_kl.engines._child FD OWNER_PID``.

The child reads calls ``(call_id, kind, body)`` from the connection:

    start                     once, first
    score, cancel             requests of several "score" calls share batches
    load, sleep, wake_up      exclusive: starts when all earlier calls are finished, and blocks all later ones
    score alone               exclusive, too
    prepare                   loads weights beside the serving ones
    commit, put back          exclusive: let them serve; undo that
    drop prepared             ends these three
    started with              names the checkpoint and the version that the engine was started with
    weights, next version     questions about the weights
    lm head                   writes the LM head to a folder

The child answers with the same triple: "info"; "results" after every step that finished requests; "done";
"error". It sends "alive" when it has sent nothing for a second. It ends with its owner: see
:mod:`vllm_kl.engines.process`.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import traceback
from collections import defaultdict, deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_kl.engines.base import drive
from vllm_kl.engines.start_failures import explain
from vllm_kl.engines.wire_format import Packed, pack, unpack
from vllm_kl.environment import KEEPS_MEMORY
from vllm_kl.errors import EngineError, VLLMKLError
from vllm_kl.lifetime import end_with_owner, kill_group, remove_orphans
from vllm_kl.types import ScoreRequest
from vllm_kl.weights.checkpoint import Checkpoint

_SIGN_OF_LIFE_S = 1.0
_NO_CALL = -1  # the id in messages that answer no call
_EXCLUSIVE = frozenset({"start", "load", "commit", "put back", "sleep", "wake_up", "score alone"})
_FREES_WEIGHTS = frozenset({"start", "load", "commit", "put back", "sleep", "drop prepared"})


def _kill_group() -> None:
    kill_group(os.getpgrp())  # it holds every process that vLLM started


def _as_answer(error: Exception) -> Exception:
    """Return the error as one that the owner can unpickle; log the traceback of a foreign error."""
    if isinstance(error, VLLMKLError):
        return error
    text = "".join(traceback.format_exception_only(error)).strip()
    print("".join(traceback.format_exception(error)), file=sys.stderr)
    return EngineError(f"vLLM failed: {text}")


class _Server:
    """Serves one connection. It reads calls between two engine steps, so concurrent callers share batches."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._driver: Any = None
        self._calls: dict[int, set[int]] = {}  # call id -> its unfinished requests
        self._held: deque[tuple[int, str, Any]] = deque()  # an exclusive call that waits, and all later calls
        self._last_sent = time.monotonic()

    def run(self) -> None:
        while True:
            self._dispatch_held()  # first: a held call must not wait until the next message comes
            while self._connection.poll(0 if self._calls else None):
                call = self._connection.recv()
                if call[1] == "cancel":
                    self._dispatch(*call)
                else:
                    self._held.append(call)
                self._dispatch_held()
            self._step()

    def leave(self) -> None:
        """Let the workers remove the file in the temporary folder by which they met."""
        if self._driver is not None:
            self._driver.leave()

    def _dispatch_held(self) -> None:
        while self._held and not (self._calls and self._held[0][1] in _EXCLUSIVE):
            self._dispatch(*self._held.popleft())

    def _dispatch(self, call_id: int, kind: str, body: Any) -> None:
        if kind not in ("score", "cancel"):
            try:
                answer = getattr(self, "_" + kind.replace(" ", "_"))(**body)
            except Exception as error:
                answer = "error", _as_answer(error)
            if kind in _FREES_WEIGHTS and self._driver is not None:
                self._give_back_memory()
            self._answer(call_id, *answer)
        elif kind == "score":
            requests = unpack(ScoreRequest, body["requests"])
            self._calls[call_id] = set(range(len(requests)))
            for n, request in enumerate(requests):
                self._driver.submit((call_id, n), request, share_prefix=body["share_prefix"])
        elif kind == "cancel":
            self._held = deque(call for call in self._held if call[0] != call_id)
            self._driver.cancel([(call_id, n) for n in self._calls.pop(call_id, ())])

    def _give_back_memory(self) -> None:
        """Let the workers give back the memory of old weights, where it is kept."""
        if KEEPS_MEMORY.keys() & os.environ.keys():
            try:
                self._driver.weights.give_back_memory()
            except Exception:  # the call has its answer; a dead worker has given its memory back
                traceback.print_exc()

    def _start(self, **options: Any) -> tuple[str, Any]:
        from vllm_kl.engines.start_engine import start

        try:
            self._driver = start(**options)
        except Exception as error:
            if not isinstance(error, VLLMKLError):
                traceback.print_exc()
            raise explain(error, model=options["model"], options=options["options"]) from error
        return "info", self._driver.info

    def _load(self, folder: Path, version: int | None) -> tuple[str, Any]:
        self._driver.weights.load(Checkpoint(folder), version=version)
        return self._weights()

    def _prepare(self, folder: Path, version: int) -> tuple[str, Any]:
        return "done", self._driver.weights.prepare(Checkpoint(folder), version=version)

    def _commit(self) -> tuple[str, Any]:
        self._driver.weights.commit()
        return self._weights()

    def _put_back(self, reason: str) -> tuple[str, Any]:
        self._driver.weights.put_back(reason)
        return self._weights()

    def _drop_prepared(self) -> tuple[str, Any]:
        self._driver.weights.drop_prepared()
        return "done", None

    def _started_with(self, folder: Path, version: int) -> tuple[str, Any]:
        self._driver.weights.started_with(Checkpoint(folder), version)
        return self._weights()

    def _weights(self) -> tuple[str, Any]:
        return "done", (self._driver.weights.version, self._driver.weights.folder)

    def _next_version(self, version: int | None) -> tuple[str, Any]:
        return "done", self._driver.weights.next_version(version)

    def _lm_head(self, folder: Path) -> tuple[str, Any]:
        parts = self._driver.write_head(str(folder))
        return "done", (self._driver.weights.version, parts)

    def _sleep(self) -> tuple[str, Any]:
        return "done", self._driver.weights.sleep()

    def _wake_up(self) -> tuple[str, Any]:
        self._driver.weights.wake_up()
        return "done", None

    def _score_alone(self, requests: Packed, share_prefix: bool) -> tuple[str, Any]:
        results = drive(self._driver, unpack(ScoreRequest, requests), share_prefix=share_prefix)
        return "results", (range(len(results)), pack(results))

    def _step(self) -> None:
        finished = defaultdict(list)
        try:
            for (call_id, n), result in self._driver.step():
                if call_id not in self._calls:
                    continue  # another request of this call failed
                if isinstance(result, Exception):
                    self._answer(call_id, "error", result)
                    self._dispatch(call_id, "cancel", None)
                    finished.pop(call_id, None)
                    continue
                finished[call_id].append((n, result))
                self._calls[call_id].remove(n)
        except Exception as error:
            # The engine's state is unknown, so the process ends.
            for call_id in self._calls:
                self._answer(call_id, "error", _as_answer(error))
            raise
        for call_id, results in finished.items():
            numbers, carriers = zip(*results, strict=True)
            self._answer(call_id, "results", (numbers, pack(carriers)))
            if not self._calls[call_id]:
                del self._calls[call_id]
        if time.monotonic() > self._last_sent + _SIGN_OF_LIFE_S:
            self._answer(_NO_CALL, "alive", None)

    def _answer(self, call_id: int, kind: str, body: Any) -> None:
        self._last_sent = time.monotonic()
        self._connection.send_bytes(pickle.dumps((call_id, kind, body), protocol=pickle.HIGHEST_PROTOCOL))


def main(fd: int, owner_pid: int) -> None:
    end_with_owner(owner_pid, _kill_group)
    server = _Server(Connection(fd))
    try:
        server.run()
    except (EOFError, OSError):
        # The owner closed the connection. If it was killed, its other files are closed a moment later.
        time.sleep(0.2)
        remove_orphans()
        server.leave()
    except BaseException:
        traceback.print_exc()  # now: this process is killed below
    finally:
        sys.stderr.flush()
        remove_orphans()
        _kill_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
