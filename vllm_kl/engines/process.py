"""An engine that the scorer owns, in a process of its own.

The caller's process never imports vLLM: its start-up, its threads and its side effects stay in the child, and the
caller's interpreter is free while the engine works. The child is started by command, not forked and not spawned by
``multiprocessing``, so a script needs no ``if __name__ == "__main__"``.

Life and death: the child leads a process group of its own, which holds every process vLLM starts. The group ends

- when :meth:`ProcessEngine.close` is called, or the owner exits or raises (``weakref.finalize``);
- when the owner is killed, SIGKILL included: the child notices within a second that its parent changed and kills its
  group (:mod:`vllm_kl.engines._child`);
- when the child dies while the owner lives: the owner kills the group.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from vllm_kl.errors import EngineError
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult


def _environment(options: dict[str, Any]) -> dict[str, str]:
    """Defaults of the child's environment; whatever the caller's environment sets wins."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the child is the process of its own: no second and third one
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if not torch.cuda.is_available() and options.get("enforce_eager", True):
        # vLLM compiles its rank count even in eager mode: 20 s at the first request, and only with a C++ compiler
        # (v1/sample/ops/logprobs.py, 0.32). Ranks are not used here. torch reads this when it is imported.
        environment["TORCH_COMPILE_DISABLE"] = "1"
    return environment


class ProcessEngine:
    """A vLLM engine in a child process. Safe to call from several threads; calls are served one after the other.

    Args:
        model: path or name of the model.
        readout: as :class:`~vllm_kl.VLLMScorer` takes it; the child decides what ``"auto"`` is.
        options: vLLM's engine options by their own names; unknown ones are refused.

    Raises:
        OptionError: an engine option does not exist.
        ReadoutUnavailableError: the engine cannot do this read-out.
        EngineError: the engine did not start; with the end of its log.
    """

    info: EngineInfo

    def __init__(self, model: str, *, readout: str, options: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        with theirs, tempfile.NamedTemporaryFile(prefix="vllm_kl_engine_", suffix=".log", delete=False) as log:
            self._log = Path(log.name)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_kl.engines._child", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_environment(options), **os.environ},
                start_new_session=True,  # the group; and Ctrl-C in a terminal stays with the caller
            )
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        self._call_ids = itertools.count()
        self._owner_pid = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection, self._log, self._owner_pid)
        try:
            self.info = self._call({"model": model, "readout": readout, "options": options})
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The child's process id, and the id of the process group that holds all of vLLM's processes."""
        return self._process.pid

    def score(self, requests: Sequence[ScoreRequest], *, share_prefix: bool) -> list[ScoreResult]:
        return self._call({"requests": list(requests), "share_prefix": share_prefix})

    def close(self) -> None:
        self._finalizer()

    def _call(self, message: dict[str, Any]) -> Any:
        if os.getpid() != self._owner_pid:
            raise EngineError("the engine belongs to the process that started it, not to a fork: make one here")
        with self._lock:
            if not self._finalizer.alive:
                raise EngineError("the engine is closed: make a new VLLMScorer")
            call_id = next(self._call_ids)
            try:
                self._send((call_id, message))
                while True:
                    self._connection.poll(None)  # where an interrupt (Ctrl-C) does no harm
                    answered_id, ok, answer = self._receive()
                    # A call that was interrupted leaves its answer behind: drop it.
                    if answered_id == call_id:
                        break
            except (EOFError, OSError) as error:
                tail = self._log_tail()
                code = _wait(self._process, timeout=5.0)
                self.close()
                raise EngineError(
                    f"the engine process died (exit status {code}). The end of its log:\n{tail}"
                ) from error
        if not ok:
            raise answer
        return answer

    def _send(self, message: Any) -> None:
        with self._whole_message():
            self._connection.send(message)

    def _receive(self) -> Any:
        with self._whole_message():
            return self._connection.recv()

    @contextlib.contextmanager
    def _whole_message(self) -> Iterator[None]:
        """Close the engine if a message is interrupted halfway: nobody could tell where the next one begins."""
        try:
            yield
        except (EOFError, OSError):
            raise
        except BaseException:
            self.close()
            raise

    def _log_tail(self, lines: int = 25) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
        return "(no log)"


def _end(process: subprocess.Popen, connection: Connection, log: Path, owner_pid: int) -> None:
    """End the engine's whole process group: politely, then by force. A fork of the owner leaves it alone."""
    if os.getpid() != owner_pid:
        return
    connection.close()  # the child sees the end of its input and exits
    _wait(process, timeout=3.0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # whatever is left of the group, the child included
    _wait(process, timeout=5.0)
    log.unlink(missing_ok=True)


def _wait(process: subprocess.Popen, *, timeout: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout)
    return None
