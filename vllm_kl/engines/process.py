"""Runs an engine that the scorer owns in a child process.

The caller's process never imports vLLM: vLLM's start-up, threads and side effects stay in the child, and the
caller's interpreter is free while the engine works. The child is started as a command. It is neither forked
nor spawned by ``multiprocessing``, so a script needs no ``if __name__ == "__main__"``.

The child leads its own process group, which holds every process that vLLM starts. The group ends

- when :meth:`ProcessEngine.close` is called, or the owner exits or raises (``weakref.finalize``);
- when the owner is killed, also by SIGKILL: within a second the child notices that its parent has changed,
  and kills its group (:mod:`vllm_kl.engines._child`);
- when the child dies: the owner kills the group.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import pickle
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from vllm_kl import lifetime
from vllm_kl.engines.devices import Devices, device_environment, has_gpu
from vllm_kl.engines.start_failures import with_log
from vllm_kl.engines.wire_format import pack, unpack
from vllm_kl.environment import ON_A_CPU
from vllm_kl.errors import EngineError, ReadoutUnavailableError, VLLMKLError, WeightsError
from vllm_kl.lifetime import kill_group
from vllm_kl.plugin.head_files import read
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult
from vllm_kl.weights.checkpoint import Checkpoint, InitialCheckpoint, Skeleton, complete, new_folder
from vllm_kl.weights.loading import NeedsNewEngineError

logger = logging.getLogger("vllm_kl")

# The child is silent longest while it starts: it reads a checkpoint, perhaps over a network.
TIMEOUT_S = 3600.0


def _environment(options: dict[str, Any]) -> dict[str, str]:
    """Return the defaults of the child's environment. Variables of the caller's environment win over them."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the child itself, not in another process
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    is_cpu = not has_gpu()
    num_workers = int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))
    if is_cpu:
        environment |= ON_A_CPU
    if is_cpu and options.get("enforce_eager", True):
        # vLLM compiles its computation of ranks even in eager mode: this takes 20 s at the first request, and
        # needs a C++ compiler (v1/sample/ops/logprobs.py, 0.32). A scorer uses no ranks. PyTorch reads the
        # variable at import.
        environment["TORCH_COMPILE_DISABLE"] = "1"
    if is_cpu and num_workers > 1:
        # vLLM's own binding reserves cores. On a small machine some workers would have none.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_workers))
    return environment


def _shows_log() -> bool:
    """Whether the user wants to see the engine's log: vLLM's own variable sets a level below WARNING."""
    return os.environ.get("VLLM_LOGGING_LEVEL", "").upper() in ("DEBUG", "INFO")


def engine_settings(
    checkpoint: InitialCheckpoint, readout: str, options: Mapping[str, Any], lora_request: Any
) -> dict[str, Any]:
    """Return what decides the numbers of an engine, by the names of the scorer's arguments."""
    model = checkpoint.model
    return {
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "the model's files": checkpoint.written,
        "readout": readout,
        "lora_request": None if lora_request is None else (lora_request.lora_name, lora_request.lora_path),
        **options,
    }


