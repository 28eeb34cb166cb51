"""The main program of an owned engine's process: ``python -m vllm_kl.engines._child FD OWNER_PID``.

Reads ``(call_id, kind, body)`` from the connection: "start" once, then "score" and "cancel". Answers with the same triple:
"info", "results" of every step that finished some, or "error". It ends with its owner; see
:mod:`vllm_kl.engines.process`.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from vllm_kl.errors import EngineError, VLLMKLError


def _end_with_owner(owner_pid: int, interval_s: float = 0.5) -> None:
    """Kill this process group as soon as the owner is gone, however it went.

    Polls the parent's id: it needs no file descriptor that a fork of the owner could keep open, and unlike
    ``PR_SET_PDEATHSIG`` it does not fire when only the owner's starting thread ends.
    """

    def watch() -> None:
        while os.getppid() == owner_pid:
            time.sleep(interval_s)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="vllm_kl-owner-watch", daemon=True).start()


def _as_answer(error: Exception) -> Exception:
    """Return an exception that the owner can unpickle and that tells what happened."""
    if isinstance(error, VLLMKLError):
        return error
    text = "".join(traceback.format_exception_only(error)).strip()
    print("".join(traceback.format_exception(error)), file=sys.stderr)
    return EngineError(f"vLLM failed: {text}")


class _Call:
    """A call that is being served: what is left of it, and what the last steps finished."""

    def __init__(self, num_requests: int) -> None:
        self.num_left = num_requests
        self.finished: list[tuple[int, Any]] = []


class _Server:
    """Serves one connection: takes calls between the steps of the engine, so that concurrent callers share batches."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._driver: Any = None
        self._calls: dict[int, _Call] = {}

    def run(self) -> None:
        while True:
            while self._connection.poll(0 if self._calls else None):
                self._take(*self._connection.recv())
            self._step()

    def _take(self, call_id: int, kind: str, body: Any) -> None:
        if kind == "start":
            from vllm_kl.engines.local import start

            try:
                self._driver = start(**body)
            except Exception as error:
                self._answer(call_id, "error", _as_answer(error))
            else:
                self._answer(call_id, "info", self._driver.info)
        elif kind == "score":
            self._calls[call_id] = _Call(len(body["requests"]))
            for n, request in enumerate(body["requests"]):
                self._driver.submit((call_id, n), request, share_prefix=body["share_prefix"])
        elif self._calls.pop(call_id, None):  # "cancel"
            self._driver.cancel([(call_id, n) for n in range(body)])

    def _step(self) -> None:
        try:
            for (call_id, n), result in self._driver.step():
                self._calls[call_id].finished.append((n, result))
        except Exception as error:
            # The engine's state is unknown: nobody may use it again.
            for call_id in self._calls:
                self._answer(call_id, "error", _as_answer(error))
            raise
        for call_id, call in list(self._calls.items()):
            if call.finished:
                call.num_left -= len(call.finished)
                self._answer(call_id, "results", call.finished)
                call.finished = []
            if not call.num_left:
                del self._calls[call_id]

    def _answer(self, call_id: int, kind: str, body: Any) -> None:
        self._connection.send_bytes(pickle.dumps((call_id, kind, body), protocol=pickle.HIGHEST_PROTOCOL))


def main(fd: int, owner_pid: int) -> None:
    _end_with_owner(owner_pid)
    try:
        _Server(Connection(fd)).run()
    except (EOFError, OSError):
        pass  # the owner closed the connection
    finally:
        # vLLM's own processes, if it started any, are in this group.
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
