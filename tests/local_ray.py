"""Marks of the tests that use a local Ray, the fixture ``cluster``; and a second Ray beside it."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

MARKS = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its log files open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@contextlib.contextmanager
def second_cluster(num_cpus=4):
    """Start a Ray that is not this process's, as an administrator does; yield its address."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    folder = tempfile.mkdtemp(dir="/tmp")  # sockets have short paths
    options = ["--head", f"--port={port}", f"--num-cpus={num_cpus}", f"--temp-dir={folder}", "--block"]
    options += ["--include-dashboard=false", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    code = "from ray.scripts.scripts import main; main()"
    log = Path(folder, "start.log")
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", code, "start", *options], stdout=file, stderr=file)
    try:
        end = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)  # ends all processes of this Ray
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
