"""Drivers of a Ray cluster: ``run`` starts one, which scores with the reference service of a name."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_kl import RetrieveKL, VLLMReference
from vllm_kl.demo.task import make_tokenizer

SEQUENCES, PROMPTS = [[5, 258, 9, 256, 7], [1, 2, 3]], [2, 1]


def make_reference(path: str, **kwargs: Any) -> VLLMReference:
    options = {"dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 16 << 20}
    return VLLMReference(path, make_tokenizer(), **{**options, **kwargs})


def service(
    path: Any, name: str | None, *, options: dict[str, Any] | None = None, **kwargs: Any
) -> RetrieveKL:
    """Return the transform that shares the service ``name``."""
    return RetrieveKL(
        "from_collector",
        ref_model_factory=functools.partial(make_reference, str(path), **kwargs),
        service_backend="ray",
        service_backend_options=options,
        actor_name=name,
    )


def run(address: str, path: Path, name: str) -> subprocess.Popen[str]:
    """Start a driver; it prints log-probs, then waits for a line on its standard input."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.service_drivers", address, str(path), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def printed(driver: subprocess.Popen[str]) -> list[list[float]]:
    """Return the log-probs that a driver has printed."""
    for line in driver.stdout:
        if line.startswith("{"):
            return json.loads(line)["log_probs"]
    raise AssertionError(f"the driver printed no log-probs; exit status {driver.wait()}")


def main(address: str, path: str, name: str) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, configure_logging=False)
    transform = service(path, name)
    log_probs = transform.ref_model.scorer.score(SEQUENCES, PROMPTS)
    print(json.dumps({"log_probs": [row.tolist() for row in log_probs]}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
