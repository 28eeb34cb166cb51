"""Files that are no manifest of an output are refused by name. No Ray, no engine."""

from __future__ import annotations

import pytest

from vllm_kl.errors import InputError
from vllm_kl.offline.manifest import Manifest
from vllm_kl.offline.storage import Folder


@pytest.mark.parametrize(
    "content", ["{", "[1]", "{}", '{"settings": 5, "files": [], "schema": "", "parts": []}', "\x80"]
)
def test_a_manifest_of_another_program_is_refused_by_name(tmp_path, content):
    (tmp_path / "_manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"_manifest\.json is (not JSON|no manifest of vllm-kl score)"):
        Manifest.read(Folder(str(tmp_path)))
