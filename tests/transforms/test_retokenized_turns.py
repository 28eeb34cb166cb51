"""Dialogs of several turns are scored in one pass; tokenizing them again changes ids."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torch.utils.data import DataLoader
from torchrl.envs import Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm.policies import Masks, Tokens

from tests.batches import dense_batch, history_batch, ids_batch
from tests.collectors import NUM_ENVS, collect
from tests.oracle import LOG_PROB_TOLERANCE
from tests.transforms.helpers import in_pieces
from vllm_kl import RetokenizedTurns, RetrieveKL, RetrieveLogProb
from vllm_kl.batch.read_tokens import InputKeys, read_batch
from vllm_kl.errors import InputError
from vllm_kl.transforms.retokenized_turns import find_retokenized

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
    PLAIN = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    )

    @pytest.fixture
    def plain(self, tokenizer):
        tokenizer.chat_template = self.PLAIN
        return tokenizer

    def transform(self, make_reference, plain):
        return RetrieveLogProb(
            make_reference(), tokenizer=plain, tokenizer_kwargs={"chat_template": self.PLAIN}
        )

    def test_it_is_said_what_works_instead(self, make_reference, plain):
        """TorchRL looks for the assistant's words in the text instead, which is a guess."""
        td = history_batch(chats=DIALOGS)
        with pytest.raises(
            InputError,
            match=r"(?s)no assistant tokens.*{% generation %} tags.*all_assistant_mask.*every token counts",
        ):
            self.transform(make_reference, plain)(td)
        assert set(td.keys(True)) == set(history_batch(chats=DIALOGS).keys(True))

    @pytest.mark.filterwarnings("ignore:the assistant's message 6 of sample 1 is empty")
    def test_it_is_said_that_another_template_is_used(self, make_reference, plain, pieces):
        with pytest.warns(
            UserWarning, match="no {% generation %} tags, so TorchRL renders with a template of its own"
        ):
            td = RetrieveLogProb(make_reference(), tokenizer=plain)(history_batch(chats=DIALOGS))
        assert [len(row) for row in td.get(("ref_log_probs", "full"), as_list=True)] == [
            len(ids) for ids, _ in pieces
        ]

    def test_the_prompts_boundary_marks_the_last_turn(self, make_reference, plain, pieces, ref_oracle):
        sequences = [ids for ids, _ in pieces]
        last = [len(ids) - 5 for ids in sequences]
        td = self.transform(make_reference, plain)(ids_batch(sequences, last))
        for row, ids, first in zip(
            td.get(("ref_log_probs", "full"), as_list=True), sequences, last, strict=True
        ):
            want = ref_oracle.masked(ids, [t >= first for t in range(len(ids))])
            torch.testing.assert_close(row.double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)


