"""Drivers that score with replicas: ``run`` starts one, which says which processes it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(path: Path, *, address: str | None = None) -> subprocess.Popen[str]:
    """Start a driver with one replica. A line on its standard input lets it close the scorer and end.

    Args:
        path: the model.
        address: of the cluster to join; ``None``: the scorer starts a local Ray.
    """
    environment = {**os.environ, "RAY_ADDRESS": address or ""}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.replica_drivers", str(path)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(driver: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the next thing that a driver says."""
    for line in driver.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError(f"the driver said nothing; exit status {driver.wait()}")


def main(path: str) -> None:
    import psutil

    from tests import tiny
    from vllm_kl import VLLMScorer

    before = {process.pid for process in psutil.process_iter()}
    options = {"min": 1, "max": 1, "cpus": 1, "gpus": 0}
    scorer = VLLMScorer(path, replicas=options, timeout_s=500, **tiny.ENGINE_OPTIONS)
    log_probs = scorer.score([[5, 6, 7]])[0].tolist()
    replica = psutil.Process(scorer._engine.pids[0])
    of_replica = [replica.pid, *(child.pid for child in replica.children(recursive=True))]
    ours = [child.pid for child in psutil.Process().children(recursive=True) if child.pid not in before]
    app = scorer._engine._service.name
    print(json.dumps({"log_probs": log_probs, "replica": of_replica, "ours": ours, "app": app}), flush=True)
    sys.stdin.readline()
    scorer.close()
    scorer.close()
    left = [child.pid for child in psutil.Process().children(recursive=True)]
    print(json.dumps({"left": left}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
