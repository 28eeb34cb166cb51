"""The folder of a run becomes samples for the page. No Ray, no engine."""

from __future__ import annotations

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from vllm_kl.cli import app
from vllm_kl.errors import InputError
from vllm_kl.offline.columns import NUM_CACHED, NUM_PROMPT, PART, Columns
from vllm_kl.offline.manifest import Manifest
from vllm_kl.offline.parts import Part
from vllm_kl.offline.samples import read_scored
from vllm_kl.offline.storage import Folder
from vllm_kl.offline.write_part import COUNTS, WritePart

COLUMNS = Columns(response_ids="chosen", prefix="of_")
INPUT = pa.schema([("prompt_ids", pa.list_(pa.int64())), ("chosen", pa.list_(pa.list_(pa.int64())))])
FIGURES = {NUM_PROMPT: [0, 0], NUM_CACHED: [0, 0], PART: pa.array([0, 0], pa.int32())}


@pytest.fixture(params=["parquet", "jsonl"])
def scored(request, tmp_path):
    """A folder of a group of two responses, and of a row that was not scored."""
    folder = Folder(str(tmp_path / "out"))
    folder.make(COUNTS)
    part = Part(index=0, path="data.parquet", format="parquet", begin=0, end=2, num_rows=2)
    settings = {"format": request.param, "policy.checksum": "", **COLUMNS.settings}
    Manifest(settings=settings, files=[], schema=INPUT, parts=[part]).write(folder)
    table = pa.table(
        {
            "prompt_ids": [[5, 6], [5]],
            "chosen": [[[7, 8], [9]], [[7]]],
            "of_ref_log_probs": [[[-1.0, -2.0], [-3.0]], None],
            "of_log_probs": [[[-1.5, -2.0], [-2.0]], None],
            "of_kl": [[[-0.5, 0.0], [1.0]], None],
            "of_num_tokens": [[2, 1], None],
            "of_error": [None, "too long"],
            **FIGURES,
        }
    )
    WritePart(folder, request.param, COLUMNS, {0: 2})(table)
    return tmp_path / "out"


def test_each_response_is_a_sample_and_rows_with_errors_are_none(scored):
    first, second = read_scored(scored)
    assert (first.token_ids, second.token_ids) == ([5, 6, 7, 8], [5, 6, 9])
    assert (first.log_probs, first.ref_log_probs, first.kl) == ([-1.5, -2.0], [-1.0, -2.0], [-0.5, 0.0])
    assert second.mask == [False, False, True]


def test_the_command_shows_them(scored, tmp_path):
    done = CliRunner().invoke(app, ["view", str(scored), "--html", str(tmp_path / "kl.html")])
    assert done.exit_code == 0, done.output
    assert "2 of 2 samples" in done.output
    assert (tmp_path / "kl.html").stat().st_size > 1000


def test_a_folder_of_one_model_and_other_folders_are_refused(scored, tmp_path):
    with pytest.raises(InputError, match="is no output of vllm-kl score"):
        read_scored(tmp_path)
    folder = Folder(str(scored))
    manifest = Manifest.read(folder)
    del manifest.settings["policy.checksum"]
    manifest.write(folder)
    with pytest.raises(InputError, match="Score with --policy MODEL2"):
        read_scored(scored)
