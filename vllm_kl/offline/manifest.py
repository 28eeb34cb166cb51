"""Writes and compares the manifest of an output folder: what made its files, and the plan of its parts.

A run that is started again must have the same settings as the first one; the message names what differs. It
takes the parts from the manifest, so they are the same whatever the planning does by then.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vllm_kl import fingerprint
from vllm_kl.errors import InputError, OptionError
from vllm_kl.offline.parts import NothingThereError, Part, find_files
from vllm_kl.offline.storage import File, Folder

NAME = "_manifest.json"
_ANEW = ".\nGive another --out, or --overwrite to begin anew"
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What made an output, and its parts."""

    settings: dict[str, Any]  # flat: name -> JSON value
    files: list[File]
    schema: pa.Schema  # of the input
    parts: list[Part]

    def write(self, folder: Folder) -> None:
        """Write the manifest into the folder of the output."""
        content = {
            "settings": self.settings,
            "files": [list(file) for file in self.files],
            "schema": base64.b64encode(self.schema.serialize()).decode(),
            "parts": [dataclasses.asdict(part) for part in self.parts],
        }
        folder.write(NAME, json.dumps(content, indent=1).encode())

    @classmethod
    def read(cls, folder: Folder) -> Manifest | None:
        """Return the manifest of a folder; ``None``: it has none.

        Raises:
            InputError: the file is not a manifest.
        """
        content = folder.read_json(NAME)
        if content is None:
            return None
        try:
            found = cls(
                settings=dict(content["settings"]),
                files=[File(*file) for file in content["files"]],
                schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["schema"]))),
                parts=[Part(**part) for part in content["parts"]],
            )
        except (KeyError, TypeError, ValueError, OSError, AttributeError, pa.ArrowException) as error:
            raise InputError(
                f"{folder.path(NAME)} is no manifest of vllm-kl score ({type(error).__name__}: {error}): "
                "give another folder"
            ) from error
        return found

    def check_same(self, settings: Mapping[str, Any], place: str) -> None:
        """Refuse settings that differ from those that made the files of the folder.

        Raises:
            OptionError: a setting differs; the message names each.
        """
        settings = json.loads(json.dumps(settings))
        names = dict.fromkeys([*self.settings, *settings])
        differ = [
            f"{name} was {_short(self.settings.get(name))}, is {_short(settings.get(name))}"
            for name in names
            if self.settings.get(name) != settings.get(name)
        ]
        if differ:
            raise OptionError(
                f"{place} was begun with other settings: {'; '.join(differ)}.\n"
                "Give the same settings to continue, another --out, or --overwrite to begin anew"
            )

    def check_files(self, data: Sequence[str], *, is_done: bool) -> None:
        """Refuse an input that is gone, has changed or has become more.

        Args:
            data: as :func:`~vllm_kl.offline.parts.find_files` takes it.
            is_done: whether all rows are scored, so the input need not be there any more.

        Raises:
            InputError: the message names the file.
        """
        now: dict[str, File] = {}
        for place in data:
            with contextlib.suppress(NothingThereError):
                now |= {file.path: file for file in find_files(place)}
        for file in self.files:
            found = now.pop(file.path, None)
            if found is None and not is_done:
                raise InputError(f"{file.path} was there when this output was begun, and is gone now")
            if found is not None and (found.size != file.size or found.mark != file.mark):
                raise InputError(
                    f"{file.path} had {file.size} bytes when this output was begun, and has {found.size} now"
                    + (", with other content" if found.size == file.size else "")
                    + _ANEW
                )
        if now:
            raise InputError(f"{next(iter(now))} was not there when this output was begun{_ANEW}")


def model_settings(name: str, model: str, engine_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one model: its files' checksum, and the options of its engine."""
    return {
        f"{name}.checksum": checksum(model, revision=engine_options.get("revision")),
        **{f"{name}.engine.{option}": value for option, value in sorted(engine_options.items())},
    }


def checksum(model: str, *, revision: str | None = None) -> str:
    """Return a checksum of a model's weights, configuration and tokenizer.

    For a folder it is made of the SHA-256 of each file; for a name on the Hugging Face hub it is the commit.

    Raises:
        OptionError: there is no such folder, and no such model on the hub.
    """
    folder = Path(model)
    if not folder.is_dir():
        return _commit(model, revision)
    # Not the folders in it: a trainer's checkpoints, and perhaps this output. transformers reads one of them.
    places = (folder, folder / "additional_chat_templates")
    paths = (path for place in places if place.is_dir() for path in place.iterdir())
    files = sorted(path for path in paths if path.suffix in _KINDS and path.name != NAME and path.is_file())
    with ThreadPoolExecutor(8) as pool:
        hashes = list(pool.map(_hash, files))
    lines = [f"{path.relative_to(folder)} {digest}" for path, digest in zip(files, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# Also code, for models that bring their own.
_KINDS = {".safetensors", ".bin", ".pt", ".json", ".model", ".jinja", ".txt", ".tiktoken", ".gguf", ".py"}


def _hash(path: Path) -> str:
    stored = path.resolve().name
    if _HASH.fullmatch(stored):  # the hub's cache names a file of weights by its SHA-256
        return stored
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(model: str, revision: str | None) -> str:
    try:
        return fingerprint.commit_of(model, revision)
    except (OSError, ValueError) as error:
        raise OptionError(f"{model!r} is no folder, and no model that can be loaded: {error}") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
