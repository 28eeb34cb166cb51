"""``VLLMReference`` as a TorchRL wrapper: every input mode, both layouts, inside TorchRL's own transforms."""

from __future__ import annotations

import shutil

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.llm.transforms import kl as torchrl_kl
from torchrl.modules.llm import TransformersWrapper
from torchrl.modules.llm.policies import LLMWrapperBase, LogProbs, Masks, Tokens

from tests import batches
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl import VLLMReference
from vllm_kl.errors import InputError, OptionError

SEQUENCES = [[5, 256, 9, 258, 7, 258], [1, 2, 3], [258, 256, 256, 4, 8, 15, 16, 23]]


def batch_for(mode):
    if mode == "history":
        return batches.history_batch()
    return batches.text_batch() if mode == "text" else batches.ids_batch(SEQUENCES)


def real(td, key, i):
    """Row i of an entry without its padding, whatever the layout."""
    row = td.get(key, as_list=True)[i]
    return row[td.get(("masks", "all_attention_mask"), as_list=True)[i]]


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
@pytest.mark.parametrize("mode", ["history", "text", "tokens"])
def test_every_input_mode_and_layout_agrees_with_float64(make_reference, ref_oracle, mode, pad_output):
    td = batch_for(mode)
    out = make_reference(input_mode=mode, pad_output=pad_output)(td)
    assert out is td
    assert isinstance(td["ref_log_probs"], LogProbs)
    assert isinstance(td["tokens"], Tokens)
    assert isinstance(td["masks"], Masks)
    for i in range(len(td)):
        ids = real(td, ("tokens", "full"), i)
        got = real(td, ("ref_log_probs", "full"), i)
        want = ref_oracle.masked(ids, [t > 0 for t in range(len(ids))])
        torch.testing.assert_close(got.double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)
    if pad_output:
        dense = td.get(("ref_log_probs", "full"))
        assert dense.ndim == 2
        assert dense.dtype == torch.float32
        assert (dense[~td.get(("masks", "all_attention_mask"))] == 0).all()


def test_history_gives_the_templates_assistant_mask(make_reference, tokenizer):
    td = make_reference()(batches.history_batch())
    ids, mask = (
        td.get(("tokens", "full"), as_list=True)[0],
        td.get(("masks", "all_assistant_mask"), as_list=True)[0],
    )
    assert tokenizer.decode(ids[mask]) == "I'm doing well, thank you!<|im_end|>"


def test_ids_win_over_history(make_reference, ref_oracle):
    td = batches.history_batch().to_lazystack(0)
    for sample, ids in zip(td.unbind(0), SEQUENCES[:2], strict=True):
        sample["tokens"] = Tokens(full=torch.tensor(ids))
    make_reference()(td)
    got = td.get(("ref_log_probs", "full"), as_list=True)[0]
    want = ref_oracle.masked(SEQUENCES[0], [t > 0 for t in range(6)])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)


def test_ids_that_are_stored_padded_are_left_alone(make_reference):
    td = batches.dense_batch(SEQUENCES, [2, 1, 3], 256)
    before = td["tokens", "full"].clone()
    make_reference(input_mode="tokens", pad_output=True)(td)
    assert torch.equal(td["tokens", "full"], before)


def test_what_is_tokenized_here_is_padded_with_the_pad_id(make_reference, tokenizer):
    td = make_reference(pad_output=True)(batches.history_batch())
    ids, real = td["tokens", "full"], td["masks", "all_attention_mask"]
    assert not real.all()
    assert set(ids[~real].tolist()) == {tokenizer.pad_token_id}


def test_prompt_and_response_of_the_policy_stay(make_reference):
    td = make_reference()(batches.ids_batch(SEQUENCES, [2, 1, 3]))
    assert [len(row) for row in td.get(("tokens", "response"), as_list=True)] == [4, 2, 5]


@pytest.mark.parametrize("shape", [(), (1,), (2, 1)])
def test_any_number_of_batch_dimensions(make_reference, shape):
    td = batches.ids_batch(SEQUENCES[:2])
    td = td[0] if shape == () else (td[:1] if shape == (1,) else td.reshape(2, 1))
    out = make_reference(input_mode="tokens")(td)
    assert out.batch_size == torch.Size(shape)
    assert ("ref_log_probs", "full") in out.keys(True)


@pytest.mark.parametrize("key", ["ref_log_probs", "teacher", ("nested", "log_probs")])
def test_any_log_probs_key(make_reference, key):
    td = make_reference(input_mode="tokens", log_probs_key=key)(batches.ids_batch(SEQUENCES))
    full = (*key, "full") if isinstance(key, tuple) else (key, "full")
    assert [len(row) for row in td.get(full, as_list=True)] == [6, 3, 8]


def test_inplace_false_leaves_the_input_alone(make_reference):
    td = batches.ids_batch(SEQUENCES)
    out = make_reference(input_mode="tokens", inplace=False)(td)
    assert "ref_log_probs" not in td
    assert "ref_log_probs" in out


def test_get_new_version_shares_the_scorer(make_reference):
    ref = make_reference(pad_output=True)
    twin = ref.get_new_version(pad_output=False, input_mode="tokens", log_probs_key="other")
    assert twin.scorer is ref.scorer
    assert (twin.pad_output, twin.input_mode, twin.log_probs_key) == (False, "tokens", "other")
    assert twin.in_keys == [("tokens", "full")]
    assert isinstance(twin, LLMWrapperBase)