class TestTemplatesWithTags:
    """A tokenizer's own template is rendered, and its mask is used: not TorchRL's templates and guesses."""

    MARKS_WORDS = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )

    def mask(self, tokenizer, dialogs, **template_kwargs):
        keys = InputKeys(**vars(KEYS) | {"tokenizer": tokenizer, "template_kwargs": template_kwargs})
        batch = read_batch(history_batch(chats=dialogs), keys, assistant_only=True)
        return list(
            zip(map(torch.Tensor.tolist, batch.token_ids), map(torch.Tensor.tolist, batch.keep), strict=True)
        )

    @pytest.mark.parametrize("family", ["qwen", "llama", "deepseek", "falcon", "dialogpt", "other"])
    def test_the_tokenizers_own_template_is_used_whatever_its_path_is_called(self, tokenizer, pieces, family):
        tokenizer.name_or_path = f"/models/my-{family}-ft"
        assert self.mask(tokenizer, DIALOGS) == pieces
        tokenizer.chat_template = {
            "default": tokenizer.chat_template,
            "tool_use": TestTemplatesWithoutTags.PLAIN,
        }
        assert self.mask(tokenizer, DIALOGS) == pieces

    @pytest.mark.parametrize("opening", ["{%- generation -%}", "{%generation%}", "{% generation -%}"])
    def test_tags_may_be_written_in_any_way(self, tokenizer, pieces, opening):
        tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", opening)
        tokenizer.name_or_path = "/models/llama"
        assert self.mask(tokenizer, DIALOGS) == pieces

    def test_a_template_that_is_named_wins(self, tokenizer, pieces):
        tokenizer.name_or_path = "/models/llama"
        ids = self.mask(tokenizer, DIALOGS, chat_template_name="falcon")[1][0]
        text = "".join(tokenizer.convert_ids_to_tokens(ids))
        assert text.startswith("User:\u0120Hi")
        assert self.mask(tokenizer, DIALOGS, chat_template=tokenizer.chat_template) == pieces

    @pytest.mark.parametrize("family", ["llama", "other"])
    def test_every_replacement_of_a_template_is_said(self, tokenizer, family):
        tokenizer.chat_template = TestTemplatesWithoutTags.PLAIN
        tokenizer.name_or_path = family
        with pytest.warns(UserWarning, match="TorchRL renders with a template of its own"):
            self.mask(tokenizer, DIALOGS)

    @pytest.mark.parametrize(
        "dead",
        [
            "{{# {{% generation %}} #}}{}",
            "{{% if False %}}{{% generation %}}{{% endgeneration %}}{{% endif %}}{}",
        ],
    )
    @pytest.mark.parametrize("given", [True, False], ids=["given", "own"])
    def test_tags_that_never_run_mark_nothing(self, tokenizer, dead, given):
        """TorchRL searches the words in the text: it misses the end of a turn, and words that come twice."""
        template = dead.format(TestTemplatesWithoutTags.PLAIN)
        if not given:
            tokenizer.chat_template = template
        with pytest.raises(
            InputError, match=r"(?s)marks no assistant tokens in sample 0\..*all_assistant_mask"
        ):
            self.mask(tokenizer, DIALOGS, **{"chat_template": template} if given else {})

    def test_one_dialog_whose_tags_do_not_run_is_refused(self, tokenizer):
        tokenizer.chat_template = self.MARKS_WORDS.replace("{% if", "{% if messages[0].role == 'system' and")
        with pytest.raises(InputError, match="marks no assistant tokens in sample 1"):
            self.mask(tokenizer, DIALOGS)

    def test_an_assistant_that_says_nothing_has_nothing_to_mark(self, tokenizer):
        silent = [[say("user", "Hi")], [say("user", "Hi"), say("assistant", "")]]
        tokenizer.chat_template = self.MARKS_WORDS
        first, *others = self.mask(tokenizer, [DIALOGS[0], *silent])
        assert sum(first[1]) == len("4call addIt is 7.Bye, bye!")
        assert [sum(mask) for _, mask in others] == [0, 0]


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

    def test_masks_that_do_not_fit_are_refused(self):
        td = turns_batch([[[1, 2, 3], [1, 2, 3]]])
        td[0, 1]["masks", "all_attention_mask"] = torch.ones(2, dtype=torch.bool)
        with pytest.raises(InputError, match="sample 1: .*all_attention_mask.* has shape"):
            find_retokenized(td, KEYS)

    def test_keys_may_be_others(self):
        td = turns_batch([[[1, 2, 3], [1, 9, 9]]])
        for dialog in td.unbind(0):
            for turn in dialog.unbind(0):
                turn["mine", "ids"], turn["my_masks"] = turn.pop("tokens"), turn.pop("masks")
        transform = RetokenizedTurns(tokens_key=("mine", "ids"), masks_key="my_masks")
        with pytest.warns(
            UserWarning, match="1 turns do not begin .*The first: dialog 0, turn 1, token 1: 2 became 9"
        ):
            transform(td)
        assert transform.metrics == {"retokenized_turns": 1}
        transform(td.view(-1))  # no turns, samples
        assert transform.metrics == {}


# A policy that only says these bytes. ASCII comes back as the ids that were sampled. 0xFF is in no text:
# it is decoded to U+FFFD, and that is tokenized to its three bytes.
SAYS = {"text": "ab", "no text": "\u00ff"}


