"""Writes the rows of one part into its file: :class:`WritePart` is the last stage of the pipeline.

The file's name follows from the part's place in the data set. The file is written under another name and
renamed when it is whole, so a killed run leaves whole files only, and a second writer of the same part
changes nothing.
"""

from __future__ import annotations

import json
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vllm_kl.errors import InputError
from vllm_kl.offline.columns import NUM_CACHED, NUM_PROMPT, PART, Columns, visible
from vllm_kl.offline.storage import Folder

COUNTS = "_counts"  # folder of the figures of each part


def file_name(index: int, suffix: str) -> str:
    """Return the name of a part's file; sorted names are in the order of the input."""
    return f"part-{index:08d}.{suffix}"


class WritePart:
    """A function for ``map_batches``: writes one part, and returns one row of its figures.

    Args:
        folder: the folder of the output.
        suffix: ``"parquet"`` or ``"jsonl"``.
        columns: the names of the added columns.
        num_rows: for each part the number of its rows.
    """

    def __init__(self, folder: Folder, suffix: str, columns: Columns, num_rows: dict[int, int]) -> None:
        self._folder, self._suffix, self._columns, self._num_rows = folder, suffix, columns, num_rows

    def __call__(self, table: pa.Table) -> pa.Table:
        (index,) = pc.unique(table.column(PART)).to_pylist()
        assert table.num_rows == self._num_rows[index], "Ray Data passes each part whole"
        figures = {
            "part": index,
            "rows": table.num_rows,
            "rejected": table.num_rows - table.column(self._columns.added("error")).null_count,
            "scored_tokens": _total(table.column(self._columns.added("num_tokens"))),
            "tokens": pc.sum(table.column(NUM_PROMPT)).as_py(),
            "shared_tokens": pc.sum(table.column(NUM_CACHED)).as_py(),
        }
        rows = table.select(visible(table.column_names))
        name = file_name(index, self._suffix)
        try:
            # The figures are written first: a part whose file is there has its figures.
            self._folder.write(f"{COUNTS}/{file_name(index, 'json')}", json.dumps(figures).encode())
            self._folder.write(name, lambda stream: self._write(rows, stream))
        except OSError as error:
            raise InputError(
                f"{self._folder.path(name)} cannot be written: {error}.\nFinished files are whole; start the "
                "same command again to continue"
            ) from error
        return pa.table({key: [value] for key, value in figures.items()})

    def _write(self, table: pa.Table, stream: IO[bytes]) -> None:
        if self._suffix == "parquet":
            pq.write_table(table, stream)
            return
        for row in table.to_pylist():
            stream.write(json.dumps(row, ensure_ascii=False, default=_plain).encode() + b"\n")


def _total(column: pa.ChunkedArray) -> int:
    while pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    return pc.sum(column).as_py() or 0


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)  # bytes, dates and the like
