"""Finds, opens, writes and renames files, on a local disk or wherever fsspec or Arrow reaches."""

from __future__ import annotations

import functools
import json
import posixpath
import uuid
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.arrow import ArrowFSWrapper

from vllm_kl.errors import OptionError


class File(NamedTuple):
    """A file of the input."""

    path: str
    size: int  # bytes


@functools.cache
def _arrow(scheme: str) -> Any:
    from pyarrow import fs

    return ArrowFSWrapper(fs.FileSystem.from_uri(f"{scheme}://x/x")[0])


def _open_store(place: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return url_to_fs(place)
    except ImportError as error:  # fsspec has no client for this scheme; Arrow has those of s3 and gs
        scheme, _, path = place.partition("://")
        if scheme not in ("s3", "gs"):
            raise OptionError(f"{place}: {error}") from error
        return _arrow(scheme), path
    except ValueError as error:
        raise OptionError(f"{place}: {error}") from error


def list_files(place: str) -> list[File]:
    """Return the files at a path, in a folder and its folders, or of a glob, sorted by name.

    Names that begin with ``.`` or ``_`` are left out, as Arrow and Ray leave them out.
    """
    store, path = _open_store(place)
    if any(letter in path for letter in "*?["):
        found = [entry for entry in store.glob(path, detail=True).values() if entry["type"] == "file"]
    elif store.isdir(path):
        found = [
            entry
            for name, entry in store.find(path, detail=True).items()
            if not any(part[0] in "._" for part in posixpath.relpath(name, path).split("/"))
        ]
    else:
        found = [store.info(path)] if store.exists(path) else []
    scheme = place.partition("://")[0] + "://" if "://" in place else ""
    return sorted(File(scheme + entry["name"].removeprefix(scheme), entry["size"]) for entry in found)


def size_of(path: str) -> int | None:
    """Return the size of a file; ``None``: there is none."""
    store, inside = _open_store(path)
    return store.info(inside)["size"] if store.exists(inside) else None


def open_file(path: str) -> IO[bytes]:
    """Open a file for reading, at any place in it."""
    store, inside = _open_store(path)
    return store.open(inside, "rb")


class Folder:
    """The folder of the output. A file is written under another name, and renamed when it is whole."""

    def __init__(self, place: str) -> None:
        # Tasks of Ray run in other folders.
        self.place = place.rstrip("/") if "://" in place else str(Path(place).resolve())

    def path(self, name: str) -> str:
        return f"{self.place}/{name}"

    def names(self) -> set[str]:
        """Return the names of all files in the folder, not in its folders."""
        store, path = _open_store(self.place)
        store.invalidate_cache()
        if not store.isdir(path):
            return set()
        return {posixpath.basename(name) for name in store.ls(path, detail=False)}

    def make(self, name: str = "") -> None:
        """Make the folder, or a folder in it, if it is not there."""
        store, path = _open_store(self.path(name))
        store.makedirs(path, exist_ok=True)

    def write(self, name: str, content: Any) -> None:
        """Write a file, whole or not at all. ``content``: bytes, or a function that gets the open file."""
        store, path = _open_store(self.path(name))
        unfinished = f"{posixpath.dirname(path)}/.{posixpath.basename(path)}.{uuid.uuid4().hex[:8]}"
        try:
            with store.open(unfinished, "wb") as stream:
                content(stream) if callable(content) else stream.write(content)
            store.mv(unfinished, path)
        except BaseException:
            if store.exists(unfinished):
                store.rm_file(unfinished)
            raise

    def read_json(self, name: str) -> Any:
        """Return the content of a file of JSON; ``None``: there is none."""
        store, path = _open_store(self.path(name))
        if not store.exists(path):
            return None
        return json.loads(store.cat_file(path))

    def remove(self, name: str) -> None:
        store, path = _open_store(self.path(name))
        if store.exists(path):
            store.rm(path, recursive=True)
