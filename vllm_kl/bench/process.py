"""Runs a provider in a process of its own, so that none shares memory, threads or settings with another.

What a provider prints goes to its log. A provider that fails, or dies, is an error in the parent.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kl.bench.meters import EnergyMeter, GpuPeak, peak_bytes
from vllm_kl.bench.types import Provider, Setup
from vllm_kl.errors import EngineError, VLLMKLError

_LOG_LINES = 12  # of a provider that died
_JOIN_S = 60.0


class ProviderProcess:
    """A provider that runs in its own process.

    Args:
        name: of its log, ``log_folder/NAME.log``.
        find: returns the provider; called in the process.
        setup: what it is to run.
        log_folder: an existing folder.

    Raises:
        VLLMKLError: the provider failed. An error of this package comes as it was raised; any other, and the
            end of the process, is an EngineError with the error or the end of the log. All methods raise it.
    """

    def __init__(self, name: str, find: Callable[[], Provider], setup: Setup, log_folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._log = log_folder / f"{name.replace(':', '.')}.log"
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, find, setup, str(self._log)))
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:  # Ctrl-C, too: nobody else knows of the process yet
            self.kill()
            raise

    def score(self, sequences: list[np.ndarray], starts: list[int]) -> list[np.ndarray]:
        """Return the log-probs of each sequence, ``[len - start]``, nats."""
        return self._ask("score", sequences, starts)

    def time(self, sequences: list[np.ndarray], starts: list[int]) -> dict[str, Any]:
        """Return the ``seconds`` of one call, of its ``parts`` by name, and its ``joules``."""
        return self._ask("time", sequences, starts)

    def notes(self) -> list[str]:
        """Return the warnings that this package has logged in the process since the last call."""
        return self._ask("notes")

    def told(self) -> dict[str, Any]:
        """Return what the provider tells about itself."""
        return self._ask("told")

    def end(self) -> dict[str, int]:
        """End the process; return the provider's peak memory and peak GPU memory, in bytes; 0: not known."""
        peaks = self._ask("end")
        self._join()
        self._connection.close()
        return peaks

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._process.terminate()  # an engine of its own ends with it
        self._join()
        self._connection.close()

    def _ask(self, *question: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self._connection.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._join()
            status = self._process.exitcode
            raise EngineError(
                f"its process ended with exit status {status}; its log ends with\n{self._tail()}"
            ) from None
        if error is not None:
            self._join()
            raise error
        return answer

    def _join(self) -> None:
        """Wait for the end of the process, which has nothing to do; a library's thread may hold it."""
        self._process.join(_JOIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-_LOG_LINES:])


class _Notes(logging.StreamHandler):
    """Keeps the warnings of this package, which also go to the log."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        self._texts.append(record.getMessage().removeprefix("vllm_kl: "))

    def taken(self) -> list[str]:
        texts, self._texts = self._texts, []
        return texts


def _serve(connection: Connection, find: Callable[[], Provider], setup: Setup, log: str) -> None:
    with Path(log).open("ab", buffering=0) as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    notes = _Notes()
    logging.getLogger("vllm_kl").addHandler(notes)
    from vllm_kl import mkl  # torch, which the parent does not import

    mkl.choose_code()
    try:
        with GpuPeak(setup.num_gpus) as gpu, contextlib.contextmanager(find())(setup) as running:
            connection.send((None, None))
            energy = EnergyMeter(setup.num_gpus)
            while (question := connection.recv())[0] != "end":
                answer = notes.taken() if question[0] == "notes" else _answer_to(question, running, energy)
                connection.send((None, answer))
            peaks = {
                "peak_bytes": sum(map(peak_bytes, running.pids)),
                "gpu_peak_bytes": gpu.size_bytes,
            }
            connection.send((None, peaks))
    except (EOFError, KeyboardInterrupt):
        return  # the parent has ended
    except VLLMKLError as error:
        connection.send((error, None))
    except Exception as error:  # a peer's errors are of any type
        traceback.print_exc()
        connection.send((EngineError(f"{type(error).__name__}: {error}"), None))


def _answer_to(question: tuple[Any, ...], running: Any, energy: EnergyMeter) -> Any:
    kind, *arguments = question
    if kind == "told":
        return running.told()
    if kind == "score":
        return [np.asarray(row) for row in running.score(*arguments)]
    energy()
    began = time.perf_counter()
    result = running.score(*arguments)
    seconds, joules = time.perf_counter() - began, energy()
    parts = result if isinstance(result, dict) else {}
    return {"seconds": sum(parts.values()) if parts else seconds, "joules": joules, "parts": parts}
