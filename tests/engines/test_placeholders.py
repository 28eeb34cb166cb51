"""Tests that placeholder ids are refused, and that a vision-language checkpoint serves its text.

The model is a tiny Gemma 3 with its vision tower. torchvision is not installed. The oracle is the whole
model of transformers in float64.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from tests import tiny
from vllm_kl import VLLMScorer, push_weights
from vllm_kl.checks import check_requests
from vllm_kl.engines.placeholders import notes_on, placeholder_ids
from vllm_kl.errors import InputError, OptionError, WeightsError
from vllm_kl.plugin.text_only import naming_missing_package
from vllm_kl.transforms.transformers_scorer import TransformersScorer
from vllm_kl.types import EngineInfo
from vllm_kl.weights.checkpoint import Skeleton, _auto_class, _names_of_text, _text_name

VOCAB, IMAGE, BEGIN_OF_IMAGE = 320, 5, 3
SEQUENCES = [[7 + (11 * seed + n * n) % 280 for n in range(length)] for seed, length in enumerate((40, 90))]
WITH_IMAGE = [7, 9, BEGIN_OF_IMAGE, IMAGE, IMAGE, 4, 20, 21, 30]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3")
    _gemma3(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(path: Path) -> Iterator[VLLMScorer]:
    with VLLMScorer(str(path), **tiny.ENGINE_OPTIONS) as scorer:
        yield scorer


def test_a_vision_language_checkpoint_scores_text_as_the_whole_model_does(scorer: VLLMScorer, path: Path):
    assert scorer.readout == "pooling"
    model = _read(path).double()
    for got, ids in zip(scorer.score(SEQUENCES), SEQUENCES, strict=True):
        torch.testing.assert_close(got.double(), _log_probs(model, ids), atol=2e-5, rtol=0)


def test_an_id_that_stands_for_an_image_is_refused_wherever_it_lies(scorer: VLLMScorer):
    expected = (
        r"sequence 1, token 3: id 5 is the model's placeholder for an image "
        r"\(image_token_index\).*2 such tokens"
    )
    with pytest.raises(InputError, match=expected):
        scorer.score([SEQUENCES[0], WITH_IMAGE], start=[1, 6])
    with pytest.raises(InputError, match=r"sequence 0, token 2: id 5 (?s:.*)placeholders='as_text'"):
        scorer.score([[7, 8, IMAGE]])


def test_the_tokens_around_an_image_are_ordinary(scorer: VLLMScorer, path: Path):
    ids = [7, 9, BEGIN_OF_IMAGE, 4, 20]
    torch.testing.assert_close(
        scorer.score([ids])[0].double(), _log_probs(_read(path).double(), ids), atol=2e-5, rtol=0
    )


def test_placeholders_are_ordinary_tokens_where_the_caller_says_so(scorer: VLLMScorer, path: Path):
    as_text = VLLMScorer(scorer._engine, placeholders="as_text")
    want = _log_probs(_read(path).double(), WITH_IMAGE)
    torch.testing.assert_close(as_text.score([WITH_IMAGE])[0].double(), want, atol=2e-5, rtol=0)
    with pytest.raises(
        OptionError, match="placeholders='text' does not exist; choose 'refuse', or 'as_text'"
    ):
        VLLMScorer(scorer._engine, placeholders="text")


def test_a_transformers_side_refuses_them_too(path: Path):
    model, ids = _read(path), torch.tensor(WITH_IMAGE)
    with pytest.raises(InputError, match="sequence 0, token 3: id 5 is the model's placeholder for an image"):
        TransformersScorer(model).score([ids], [1])
    want = _log_probs(model, WITH_IMAGE)
    with torch.no_grad():
        got = TransformersScorer(model, placeholders="as_text").score([ids], [1])[0]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


# The last in this file that scores: it changes the engine's weights.
def test_a_text_only_trainer_pushes_and_the_vision_tower_stays(
    scorer: VLLMScorer, path: Path, caplog: pytest.LogCaptureFixture
):
    before = scorer.score(SEQUENCES)
    assert push_weights(scorer, _read(path)) == 1  # the whole model, as it is
    assert all(map(torch.equal, scorer.score(SEQUENCES), before))
    other = _gemma3(seed=1)
    trainer = Gemma3ForCausalLM(other.config.text_config)
    trainer.model.load_state_dict(other.model.language_model.state_dict())
    with caplog.at_level(logging.WARNING, "vllm_kl"):
        assert push_weights(scorer, trainer) == 2
    assert "these weights stay as they are: model.multi_modal_projector" in caplog.text
    other = other.double()
    for got, ids in zip(scorer.score(SEQUENCES), SEQUENCES, strict=True):
        torch.testing.assert_close(got.double(), _log_probs(other, ids), atol=2e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_a_state_dict_of_the_language_model_maps_by_prefix(path: Path, prefix: str):
    skeleton, whole = Skeleton(str(path)), _read(path).state_dict()
    text = {
        name.replace("model.language_model.", prefix): t
        for name, t in whole.items()
        if "language_model" in name
    }
    checked = skeleton.checked(text)
    assert checked.keys() == {name for name in whole if "language_model" in name}
    written = skeleton.write(checked)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in skeleton.read(written.folder).items())


def test_what_does_not_map_is_refused_by_name(path: Path):
    skeleton, whole = Skeleton(str(path)), _read(path).state_dict()
    text = {name: tensor for name, tensor in whole.items() if "language_model" in name}
    with pytest.raises(WeightsError, match=r"engine.s model: unknown model\.extra\.weight"):
        skeleton.checked({**text, "model.extra.weight": torch.zeros(3)})
    with pytest.raises(WeightsError, match=r"missing model\.language_model\.norm\.weight\. Expected"):
        skeleton.checked(
            {name: tensor for name, tensor in text.items() if not name.endswith("language_model.norm.weight")}
        )
    with pytest.raises(WeightsError, match=r"model\.norm\.weight: .* twice, under two names"):
        skeleton.checked({**text, "model.norm.weight": whole["model.language_model.norm.weight"]})
    part_of_the_tower = {name: tensor for name, tensor in whole.items() if "post_layernorm" not in name}
    with pytest.raises(WeightsError, match=r"missing model\.vision_tower\.post_layernorm"):
        skeleton.checked(part_of_the_tower)


def test_a_checkpoint_that_lacks_a_tensor_is_not_filled_with_random_numbers(path: Path, tmp_path: Path):
    model = _read(path)
    state = {
        name: t for name, t in model.state_dict().items() if not name.endswith("language_model.norm.weight")
    }
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(WeightsError, match=r"missing model\.language_model\.norm\.weight"):
        Skeleton(str(path)).read(tmp_path)


PLACEHOLDERS = {
    "gemma3": {262144},
    "gemma3n": {262145, 262273},  # audio is the second
    "gemma4": {258880, 258884, 258881},
    "qwen2_vl": {151655, 151656},
    "qwen2_5_vl": {151655, 151656},
    "qwen3_vl": {151655, 151656},
    "qwen3_omni_moe": {151646, 151655, 151656},  # in a config inside the config
    "qwen2_audio": {151646},
    "llava": {32000},
    "llava_onevision": {151646, 151647},
    "mllama": {128256},
    "internvl": {151667},
    "mistral3": {10},
    "phi4_multimodal": {200010, 200011},  # in the configs of the towers
    "idefics3": {128257},
    "smolvlm": {128257},
    "llama4": {200092},
    "glm4v": {151343, 151344},
    "ovis2": {151665, 151666, 151667, 151668, 151669, 151670},
    "granite_speech": {49155},
}


@pytest.mark.parametrize("kind", PLACEHOLDERS)
def test_placeholders_are_found_in_the_config_of_every_kind(kind: str):
    assert placeholder_ids(AutoConfig.for_model(kind)).keys() == PLACEHOLDERS[kind]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "gemma2", "gemma3_text", "mixtral", "gpt2"])
def test_a_model_of_text_has_no_placeholders(kind: str):
    assert placeholder_ids(AutoConfig.for_model(kind)) == {}


def test_ids_set_later_and_given_as_names_of_other_kinds_are_found():
    voxtral = AutoConfig.for_model("voxtral", audio_token_id=24)
    assert placeholder_ids(voxtral) == {24: "audio (audio_token_id)"}
    remote = transformers.PreTrainedConfig(
        media_placeholder_token_id=9, image_start_token_id=8, vision={"img_context_token_id": 7}
    )
    assert placeholder_ids(remote).keys() == {7, 9}
    ernie = transformers.PreTrainedConfig(im_patch_id=6, im_start_id=5, im_end_id=4, vision_start_token_id=3)
    assert placeholder_ids(ernie) == {6: "an image (im_patch_id)"}


@pytest.mark.parametrize(
    "kind", ["gemma3", "qwen2_5_vl", "qwen3_vl", "llava", "mistral3", "llama4", "qwen2_audio", "mllama"]
)
def test_the_language_model_is_told_from_the_towers_in_every_kind(kind: str):
    config = AutoConfig.for_model(kind)
    for part in (
        config.get_text_config(),
        getattr(config, "vision_config", None),
        getattr(config, "audio_config", None),
    ):
        for depth in ("num_hidden_layers", "depth", "encoder_layers"):
            if hasattr(part, depth):
                setattr(part, depth, 2)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:2]
    with torch.device("meta"):
        model = _auto_class(config).from_config(config)
    names = set(model.state_dict())
    text = _names_of_text(model) & names
    assert {_text_name(name).partition(".")[0] for name in text} == {
        "embed_tokens",
        "layers",
        "norm",
        "lm_head",
    }
    assert not any(_text_name(name).startswith(("layers", "lm_head")) for name in names - text)
    assert len({_text_name(name) for name in names}) == len(names)


def test_an_id_beyond_the_heads_rows_is_told_from_a_label_that_is_ignored():
    info = EngineInfo(readout="flat", vocab_size=320, max_sequence_len=None)
    check_requests([[1, 319]], None, info)  # beyond a tokenizer of 300, within the head
    with pytest.raises(
        InputError,
        match=r"sequence 0, token 1: id 320 is outside .*\[0, 320\)\.\nThe model's head has 320 rows",
    ) as beyond:
        check_requests([[1, 320]], None, info)
    assert "-100" not in str(beyond.value)
    with pytest.raises(
        InputError,
        match=r"(?s)sequence 0, token 2: id -100 is outside .* ignored labels such as -100 must be cut off",
    ):
        check_requests([[1, 2, -100]], None, info)


def test_a_placeholder_outside_the_vocabulary_is_told_by_what_it_is():
    info = EngineInfo(
        readout="flat",
        vocab_size=320,
        max_sequence_len=None,
        placeholders={-200: "an image (image_token_index)"},
    )
    with pytest.raises(InputError, match="id -200 is the model's placeholder for an image"):
        check_requests([[1, -200]], None, info)


@pytest.mark.parametrize("serves_images", [False, True])
def test_a_package_that_a_models_module_wants_is_named(monkeypatch: pytest.MonkeyPatch, serves_images: bool):
    from vllm import ModelRegistry

    def load() -> None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setitem(ModelRegistry.models, "Seeing", SimpleNamespace(load_model_cls=load))
    given = {"language_model_only": False} if serves_images else {}
    cure = ", or pass language_model_only=True to serve its text" if serves_images else ""
    with (
        pytest.raises(
            OptionError, match=f"vLLM's Seeing needs timm, which is not installed. Install it{cure}$"
        ),
        naming_missing_package(given),
    ):
        raise ValueError(
            "Value error, Model architectures ['Seeing'] failed to be inspected. Please check the logs"
        )
    with pytest.raises(ValueError, match="too long"), naming_missing_package(given):
        raise ValueError("max_model_len is too long")


def test_a_multimodal_model_whose_config_names_no_placeholder_has_a_note():
    seeing = SimpleNamespace(is_multimodal_model=True, architecture="Seeing")
    assert notes_on(seeing, {5: "an image"}) == notes_on(None, {}) == ()
    assert notes_on(SimpleNamespace(is_multimodal_model=False, architecture="Reading"), {}) == ()
    (note,) = notes_on(seeing, {})
    assert note.startswith("the config of Seeing does not name the ids that stand for an image")


@pytest.mark.nightly
def test_vllm_imports_its_vision_models_where_torchvision_is_missing():
    code = (
        "import sys\n"
        "from vllm_kl.plugin import text_only; text_only.enable_text_only()\n"
        "from vllm import ModelRegistry\n"
        "for name in ('Gemma3ForConditionalGeneration', 'Qwen2_5_VLForConditionalGeneration',\n"
        "             'LlavaForConditionalGeneration', 'Llama4ForConditionalGeneration',\n"
        "             'InternVLChatModel', 'Mistral3ForConditionalGeneration'):\n"
        "    ModelRegistry.models[name].load_model_cls()\n"
        "import transformers\n"
        "print('torchvision:', transformers.utils.is_torchvision_available())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "torchvision: " in run.stdout


def _gemma3(seed: int) -> Gemma3ForConditionalGeneration:
    torch.manual_seed(seed)
    text = {
        **tiny._SIZES,
        "vocab_size": VOCAB,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
    }
    text |= {"tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=BEGIN_OF_IMAGE,
        eoi_token_index=4,
        image_token_index=IMAGE,
        eos_token_id=2,
    )
    return Gemma3ForConditionalGeneration(config).eval()


def _read(path: Path) -> Gemma3ForConditionalGeneration:
    return Gemma3ForConditionalGeneration.from_pretrained(path, attn_implementation="eager").eval()


@torch.no_grad()
def _log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """Return ``[L - 1]``: of every token but the first."""
    tokens = torch.tensor(ids)
    rows = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
    return rows.gather(-1, tokens[1:, None])[:, 0]
