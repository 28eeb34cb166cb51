"""A program in whose mounts ``/dev/shm`` and the folder of temporary files are small: it fills them.

    unshare -rm sh -c "mount -t tmpfs ... && exec python -m tests.faults.small_shm MODEL"

It prints one JSON document: what each step became, and the log-probs that the engine then gives.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

from tests import tiny
from vllm_kl import VLLMScorer, lifetime, push_weights
from vllm_kl.errors import WeightsError
from vllm_kl.weights import checkpoint

IDS = list(range(5, 60))
SMALL_BYTES = 32 << 20  # of each of the two; the model's weights have less than one
LEFT_BYTES = 64 << 10  # less than the weights
SHM, TEMPORARY = lifetime.SHARED_MEMORY, Path(tempfile.gettempdir())


def fill(folder: Path) -> Path:
    """Write a file that leaves a few pages of room."""
    free = os.statvfs(folder)
    path = folder / "filled"
    path.write_bytes(bytes(free.f_bavail * free.f_frsize - LEFT_BYTES))
    return path


def main(model: str, other: str) -> None:
    """Push weights into every kind of full memory, and print what came of it."""
    told: dict[str, object] = {}
    state = AutoModelForCausalLM.from_pretrained(other).state_dict()
    scorer = VLLMScorer(model, **tiny.ENGINE_OPTIONS)

    def attempt(name: str) -> None:
        before = scorer.weight_version
        try:
            told[name] = push_weights(scorer, state) - before
        except WeightsError as error:
            told[name] = str(error)
            assert scorer.weight_version == before
        told[f"{name}, left"] = sorted(
            path.name for folder in (SHM, TEMPORARY) for path in folder.glob(f"{lifetime.PREFIX}_*")
        )
        told[f"{name}, log-probs"] = scorer.score([IDS])[0].tolist()

    new_folder, filled = checkpoint.new_folder, []

    def filled_after_the_look(size_bytes: int) -> Path:
        folder = new_folder(size_bytes)
        filled.append(fill(folder.parent))
        return folder

    checkpoint.new_folder = filled_after_the_look
    attempt("filled meanwhile")
    checkpoint.new_folder = new_folder
    fill(TEMPORARY)
    attempt("both full")
    (TEMPORARY / "filled").unlink()
    attempt("shared memory full")
    with VLLMScorer(model, **tiny.ENGINE_OPTIONS) as started:
        told["started, log-probs"] = started.score([IDS])[0].tolist()
    (SHM / "filled").unlink()
    attempt("room again")
    told["parents"] = [str(path.parent) for path in filled]
    scorer.close()
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
