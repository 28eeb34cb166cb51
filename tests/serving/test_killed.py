"""Servers that are killed while clients ask: nothing is lost on the client's side, and nothing is swapped."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import psutil
import pytest
import torch

from tests import local_ray
from tests.serving.server import free_port, serving
from vllm_kl.client import Client

pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = [*local_ray.MARKS, pytest.mark.nightly, pytest.mark.timeout(900)]


class Load:
    """Threads that ask for different sequences, again and again, and keep what they got."""

    def __init__(self, address, num_threads=4):
        self._address, self._is_over = address, threading.Event()
        self.found, self.errors = [], []
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def _ask(self, n):
        draw = random.Random(n)
        try:
            with Client(self._address, retry_s=300) as client:
                while not self._is_over.is_set():
                    ids = [[draw.randrange(200) for _ in range(draw.randrange(2, 60))] for _ in range(20)]
                    self.found.append((ids, client.score(ids)))
        except Exception as error:
            self.errors.append(error)

    def wait_for(self, more):
        """Wait until so many more calls were answered."""
        until, wanted = time.monotonic() + 300, len(self.found) + more
        while len(self.found) < wanted and not self.errors:
            assert time.monotonic() < until
            time.sleep(0.05)

    def end(self, scorer):
        """Compare every row with a local engine's; return how many calls there were."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(300)
        assert not self.errors, self.errors
        for ids, rows in self.found:
            for row, theirs in zip(rows, scorer.score(ids), strict=True):
                torch.testing.assert_close(torch.from_numpy(row.copy()), theirs, rtol=0, atol=2e-6)
        return len(self.found)


def processes(server):
    return psutil.Process(server.process.pid).children(recursive=True)


def test_whatever_part_of_a_server_is_killed_under_load_nothing_is_lost_or_swapped(ref_path, ref_scorer):
    with serving(ref_path) as server:
        load = Load(server.address)
        load.wait_for(20)
        for name in (":replica", ":replica", ":door", "ProxyActor"):
            next(p for p in processes(server) if name in "".join(p.cmdline()[:1])).kill()
            load.wait_for(40)
        assert load.end(ref_scorer) >= 180


def test_a_server_killed_and_started_again_under_load_loses_nothing(ref_path, ref_scorer):
    port = free_port()
    with serving(ref_path, port=port) as server:
        load = Load(server.address)
        load.wait_for(20)
        left = processes(server)
        server.process.kill()
    _, alive = psutil.wait_procs(left, timeout=120)
    assert not [p for p in alive if "vllm_kl" in " ".join(p.cmdline())], alive
    for process in alive:  # Ray's agents stay for a minute and more
        os.kill(process.pid, signal.SIGKILL)
    with serving(ref_path, port=port):
        load.wait_for(40)
        assert load.end(ref_scorer) >= 60
