"""Checkpoints: written in the names that they have on disk, and refused if they are of another model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.weights.helpers import tensors_in
from vllm_kl.errors import WeightsError
from vllm_kl.weights import checkpoint


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_names_of_a_checkpoint_on_disk_are_written_for_every_architecture(tmp_path, name):
    """transformers fuses experts in memory, and vLLM reads them as they are on disk."""
    folder = tiny.build_architecture(tmp_path / name, name)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    skeleton = checkpoint.Skeleton(str(folder))
    files = skeleton.write(skeleton.checked(state))
    written = tensors_in(files.folder)
    sent = skeleton.as_in_files(skeleton.checked(state))  # by NCCL
    assert written.keys() == sent.keys() == tensors_in(folder).keys()
    for key, tensor in tensors_in(folder).items():
        assert torch.equal(tensor, written[key])
        assert torch.equal(tensor, sent[key])


def test_a_checkpoint_is_read_in_the_engines_revision_and_by_its_code(folders, monkeypatch):
    asked = []
    load = AutoModelForCausalLM.from_pretrained

    def note(source, **options):
        asked.append((options["revision"], options["trust_remote_code"]))
        return load(source, dtype=options["dtype"], output_loading_info=options["output_loading_info"])

    skeleton = checkpoint.Skeleton(str(folders[0]), revision="a1b2", trust_remote_code=True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", note)
    for folder in folders[:2]:
        skeleton.read(folder)
    assert asked == [("a1b2", True), ("main", True)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"rms_norm_eps": 0.5},
            r"is another model: its configuration has rms_norm_eps=0.5, the engine's 1e-06",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            r"is another model: .*rope_parameters=.*7\.0",
        ),
        (
            {"intermediate_size": 96},
            r"mlp\.down_proj\.weight has shape \[64, 128\], its configuration says \[64, 96\]",
        ),
    ],
)
def test_a_checkpoint_that_computes_otherwise_is_not_taken_for_the_engines_model(
    folders, tmp_path, setting, message
):
    folder = shutil.copytree(folders[1], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    skeleton = checkpoint.Skeleton(str(folders[0]))
    skeleton.read(folder)
    (folder / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(WeightsError, match=message):
        skeleton.read(folder)


def test_a_damaged_checkpoint_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:9000])
    with pytest.raises(WeightsError, match="no checkpoint that transformers can read"):
        checkpoint.Skeleton(str(folders[0])).read(folder)