class ProcessEngine:
    """A vLLM engine in a child process. Several threads may call it at a time; their requests share batches.

    The arguments and errors are those of :class:`~vllm_kl.VLLMScorer`. The child chooses the read-out for
    "auto".
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
        checkpoint = InitialCheckpoint(model)
        start = {"readout": readout, "options": options, "lora_request": lora_request}
        self._child_options = {
            "start": start,
            "timeout_s": timeout_s,
            "environment": device_environment(devices, options),
        }
        self._child = _Child(model, **self._child_options)
        self.info = self._child.info
        self.settings = engine_settings(checkpoint, self.info.readout, options, lora_request)
        self.weights = _OwnedWeights(self, model, options, checkpoint)

    @property
    def pid(self) -> int:
        """The process id of the child, and the id of the group with all of vLLM's processes."""
        return self._child.process.pid

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: Callable[[int], None] | None = None,
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

    def read_head(self) -> tuple[torch.Tensor, float, int]:
        vocab_size, hidden_size = self.info.vocab_size, self.info.hidden_size
        if vocab_size is None or hidden_size is None:
            raise ReadoutUnavailableError(f"the read-out {self.info.readout!r} cannot return the LM head")
        folder = new_folder(4 * vocab_size * hidden_size)
        try:
            version, told = self.ask("lm head", folder=folder)
            parts = sorted(part for part in told if part is not None)
            for kind, *rest in parts:
                if kind == "no matrix":
                    raise ReadoutUnavailableError(
                        f"the model's logits are not hidden states times a matrix: {rest[0]}"
                    )
                if kind == "failed":
                    raise EngineError(
                        f"the LM head could not be written to {folder}: {rest[0]}. Make room there"
                    )
            for _, _, _, file, *_ in parts:
                if not Path(file).exists():
                    raise EngineError(f"{file} is not there: its worker runs on another machine")
            shards = [
                read(file, dtype, num_tokens, hidden_size)
                for _, _, _, file, dtype, num_tokens in parts
                if num_tokens  # 0: the vocabulary is so small that a worker's shard is empty
            ]
        finally:
            lifetime.remove(folder)
        return shards[0] if len(shards) == 1 else torch.cat(shards), parts[0][2], version

    @property
    def is_open(self) -> bool:
        """Whether the child lives."""
        return self._child.is_alive

    def close(self) -> None:
        self._child.end()
        self.weights.release()

    def ask(self, kind: str, **body: Any) -> Any:
        """Make a call that has one answer; return the answer."""
        with self._child.call(kind, body) as answers:
            return next(answers)

    def start_beside(self, checkpoint: Checkpoint, model: str, version: int) -> _Child:
        """Return a new child that has a checkpoint. The serving child goes on, so both need their memory.

        Raises:
            WeightsError, EngineError: the new child did not start.
        """
        child = _Child(str(complete(checkpoint.folder, model)), **self._child_options)
        try:
            with child.call("started with", {"folder": checkpoint.folder, "version": version}) as answers:
                next(answers)
        except BaseException:
            child.end()
            raise
        return child

    def serve_with(self, child: _Child) -> _Child:
        """Let another child serve; return the old one, which ends with the last reference to it.

        Its running calls hold such references.
        """
        old, self._child, self.info = self._child, child, child.info
        return old


