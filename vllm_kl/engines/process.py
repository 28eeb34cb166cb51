"""An engine that the scorer owns, in a process of its own.

The caller's process never imports vLLM: its start-up, its threads and its side effects stay in the child, and
the caller's interpreter is free while the engine works. The child is started by command, not forked and not
spawned by ``multiprocessing``, so a script needs no ``if __name__ == "__main__"``.

Life and death: the child leads a process group of its own, which holds every process vLLM starts. The group
ends

- when :meth:`ProcessEngine.close` is called, or the owner exits or raises (``weakref.finalize``); - when the
owner is killed, SIGKILL included: the child notices within a second that its parent changed and kills its
  group (:mod:`vllm_kl.engines._child`);
- when the child dies while the owner lives: the owner kills the group.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_kl.engines.base import OnDone
from vllm_kl.engines.devices import Devices, has_gpu, seeing
from vllm_kl.engines.failures import with_log
from vllm_kl.engines.packed import pack, unpack
from vllm_kl.errors import EngineError, VLLMKLError, WeightsError
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult
from vllm_kl.weights.checkpoint import Checkpoint, Skeleton, Start, complete
from vllm_kl.weights.loading import NeedsNewEngineError

logger = logging.getLogger("vllm_kl")

# A start reads a checkpoint, perhaps over a network; nothing else is silent for so long.
TIMEOUT_S = 3600.0


def _environment(options: dict[str, Any]) -> dict[str, str]:
    """Defaults of the child's environment; whatever the caller's environment sets wins."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the child is the process of its own: no second and third one
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    is_cpu = not has_gpu()
    if is_cpu:
        environment["THP_MEM_ALLOC_ENABLE"] = (
            "1"  # PyTorch's, read when it is imported: huge pages for what is large
        )
    if is_cpu and options.get("enforce_eager", True):
        # vLLM compiles its rank count even in eager mode: 20 s at the first request, and only with a C++
        # compiler (v1/sample/ops/logprobs.py, 0.32). Ranks are not used here. torch reads this when it is
        # imported.
        environment["TORCH_COMPILE_DISABLE"] = "1"
    num_workers = int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))
    if is_cpu and num_workers > 1:
        # vLLM's own binding keeps cores back, which on a small machine leaves workers without any.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_workers))
    return environment


def _shows_log() -> bool:
    """Whether the engine's log was asked for: vLLM's own variable, at a level that says more than its default here."""
    return os.environ.get("VLLM_LOGGING_LEVEL", "").upper() in ("DEBUG", "INFO")


class ProcessEngine:
    """A vLLM engine in a child process. Safe to call from several threads: concurrent calls share its
    batches.

    What it takes and raises is what :class:`~vllm_kl.VLLMScorer` does; the child decides what
    ``readout="auto"`` is.
    """

    info: EngineInfo

    def __init__(
        self,
        model: str,
        *,
        readout: str,
        options: dict[str, Any],
        lora_request: Any = None,
        timeout_s: float | None = TIMEOUT_S,
        devices: Devices | None = None,
    ) -> None:
        checkpoint = Start(model)
        start = {"readout": readout, "options": options, "lora_request": lora_request}
        self._how = {"start": start, "timeout_s": timeout_s, "environment": seeing(devices, options)}
        self._child = _Child(model, **self._how)
        self.info = self._child.info
        self.weights = _OwnedWeights(self, model, options, checkpoint)

    @property
    def pid(self) -> int:
        """The child's process id, and the id of the process group that holds all of vLLM's processes."""
        return self._child.process.pid

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: OnDone | None = None,
        alone: bool = False,
    ) -> list[ScoreResult]:
        results: dict[int, ScoreResult] = {}
        body = {"requests": pack(requests), "share_prefix": share_prefix}
        with self._child.call("score alone" if alone else "score", body) as answers:
            while len(results) < len(requests):
                numbers, finished = next(answers)
                results.update(zip(numbers, unpack(ScoreResult, finished), strict=True))
                if on_done is not None:
                    on_done(len(numbers))
        return [results[n] for n in range(len(requests))]

    @property
    def is_open(self) -> bool:
        """Whether the child lives."""
        return self._child.is_alive

    def close(self) -> None:
        self._child.end()
        self.weights.release()

    def ask(self, kind: str, **body: Any) -> Any:
        """Make a call that the child answers once."""
        with self._child.call(kind, body) as answers:
            return next(answers)

    def start_anew(self, checkpoint: Checkpoint, model: str, version: int) -> None:
        """Serve a checkpoint by a new child, started with it; what the old one was asked it still answers.

        Until the new child is ready the old one serves, so both need their memory for a moment.

        Raises:
            WeightsError, EngineError: the new child did not start; the old one goes on.
        """
        child = _Child(str(complete(checkpoint.folder, model)), **self._how)
        try:
            with child.call("started with", {"folder": checkpoint.folder, "version": version}) as answers:
                next(answers)
        except BaseException:
            child.end()
            raise
        # The old one ends when the last call that it still answers has ended.
        self._child, self.info = child, child.info


