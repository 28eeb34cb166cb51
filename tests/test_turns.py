"""Dialogs of several turns: all assistant tokens of all turns in one pass, and what tokenizing again does to ids."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Masks, Tokens

from tests.batches import history_batch, ids_batch
from tests.oracle import LOG_PROB_TOLERANCE
from tests.test_from_collector import NUM_ENVS, collect, make_env, make_policy  # noqa: F401  # fixtures
from vllm_kl import RetrieveKL, RetrieveLogProb
from vllm_kl.errors import InputError
from vllm_kl.inputs import InputKeys, _has_tags
from vllm_kl.turns import find_retokenized

KEYS = InputKeys(input_mode="history", key=("history", "full"))


def say(role, content):
    return {"role": role, "content": content}


DIALOGS = [
    [
        say("system", "Be brief."),
        say("user", "2+2?"),
        say("assistant", "4"),
        say("user", "Add 3."),
        say("assistant", "call add"),
        say("tool", "7"),
        say("assistant", "It is 7."),
        say("user", "Bye"),
        say("assistant", "Bye, bye!"),
    ],
    [
        say("user", "Hi"),
        say("assistant", "call time"),
        say("tool", "noon"),
        say("tool", "UTC"),
        say("assistant", "Noon."),
        say("user", ""),
        say("assistant", ""),
        say("user", "?"),
        say("assistant", "."),
    ],
]


def in_pieces(tokenizer, dialog):
    """Return ids and mask of a dialog, put together message by message: what an assistant says, and its end, counts."""
    ids, mask = [], []

    def add(text, counts):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(piece)
        mask.extend([counts] * len(piece))

    for message in dialog:
        is_ours = message["role"] == "assistant"
        add(f"<|im_start|>{message['role']}\n", False)
        add(f"{message['content']}<|im_end|>", is_ours)
        add("\n", False)
    return ids, mask


@pytest.fixture
def pieces(tokenizer):
    return [in_pieces(tokenizer, dialog) for dialog in DIALOGS]


def check_rows(rows, oracle, pieces):
    for row, (ids, mask) in zip(rows, pieces, strict=True):
        row = row[-len(ids) :]  # padded on the left, if at all
        torch.testing.assert_close(row.double(), oracle.masked(ids, mask), rtol=0, atol=LOG_PROB_TOLERANCE)
        assert (row[~torch.tensor(mask)] == 0).all()


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
class TestFourTurnsWithToolsAndASystemPrompt:
    def test_both_sides_agree_with_float64(
        self, make_reference, make_gen, policy_oracle, ref_oracle, pieces, ref_scorer, pad_output
    ):
        transform = RetrieveKL(make_gen("vllm", pad_output=pad_output), make_reference(pad_output=pad_output))
        td = transform(history_batch(chats=DIALOGS))
        for key, oracle in ((("log_probs", "full"), policy_oracle), (("ref_log_probs", "full"), ref_oracle)):
            check_rows(td.get(key, as_list=True), oracle, pieces)
        masks = td.get("kl_mask", as_list=True)
        assert [row[-len(ids) :].tolist() for row, (ids, _) in zip(masks, pieces, strict=True)] == [
            m for _, m in pieces
        ]
        assert sum(mask.sum() for mask in masks) == transform.metrics["num_tokens"]
        assert ref_scorer.stats.num_requests == len(DIALOGS)  # one pass a dialog, not one a turn

    def test_stored_ids_and_masks_give_the_same(self, make_reference, ref_oracle, pieces, pad_output):
        td = ids_batch([ids for ids, _ in pieces], assistant=[mask for _, mask in pieces])
        td = RetrieveLogProb(make_reference(pad_output=pad_output))(td)
        check_rows(td.get(("ref_log_probs", "full"), as_list=True), ref_oracle, pieces)


class TestTemplatesWithoutTags:
    PLAIN = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"

    @pytest.fixture
    def plain(self, tokenizer):
        tokenizer.chat_template = self.PLAIN
        return tokenizer

    def transform(self, make_reference, plain):
        return RetrieveLogProb(make_reference(), tokenizer=plain, tokenizer_kwargs={"chat_template": self.PLAIN})

    def test_it_is_said_what_works_instead(self, make_reference, plain):
        """TorchRL looks for the assistant's words in the text instead, which is a guess."""
        td = history_batch(chats=DIALOGS)
        with pytest.raises(
            InputError, match=r"no assistant tokens.*{% generation %} tags.*all_assistant_mask.*last turn"
        ):
            self.transform(make_reference, plain)(td)
        assert set(td.keys(True)) == set(history_batch(chats=DIALOGS).keys(True))

    def test_it_is_said_that_another_template_is_used(self, make_reference, plain, pieces):
        with pytest.warns(
            UserWarning, match="no {% generation %} tags .*so TorchRL renders with a template of its own"
        ):
            td = RetrieveLogProb(make_reference(), tokenizer=plain)(history_batch(chats=DIALOGS))
        assert [len(row) for row in td.get(("ref_log_probs", "full"), as_list=True)] == [len(ids) for ids, _ in pieces]

    @pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%generation%}"])
    def test_tags_may_be_written_in_any_way(self, tag):
        assert _has_tags(f"{tag}text")
        assert not _has_tags("{% if generation %}{{ generation }}{% endif %}")

    def test_the_prompts_boundary_marks_the_last_turn(self, make_reference, plain, pieces, ref_oracle):
        sequences = [ids for ids, _ in pieces]
        last = [len(ids) - 5 for ids in sequences]
        td = self.transform(make_reference, plain)(ids_batch(sequences, last))
        for row, ids, first in zip(td.get(("ref_log_probs", "full"), as_list=True), sequences, last, strict=True):
            want = ref_oracle.masked(ids, [t >= first for t in range(len(ids))])
            torch.testing.assert_close(row.double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)