@pytest.fixture
def policy_saying(make_policy, tokenizer):
    def make(letters, **kwargs):
        def factory():
            policy = make_policy(generate_kwargs={"max_new_tokens": 5, "temperature": 1.0}, **kwargs)()
            # TorchRL's wrapper drops what it does not know of generate_kwargs.
            policy.sampling_params.allowed_token_ids = tokenizer.convert_tokens_to_ids(list(letters))
            return policy

        return factory

    return make


def caught_warnings(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(w.message) for w in caught if "tokenized again" in str(w.message)]


@pytest.mark.parametrize("says", SAYS)
class TestDialogsOfTwoTurns:
    def test_a_batch_of_turns_is_counted_and_reported(self, make_env, policy_saying, says):
        batches = []

        def keep(data):
            batches.append(data)
            return data

        collect(make_env(max_steps=2), policy_saying(SAYS[says]), turns=4 * NUM_ENVS, postproc=keep)
        # Two dialogs of two turns in a row.
        data = torch.cat([batch.to_lazystack(0) for batch in batches], dim=1)
        transform = RetokenizedTurns()
        _, said = caught_warnings(lambda: transform(data))
        differing = 2 * NUM_ENVS if says == "no text" else 0
        assert transform.metrics == {"retokenized_turns": differing}
        assert len(said) == bool(differing)
        assert all(f"{differing} turns do not begin" in text and "dialog 0, turn 1" in text for text in said)

    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    def test_an_env_counts_and_reports_once(self, make_env, policy_saying, tokenizer, says, pad_output):
        transform = RetokenizedTurns()
        env = make_env(max_steps=2).append_transform(transform)
        policy = policy_saying(SAYS[says], pad_output=pad_output)
        batches, said = caught_warnings(lambda: collect(env, policy, turns=4 * NUM_ENVS))
        # Steps 1 and 3 begin dialogs: after a reset nothing is compared.
        differs = says == "no text"
        assert transform.metrics == {
            "retokenized_turns": NUM_ENVS * differs,
            "retokenized_turns_total": 2 * NUM_ENVS * differs,
            "later_turns_total": 2 * NUM_ENVS,
        }
        assert len(said) == differs
        if differs:
            # The first that was generated.
            position = int(batches[0][0]["masks", "all_attention_mask"].sum()) - 5
            was, now = tokenizer.convert_tokens_to_ids(["\u00ff", tokenizer.tokenize("\ufffd")[0]])
            assert f"{NUM_ENVS} of the {NUM_ENVS} later turns" in said[0]
            assert f"dialog 0, turn 1, token {position}: {was} became {now}." in said[0]