class _Child:
    """A child process with an engine, and the calls to it. It ends when nobody holds this object any more.

    Raises:
        EngineError and others: the engine did not start; see :class:`ProcessEngine`.
    """

    def __init__(
        self, model: str, *, start: dict[str, Any], timeout_s: float | None, environment: dict[str, str]
    ) -> None:
        ours, theirs = socket.socketpair()
        with (
            contextlib.ExitStack() as undo,
            theirs,
            tempfile.NamedTemporaryFile(prefix="vllm_kl_engine_", suffix=".log", delete=False) as log,
        ):
            self._log = Path(log.name)
            undo.callback(ours.close)
            undo.callback(self._log.unlink)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm_kl.engines._child", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2 if _shows_log() else log,
                stderr=2 if _shows_log() else log,
                env={**_environment(start["options"]), **os.environ, **environment},
                start_new_session=True,  # the group; and Ctrl-C in a terminal stays with the caller
            )
            undo.pop_all()
        self._calls = _Calls(Connection(os.dup(ours.fileno())), timeout_s)
        self._why_ended = "the engine was closed during the call"
        self._owner_pid = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self.process, ours, self._log, self._owner_pid)
        try:
            with self.call("start", {"model": model, **start}) as answers:
                self.info: EngineInfo = next(answers)
        except BaseException as error:
            log = self._read_log()
            self.end()
            if isinstance(error, EngineError):
                raise EngineError(with_log(str(error), log)) from error
            raise

    @property
    def is_alive(self) -> bool:
        return self._finalizer.alive

    def end(self) -> None:
        """End the process group. Safe to call twice."""
        self._finalizer()

    @contextlib.contextmanager
    def call(self, kind: str, body: Any) -> Iterator[Iterator[Any]]:
        """Send a call; give its answers as they come. A call that is left early is cancelled."""
        if os.getpid() != self._owner_pid:
            raise EngineError(
                "the engine belongs to the process that started it, not to a fork: make one here"
            )
        if not self._finalizer.alive:
            raise EngineError("the engine is closed: make a new VLLMScorer")
        try:
            call_id = self._calls.begin(kind, body)
            try:
                yield self._calls.answers(call_id)
            except BaseException:
                self._calls.cancel(call_id)
                raise
            finally:
                self._calls.end(call_id)
        except (_OverError, _SilentError) as error:
            if not self._finalizer.alive:
                raise EngineError(self._why_ended) from error
            if isinstance(error, _SilentError):
                self._why_ended = f"the engine gave no sign of life for {error} s (timeout_s), and was ended"
            else:
                self._why_ended = f"the engine process died (exit status {_wait(self.process, timeout=5.0)})"
            log = self._read_log()
            self.end()
            raise EngineError(with_log(self._why_ended, log)) from error

    def _read_log(self) -> str:
        with contextlib.suppress(OSError):
            return self._log.read_text(errors="replace")
        return ""


class _OwnedWeights:
    """The weights of the engine in the child. What was pushed is kept, in shared memory: a push that fails is
    taken back.

    The child knows what serves. Its last answer is good until a push fails, or is interrupted here while the
    child goes on.
    """

    def __init__(self, engine: ProcessEngine, model: str, options: dict[str, Any], start: Start) -> None:
        self._engine = weakref.proxy(engine)
        self._model = model
        self._start = start
        self._options = options
        self._kept: list[Checkpoint] = []  # each may be what the child serves
        self._last = 0
        self._served: tuple[int, str | None] | None = (
            0,
            None,
        )  # version and folder; None: the child must be asked
        self._lock = threading.Lock()

    @functools.cached_property
    def skeleton(self) -> Skeleton:
        return Skeleton(
            self._model,
            revision=self._options.get("revision"),
            trust_remote_code=self._options.get("trust_remote_code", False),
            hf_overrides=self._options.get("hf_overrides"),
        )

    @property
    def version(self) -> int:
        return self._ask_if_unsure()[0]

    @property
    def source(self) -> str:
        return self._ask_if_unsure()[1] or self._start.unchanged()

    def next_version(self, version: int | None = None) -> int:
        return self._ask("next version", version=version)

    def load(self, checkpoint: Checkpoint, *, version: int | None = None) -> int:
        with self._lock:
            self._kept.append(checkpoint)
            try:
                return self._settle(self._load(checkpoint, version))[0]
            except BaseException as error:
                self._served = None
                if isinstance(error, WeightsError):
                    with contextlib.suppress(WeightsError):  # not known: then either may be what serves
                        self._settle(self._ask("weights"))
                raise

    def _load(self, checkpoint: Checkpoint, version: int | None) -> tuple[int, str | None]:
        try:
            return self._ask("load", folder=checkpoint.folder, version=version)
        except NeedsNewEngineError as error:
            version = self.next_version(version)
            began = time.perf_counter()
            try:
                self._engine.start_anew(checkpoint, self._model, version)
            except VLLMKLError as second:
                raise WeightsError(
                    f"the running engine cannot take these weights over ({error.reason}), and none starts "
                    f"with them ({second}). The old weights go on serving"
                ) from second
            logger.warning(
                "vllm_kl: version %d is served by an engine that was started for it, in %.1f s. The running "
                "one could not take the weights over: %s",
                version,
                time.perf_counter() - began,
                error.reason,
            )
            return version, str(checkpoint.folder)

    def _ask_if_unsure(self) -> tuple[int, str | None]:
        if (served := self._served) is not None:
            return served
        with self._lock:
            return self._settle(self._ask("weights"))

    def _settle(self, served: tuple[int, str | None]) -> tuple[int, str | None]:
        self._last, folder = self._served = served
        self._kept = [checkpoint for checkpoint in self._kept if str(checkpoint.folder) == folder]
        return served

    def _ask(self, kind: str, **body: Any) -> Any:
        try:
            return self._engine.ask(kind, **body)
        except EngineError as error:
            if self._engine.is_open:
                raise
            raise EngineError(
                f"{error}\nNothing serves any more; the last that did was version {self._last}"
            ) from error

    def release(self) -> None:
        """Give back the memory of what was pushed."""
        for checkpoint in self._kept:
            checkpoint.delete()

    def sleep(self) -> bool:
        return self._engine.ask("sleep")

    def wake_up(self) -> None:
        self._engine.ask("wake_up")