class _Child:
    """A child process with an engine, and its calls. It ends when this object is garbage-collected.

    Raises:
        EngineError, OptionError, ...: the engine did not start; see :class:`ProcessEngine`.
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
                start_new_session=True,  # its own process group, which Ctrl-C in a terminal does not reach
            )
            undo.callback(self.process.kill)
            self._calls = _Calls(Connection(os.dup(ours.fileno())), timeout_s)
            self._why_ended = "the engine was closed during the call"
            self._owner_pid = os.getpid()
            self._finalizer = weakref.finalize(self, _end, self.process, ours, self._log, self._owner_pid)
            undo.pop_all()
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
        """Send a call; yield an iterator of its answers. A call that raises is cancelled."""
        if os.getpid() != self._owner_pid:
            raise EngineError(
                "the engine belongs to the process that started it, not to a fork: make a new VLLMScorer in "
                "the fork"
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
    """The weights of the engine in the child.

    The checkpoint that was pushed last stays in shared memory: if the next push fails, the child loads it
    again.

    The child knows which weights serve. ``_served`` is the child's last answer. It is forgotten when a push
    fails, or is interrupted in this process while the child goes on.
    """

    def __init__(
        self, engine: ProcessEngine, model: str, options: dict[str, Any], start: InitialCheckpoint
    ) -> None:
        self._engine = weakref.proxy(engine)
        self._model = model
        self._start = start
        self._options = options
        self._kept: list[Checkpoint] = []  # the child may serve any of these
        self._last = 0  # the last version that was known to serve
        # Version and folder of the weights that serve (folder None: the model's own); None: the child must be
        # asked.
        self._served: tuple[int, str | None] | None = (0, None)
        # A child that is not serving: of prepared weights, or of those before a commit.
        self._beside: _Child | None = None
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
                    with contextlib.suppress(WeightsError):  # if no answer comes, both checkpoints are kept
                        self._settle(self._ask("weights"))
                raise

    def _load(self, checkpoint: Checkpoint, version: int | None) -> tuple[int, str | None]:
        try:
            return self._ask("load", folder=checkpoint.folder, version=version)
        except NeedsNewEngineError as error:
            version = self.next_version(version)
            self._engine.serve_with(self._start_beside(checkpoint, version, error))
            return version, str(checkpoint.folder)

    def _start_beside(self, checkpoint: Checkpoint, version: int, why: NeedsNewEngineError) -> _Child:
        began = time.perf_counter()
        try:
            child = self._engine.start_beside(checkpoint, self._model, version)
        except VLLMKLError as second:
            raise WeightsError(
                f"the running engine cannot load these weights ({why.reason}), and a new engine does "
                f"not start with them ({second}). The old weights go on serving"
            ) from second
        logger.warning(
            "vllm_kl: version %d is served by a new engine, which started in %.1f s. The running engine "
            "could not load the weights: %s",
            version,
            time.perf_counter() - began,
            why.reason,
        )
        return child

    def prepare(self, checkpoint: Checkpoint, version: int) -> None:
        """Get ready to serve a checkpoint. :meth:`commit` lets it serve, :meth:`put_back` undoes that.

        :meth:`drop_prepared` ends both.

        Raises:
            WeightsError: it cannot be loaded. The old weights go on serving.
        """
        with self._lock:
            self._kept.append(checkpoint)
            self._beside = None
            try:
                self._ask("prepare", folder=checkpoint.folder, version=version)
            except NeedsNewEngineError as error:
                self._beside = self._start_beside(checkpoint, version, error)

    def commit(self) -> None:
        """Serve what :meth:`prepare` got ready."""
        with self._lock:
            self._served = None
            if self._beside is None:
                self._served = self._ask("commit")
            else:
                self._beside = self._engine.serve_with(self._beside)

    def put_back(self, reason: str) -> None:
        """Serve what served before :meth:`commit`."""
        with self._lock:
            self._served = None
            if self._beside is None:
                self._served = self._ask("put back", reason=reason)
            else:
                self._beside = self._engine.serve_with(self._beside)

    def drop_prepared(self) -> None:
        """Forget what does not serve."""
        with self._lock:
            self._beside = None
            self._ask("drop prepared")
            self._settle(self._ask("weights"))

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
                f"{error}\nNo engine serves any more; version {self._last} was the last"
            ) from error

    def release(self) -> None:
        """Free the memory of the pushed checkpoints."""
        for checkpoint in self._kept:
            checkpoint.delete()

    def sleep(self) -> bool:
        return self._engine.ask("sleep")

    def wake_up(self) -> None:
        self._engine.ask("wake_up")


class _OverError(Exception):
    """The connection is closed, by this process or by the child."""


class _SilentError(Exception):
    """The child has sent nothing for too long. The argument is the limit in seconds."""


class _Calls:
    """The calls of all threads over one connection.

    One thread writes all messages to the child, so Ctrl-C in a caller never breaks a message. Another thread
    reads the answers into one queue per call; each caller waits for its own queue. The child sends a sign of
    life every second while it works, so a caller can tell a slow answer from a dead child.
    """

    def __init__(self, connection: Connection, timeout_s: float | None) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._heard = time.monotonic()
        self._ids = itertools.count()
        self._queues: dict[int, queue.SimpleQueue] = {}
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._is_over = False
        # The threads hold no reference to the engine, so it ends when the last user drops it.
        threading.Thread(target=self._write, name="vllm_kl-calls", daemon=True).start()
        threading.Thread(target=self._read, name="vllm_kl-answers", daemon=True).start()

    def begin(self, kind: str, body: Any) -> int:
        call_id = next(self._ids)
        self._queues[call_id] = queue.SimpleQueue()
        if self._is_over:
            raise _OverError
        self._heard = time.monotonic()  # begin the timeout anew: an idle child sends nothing
        self._send(call_id, kind, body)
        return call_id

    def answers(self, call_id: int) -> Iterator[Any]:
        """Yield the bodies of the call's answers; raise an answer that is an error."""
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
        with contextlib.suppress(OSError):  # the child is gone: the reading thread tells all callers
            while (data := self._outbox.get()) is not None:
                self._connection.send_bytes(data)

    def _read(self) -> None:
        try:
            while True:
                call_id, *answer = self._connection.recv()
                self._heard = time.monotonic()
                waiting = self._queues.get(call_id)
                if waiting is not None:  # None: the caller has left
                    waiting.put(answer)
        except (EOFError, OSError):
            pass
        finally:
            self._is_over = True
            self._outbox.put(None)
            for waiting in list(self._queues.values()):
                waiting.put(("over", None))


def _end(process: subprocess.Popen, ours: socket.socket, log: Path, owner_pid: int) -> None:
    """End the engine's process group, if need be by SIGKILL. Does nothing in a fork of the owner."""
    if os.getpid() != owner_pid:
        return
    try:
        _shut_down(ours)
        ours.close()
        _wait(process, timeout=3.0)
    finally:  # also if Ctrl-C ends the wait: this function is not called again
        kill_group(process.pid)  # all processes that are left in it
        log.unlink(missing_ok=True)
        _wait(process, timeout=5.0)


def _shut_down(ours: socket.socket) -> None:
    """Shut the connection down: the child exits, and callers that wait get an error."""
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_RDWR)


def _wait(process: subprocess.Popen, *, timeout: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout)
    return None
