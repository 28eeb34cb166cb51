"""A part is written whole or not at all. No Ray, no engine."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_kl.errors import InputError
from vllm_kl.offline.columns import IDS, NUM_CACHED, NUM_PROMPT, PART, Columns
from vllm_kl.offline.storage import Folder
from vllm_kl.offline.write_part import COUNTS, WritePart


def part(index, num_rows=5):
    return pa.table(
        {
            "id": list(range(num_rows)),
            PART: pa.array([index] * num_rows, pa.int32()),
            IDS: [[[5, 6]]] * num_rows,
            "ref_log_probs": pa.array([[-1.5, float("-inf")]] * num_rows, pa.list_(pa.float32())),
            "num_tokens": [2] * num_rows,
            NUM_PROMPT: [2 * num_rows] + [0] * (num_rows - 1),
            NUM_CACHED: [1] + [0] * (num_rows - 1),
            "error": pa.array(["bad"] + [None] * (num_rows - 1), pa.string()),
        }
    )


@pytest.fixture
def folder(tmp_path):
    made = Folder(str(tmp_path / "out"))
    made.make(COUNTS)
    return made


def test_a_part_has_its_rows_its_name_and_its_figures(folder, tmp_path):
    told = WritePart(folder, "parquet", Columns(), {3: 5})(part(3)).to_pylist()
    figures = {"part": 3, "rows": 5, "rejected": 1, "scored_tokens": 10, "tokens": 10, "shared_tokens": 1}
    assert told == [figures]
    table = pq.read_table(tmp_path / "out" / "part-00000003.parquet")
    assert table.column_names == ["id", "ref_log_probs", "num_tokens", "error"]
    assert folder.read_json(f"{COUNTS}/part-00000003.json") == figures


def test_json_lines_keep_every_bit_of_a_log_prob(folder, tmp_path):
    table = part(0).set_column(3, "ref_log_probs", pa.array([[-0.1, -1e-30]] * 5, pa.list_(pa.float32())))
    WritePart(folder, "jsonl", Columns(), {0: 5})(table)
    rows = [json.loads(line) for line in (tmp_path / "out" / "part-00000000.jsonl").read_text().splitlines()]
    assert [row["ref_log_probs"] for row in rows] == table["ref_log_probs"].to_pylist()


def test_a_full_disk_is_an_error_and_finished_files_stay(folder, tmp_path):
    write = WritePart(folder, "parquet", Columns(), {0: 5, 1: 50_000})
    write(part(0))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("part-*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may be larger
        with pytest.raises(InputError, match=r"part-00000001\.parquet cannot be written: .*File too large"):
            write(part(1, 50_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*part-*")} == before


def test_a_part_that_is_not_whole_is_never_written(folder, tmp_path):
    with pytest.raises(AssertionError, match="whole"):
        WritePart(folder, "parquet", Columns(), {0: 6})(part(0))
    assert not list((tmp_path / "out").glob("*part-*"))


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_counts(
    folder, tmp_path, monkeypatch
):
    """After a power cut a name without its content would pass for a finished part."""
    seen = []
    fsync, move = os.fsync, shutil.move

    def sync(fd):
        path = Path(f"/proc/self/fd/{fd}").readlink()
        seen.append(
            ("sync", path.name.split(".")[1] if path.is_file() else "folder", path.stat().st_size > 0)
        )
        fsync(fd)

    def rename(source, target):
        move(source, target)
        seen.append(("rename", Path(target).name.split(".")[0]))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(shutil, "move", rename)
    folder.write("a.json", b"{}")
    assert seen == [("sync", "a", True), ("rename", "a"), ("sync", "folder", True)]
    assert (tmp_path / "out" / "a.json").read_bytes() == b"{}"