class Ends(Transform):
    """Ends the dialogs of some rows after every step."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = rows

    def _step(self, tensordict, next_tensordict):
        done = torch.zeros(*tensordict.batch_size, 1, dtype=torch.bool)
        done[list(self.rows)] = True
        return next_tensordict.set("done", done).set("terminated", done.clone())


def act(td, *sequences):
    """Act as a policy that writes these ids."""
    for sample, ids in zip(td.unbind(0), sequences, strict=True):
        sample["tokens"] = Tokens(prompt=torch.tensor(ids[:1]), full=torch.tensor(ids))
    return td


def step(transform, *sequences):
    """Take a step of an env that shows the transform these rows."""
    td = act(lazy_stack([TensorDict() for _ in sequences]), *sequences)
    transform._step(td, td.empty())
    return td


class TestInAnEnv:
    @pytest.fixture
    def make_token_env(self, tokenizer):
        def make(*transforms):
            loader = DataLoader(
                [{"query": "?"}], collate_fn=lambda items: lazy_stack([TensorDict(i) for i in items])
            )
            env = ChatEnv.from_dataloader(
                loader, batch_size=(3,), repeats=1, input_mode="tokens", tokenizer=tokenizer
            )
            for transform in transforms:
                env = env.append_transform(transform)
            return env

        return make

    def test_only_the_rows_that_were_reset_begin_anew(self, make_token_env):
        transform = RetokenizedTurns()
        env = make_token_env(Ends(1), transform)

        def go_on(td, *sequences):
            return env.step_and_maybe_reset(act(td, *sequences))[1]

        td = go_on(env.reset(), [5, 6], [5, 6], [5, 6])
        with pytest.warns(
            UserWarning, match="1 of the 2 later turns .*The first: dialog 2, turn 1, token 1: 6 became 8."
        ):
            td = go_on(td, [5, 6, 7], [9, 9, 9], [5, 8, 7])
        assert transform.metrics == {
            "retokenized_turns": 1,
            "retokenized_turns_total": 1,
            "later_turns_total": 2,
        }
        td = go_on(td, [5, 6, 7, 8], [1, 2, 3, 4], [5, 8, 7, 1])
        td = go_on(td, [5, 6, 9], [3, 4, 5], [5, 8, 7])  # the fourth turn; said only once
        assert transform.metrics == {
            "retokenized_turns": 2,
            "retokenized_turns_total": 3,
            "later_turns_total": 6,
        }
        go_on(env.reset(), [1, 2], [1, 2], [1, 2])
        assert transform.metrics == {
            "retokenized_turns": 0,
            "retokenized_turns_total": 3,
            "later_turns_total": 6,
        }

    def test_rows_that_cannot_be_told_apart_are_not_compared(self):
        """``rollout(break_when_all_done=True)`` steps rows that are not done, and does not say which."""
        transform = RetokenizedTurns()
        step(transform, [1, 2], [3, 4])
        step(transform, [3, 4, 5])
        assert transform.metrics["later_turns_total"] == 0
        step(transform, [3, 4, 5, 6])
        assert transform.metrics == {
            "retokenized_turns": 0,
            "retokenized_turns_total": 0,
            "later_turns_total": 1,
        }

    def test_a_step_without_ids_has_nothing_to_compare(self):
        transform = RetokenizedTurns()
        step(transform, [1, 2])
        td = lazy_stack([TensorDict(text="a")])
        transform._step(td, td.empty())
        assert transform.metrics == {}
        step(transform, [3, 4])
        assert transform.metrics["later_turns_total"] == 0

    @pytest.mark.parametrize("is_dense", [False, True])
    def test_what_others_do_to_their_batch_afterwards_is_not_seen(self, is_dense):
        transform = RetokenizedTurns()
        td = dense_batch([[1, 2]], [1], 0) if is_dense else ids_batch([[1, 2]])
        transform._step(td, td.empty())
        td[0]["tokens", "full"].zero_()
        step(transform, [1, 2, 3])
        assert transform.metrics == {
            "retokenized_turns": 0,
            "retokenized_turns_total": 0,
            "later_turns_total": 1,
        }

    @pytest.mark.parametrize(
        "copied", [Transform.clone, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
    )
    def test_a_copy_in_another_env_sees_other_dialogs(self, make_token_env, copied):
        transform = RetokenizedTurns()
        step(transform, [1, 2], [1, 2], [1, 2])
        twin = copied(transform)
        other = make_token_env()
        td = other.reset()
        other = other.append_transform(twin)
        other.step(act(td, [7, 8], [7, 8], [7, 8]))
        assert twin.metrics["later_turns_total"] == 0
        with pytest.warns(UserWarning, match="dialog 0, turn 1, token 1: 2 became 3"):
            step(transform, [1, 3], [1, 2], [1, 2])

    def test_a_run_that_is_resumed_counts_on(self, make_token_env):
        transform, resumed = RetokenizedTurns(), RetokenizedTurns()
        step(transform, [1, 2])
        with pytest.warns(UserWarning, match="This warning comes once"):
            step(transform, [1, 3])
        make_token_env(resumed).load_state_dict(make_token_env(transform).state_dict())
        step(resumed, [5, 6])
        step(resumed, [5, 7])  # was said before
        assert resumed.metrics == {
            "retokenized_turns": 1,
            "retokenized_turns_total": 2,
            "later_turns_total": 2,
        }