def test_a_live_engine_is_wrapped_and_brings_its_tokenizer(policy_llm, policy_oracle):
    ref = VLLMReference(policy_llm, input_mode="tokens")
    td = ref(batches.ids_batch(SEQUENCES))
    want = policy_oracle.masked(SEQUENCES[1], [False, True, True])
    torch.testing.assert_close(
        td.get(("ref_log_probs", "full"), as_list=True)[1].double(), want, rtol=0, atol=LOG_PROB_TOLERANCE
    )
    assert ref.tokenizer.eos_token == "<|im_end|>"


class TestInsideTorchRL:
    """The same module in TorchRL's own transforms."""

    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    @pytest.mark.parametrize("assistant_only", [True, False])
    def test_retrieve_log_prob(self, make_reference, ref_oracle, tokenizer, assistant_only, pad_output):
        ref = make_reference(pad_output=pad_output)
        transform = torchrl_kl.RetrieveLogProb(ref, assistant_only=assistant_only, tokenizer=tokenizer)
        td = transform(batches.history_batch())
        expected = make_reference(pad_output=pad_output)(batches.history_batch())
        for i in range(2):
            ids = real(expected, ("tokens", "full"), i)
            keep = (
                real(expected, ("masks", "all_assistant_mask"), i)
                if assistant_only
                else torch.arange(len(ids)) > 0
            )
            got = td.get(("ref_log_probs", "full"), as_list=True)[i]
            got = got[expected.get(("masks", "all_attention_mask"), as_list=True)[i]]
            torch.testing.assert_close(
                got.double(), ref_oracle.masked(ids, keep.tolist()), rtol=0, atol=LOG_PROB_TOLERANCE
            )

    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    def test_retrieve_kl(self, make_reference, policy_model, tokenizer, pad_output):
        gen = TransformersWrapper(
            policy_model, tokenizer=tokenizer, input_mode="history", generate=False, pad_output=pad_output
        )
        transform = torchrl_kl.RetrieveKL(gen, make_reference(pad_output=pad_output), tokenizer=tokenizer)
        td = transform(batches.history_batch(with_next=True).to_lazystack(0))
        kl = td["next"].get("kl_penalty", as_list=True)
        assert len(kl) == 2
        assert all(row.abs().max() > 0.1 for row in kl)


def test_a_path_brings_its_tokenizer(ref_path, monkeypatch):
    from vllm_kl.transforms import vllm_reference

    monkeypatch.setattr(vllm_reference, "VLLMScorer", lambda model: model)
    assert VLLMReference(ref_path).tokenizer.eos_token == "<|im_end|>"


def test_a_tokenizer_that_cannot_be_loaded_is_refused_before_an_engine_is_started(
    ref_path, tmp_path, monkeypatch
):
    from vllm_kl.transforms import vllm_reference

    monkeypatch.setattr(vllm_reference, "VLLMScorer", lambda model: pytest.fail("an engine was started"))
    with pytest.raises(
        OptionError, match=r"(?s)the tokenizer of '/no/such' could not be loaded: .*Pass tokenizer="
    ):
        VLLMReference(ref_path, "/no/such")
    shutil.copytree(ref_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(OptionError, match="the tokenizer of .* could not be loaded: JSONDecodeError"):
        VLLMReference(tmp_path)
    with pytest.raises(OptionError, match="model '/no/such' does not exist"):
        VLLMReference("/no/such")


def test_a_checkpoint_without_a_tokenizer_scores_ids(ref_path, tmp_path, monkeypatch):
    from vllm_kl.transforms import vllm_reference

    monkeypatch.setattr(vllm_reference, "VLLMScorer", lambda model: model)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ref_path / name, tmp_path)
    assert VLLMReference(tmp_path).tokenizer is None


class TestRefusals:
    def test_generation_and_logits_are_refused(self, ref_scorer, make_reference):
        with pytest.raises(OptionError, match="VLLMReference only scores"):
            VLLMReference(ref_scorer, generate=True)
        with pytest.raises(OptionError, match="takes no logits_only"):
            make_reference(input_mode="tokens")(batches.ids_batch(SEQUENCES), logits_only=True)

    def test_unknown_arguments_are_refused(self, ref_scorer):
        with pytest.raises(OptionError, match="pad_outputs"):
            VLLMReference(ref_scorer, pad_outputs=True)
        with pytest.raises(OptionError, match="input_mode='chat' does not exist"):
            VLLMReference(ref_scorer, input_mode="chat")

    def test_an_empty_tensordict_says_what_it_looked_for(self, make_reference):
        with pytest.raises(
            InputError, match=r"neither \('tokens', 'full'\) nor \('history', 'full'\); it has \['x'\]"
        ):
            make_reference()(TensorDict(x=torch.zeros(2), batch_size=(2,)))

    def test_text_without_a_tokenizer_says_so(self, ref_scorer):
        with pytest.raises(InputError, match="a tokenizer is needed"):
            VLLMReference(ref_scorer, input_mode="text")(batches.text_batch())

    def test_a_mask_of_another_shape_is_refused_by_sample(self, make_reference):
        td = batches.ids_batch(SEQUENCES, assistant=[[True] * 6, [True] * 2, [True] * 8])
        with pytest.raises(
            InputError, match=r"sample 1: .*all_assistant_mask.* has shape \[2\], expected \[3\]"
        ):
            make_reference(input_mode="tokens")(td)
