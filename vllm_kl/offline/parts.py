"""Cuts the files of a data set into parts, and reads a part as a table.

A part is a range of the rows of one file. The parts of a data set depend only on its files and on the size
of a part, so a run that is started again has the same parts, and each part has one output file with its
number.
"""

from __future__ import annotations

import contextlib
import itertools
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vllm_kl.errors import InputError, VLLMKLError
from vllm_kl.offline import jsonl
from vllm_kl.offline.columns import PART, ROW, Columns, layout_of
from vllm_kl.offline.storage import File, list_files, marked, open_file, parse_json

Format = Literal["jsonl", "parquet", "arrow"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
MIN_PART_BYTES, MAX_PART_BYTES = 16 << 10, 1 << 20  # 4 bytes are about a token
_MAX_PARTS, _MIN_PARTS = 10_000, 32
_READ_ROWS = 1024
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Part:
    """A range of one file. ``begin`` and ``end`` count bytes of JSONL, and rows of the other formats."""

    index: int
    path: str
    format: Format
    begin: int
    end: int
    first_row: int = 0  # index in the data set of its first row
    num_rows: int = 0


def format_of(path: str) -> Format:
    """Return the format of a file, by its name.

    Raises:
        InputError: the name tells no format that can be read.
    """
    suffix = posixpath.splitext(path)[1]
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a name that ends with one of {', '.join(SUFFIXES)}")
    return SUFFIXES[suffix]


class NothingThereError(InputError):
    """There is no file at a place."""


def find_files(data: str | Sequence[str]) -> list[File]:
    """Return the files of a data set, in the order of their names where DATA is a folder or a glob.

    Raises:
        InputError: there are none; or the name of one says that it is compressed.
    """
    files = []
    for place in [data] if isinstance(data, str) else data:
        found = list_files(place)
        if not found:
            raise NothingThereError(f"{place}: no such file, or an empty folder")
        splits = [file for file in found if posixpath.basename(file.path) == "dataset_dict.json"]
        if splits:
            raise InputError(f"{place} holds several splits: give the folder of one, such as {place}/train")
        found = _of_save_to_disk(found)
        files += found if len(found) == 1 else _readable(place, found)
    return marked([file for file in files if posixpath.basename(file.path) not in _SIDE_FILES])


def _readable(place: str, files: Sequence[File]) -> list[File]:
    """Leave out files of other kinds, such as a README."""
    kept = []
    for file in files:
        stem, suffix = posixpath.splitext(file.path)
        if suffix in SUFFIXES:
            kept.append(file)
            continue
        inner = posixpath.splitext(stem)[1] if suffix.lower() in _COMPRESSED else suffix
        if inner.lower() in SUFFIXES:
            raise InputError(
                f"{file.path} looks like data and would be left out: give it unpacked, with a name that ends "
                f"with one of {', '.join(SUFFIXES)}"
            )
    if not kept:
        raise InputError(f"{place} has no file with a name that ends with one of {', '.join(SUFFIXES)}")
    return kept


_COMPRESSED = {".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip"}


def _of_save_to_disk(files: Sequence[File]) -> list[File]:
    """Leave out what ``map`` of ``datasets`` keeps beside the files of ``save_to_disk``.

    The state.json of such a folder names the files of the data set (datasets 5.2).
    """
    named: dict[str, set[str]] = {}
    for file in files:
        folder, name = posixpath.split(file.path)
        if name == "state.json":
            with open_file(file.path) as stream:
                state = parse_json(file.path, stream.read())
            if isinstance(state, dict) and isinstance(state.get("_data_files"), list):
                entries = [entry for entry in state["_data_files"] if isinstance(entry, dict)]
                named[folder] = {entry.get("filename") for entry in entries}
    kept = []
    for file in files:
        folder, name = posixpath.split(file.path)
        if folder not in named or name in named[folder]:
            kept.append(file)
    return kept


_SIDE_FILES = {"state.json", "dataset_info.json", "dataset_dict.json"}  # of datasets.save_to_disk


def part_bytes_of(files: Sequence[File]) -> int:
    """Return the size of a part: about 1 MiB, less for small data sets, more for very large ones."""
    total = sum(file.size for file in files)
    wanted = max(MIN_PART_BYTES, min(MAX_PART_BYTES, total // _MIN_PARTS))
    return max(wanted, -(-total // _MAX_PARTS))


def cut(files: Sequence[File], part_bytes: int) -> list[Part]:
    """Return the parts of a data set, without the numbers of their rows where the format does not tell."""
    parts: list[Part] = []
    kinds = [format_of(file.path) for file in files]
    with ThreadPoolExecutor(16) as pool:  # the footers of many files of an object store
        ranges = list(pool.map(lambda file, kind: list(_ranges(file, kind, part_bytes)), files, kinds))
    for file, kind, of_file in zip(files, kinds, ranges, strict=True):
        for begin, end, num_rows in of_file:
            parts.append(Part(index=0, path=file.path, format=kind, begin=begin, end=end, num_rows=num_rows))
    return parts


def numbered(parts: Sequence[Part], limit: int | None = None) -> list[Part]:
    """Return the parts that have rows, with their numbers; with ``limit``, only the first rows."""
    found: list[Part] = []
    first = 0
    for part in parts:
        num_rows = part.num_rows if limit is None else min(part.num_rows, limit - first)
        if num_rows > 0:
            found.append(replace(part, index=len(found), first_row=first, num_rows=num_rows))
            first += num_rows
    return found


def _ranges(file: File, kind: Format, part_bytes: int) -> Iterator[tuple[int, int, int]]:
    if kind == "jsonl":
        for begin in range(0, file.size, part_bytes):
            yield begin, min(begin + part_bytes, file.size), 0
        return
    with open_file(file.path) as stream, _whole(file.path, kind):
        if kind == "parquet":
            metadata = open_parquet(file.path, stream).metadata
            groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        else:
            sizes = [(batch.num_rows, _size_of(batch)) for batch in _arrow(file.path, stream)]
    num_rows, num_bytes = (sum(column) for column in zip((0, 0), *sizes, strict=True))
    step = max(1, num_rows * part_bytes // max(1, num_bytes))
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        yield begin, end, end - begin


def _size_of(batch: pa.RecordBatch) -> int:
    batch.validate()  # the size is computed from offsets, which may be damaged
    return batch.nbytes


def open_parquet(path: str, stream: Any) -> pq.ParquetFile:
    """Return a reader of a Parquet file.

    Raises:
        InputError: it is no Parquet file, or reading a value of it would run code.
    """
    with _whole(path, "parquet"):
        # Without these, Arrow keeps the whole columns of a row group in memory.
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_READ_BYTES)
        _check_schema(path, file.schema_arrow)
    return file


def _arrow(path: str, stream: Any) -> pa.ipc.RecordBatchStreamReader:
    with _whole(path, "arrow"):
        reader = pa.ipc.open_stream(stream)
        _check_schema(path, reader.schema)
    return reader


_KINDS = {"parquet": "Parquet file", "arrow": "file of Arrow's streaming format"}


@contextlib.contextmanager
def _whole(path: str, kind: Format) -> Iterator[None]:
    """Say of a file that is damaged that it is.

    Raises:
        InputError: Arrow cannot read it. It raises errors of Python, too: MemoryError for a damaged size.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        if isinstance(error, (VLLMKLError, FileNotFoundError)):
            raise
        raise InputError(f"{path} is no whole {_KINDS[kind]}: {error}") from error


def _check_schema(path: str, schema: pa.Schema) -> None:
    """Refuse columns that cannot be told apart, or whose values cannot be read safely.

    Raises:
        InputError: there are such columns.
    """
    name, count = next(iter(Counter(schema.names).most_common(1)), ("", 1))
    if count > 1:
        raise InputError(f"{path} has {count} columns with the name {name!r}: rename them")
    _refuse_pickles(path, schema)


def _refuse_pickles(path: str, schema: pa.Schema) -> None:
    """Refuse columns of pickled Python objects: to read one runs the code that the file's author chose.

    Source: ``data/_internal/object_extensions/arrow.py``, Ray 2.60. Ray's own readers refuse them, too.

    Raises:
        InputError: there is such a column.
    """
    for column in schema:
        if _holds_pickles(column.type):
            raise InputError(
                f"{path}: column {column.name!r} holds pickled Python objects, which can run any code when "
                "they are read. Write the file without this column, or its values as text, numbers and lists"
            )


def _holds_pickles(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name == "ray.data.arrow_pickled_object" or _holds_pickles(kind.storage_type)
    if pa.types.is_dictionary(kind):  # it has no fields
        return _holds_pickles(kind.value_type)
    return any(_holds_pickles(kind.field(i).type) for i in range(kind.num_fields))


def survey(part: Part, role_of: Mapping[str, str]) -> tuple[Part, jsonl.Types]:
    """Return the part with the number of its rows, and the types of its columns.

    All lines of JSONL are read for it; the other formats tell.
    """
    if part.format == "jsonl":
        num_rows, types = jsonl.types_of(part.path, part.begin, part.end, role_of)
        return replace(part, num_rows=num_rows), types
    return part, {field.name: {field.type} for field in file_schema(part)}


def file_schema(part: Part) -> pa.Schema:
    """Return the columns of a Parquet or Arrow file."""
    with open_file(part.path) as stream:
        if part.format == "parquet":
            return open_parquet(part.path, stream).schema_arrow
        return _arrow(part.path, stream).schema


def features_of(parts: Sequence[Part]) -> dict[bytes, bytes] | None:
    """Return what ``datasets`` wrote into the first file about its columns, such as a label's names."""
    first = next((part for part in parts if part.format != "jsonl"), None)
    metadata = (file_schema(first).metadata if first else None) or {}
    return {key: value for key, value in metadata.items() if key == b"huggingface"} or None


def read_part(part: Part, schema: pa.Schema, columns: Columns) -> pa.Table:
    """Return the rows of a part, with their numbers in ``ROW``, and the part's in ``PART``.

    JSONL also gets the column ``error``: the text for a line that is no JSON object, or whose value cannot be
    of its column's type.

    Raises:
        InputError: the file is gone, or has other rows than before.
    """
    try:
        table = _read(part, schema, columns)
    except FileNotFoundError as error:
        raise InputError(f"{part.path} was there at the start, and is gone now") from error
    if table.num_rows != part.num_rows:
        raise InputError(
            f"{part.path} has changed: expected {part.num_rows} rows from row {part.first_row} of the data "
            f"set on, found {table.num_rows}"
        )
    rows = range(part.first_row, part.first_row + part.num_rows)
    table = table.append_column(ROW, pa.array(rows, pa.int64()))
    return table.append_column(PART, pa.array([part.index] * table.num_rows, pa.int32()))


def _read(part: Part, schema: pa.Schema, columns: Columns) -> pa.Table:
    if part.format == "jsonl":
        has_dialogs = layout_of(schema, columns).kind == "messages"
        return jsonl.read(
            part.path,
            part.begin,
            part.end,
            part.num_rows,
            schema,
            error=columns.added("error"),
            dialogs=columns.messages if has_dialogs else None,
        )
    with open_file(part.path) as stream, _whole(part.path, part.format):
        skip = part.begin
        if part.format == "parquet":
            file = open_parquet(part.path, stream)
            ends = itertools.accumulate(
                file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)
            )
            groups = [(g, end) for g, end in enumerate(ends) if end > part.begin]
            first = groups[0][0] if groups else 0
            skip -= sum(file.metadata.row_group(g).num_rows for g in range(first))
            batches = file.iter_batches(batch_size=_READ_ROWS, row_groups=[g for g, _ in groups])
        else:
            batches = iter(_arrow(part.path, stream))
        taken = list(_slice(batches, skip, part.num_rows))
        table = pa.Table.from_batches(taken) if taken else schema.empty_table()
        table.validate(full=True)  # Arrow trusts the offsets and texts of a file until it reads them
    return _conformed(part.path, table, schema)


def _conformed(path: str, table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with the columns of the whole data set; those that its file lacks are null."""
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        found = table.column(field.name)
        try:
            columns.append(found.cast(field.type))
        except pa.ArrowException as error:
            raise InputError(
                f"{path}: column {field.name!r} holds {found.type}, of which not every value fits "
                f"{field.type}, the type in all files together: {error}"
            ) from error
    return pa.Table.from_arrays(columns, schema=schema)


def _slice(batches: Iterator[pa.RecordBatch], skip: int, num_rows: int) -> Iterator[pa.RecordBatch]:
    """Return ``num_rows`` rows after the first ``skip``."""
    for batch in batches:
        if num_rows <= 0:
            return
        taken = batch.slice(skip, num_rows)
        skip = max(0, skip - batch.num_rows)
        num_rows -= taken.num_rows
        if taken.num_rows:
            yield taken
