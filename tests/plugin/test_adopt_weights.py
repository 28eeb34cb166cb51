"""Tests that a model adopts all weights of another model: tensors, floats, tensors that it makes later."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_kl.errors import WeightsError
from vllm_kl.plugin import adopt_weights, load_weights, missing_weights, second_model
from vllm_kl.weights.checkpoint import Skeleton


class Scaled(torch.nn.Module):
    """A layer that takes a number out of its weight, as vLLM's do with scales."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.scale = weight.max().item()
        self.bounds = {"low": weight.min().item()}

    def forward(self, x):
        return (self.weight * self.scale - self.bounds["low"]) @ x


class Late(torch.nn.Module):
    """A layer that joins its weights in its first forward, as vLLM's runner of experts does with gates."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.joined, self.last_ids = None, None

    def forward(self, x):
        if self.joined is None:
            self.joined = torch.cat([self.weight.detach(), 2 * self.weight.detach()])
        self.last_ids = torch.arange(3)
        return self.joined @ x


class Cast(torch.nn.Module):
    """A layer that casts a buffer to the dtype of its first input, as vLLM's rotary embeddings do."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("cache", weight)

    def forward(self, x):
        self.cache = self.cache.to(torch.bfloat16)
        return self.cache @ x.bfloat16()


@pytest.mark.parametrize("kind", [Scaled, Late, Cast])
def test_after_an_adoption_a_layer_computes_what_the_loaded_one_does(kind):
    weights, x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    serving, loaded = (torch.nn.Sequential(kind(weight.clone())) for weight in weights)
    before = serving(x)
    found = adopt_weights.pair_tensors(serving, loaded)
    assert torch.equal(serving(x), before)
    adopt_weights.adopt(found)
    assert found.obstacles == []
    assert torch.equal(serving(x), torch.nn.Sequential(kind(weights[1].clone()))(x))
    assert not torch.equal(serving(x), before)
    assert bool(found.moved) == (kind is not Cast)  # compiled code would go on with the old ones


def test_nothing_is_moved_of_a_layer_with_the_same_weights_that_has_computed_nothing():
    layers = [torch.nn.Sequential(Scaled(torch.eye(4)), Late(torch.eye(4))) for _ in range(2)]
    assert adopt_weights.pair_tensors(*layers).moved == []


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float8_e4m3fn)])
def test_a_tensor_of_another_kind_is_an_obstacle(dtypes):
    serving, loaded = (Late(torch.eye(4).to(dtype)) for dtype in dtypes)
    assert "is torch." in adopt_weights.pair_tensors(serving, loaded).obstacles[0]


def test_a_number_in_a_tuple_cannot_be_put_there_and_is_an_obstacle():
    serving, loaded = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    serving.bounds, loaded.bounds = (0.0, 1.0), (0.0, 2.0)
    assert adopt_weights.pair_tensors(serving, loaded).obstacles == [
        ".bounds.1 is a float that cannot be looked into"
    ]


QUANTIZATION = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def quantised(policy_path, tmp_path_factory):
    """A checkpoint with one layer in 8 bits, beside a scale; as compressed-tensors writes it."""
    folder = tmp_path_factory.mktemp("quantised")
    tensors = load_file(policy_path / "model.safetensors")
    scale = tensors[UP].abs().amax(1, keepdim=True) / 127
    tensors |= {UP: (tensors[UP] / scale).round().to(torch.int8), f"{UP}_scale": scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((policy_path / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))
    return folder


def test_a_state_dict_is_refused_by_an_engine_whose_checkpoint_is_quantised(quantised, policy_path):
    skeleton = Skeleton(str(quantised))
    for call, source in (
        (skeleton.checked, AutoModelForCausalLM.from_pretrained(policy_path)),
        (skeleton.read, policy_path),
        (skeleton.read, quantised),
    ):
        with pytest.raises(
            WeightsError,
            match=r"is quantised \(compressed-tensors\).*no place for (?s:.*)unquantised checkpoint",
        ):
            call(source)


def test_a_folder_that_is_not_quantised_as_the_engines_checkpoint_is_refused(
    quantised, policy_path, tmp_path
):
    second_model._check_format(quantised, str(quantised))
    with pytest.raises(
        ValueError,
        match=rf"not quantised in the same way: {UP} is I8 in the engine's checkpoint, and a float here",
    ):
        second_model._check_format(policy_path, str(quantised))
    tensors = load_file(quantised / "model.safetensors")
    del tensors[f"{UP}_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"{UP}_scale is a float in the engine's checkpoint, and missing here"
    ):
        second_model._check_format(tmp_path, str(quantised))


class Part(torch.nn.Module):
    """A parameter as vLLM has it: experts, each of two parts."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(8, 4), (1152, 896), (256, 64, 64), (300, 1024), (3, 100_001)])
def test_a_part_that_no_checkpoint_fills_is_noticed_wherever_it_lies(shape):
    """The smallest part is a 512th of the rows of a parameter, or of its columns."""
    model = Part(*shape)
    for axis in range(len(shape)):
        length = max(1, shape[axis] // 512)
        for first in (0, shape[axis] // 2, shape[axis] - length):
            marks = list(missing_weights._mark(model))
            data = model.weight.data
            kept = data.narrow(axis, first, length).clone()
            data.zero_()
            data.narrow(axis, first, length).copy_(kept)
            assert [is_missing for _, is_missing in missing_weights._unmark(marks)] == [True], (axis, first)
            assert not data.isnan().any()


def test_what_a_request_makes_of_the_old_weights_between_load_and_adoption_is_replaced(monkeypatch):
    """As vLLM's layers of experts do in their first forward: the load came before, the adoption after it."""

    class Gate(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((2,), value))
            self.doubled = None

        def forward(self):
            self.doubled = self.weight * 2 if self.doubled is None else self.doubled
            return self.doubled

    serving, loaded = Gate(1.0), Gate(3.0)
    monkeypatch.setattr(load_weights, "load_second_model", lambda worker, folder, sent: loaded)
    monkeypatch.setattr(load_weights, "_is_compiled", lambda worker: False)
    runner = SimpleNamespace(
        get_model=lambda: serving, reset_encoder_cache=lambda: None, reset_mm_cache=lambda: None
    )
    worker = SimpleNamespace(model_runner=runner)
    assert load_weights.prepare(worker, "folder") == []
    assert serving().tolist() == [2, 2]  # a request in between
    load_weights.adopt(worker)
    assert serving().tolist() == [6, 6]
