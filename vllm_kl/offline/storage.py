"""Finds, opens, writes and renames files, on a local disk or wherever fsspec or Arrow reaches."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import posixpath
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem

from vllm_kl import fingerprint
from vllm_kl.errors import InputError, OptionError, VLLMKLError


class File(NamedTuple):
    """A file of the input."""

    path: str
    size: int  # bytes
    mark: str = ""  # of the content: a hash, the store's own, or its time of the last change; empty: unknown


@functools.cache
def _arrow(scheme: str, bucket: str) -> Any:
    from pyarrow import fs

    # Arrow 26 asks for the region of the bucket, and repeats a failed request to gs:// for 15 minutes.
    options = f"?retry_limit_seconds={_RETRY_S}" if scheme == "gs" else ""
    return ArrowFSWrapper(fs.FileSystem.from_uri(f"{scheme}://{bucket}{options}")[0])


_RETRY_S = 15


def _open_store(place: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return url_to_fs(place)
    except ImportError as error:  # fsspec has no client for this scheme; Arrow has those of s3 and gs
        scheme, _, path = place.partition("://")
        if scheme not in ("s3", "gs"):
            raise OptionError(f"{place}: {error}") from error
        return _arrow(scheme, path.partition("/")[0]), path
    except ValueError as error:
        raise OptionError(f"{place}: {error}") from error


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Name the place in the error of a store that is not this disk: each has error classes of its own."""
    try:
        yield
    except (VLLMKLError, FileNotFoundError):
        raise
    except Exception as error:
        if "://" not in place:
            raise
        raise InputError(f"{place} cannot be reached: {type(error).__name__}: {error}") from error


def list_files(place: str) -> list[File]:
    """Return the files at a path, in a folder and its folders, or of a glob, sorted by name.

    Names that begin with ``.`` or ``_`` are left out, as Arrow and Ray leave them out.
    """
    with _named(place):
        return _list_files(place)


def _list_files(place: str) -> list[File]:
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
    return sorted(
        File(scheme + entry["name"].removeprefix(scheme), entry["size"], _mark_of(entry)) for entry in found
    )


# What stores tell of a file, the best first: S3, Google and Azure, the Hugging Face hub; times.
_MARKS = ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")


def _mark_of(entry: Mapping[str, Any]) -> str:
    return next((str(entry[name]) for name in _MARKS if entry.get(name)), "")


def marked(files: Sequence[File]) -> list[File]:
    """Return the files with marks: those of this disk get a hash of some blocks of each."""

    def mark(file: File) -> File:
        if "://" in file.path:
            return file
        return file._replace(mark=fingerprint.of_files([Path(file.path)]))

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(mark, files))


def parse_json(path: str, data: bytes) -> Any:
    """Return the content of a file of JSON.

    Raises:
        InputError: it is not JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def open_file(path: str) -> IO[bytes]:
    """Open a file for reading, at any place in it."""
    with _named(path):
        store, inside = _open_store(path)
        return store.open(inside, "rb")


def _sync_folder(path: str) -> None:
    """Put the names in a local folder on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that does so by itself, or never
            raise
    finally:
        os.close(folder)


class Folder:
    """The folder of the output. A file is written under another name, and renamed when it is whole."""

    def __init__(self, place: str) -> None:
        # Tasks of Ray run in other folders.
        self.place = place.rstrip("/") if "://" in place else str(Path(place).resolve())

    def path(self, name: str) -> str:
        return f"{self.place}/{name}"

    def holds(self, path: str) -> bool:
        """Whether a file of the input is in this folder."""
        return path.startswith(f"{self.place}/")

    def names(self) -> set[str]:
        """Return the names of all files in the folder, not in its folders."""
        with _named(self.place):
            store, path = _open_store(self.place)
            store.invalidate_cache()
            if not store.isdir(path):
                return set()
            return {posixpath.basename(name.rstrip("/")) for name in store.ls(path, detail=False)}

    def make(self, name: str = "") -> None:
        """Make the folder, or a folder in it, if it is not there."""
        with _named(self.path(name)):
            store, path = _open_store(self.path(name))
            store.makedirs(path, exist_ok=True)

    def write(self, name: str, content: Any) -> None:
        """Write a file, whole or not at all. ``content``: bytes, or a function that gets the open file.

        On a local disk this holds after a power cut, too: the content is on the disk before the file has its
        name, and the name is there before this returns.
        """
        with _named(self.path(name)):
            self._write(name, content)

    def _write(self, name: str, content: Any) -> None:
        store, path = _open_store(self.path(name))
        unfinished = f"{posixpath.dirname(path)}/.{posixpath.basename(path)}.{uuid.uuid4().hex[:8]}"
        is_local = isinstance(store, LocalFileSystem)
        try:
            with store.open(unfinished, "wb") as stream:
                content(stream) if callable(content) else stream.write(content)
                if is_local:
                    stream.flush()
                    os.fsync(stream.fileno())
            store.mv(unfinished, path)
            if is_local:
                _sync_folder(posixpath.dirname(path))
        except BaseException:
            if store.exists(unfinished):
                store.rm_file(unfinished)
            raise

    def read_json(self, name: str) -> Any:
        """Return the content of a file of JSON; ``None``: there is none.

        Raises:
            InputError: the file is not JSON.
        """
        with _named(self.path(name)):
            store, path = _open_store(self.path(name))
            return parse_json(self.path(name), store.cat_file(path)) if store.exists(path) else None

    def remove(self, name: str) -> None:
        with _named(self.path(name)):
            store, path = _open_store(self.path(name))
            if store.exists(path):
                store.rm(path, recursive=True)
