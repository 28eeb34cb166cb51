"""Starts ``vllm-kl serve`` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests import tiny


class Server:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address

    def end(self) -> int:
        """Ask the server to end, as a service manager does; return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(
    model: Path, *options: str, cluster: str = "", key: str = "", port: int | None = None
) -> Iterator[Server]:
    """Yield a server of a tiny model with one replica.

    Args:
        cluster: the address of the Ray that it joins; "": a Ray of its own.
        key: its API key; "": everybody may ask.
        port: where it listens; ``None``: at any free port.
    """
    command = [sys.executable, "-c", "from vllm_kl.cli import main; main()", "serve", str(model)]
    command += ["--port", str(port or free_port()), "--num-cpus", "1", "--num-gpus", "0", *options]
    for name, value in tiny.ENGINE_OPTIONS.items():
        command += ["--engine", f"{name}={value}"]
    environment = {**os.environ, "RAY_ADDRESS": cluster, "VLLM_KL_API_KEY": key}
    if not cluster:
        del environment["RAY_ADDRESS"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            told = next((line for line in process.stdout if line.startswith("{")), None)  # Ray talks, too
            if told is None:
                log.seek(0)
                raise AssertionError(f"no server: {log.read()}")
            yield Server(process, json.loads(told)["address"])
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.wait(90)
            process.stdout.close()
