"""The main program of an owned engine's process: ``python -m vllm_kl.engines._child FD OWNER_PID``.

Reads ``(call_id, message)`` from the connection, answers ``(call_id, ok, result or exception)``. The first message
starts the engine. It ends with its owner; see :mod:`vllm_kl.engines.process`.
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


def main(fd: int, owner_pid: int) -> None:
    _end_with_owner(owner_pid)
    connection = Connection(fd)
    engine: Any = None
    while True:
        try:
            call_id, message = connection.recv()
        except EOFError:
            break
        try:
            if engine is None:
                from vllm_kl.engines.local import start

                engine = start(**message)
                answer = engine.info
            else:
                answer = engine.score(**message)
            reply = (call_id, True, answer)
        except Exception as error:
            reply = (call_id, False, _as_answer(error))
        try:
            connection.send_bytes(pickle.dumps(reply))
        except OSError:
            break
    # vLLM's own processes, if it started any, are in this group.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
