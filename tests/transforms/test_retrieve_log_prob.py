"""``RetrieveLogProb`` on batches: models, layouts, input modes and keys."""

from __future__ import annotations

import copy

import pytest
import torch
from torchrl.modules.llm import TransformersWrapper

from tests import batches
from tests.oracle import LOG_PROB_TOLERANCE
from tests.transforms.helpers import KEEP, PROMPTS, SEQUENCES, assert_rows, rows
from vllm_kl import RetrieveKL, RetrieveLogProb
from vllm_kl.errors import InputError, MissingLogProbError


class TestRetrieveLogProb:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_model_that_gives_no_number_is_an_error(self, policy_model, tokenizer, value):
        broken = copy.deepcopy(policy_model)
        with torch.no_grad():
            broken.lm_head.weight[9] = value
        gen = TransformersWrapper(broken, tokenizer=tokenizer, generate=False)
        with pytest.raises(
            MissingLogProbError, match="log-probs: sample 0, token 2 of 6 is kept by the mask"
        ):
            RetrieveLogProb(gen)(batches.ids_batch(SEQUENCES, PROMPTS))

    def test_ids_that_a_transformers_model_does_not_have_are_refused(self, make_gen):
        with pytest.raises(
            InputError, match=r"sample 0, token 2: id 400 is outside the vocabulary \[0, 259\)"
        ):
            RetrieveLogProb(make_gen("transformers"))(batches.ids_batch([[1, 2, 400]], [1]))

    @pytest.mark.parametrize("kind", ["transformers", "vllm"])
    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    def test_agrees_with_float64(self, make_gen, policy_oracle, kind, pad_output):
        td = batches.ids_batch(SEQUENCES, PROMPTS)
        assert RetrieveLogProb(make_gen(kind, pad_output=pad_output))(td) is td
        want = [policy_oracle.masked(s, k) for s, k in zip(SEQUENCES, KEEP, strict=True)]
        got = rows(td, ("log_probs", "full"))
        assert_rows([row[-len(s) :] for row, s in zip(got, SEQUENCES, strict=True)], want, LOG_PROB_TOLERANCE)

    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    @pytest.mark.parametrize(
        ("mode", "assistant_only"),
        [("history", True), ("history", False), ("text", False), ("tokens", False)],
    )
    def test_every_input_mode_agrees_with_float64(
        self, make_reference, ref_oracle, tokenizer, mode, assistant_only, pad_output
    ):
        if mode == "history":
            td = batches.history_batch()
            rendered = [
                tokenizer.apply_chat_template(
                    c, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                )
                for c in batches.CHATS
            ]
            ids, masks = [r["input_ids"] for r in rendered], [r["assistant_masks"] for r in rendered]
        else:
            td = batches.text_batch() if mode == "text" else batches.ids_batch(SEQUENCES)
            ids, masks = (tokenizer(batches.TEXTS)["input_ids"] if mode == "text" else SEQUENCES), None
        transform = RetrieveLogProb(
            make_reference(input_mode=mode, pad_output=pad_output), assistant_only=assistant_only
        )
        got = rows(transform(td), ("ref_log_probs", "full"))
        keep = masks if assistant_only else [[t > 0 for t in range(len(s))] for s in ids]
        want = [ref_oracle.masked(s, k) for s, k in zip(ids, keep, strict=True)]
        assert_rows([row[-len(s) :] for row, s in zip(got, ids, strict=True)], want, LOG_PROB_TOLERANCE)

    def test_text_is_tokenized_once_for_both_sides(self, make_gen, make_reference, tokenizer, monkeypatch):
        calls = []
        render = type(tokenizer).apply_chat_template
        monkeypatch.setattr(
            type(tokenizer),
            "apply_chat_template",
            lambda *a, **k: calls.append(k["tokenize"]) or render(*a, **k),
        )
        RetrieveKL(make_gen("transformers"), make_reference())(batches.history_batch())
        # One call more than chats: a dialog of plain words, which shows what ends a turn.
        assert calls.count(True) == len(batches.CHATS) + 1

    def test_writes_where_it_is_told(self, make_gen):
        td = RetrieveLogProb(make_gen("transformers"), log_probs_full_key=("mine", "full"))(
            batches.ids_batch(SEQUENCES, PROMPTS)
        )
        assert ("mine", "full") in td.keys(True)
        with pytest.warns(UserWarning, match="not a tuple that ends with 'full'"):
            RetrieveLogProb(make_gen("transformers"), log_probs_full_key="mine")

    def test_a_stored_assistant_mask_is_used_as_it_is(self, make_gen, policy_oracle):
        keep = [[False, True, False, False, True, True], [False, False, True], [False] * 7, [False, True]]
        td = RetrieveLogProb(make_gen("transformers"))(batches.ids_batch(SEQUENCES, assistant=keep))
        want = [policy_oracle.masked(s, k) for s, k in zip(SEQUENCES, keep, strict=True)]
        assert_rows(rows(td, ("log_probs", "full")), want, LOG_PROB_TOLERANCE)