def turns_batch(dialogs, done=None):
    """A batch ``[dialogs, turns]`` of ragged ids, as a collector yields it."""

    def turn(ids, is_done):
        ids = torch.tensor(ids)
        masks = Masks(all_attention_mask=torch.ones_like(ids, dtype=torch.bool))
        return TensorDict(tokens=Tokens(full=ids), masks=masks, next=TensorDict(done=torch.tensor([is_done])))

    done = done or [[False] * len(turns) for turns in dialogs]
    return lazy_stack(
        [
            lazy_stack([turn(ids, ended) for ids, ended in zip(turns, ends, strict=True)])
            for turns, ends in zip(dialogs, done, strict=True)
        ]
    )


class TestRetokenized:
    def test_a_later_turn_with_other_ids_is_found(self):
        td = turns_batch([[[1, 2, 3], [1, 2, 3, 4, 5]], [[1, 2, 3], [1, 9, 9, 3, 4]], [[1, 2, 3], [1, 2]]])
        second, third = find_retokenized(td, KEYS)
        assert (second.dialog, second.turn, second.position, second.was, second.now) == (1, 1, 1, 2, 9)
        assert (third.dialog, third.turn, third.position, third.was, third.now) == (2, 1, 2, 3, None)
        assert str(third) == "dialog 2, turn 1, token 2: 3 became None"

    def test_a_new_dialog_in_the_same_row_is_none(self):
        td = turns_batch([[[1, 2, 3], [7, 8], [7, 8, 9]]], done=[[True, False, True]])
        assert find_retokenized(td, KEYS) == []

    def test_rows_that_are_no_turns_are_left_alone(self):
        """A group's responses to one prompt: nothing says that a dialog goes on."""
        td = turns_batch([[[1, 2, 3], [1, 2, 4]]])
        assert len(find_retokenized(td, KEYS)) == 1
        assert find_retokenized(td.exclude("next"), KEYS) == []

    def test_without_ids_there_is_nothing_to_compare(self):
        assert find_retokenized(lazy_stack([TensorDict(a=torch.ones(2), batch_size=2)]), KEYS) == []

    def test_it_is_counted_and_reported_where_a_batch_has_turns(self, make_env, make_policy, make_reference):  # noqa: F811
        """A random model's bytes are often no text: the next turn reads other ids than were generated."""
        batches = []

        def keep(data):
            batches.append(data)
            return data

        collect(make_env(max_steps=2), make_policy(), turns=4 * NUM_ENVS, postproc=keep)
        transform = RetrieveKL("from_collector", make_reference())
        data = torch.cat([batch.to_lazystack(0) for batch in batches], dim=1)
        plain = []
        for row in data.unbind(0):
            ids = row.get(("tokens", "full"), as_list=True)
            ends = row["next", "done"].reshape(len(ids), -1).any(1)
            plain += [
                t
                for t in range(1, len(ids))
                if not ends[t - 1] and ids[t - 1].tolist() != ids[t].tolist()[: len(ids[t - 1])]
            ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            transform(data)
        assert transform.metrics["retokenized_turns"] == len(plain)
        said = [str(w.message) for w in caught if "tokenized again" in str(w.message)]
        assert len(said) == bool(plain)
        assert all("dialog" in text for text in said)
