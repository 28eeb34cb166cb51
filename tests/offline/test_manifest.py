"""Files that are no manifest of an output are refused by name. No Ray, no engine."""

from __future__ import annotations

import base64
import json
import os

import pyarrow as pa
import pytest

from vllm_kl.errors import InputError
from vllm_kl.offline.manifest import Manifest, checksum
from vllm_kl.offline.parts import find_files
from vllm_kl.offline.storage import Folder


@pytest.mark.parametrize(
    "content", ["{", "[1]", "{}", '{"settings": 5, "files": [], "schema": "", "parts": []}', "\x80"]
)
def test_a_manifest_of_another_program_is_refused_by_name(tmp_path, content):
    (tmp_path / "_manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"_manifest\.json is (not JSON|no manifest of vllm-kl score)"):
        Manifest.read(Folder(str(tmp_path)))


def test_a_manifest_whose_schema_arrow_does_not_know_is_refused_by_name(tmp_path):
    folder = Folder(str(tmp_path))
    Manifest(settings={}, files=[], schema=pa.schema([("x", pa.int64())]), parts=[]).write(folder)
    file = tmp_path / "_manifest.json"
    content = json.loads(file.read_text())
    schema = base64.b64decode(content["schema"]).replace(
        (64).to_bytes(4, "little"), (128).to_bytes(4, "little")
    )
    file.write_text(json.dumps(content | {"schema": base64.b64encode(schema).decode()}))
    with pytest.raises(InputError, match=r"_manifest\.json is no manifest .*more than 64 bits"):
        Manifest.read(folder)


def test_what_a_trainer_and_this_output_add_to_a_models_folder_does_not_change_the_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "modeling.py").write_text("x = 1")
    before = checksum(str(tmp_path))
    for folder in ("checkpoint-10", "ref"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "_manifest.json").write_text("{}")
    (tmp_path / "_manifest.json").write_text("{}")
    assert checksum(str(tmp_path)) == before
    (tmp_path / "modeling.py").write_text("x = 2")
    assert checksum(str(tmp_path)) != before


class TestTheInputOfARunThatGoesOn:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"ids": [1]}\n' * 3)
        return tmp_path

    def check(self, folder, *, is_done=False):
        manifest = Manifest(settings={}, files=self.files, schema=pa.schema([]), parts=[])
        manifest.check_files((str(folder),), is_done=is_done)

    @pytest.fixture(autouse=True)
    def _begun(self, folder):
        self.files = find_files(str(folder))

    def test_the_same_files_written_again_go_on(self, folder):
        text = (folder / "a.jsonl").read_text()
        (folder / "a.jsonl").write_text(text)
        os.utime(folder / "a.jsonl", (1, 1))
        self.check(folder)

    @pytest.mark.parametrize("is_done", [False, True])
    def test_rows_that_came_after_it_are_not_left_out_silently(self, folder, is_done):
        (folder / "b.jsonl").write_text('{"ids": [1]}\n')
        with pytest.raises(
            InputError, match=r"(?s)b\.jsonl was not there when this output was begun.*--overwrite"
        ):
            self.check(folder, is_done=is_done)
        (folder / "b.jsonl").unlink()
        with (folder / "a.jsonl").open("a") as file:
            file.write('{"ids": [2]}\n')
        with pytest.raises(InputError, match=r"a\.jsonl had 39 bytes .* and has 52 now"):
            self.check(folder, is_done=is_done)

    def test_other_content_of_the_same_size_is_seen(self, folder):
        (folder / "a.jsonl").write_text('{"ids": [2]}\n' * 3)
        with pytest.raises(InputError, match="has 39 now, with other content"):
            self.check(folder)

    def test_the_file_that_is_gone_is_the_one_that_is_named(self, folder):
        (folder / "b.jsonl").write_text('{"ids": [1]}\n')
        data = (str(folder / "a.jsonl"), str(folder / "b.jsonl"))
        manifest = Manifest(settings={}, files=find_files(data), schema=pa.schema([]), parts=[])
        (folder / "b.jsonl").unlink()
        with pytest.raises(InputError, match=r"b\.jsonl was there .* and is gone now"):
            manifest.check_files(data, is_done=False)

    def test_only_a_finished_output_needs_no_input_any_more(self, folder):
        (folder / "a.jsonl").unlink()
        self.check(folder, is_done=True)
        with pytest.raises(InputError, match=r"a\.jsonl was there .* and is gone now"):
            self.check(folder)
