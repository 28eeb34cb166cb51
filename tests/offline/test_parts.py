"""Files are cut into parts whose rows, laid end to end, are the rows of the files. No Ray, no engine."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_kl.errors import InputError
from vllm_kl.offline import jsonl
from vllm_kl.offline.columns import PART, Columns
from vllm_kl.offline.parts import cut, find_files, numbered, part_bytes_of, read_part, survey
from vllm_kl.offline.storage import File

ROWS = [{"ids": list(range(i % 7 + 1)), "n": i, "text": "é" * (i % 5)} for i in range(101)]


def write(path, kind):
    table = pa.Table.from_pylist(ROWS)
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n")
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=17)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            for batch in table.to_batches(max_chunksize=13):
                writer.write_batch(batch)


def rows_of(place, part_bytes, limit=None):
    columns = Columns()
    surveys = [survey(part, columns.role_of) for part in cut(find_files(place), part_bytes)]
    types = {}
    for _, of_part in surveys:
        for name, seen in of_part.items():
            types.setdefault(name, set()).update(seen)
    schema = jsonl.schema_of(types, columns.role_of)
    parts = numbered([part for part, _ in surveys], limit)
    tables = [read_part(part, schema, columns) for part in parts]
    assert [part.first_row for part in parts] == [
        sum(t.num_rows for t in tables[:i]) for i in range(len(parts))
    ]
    return pa.concat_tables(tables), len(parts)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("part_bytes", [1, 97, 1000, 10**6])
def test_parts_laid_end_to_end_are_the_file(tmp_path, kind, part_bytes):
    path = tmp_path / f"data.{kind}"
    write(path, kind)
    table, num_parts = rows_of(str(path), part_bytes)
    assert table.select(["ids", "n", "text"]).to_pylist() == ROWS
    assert num_parts > 1 or part_bytes == 10**6


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_a_limit_keeps_the_first_rows(tmp_path, kind):
    for name in "ab":
        write(tmp_path / f"{name}.{kind}", kind)
    table, _ = rows_of(str(tmp_path), 300, limit=130)
    assert table.select(["ids", "n", "text"]).to_pylist() == (ROWS + ROWS)[:130]
    table, _ = rows_of(str(tmp_path / f"?.{kind}"), 300)
    assert table.num_rows == 202


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.parquet.ZST", "b.JSONL"])
def test_data_that_would_be_left_out_is_named(tmp_path, name):
    write(tmp_path / "a.jsonl", "jsonl")
    (tmp_path / "README.md").write_text("no data")
    assert [file.path for file in find_files(str(tmp_path))] == [str(tmp_path / "a.jsonl")]
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"{name} looks like data and would be left out"):
        find_files(str(tmp_path))


def test_a_folder_without_data_is_an_error(tmp_path):
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text("no data")
    with pytest.raises(InputError, match="no file with a name that ends with one of"):
        find_files(str(tmp_path))


def test_the_files_of_save_to_disk_are_found_and_its_splits_are_named(tmp_path):
    write(tmp_path / "data-00000-of-00001.arrow", "arrow")
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert [file.path for file in find_files(str(tmp_path))] == [str(tmp_path / "data-00000-of-00001.arrow")]
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(InputError, match="several splits"):
        find_files(str(tmp_path))


def test_what_is_no_data_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        find_files(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no such file"):
        find_files(str(tmp_path))
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(InputError, match=r"ends with one of \.jsonl"):
        cut(find_files(str(tmp_path / "x.csv")), 10)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="no whole Parquet file"):
        cut(find_files(str(tmp_path / "x.parquet")), 10)
    (tmp_path / "x.arrow").write_bytes(b"no")
    with pytest.raises(InputError, match="no whole file of Arrow"):
        cut(find_files(str(tmp_path / "x.arrow")), 10)


class Harmful:
    """What writes a file when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_no_value_of_a_file_is_unpickled(tmp_path, kind, is_nested):
    """Ray Data registers a type of column whose values are pickles."""
    extension = pytest.importorskip("ray.data.extensions", reason="pip install 'vllm-kl[ray]'")
    harmful = extension.ArrowPythonObjectArray.from_objects([Harmful(tmp_path / "run"), None])
    if is_nested:
        harmful = pa.StructArray.from_arrays([harmful], ["inner"])
    path = tmp_path / f"data.{kind}"
    table = pa.table({"ids": [[1, 2], [3, 4]], "note": harmful})
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(InputError, match="column 'note' holds pickled Python objects"):
        rows_of(str(path), 10**6)[0].to_pylist()  # as the writer of JSONL does
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("row_group_size", [7, 100, None])
def test_parts_of_a_row_group_of_any_size_have_their_rows(tmp_path, row_group_size):
    table = pa.table({"ids": [[i] * 50 for i in range(230)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=row_group_size, use_dictionary=False)
    parts = numbered(cut(find_files(str(tmp_path)), 4000))
    assert len(parts) > 10
    for part in parts:
        found = read_part(part, table.schema, Columns())
        assert found["ids"].to_pylist() == table["ids"][part.begin : part.end].to_pylist()
        assert set(found[PART].to_pylist()) == {part.index}


def test_a_file_that_changed_or_is_gone_is_an_error(tmp_path):
    path = tmp_path / "data.jsonl"
    write(path, "jsonl")
    columns = Columns()
    part, types = survey(cut(find_files(str(path)), 10**6)[0], columns.role_of)
    schema = jsonl.schema_of(types, columns.role_of)
    path.write_text("\n".join(path.read_text().splitlines()[:50]))
    with pytest.raises(InputError, match="has changed: expected 101 rows"):
        read_part(part, schema, columns)
    path.unlink()
    with pytest.raises(InputError, match="is gone now"):
        read_part(part, schema, columns)


def test_a_column_has_one_type_in_all_parts(tmp_path):
    lines = [
        {"ids": [1], "score": 1, "tag": "a", "extra": None},
        {"ids": [2], "score": 0.5, "tag": 3, "extra": {"x": 1}},
        {"ids": "bad", "score": None, "tag": [1], "more": 10**30},
        {"ids": [2.5], "score": 2},
        {"ids": [], "score": 2},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n[1]\n{broken\n\xff\n")
    table, num_parts = rows_of(str(path), 20)
    assert num_parts > 3
    assert table["ids"].to_pylist() == [[1], [2], None, None, [], None, None, None]
    assert table["score"].to_pylist()[:5] == [1.0, 0.5, None, 2.0, 2.0]
    assert table["tag"].to_pylist()[:3] == ['"a"', "3", "[1]"]
    assert table["extra"].to_pylist()[:3] == [None, {"x": 1}, None]
    assert table["more"].to_pylist()[2] == str(10**30)
    told = table["error"].to_pylist()
    assert told[:2] == [None, None]
    assert ["'bad'" in told[2], "[2.5]" in told[3], told[4]] == [True, True, None]
    assert ["expected a JSON object" in told[5], "not JSON" in told[6], "not JSON" in told[7]] == [True] * 3


def test_a_part_is_a_mebibyte_less_of_small_data_and_more_of_very_large_ones():
    sizes = {1 << 10: 16 << 10, 1 << 22: 1 << 17, 1 << 30: 1 << 20, 10**12: 10**8}
    for total, expected in sizes.items():
        assert part_bytes_of([File("x", total)]) == expected


def test_a_line_with_half_of_a_surrogate_pair_has_an_error_and_the_others_are_read(tmp_path):
    """JSON can write it, and no column of Arrow can hold it. Whole pairs are characters."""
    path = tmp_path / "data.jsonl"
    lines = [
        r'{"ids": [1], "x": "\ud83d\ude00"}',
        r'{"ids": [2], "x": "\ud83d"}',
        r'{"ids": [3], "\udc00": 1}',
    ]
    path.write_bytes("\n".join(lines).encode() + b'\n{"ids": [4], "x": "\xed\xa0\x80"}\n')
    rows = rows_of(str(path), 10**6)[0].to_pylist()
    assert [row["ids"] for row in rows] == [[1], None, None, None]
    assert rows[0]["x"] == "\U0001f600"
    assert [row["error"] is None for row in rows] == [True, False, False, False]
    assert "half of a surrogate pair" in rows[1]["error"]
    assert "not UTF-8" in rows[3]["error"]


@pytest.mark.parametrize(
    ("name", "other", "value"), [("ids", [], ""), ("ids", [1], ""), ("messages", [{"role": "user"}], "")]
)
def test_an_empty_text_in_a_column_of_lists_is_an_error_of_the_row(tmp_path, name, other, value):
    """Arrow takes it for an empty list."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"n": 1, name: one}) for one in (other, value)))
    good, bad = rows_of(str(path), 10**6)[0].to_pylist()
    assert good["error"] is None
    assert bad[name] is None
    assert f"column '{name}' holds ''" in bad["error"]


@pytest.mark.parametrize("part_bytes", [7, 10**6])
@pytest.mark.parametrize(
    "values",
    [
        (0.5, False),
        (False, 0.5),
        ([0.0, False], [1.0]),
        ([[0.5]], [[True]]),
        ({"a": 0.5}, {"a": True}),
        ([{"a": [0.5, True]}], None),
    ],
)
def test_a_boolean_beside_fractions_stays_one(tmp_path, values, part_bytes):
    """Arrow makes a float of it."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"ids": [1, 2], "x": value}) for value in values))
    rows = rows_of(str(path), part_bytes)[0].to_pylist()
    assert [row["error"] for row in rows] == [None, None]
    assert [None if row["x"] is None else json.loads(row["x"]) for row in rows] == list(values)


def test_a_column_that_parquet_has_no_type_for_is_json(tmp_path):
    deep = json.loads("[" * 70 + "]" * 70)
    rows = [{"ids": [1], "x": {}, "y": [{"a": {}}], "z": deep}, {"ids": [2], "x": {}, "y": [], "z": []}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = rows_of(str(path), 10**6)[0]
    pq.write_table(table, tmp_path / "out.parquet")
    for found, sent in zip(pq.read_table(tmp_path / "out.parquet").to_pylist(), rows, strict=True):
        assert {name: json.loads(found[name]) for name in "xyz"} == {name: sent[name] for name in "xyz"}
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[1], "x": {"a": 1}}))
    assert rows_of(str(path), 10**6)[0].column("x").to_pylist() == [{"a": None}, {"a": 1}]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    write(path, kind)
    whole = path.read_bytes()
    told = []
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + b"\x00\xff\x80" + whole[place + 3 :])
        try:
            rows_of(str(path), 10**6)
        except InputError as error:
            told.append(str(error))
    assert len(told) > 3
    assert all(str(path) in one for one in told)


def test_columns_of_one_name_are_refused(tmp_path):
    twins = pa.Table.from_arrays([pa.array([[1]]), pa.array([[2]])], names=["ids", "ids"])
    pq.write_table(twins, tmp_path / "data.parquet")
    with pytest.raises(InputError, match="has 2 columns with the name 'ids'"):
        rows_of(str(tmp_path), 10**6)


def test_files_whose_columns_have_no_type_together_are_refused(tmp_path):
    pq.write_table(pa.table({"ids": [[1]], "x": [2**60 + 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"ids": [[1]], "x": [0.5]}), tmp_path / "b.parquet")
    with pytest.raises(
        InputError, match=r"a\.parquet: column 'x' holds int64, of which not every value fits"
    ):
        rows_of(str(tmp_path), 10**6)


def test_a_state_of_another_program_is_no_matter(tmp_path):
    write(tmp_path / "data.arrow", "arrow")
    (tmp_path / "state.json").write_text('{"_data_files": [5, {"name": "x"}, {"filename": "data.arrow"}]}')
    assert len(find_files(str(tmp_path))) == 1
    (tmp_path / "state.json").write_text('{"_data_files": 5}')
    assert len(find_files(str(tmp_path))) == 1
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state\.json is not JSON"):
        find_files(str(tmp_path))
