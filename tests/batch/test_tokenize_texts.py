"""Texts become ids with one BOS; each kind of finding is reported once."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules.llm.policies import Text

from tests.batch.helpers import (
    CHATML,
    FAMILIES,
    LLAMA3,
    QWEN3,
    R1,
    THOUGHT,
    TURNS,
    make,
    read,
    read_texts,
    say,
)
from tests.batches import history_batch, ids_batch
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl import RetrieveKL, RetrieveLogProb, VLLMReference
from vllm_kl.batch.tokenize_texts import tokenize

ADDS_BOS = {"adds": "<|pad|> $A", "bos": "<|pad|>"}  # an id that the tests' models have


class TestOneBOS:
    """A tokenizer that adds BOS, and texts of a chat template that begin with it."""

    def reference(self, ref_scorer, tokenizer, **kwargs):
        return VLLMReference(ref_scorer, tokenizer, input_mode="text", **kwargs)

    def batch(self, texts):
        return TensorDict(text=Text(full=texts), batch_size=(len(texts),)).to_lazystack(0)

    def test_texts_with_and_without_bos_are_scored_with_one_and_it_is_said_once(self, ref_scorer, ref_oracle):
        tokenizer = make(CHATML, **ADDS_BOS)
        reference = self.reference(ref_scorer, tokenizer)
        texts = ["<|pad|><|im_start|>user\nhi", "<|im_start|>user\nhi", "<|pad|>hello"]
        with pytest.warns(
            UserWarning, match="2 of 3 texts begin with the BOS '<|pad|>'.*the first is sample 0"
        ):
            td = reference(self.batch(texts))
        for text, sample in zip(texts, td.unbind(0), strict=True):
            ids = [tokenizer.bos_token_id, *make(CHATML)(text.removeprefix("<|pad|>")).input_ids]
            assert sample["tokens", "full"].tolist() == ids
            want = ref_oracle.masked(ids, [t > 0 for t in range(len(ids))])
            torch.testing.assert_close(
                sample["ref_log_probs", "full"].double(), want, rtol=0, atol=LOG_PROB_TOLERANCE
            )
        reference(self.batch(texts))  # a second warning would be an error

    @pytest.mark.parametrize(("add", "num_bos"), [(True, 2), (False, 1)])
    def test_what_the_user_asks_for_is_done_to_the_letter(self, add, num_bos):
        tokenizer = make(CHATML, **ADDS_BOS)
        (ids,), report = read_texts(tokenizer, "<|pad|>hello", add_special_tokens=add)
        assert ids[:3].count(tokenizer.bos_token_id) == num_bos
        assert ("double_bos" in report.warnings) == add

    @pytest.mark.parametrize(
        ("adds", "text"), [("$A </s>", "a</s>"), ("<s> $A </s>", "<s>a</s>"), ("<s> $A </s>", "a</s>")]
    )
    def test_eos_is_there_once_too(self, adds, text):
        tokenizer = make(CHATML, eos="</s>", bos="<s>", adds=adds)
        (ids, twin), report = read_texts(tokenizer, text, "a")
        assert ids == twin
        assert "end with the EOS '</s>'" in report.warnings["text_ends"]

    def test_a_text_that_has_two_itself_keeps_them_and_is_told(self):
        tokenizer = make(CHATML, **ADDS_BOS)
        (ids,), report = read_texts(tokenizer, "<|pad|><|pad|>a")
        assert ids[:2] == [tokenizer.bos_token_id] * 2
        assert "two BOS" in report.warnings["double_bos"]

    def test_white_space_before_a_texts_own_bos_is_told(self):
        tokenizer = make(None, bos="<s>", adds="<s> $A")
        rows, report = read_texts(tokenizer, "<s>hi", " \n<s>hi")
        assert [row.count(tokenizer.bos_token_id) for row in rows] == [1, 2]
        assert "1 of 2 texts have white space before their own BOS" in report.warnings["begins_late"]
        assert "sample 1" in report.warnings["begins_late"]

    def test_a_tokenizer_that_adds_nothing_changes_nothing(self):
        tokenizer = make(CHATML, bos="<s>")
        rows, report = tokenize(["<s>a", "", "a"], tokenizer, {})
        assert rows == [tokenizer(text).input_ids for text in ("<s>a", "", "a")]
        assert not report.warnings

    def test_stored_ids_with_two_bos_win_and_are_told_once(self, ref_scorer):
        tokenizer = make(CHATML, bos="<|im_start|>")
        bos = tokenizer.bos_token_id
        transform = RetrieveLogProb(VLLMReference(ref_scorer, tokenizer))
        with pytest.warns(
            UserWarning, match=r"the ids of 1 of 2 samples begin with two BOS.*the first is sample 1"
        ):
            td = transform(ids_batch([[bos, 5, 6], [bos, bos, 5, 6]], [1, 2]))
        assert [len(row) for row in td.get(("ref_log_probs", "full"), as_list=True)] == [3, 4]
        transform(ids_batch([[bos, bos, 5, 6]], [2]))

    def test_a_history_has_the_templates_bos_and_no_other_and_its_lack_is_noted(self):
        bare, with_bos = make(CHATML, **ADDS_BOS), make("{{ bos_token }}" + CHATML, **ADDS_BOS)
        (ids,), (others,) = read(bare, TURNS).token_ids, read(with_bos, TURNS).token_ids
        assert others.tolist() == [bare.bos_token_id, *ids.tolist()]
        assert "renders no BOS (first in sample 0)" in read(bare, TURNS).report.notes["no_bos"]
        assert not read(with_bos, TURNS).report.notes


class TestSaidOnce:
    def test_one_warning_a_run_and_figures_of_every_batch(self, make_reference, tokenizer):
        tokenizer.chat_template = QWEN3
        for module in (
            RetrieveLogProb(make_reference()),
            make_reference(),
            RetrieveKL(make_reference(), make_reference(log_probs_key="x"), on_stale="allow"),
        ):
            with pytest.warns(
                UserWarning, match="leaves out content of 1 of 4 messages, 45 of 109 characters"
            ) as said:
                module(history_batch(chats=[THOUGHT]))
            assert len(said) == 1
            assert module.metrics["template_cut_chars"] == 45
            module(history_batch(chats=[TURNS]))
            assert module.metrics["template_cut_chars"] == 0
            module(history_batch(chats=[THOUGHT, THOUGHT]))
            assert module.metrics["template_cut_chars"] == 90

    def test_white_space_that_is_trimmed_does_not_use_up_the_warning_of_what_is_cut(
        self, make_reference, tokenizer
    ):
        tokenizer.chat_template = CHATML.replace(
            "{{ m.content + '<|im_end|>' }}{% endgen",
            "{{ (m.content.split('</think>')[-1] | trim) + '<|im_end|>' }}{% endgen",
        )
        transform = RetrieveLogProb(make_reference())
        said = []
        for answer in ("ho ", "ho  ", "<think>four?</think>ho", "<think>so?</think>ho"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                transform(history_batch(chats=[[say("user", "hi"), say("assistant", answer)]]))
            said.append([str(w.message) for w in caught if "leaves out content" in str(w.message)])
        assert [len(messages) for messages in said] == [1, 0, 1, 0]
        assert "white space was trimmed" in said[0][0]
        assert "missing: '<think>four?</think>'" in said[2][0]

    def test_ids_in_the_batch_are_not_compared(self, make_reference, tokenizer):
        transform = RetrieveLogProb(make_reference())
        transform(ids_batch([[1, 2, 3]], [1]))
        assert not any(name.startswith("template_") for name in transform.metrics)


@pytest.mark.parametrize("template", [R1, "{{ bos_token }}" + LLAMA3])
def test_two_bos_of_a_template_are_said(template):
    tokenizer = make(template, eos="</s>", bos="<s>")
    system = "<s>Be brief." if template is R1 else "Be brief."
    turns = [say("system", system), *TURNS]
    batch = read(tokenizer, turns)
    assert tokenizer.decode(batch.token_ids[0]).count("<s>") == 2
    assert "1 of 1 samples begin with two BOS tokens" in batch.report.warnings["double_bos"]
    assert "double_bos" not in read(FAMILIES["r1"], TURNS).report.warnings
