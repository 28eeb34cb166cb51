"""What the library ``datasets`` writes is read, and it reads what this package writes."""

from __future__ import annotations

import pytest

from tests import local_ray
from tests.offline.helpers import check_oracle, run
from tests.offline.test_parts import rows_of
from tests.offline.test_rows import DIALOG, read, tokenizer_path  # noqa: F401
from vllm_kl.errors import InputError
from vllm_kl.offline.columns import IDS, STARTS, Columns, layout_of
from vllm_kl.offline.parts import find_files
from vllm_kl.offline.rows import ReadRows, Texts

datasets = pytest.importorskip("datasets", reason="pip install datasets")
from datasets import ClassLabel, Dataset, DatasetDict, Features, LargeList, List, Value  # noqa: E402

FEATURES = Features(
    {
        "prompt_ids": List(Value("int32")),
        "response_ids": LargeList(List(Value("int16"))),
        "kind": ClassLabel(names=["good", "bad"]),
        "note": Value("string"),
        "score": Value("float32"),
    }
)
ROWS = [
    {
        "prompt_ids": None if i == 3 else [5, 6, 7 + i],
        "response_ids": None if i == 5 else [[8], [9, 10][: i % 3]],
        "kind": i % 2,
        "note": None if i % 4 else f"é{i}",
        "score": i / 2,
    }
    for i in range(40)
]
NAMES = list(FEATURES)


def save(ds, path, kind):
    """Write a data set as ``datasets`` writes it; return the path to read."""
    if kind == "save_to_disk":
        ds.save_to_disk(path, num_shards=2)
        return path
    if kind == "to_parquet":
        ds.to_parquet(path / "data.parquet", batch_size=7)
        return path / "data.parquet"
    ds.to_json(path / "data.jsonl")
    return path / "data.jsonl"


@pytest.mark.parametrize("kind", ["save_to_disk", "to_parquet", "to_json"])
def test_every_row_is_read_with_its_types(tmp_path, kind):
    place = save(Dataset.from_list(ROWS, features=FEATURES), tmp_path, kind)
    table, num_parts = rows_of(str(place), 300)
    assert num_parts > 2
    assert table.select(NAMES).to_pylist() == ROWS
    columns = Columns()
    found = ReadRows(layout_of(table.schema, columns), columns, Texts())(table)
    for row, ids, starts, error in zip(
        ROWS, found[IDS].to_pylist(), found[STARTS].to_pylist(), found["error"].to_pylist(), strict=True
    ):
        if row["prompt_ids"] is None or row["response_ids"] is None:
            assert "is null" in error
            continue
        assert ids == [row["prompt_ids"] + response for response in row["response_ids"]]
        assert (starts, error) == ([3, 3], None)


@pytest.mark.parametrize("kind", ["save_to_disk", "to_parquet", "to_json"])
def test_dialogs_are_read(tmp_path, tokenizer_path, kind):  # noqa: F811
    called = [{"role": "user", "content": "a", "name": "bob"}, *DIALOG[1:]]
    ds = Dataset.from_list([{"messages": DIALOG, "id": 0}, {"messages": called, "id": 1}])
    table, _ = rows_of(str(save(ds, tmp_path, kind)), 10**6)
    ids, starts, masks, errors = read(table.select(["messages"]), tokenizer=tokenizer_path)
    assert errors == [None, None]
    expected = read(ds.with_format("arrow")[:].select(["messages"]), tokenizer=tokenizer_path)
    assert (ids, starts, masks, errors) == expected


def test_files_that_map_has_left_in_the_folder_are_not_read(tmp_path):
    Dataset.from_list(ROWS, features=FEATURES).save_to_disk(tmp_path)
    loaded = datasets.load_from_disk(tmp_path)
    loaded.map(lambda row: {"score": row["score"] + 1})
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    assert [file.path for file in find_files(str(tmp_path))] == [str(tmp_path / "data-00000-of-00001.arrow")]


@pytest.mark.usefixtures("cluster")
class TestOutput:
    pytestmark = local_ray.MARKS

    def test_datasets_reads_the_output_of_a_run(self, whole, tmp_path):
        home, *_, table = whole
        files = sorted(map(str, (home / "out").glob("part-*.parquet")))
        ds = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
        assert ds.features["ref_log_probs"] == List(Value("float32"))
        assert ds.with_format("arrow")[:].to_pylist() == table.to_pylist()

    @pytest.mark.nightly
    def test_its_rows_are_scored_and_its_columns_are_in_the_output(self, ref_path, ref_oracle, tmp_path):
        place = save(Dataset.from_list(ROWS, features=FEATURES), tmp_path / "data", "save_to_disk")
        summary = run(place, tmp_path / "out", ref_path)
        assert (summary.rows, summary.rejected) == (len(ROWS), 2)
        files = sorted(map(str, (tmp_path / "out").glob("part-*.parquet")))
        ds = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
        assert {name: ds.features[name] for name in NAMES} == dict(FEATURES)
        assert ds.select_columns(NAMES).to_list() == ROWS
        for row in ds:
            for response, found in zip(row["response_ids"] or [], row["ref_log_probs"] or [], strict=False):
                check_oracle(found, row["prompt_ids"] + response, 3, ref_oracle)


def test_a_folder_of_several_splits_is_refused_and_one_split_is_read(tmp_path):
    ds = Dataset.from_list(ROWS, features=FEATURES)
    DatasetDict(train=ds, test=ds.select(range(3))).save_to_disk(tmp_path)
    with pytest.raises(InputError, match="several splits: give the folder of one, such as .*/train"):
        find_files(str(tmp_path))
    table, _ = rows_of(str(tmp_path / "test"), 10**6)
    assert table.select(NAMES).to_pylist() == ROWS[:3]
