"""Files of data sets and samples: their rows as they were written, an error for a row, or an error."""

from __future__ import annotations

import io
import itertools
import json
import math
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from tests.fuzz.strategies import CHANGES, FLOATS, INTS, JSON_VALUES, KEEPS, SCALARS, fuzz, mutated, told
from vllm_kl.offline import jsonl
from vllm_kl.offline.columns import IDS, STARTS, Columns, layout_of
from vllm_kl.offline.manifest import NAME, Manifest
from vllm_kl.offline.parts import cut, find_files, numbered, read_part, survey
from vllm_kl.offline.rows import ReadRows, Texts
from vllm_kl.offline.storage import Folder
from vllm_kl.view.samples import read_samples, write_samples

HOME = tempfile.TemporaryDirectory(prefix="vllm_kl_fuzz_")  # removed when Python ends
COLUMNS = Columns()
ROLES = COLUMNS.role_of
IDS_VALUES = st.one_of(st.lists(st.integers(0, 9), max_size=4), st.lists(INTS, max_size=3), JSON_VALUES)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "ids": IDS_VALUES,
        "start": st.one_of(st.integers(0, 3), SCALARS),
        "prompt_ids": IDS_VALUES,
        "response_ids": st.one_of(IDS_VALUES, st.lists(IDS_VALUES, max_size=2)),
        "x": JSON_VALUES,
        "y": st.one_of(st.integers(0, 5), FLOATS),
        "\ud801": st.integers(0, 1),
        "": JSON_VALUES,
    },
)


def read_all(parts, schema):
    return [read_part(part, schema, COLUMNS) for part in parts]


def put(name, data):
    path = Path(HOME.name, name)
    path.write_bytes(data)
    return str(path)


def read_lines(data, part_bytes):
    """Read JSON lines as ``vllm-kl score`` reads them."""
    path = put("rows.jsonl", data)
    parts = cut(find_files(path), part_bytes)
    found = [survey(part, ROLES) for part in parts]
    types: jsonl.Types = {}
    for _, of_part in found:
        for name, seen in of_part.items():
            types.setdefault(name, set()).update(seen)
    schema = jsonl.schema_of(types, ROLES)
    if not schema.names:  # layout_of refuses it before a part is read
        return None, []
    tables = read_all(numbered([part for part, _ in found]), schema)
    return schema, tables


def same(found, sent, field):
    """Whether a value of the table is the one of the file."""
    if field.metadata:  # JSON as text
        return (sent is None and found is None) or same(json.loads(found), sent, pa.field("x", pa.null()))
    if isinstance(found, dict):
        # A struct has the keys of all rows.
        return (
            isinstance(sent, dict)
            and all(same(one, sent.get(key), field.with_metadata(None)) for key, one in found.items())
            and all(key in found for key in sent)
        )
    if isinstance(found, list):
        return (
            isinstance(sent, list)
            and len(found) == len(sent)
            and all(map(same, found, sent, itertools.repeat(field.with_metadata(None))))
        )
    if isinstance(found, float) and isinstance(sent, (int, float)) and not isinstance(sent, bool):
        return found == sent or (math.isnan(found) and math.isnan(sent))
    return type(found) is type(sent) and found == sent


@fuzz(
    rows=st.lists(ROWS, max_size=4),
    part_bytes=st.sampled_from([7, 40, 10**6]),
    changes=st.one_of(st.just([]), CHANGES),
    few=120,
    share=0.4,
)
def test_lines_are_rows_or_errors_and_can_be_written(rows, part_bytes, changes):
    sent = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    data = mutated(sent, changes)
    found = told(lambda: read_lines(data, part_bytes))
    if found is None:
        return
    schema, tables = found
    if schema is None:
        return
    written = [line for line in data.split(b"\n") if line.strip()]
    errors = [one for table in tables for one in table.column("error").to_pylist()]
    assert len(errors) == len(written)
    for table in tables:
        pq.write_table(table, io.BytesIO())
    if data == sent:
        values = [one for table in tables for one in table.to_pylist()]
        for row, value, error in zip(rows, values, errors, strict=True):
            for field in schema:
                if error is None:
                    assert same(value[field.name], row.get(field.name), field), (field, row, value)
    layout = told(lambda: layout_of(schema, COLUMNS))
    if layout is not None and not layout.has_texts:
        for table in tables:
            check_rows(ReadRows(layout, COLUMNS, Texts())(table), layout)


