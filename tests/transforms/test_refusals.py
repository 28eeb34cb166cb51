"""Transforms refuse wrong arguments and batches by name, with the cure, and write nothing."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from tests import batches
from vllm_kl import RetrieveKL, RetrieveLogProb
from vllm_kl.errors import InputError, OptionError

SEQUENCES, PROMPTS = [[5, 258, 9, 256, 7, 258], [258, 2, 3]], [2, 2]


class TestRefusedWhenBuilt:
    def test_pad_output_mismatch(self, make_gen, make_reference):
        with pytest.raises(ValueError, match=r"pad_output mismatch: .*Both sides of a KL share one value"):
            RetrieveKL(make_gen("transformers", pad_output=True), make_reference(pad_output=False))

    def test_arguments_that_do_not_exist_or_have_no_effect(self, make_gen, make_reference):
        with pytest.raises(OptionError, match="estimator='k9' does not exist"):
            RetrieveKL("from_collector", make_reference(), estimator="k9")
        with pytest.raises(OptionError, match="gen_log_probs='never' does not exist"):
            RetrieveKL("from_collector", make_reference(), gen_log_probs="never")
        with pytest.raises(OptionError, match="unless service_backend='ray': actor_name"):
            RetrieveKL("from_collector", make_reference(), actor_name="x")
        with pytest.raises(OptionError, match="unless service_backend='ray': coef"):
            RetrieveKL("from_collector", make_reference(), coef=1.0)
        with pytest.raises(OptionError, match="both sides would be written to"):
            RetrieveKL("from_collector", make_reference(), ref_log_probs_full_key=("log_probs", "full"))
        with pytest.raises(OptionError, match="gen_log_probs='reuse' has no effect with a gen_model"):
            RetrieveKL(make_gen("transformers"), make_reference(), gen_log_probs="reuse")


class TestRefusedWhenCalled:
    def test_a_kept_first_token_has_no_log_prob(self, make_reference):
        td = batches.ids_batch([[1, 2]], assistant=[[True, True]])
        with pytest.raises(InputError, match="sample 0: the assistant mask keeps token 0"):
            RetrieveLogProb(make_reference())(td)

    def test_ids_without_any_mask_are_not_guessed(self, make_reference):
        with pytest.raises(InputError, match="neither .*all_assistant_mask.* nor .*prompt.* nor .*history"):
            RetrieveLogProb(make_reference())(batches.ids_batch([[1, 2]]))

    def test_history_that_does_not_render_to_the_stored_ids_is_refused(self, make_reference):
        td = batches.history_batch().to_lazystack(0)
        for sample in td.unbind(0):
            sample["tokens"] = TensorDict(full=torch.tensor([1, 2, 3]))
        with pytest.raises(
            InputError, match="sample 0: its history renders to .* that differ from its 3 stored ids"
        ):
            RetrieveLogProb(make_reference())(td)

    def test_a_template_that_marks_nothing_says_what_works(self, make_reference):
        ref = make_reference(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
        chats = [[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]]
        with pytest.raises(
            InputError, match=r"(?s)marks no assistant tokens.*generation.*assistant_only=False"
        ):
            RetrieveLogProb(ref)(batches.history_batch(chats=chats))

    def test_a_reward_of_the_wrong_length_leaves_the_batch_as_it_was(self, make_gen, make_reference):
        td = batches.ids_batch(SEQUENCES, PROMPTS, extra={"reward": [torch.zeros(5, 1)] * 2})
        with pytest.raises(
            InputError, match=r"sample 0: its reward has shape \[5, 1\], expected one value or one per token"
        ):
            RetrieveKL(make_gen("transformers"), make_reference())(td)
        assert "kl_penalty" not in td
        assert "ref_log_probs" not in td

    def test_holes_in_the_attention_mask_are_reported(self, make_reference):
        td = batches.ids_batch([[1, 2, 3, 4]], assistant=[[False, False, True, True]])
        td[0]["masks"].all_attention_mask[1] = False
        with pytest.warns(UserWarning, match="sample 0 .*leaves out tokens inside the sequence"):
            RetrieveLogProb(make_reference())(td)
