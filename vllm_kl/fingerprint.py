"""Tells files apart by a few bytes of each, because reading a whole checkpoint takes minutes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_BLOCKS, _BLOCK = 64, 4096


def of_files(paths: Iterable[Path]) -> str:
    """Return a hash of the name, the size and 64 blocks of each file, the whole file up to 256 KiB.

    Blocks are spread evenly, so a checkpoint of a later step of a training has another hash.
    """
    found = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = path.stat().st_size if path.exists() else 0
        found.update(f"{path.name} {size} ".encode())
        if size:
            with path.open("rb") as file:
                for n in range(_BLOCKS):
                    file.seek(n * max(size - _BLOCK, 0) // (_BLOCKS - 1))
                    found.update(file.read(_BLOCK))
    return found.hexdigest()


def of_model(model: str, revision: str | None = None) -> str | None:
    """Return a hash of a checkpoint's config and weights; of a name on the hub, its commit.

    ``None``: the folder has no weights, or the hub's files are not here and cannot be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        return of_files([folder / "config.json", *files]) if files else None
    try:
        return commit_of(model, revision)
    except (OSError, ValueError):
        return None


def commit_of(model: str, revision: str | None) -> str:
    """Return the commit of a model on the Hugging Face hub. Its config is downloaded, if it is not here.

    Raises:
        OSError, ValueError: there is no such model, or the hub cannot be reached.
    """
    from transformers.utils.hub import cached_file

    return f"commit {Path(cached_file(model, 'config.json', revision=revision)).parent.name}"