class _OverError(Exception):
    """The connection is closed, at this end or at the other."""


class _SilentError(Exception):
    """The child has not been heard of for too long; how long, in seconds."""


class _Calls:
    """Many callers' calls over one connection. One thread sends, another reads the answers; each caller waits
    for its own.

    A caller that is interrupted (Ctrl-C) interrupts no message. While the child works it says so every
    second, so a caller whose answer takes long is told apart from one that waits in vain.
    """

    def __init__(self, connection: Connection, timeout_s: float | None) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._heard = time.monotonic()
        self._ids = itertools.count()
        self._queues: dict[int, queue.SimpleQueue] = {}
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._is_over = False
        # They hold no reference to the engine, so an engine that is dropped is ended.
        threading.Thread(target=self._write, name="vllm_kl-calls", daemon=True).start()
        threading.Thread(target=self._read, name="vllm_kl-answers", daemon=True).start()

    def begin(self, kind: str, body: Any) -> int:
        call_id = next(self._ids)
        self._queues[call_id] = queue.SimpleQueue()
        if self._is_over:
            raise _OverError
        self._heard = time.monotonic()  # an idle child says nothing
        self._send(call_id, kind, body)
        return call_id

    def answers(self, call_id: int) -> Iterator[Any]:
        """Yield the bodies of the call's answers; raise the error among them."""
        while True:
            kind, body = self._answer(call_id)
            if kind == "over":
                raise _OverError
            if kind == "error":
                raise body
            yield body

    def _answer(self, call_id: int) -> tuple[str, Any]:
        while True:
            left = None if self._timeout_s is None else self._heard + self._timeout_s - time.monotonic()
            try:
                return self._queues[call_id].get(timeout=left and max(left, 0.01))
            except queue.Empty:
                if time.monotonic() > self._heard + self._timeout_s:
                    raise _SilentError(f"{self._timeout_s:g}") from None

    def cancel(self, call_id: int) -> None:
        self._send(call_id, "cancel", None)

    def end(self, call_id: int) -> None:
        self._queues.pop(call_id, None)

    def _send(self, call_id: int, kind: str, body: Any) -> None:
        self._outbox.put(pickle.dumps((call_id, kind, body), protocol=pickle.HIGHEST_PROTOCOL))

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the child is gone: who reads tells all callers
            while (data := self._outbox.get()) is not None:
                self._connection.send_bytes(data)

    def _read(self) -> None:
        try:
            while True:
                call_id, *answer = self._connection.recv()
                self._heard = time.monotonic()
                waiting = self._queues.get(call_id)
                if waiting is not None:  # else nobody waits for it any more
                    waiting.put(answer)
        except (EOFError, OSError):
            pass
        finally:
            self._is_over = True
            self._outbox.put(None)
            for waiting in list(self._queues.values()):
                waiting.put(("over", None))


def _end(process: subprocess.Popen, ours: socket.socket, log: Path, owner_pid: int) -> None:
    """End the engine's whole process group: politely, then by force. A fork of the owner leaves it alone."""
    if os.getpid() != owner_pid:
        return
    _shut_down(ours)
    ours.close()
    _wait(process, timeout=3.0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # whatever is left of the group, the child included
    _wait(process, timeout=5.0)
    log.unlink(missing_ok=True)


def _shut_down(ours: socket.socket) -> None:
    """Both ends see the end of their input: the child exits, waiting callers are told."""
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_RDWR)


def _wait(process: subprocess.Popen, *, timeout: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout)
    return None