def check_rows(table, layout):
    """The ids of each row are those of its columns, or it has an error."""
    for row in table.to_pylist():
        if row["error"] is not None:
            assert row[IDS] is None
            continue
        assert len(row[IDS]) == len(row[STARTS])
        if layout.kind == "ids":
            assert row[IDS] == [[one - (one >= 2**63) * 2**64 for one in row["ids"]]]


@fuzz(data=st.one_of(st.binary(max_size=80), JSON_VALUES.map(lambda v: json.dumps(v).encode())), share=1.0)
def test_any_line_is_parsed_or_told(data):
    found = jsonl.parse(data)
    assert isinstance(found, (dict, str))
    json.dumps(found, ensure_ascii=False).encode()  # it can be written


TABLES = st.sampled_from(
    [
        pa.table({"ids": [[1, 2], [3]], "start": [1, 1]}),
        pa.table({"prompt": ["a", None], "responses": [["b", "c"], []]}),
        pa.table({"messages": [[{"role": "user", "content": "a"}]]}),
        pa.table({"ids": pa.array([[1, 2]], pa.list_(pa.uint8())), "x": pa.array([b"\xff"])}),
        pa.table({"ids": pa.array([], pa.list_(pa.int32()))}),
        pa.Table.from_arrays([pa.array([[1]]), pa.array([[2]])], names=["ids", "ids"]),
        pa.table({"ids": pa.array([[1, 2]], pa.list_(pa.int64(), 2)), "s": [{"a": 1}]}),
    ]
)


def as_bytes(table, kind):
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def read_table(path):
    parts = cut(find_files(path), 16)
    types: jsonl.Types = {}
    for part in parts:
        for name, seen in survey(part, ROLES)[1].items():
            types.setdefault(name, set()).update(seen)
    schema = jsonl.schema_of(types, ROLES)
    return schema, read_all(numbered(parts), schema)


@fuzz(
    table=TABLES, kind=st.sampled_from(["parquet", "arrow"]), changes=CHANGES, keep=KEEPS, few=100, share=0.5
)
def test_a_changed_file_is_read_or_refused(table, kind, changes, keep):
    sent = as_bytes(table, kind)
    data = mutated(sent, changes, keep)
    path = put(f"table.{kind}", data)
    found = told(lambda: read_table(path), names=path)
    if found is not None and data == sent:
        rows = [row for one in found[1] for row in one.select(table.column_names).to_pylist()]
        assert rows == table.to_pylist()


SAMPLE = {"token_ids": [5, 6, 7], "log_probs": [-1.0, -2.0], "ref_log_probs": [-1.5, -1.0]}


@fuzz(
    changes=st.dictionaries(
        st.sampled_from([*SAMPLE, "mask", "kl", "tokens", "query", "reward", "policy_version"]),
        st.one_of(JSON_VALUES, st.lists(FLOATS, max_size=3), st.lists(st.booleans(), max_size=3)),
        max_size=3,
    ),
    mutations=CHANGES,
    share=1.0,
    few=60,
)
def test_samples_are_read_and_written_again_or_refused(changes, mutations):
    data = mutated(json.dumps(SAMPLE | changes).encode(), mutations)
    path = put("samples.jsonl", data)
    found = told(lambda: read_samples(path), names=path)
    if found is not None:
        again = Path(HOME.name, "again.jsonl")
        write_samples(again, found)
        assert read_samples(again) == found


def good_manifest():
    folder = Folder(HOME.name)
    Manifest(settings={"a": 1}, files=[], schema=pa.schema([("ids", pa.int64())]), parts=[]).write(folder)
    return Path(HOME.name, NAME).read_bytes()


@fuzz(
    fields=st.one_of(
        st.none(),
        st.dictionaries(st.sampled_from(["settings", "files", "schema", "parts"]), JSON_VALUES, min_size=1),
        JSON_VALUES,
    ),
    changes=CHANGES,
    share=0.5,
)
def test_a_manifest_of_another_program_is_refused(fields, changes):
    sent = good_manifest()
    data = mutated(sent, changes) if fields is None else json.dumps(fields).encode()
    if fields and isinstance(fields, dict):
        data = json.dumps(json.loads(sent) | fields).encode()
    put(NAME, data)
    found = told(lambda: Manifest.read(Folder(HOME.name)), names=HOME.name)
    assert found is None or isinstance(found.settings, dict)
