"""Serve's own command starts the application from its config file, as an administrator of a cluster does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml

from tests import local_ray, tiny
from tests.serving.server import free_port
from vllm_kl import VLLMScorer
from vllm_kl.errors import EngineError, OptionError

pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = [*local_ray.MARKS, pytest.mark.nightly, pytest.mark.timeout(900)]

IDS = [[5, 6, 7, 8], [5, 6, 9], [5, 6]]


def config_of(ref_path, tmp_path, port):
    key = tmp_path / "key"
    key.write_text("only for this test")
    args = {"model": str(ref_path), "name": "reference", "replicas": 2, "api_key_file": str(key)}
    args["engine"] = tiny.ENGINE_OPTIONS
    application = {
        "name": "reference",
        "route_prefix": "/",
        "import_path": "vllm_kl.serving:app",
        "args": args,
    }
    file = tmp_path / "config.yaml"
    file.write_text(
        yaml.safe_dump({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]})
    )
    return file, key


@contextlib.contextmanager
def serve_run(file, address):
    """Run ``serve run`` in a cluster, and end it after the block."""
    code = "from ray.serve.scripts import cli; cli()"
    log = file.with_suffix(".log")
    with log.open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "run", str(file)],
            stdout=told,
            stderr=told,
            # ray start asks for a token where this user has one; who joins must say so (Ray 2.60).
            env={"RAY_AUTH_MODE": "token"} | os.environ | {"RAY_ADDRESS": address},
        )
    try:
        yield process, log
    finally:
        process.terminate()  # its replicas end with the cluster
        process.wait(120)


def scorer_of(url, key, process, log):
    """Return a scorer of a server as soon as it answers."""
    until = time.monotonic() + 400
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        with contextlib.suppress(EngineError):
            return VLLMScorer(url, api_key_file=str(key), retry_s=1)
        time.sleep(1)


def test_a_config_file_starts_replicas_behind_a_door(ref_path, ref_scorer, tmp_path):
    port = free_port()
    file, key = config_of(ref_path, tmp_path, port)
    with local_ray.second_cluster() as address, serve_run(file, address) as (process, log):
        url = f"http://127.0.0.1:{port}"
        with scorer_of(url, key, process, log) as scorer:
            assert scorer.readout == "pooling"
            for row, theirs in zip(scorer.score(IDS), ref_scorer.score(IDS), strict=True):
                torch.testing.assert_close(row, theirs, rtol=0, atol=2e-6)
        with pytest.raises(OptionError, match="the key is missing or wrong"):
            VLLMScorer(url)
