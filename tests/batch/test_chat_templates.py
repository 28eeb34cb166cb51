"""Chat templates turn dialogs into ids and masks: tokens of a turn that count, dates, and errors by name."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.batch.helpers import CHATML, FAMILIES, LLAMA3, TURNS, figures, kept, make, read, say, tool_call
from tests.batches import history_batch, ids_batch
from vllm_kl.batch.read_tokens import InputKeys, read_batch
from vllm_kl.batch.tokenize_texts import tokenize
from vllm_kl.errors import InputError, OptionError

OUTSIDE = CHATML.replace(
    "m.content + '<|im_end|>' }}{% endgeneration %}", "m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
)
BEHIND = CHATML.replace(
    "m.content + '<|im_end|>' }}{% endgeneration %}", "m.content + '<|im_end|>\n' }}{% endgeneration %}"
).replace("{{ '\n' }}", "{% if m.role != 'assistant' %}{{ '\n' }}{% endif %}")


class TestTheEndOfATurn:
    """The token that ends a turn counts, because the policy samples it: in ids and History, with all tags."""

    @pytest.mark.parametrize(
        ("tokenizer", "end"),
        [
            (make(CHATML), "<|im_end|>"),
            (make(OUTSIDE), "<|im_end|>"),
            (make(BEHIND), "<|im_end|>"),
            (FAMILIES["gemma"], "<end_of_turn>"),
            (FAMILIES["phi3"], "<|end|>"),
            (FAMILIES["llama3"], "<|eot_id|>"),
            (FAMILIES["torchrl-chatml_format"], "<|im_end|>"),
        ],
        ids=["inside", "outside", "newline inside", "gemma", "phi3", "llama3", "torchrl"],
    )
    def test_a_history_and_the_ids_of_its_last_turn_have_one_mask(self, tokenizer, end):
        prompt = tokenizer.apply_chat_template(TURNS[:3], add_generation_prompt=True, tokenize=False)
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, f"{prompt}a{end}")]
        by_ids = read_batch(
            ids_batch(ids[1:], [len(ids[0])]),
            InputKeys(input_mode="tokens", key=("tokens", "full")),
            assistant_only=True,
        )
        batch = read(tokenizer, TURNS)
        length = len(ids[1])
        assert batch.token_ids[0][:length].tolist() == ids[1]
        assert batch.keep[0][len(ids[0]) : length].tolist() == by_ids.keep[0][len(ids[0]) :].tolist()
        assert not batch.keep[0][length:].any()
        assert kept(tokenizer, batch) == [f"four{end}a{end}"]

    def test_tags_that_leave_it_out_or_go_on_after_it_are_noted(self):
        assert "leave out '<|im_end|>'" in read(make(OUTSIDE), TURNS).report.notes["end_outside"]
        assert (
            "mark '\\n' after the token that ends a turn"
            in read(make(BEHIND), TURNS).report.notes["after_end"]
        )
        assert not read(make(CHATML), TURNS).report.notes

    def test_a_stored_mask_wins(self):
        tokenizer = make(OUTSIDE)
        ids = read(tokenizer, TURNS).token_ids[0]
        mask = torch.arange(len(ids)) == 7
        td = ids_batch([ids], assistant=[mask])
        td["history"] = history_batch(chats=[TURNS])["history"]
        keys = InputKeys(input_mode="history", key=("history", "full"), tokenizer=tokenizer)
        assert torch.equal(read_batch(td, keys, assistant_only=True).keep[0], mask)

    @pytest.mark.parametrize("template", [CHATML, OUTSIDE], ids=["inside", "outside"])
    def test_a_response_that_brings_its_own_counts_one(self, template):
        tokenizer = make(template)
        batch = read(tokenizer, [say("user", "hi"), say("assistant", "ho<|im_end|>")])
        assert kept(tokenizer, batch) == ["ho<|im_end|>"]
        assert "'<|im_end|>' ends a turn twice in sample 0" in batch.report.warnings["double_end"]

    @pytest.mark.parametrize("template", [CHATML, OUTSIDE], ids=["inside", "outside"])
    def test_special_tokens_inside_an_answer_end_nothing(self, template):
        tokenizer = make(template)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<answer>", "</answer>"]}, replace_extra_special_tokens=False
        )
        turns = [
            say("user", "2 + 2?"),
            say("assistant", "<answer>4</answer>"),
            say("user", "so?"),
            say("assistant", "4"),
        ]
        batch = read(tokenizer, turns, turns[:2])
        assert kept(tokenizer, batch) == [
            "<answer>4</answer><|im_end|>4<|im_end|>",
            "<answer>4</answer><|im_end|>",
        ]
        assert "no_end" not in batch.report.warnings

    def test_a_mask_does_not_depend_on_the_other_dialogs_of_its_batch(self):
        tokenizer = make(OUTSIDE, eos="</s>")  # a base model's EOS, which the template does not use
        ends_with_a_question = [*TURNS[:2], say("user", "and?")]
        alone = read(tokenizer, ends_with_a_question)
        beside = read(tokenizer, ends_with_a_question, TURNS)
        assert kept(tokenizer, alone) == kept(tokenizer, beside)[:1] == ["four<|im_end|>"]
        assert "no_end" not in alone.report.warnings

    def test_what_begins_the_next_message_ends_no_turn(self):
        glm = (
            "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation "
            "%}{{ m.content }}"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
        )
        tokenizer = make(glm)
        for prompted in (False, True):
            batch = read(tokenizer, TURNS, add_generation_prompt=prompted)
            assert kept(tokenizer, batch) == ["foura"]
            assert "no_end" in batch.report.warnings

    @pytest.mark.parametrize("call_first", [True, False])
    def test_another_token_that_ends_a_turn_counts_too_where_the_tags_leave_it_out(self, call_first):
        """Llama 3.1 ends a turn that calls a tool with <|eom_id|>, a special token that is not EOS."""
        template = OUTSIDE.replace(
            "{% endgeneration %}{{ '<|im_end|>' }}",
            "{% endgeneration %}{{ '<|end|>' if m.role == 'call' else '<|im_end|>' }}",
        )
        template = template.replace("m.role == 'assistant'", "m.role in ('assistant', 'call')")
        tokenizer = make(template)
        turns = [say("user", "rain?"), say("call", "weather()")]
        turns = turns if not call_first else [*turns, say("tool", "no"), say("assistant", "No.")]
        batch = read(tokenizer, turns)
        assert kept(tokenizer, batch) == [
            "weather()<|end|>No.<|im_end|>" if call_first else "weather()<|end|>"
        ]
        assert "no_end" not in batch.report.warnings
        assert "leave out '<|end|>'" in batch.report.notes["end_outside"]

    def test_a_first_turn_without_its_end_is_told_too(self):
        last_only = CHATML.replace(
            "m.content + '<|im_end|>' }}{% endgen",
            "m.content + ('<|im_end|>' if loop.last else '') }}{% endgen",
        )
        batch = read(make(last_only), TURNS)
        assert kept(make(last_only), batch) == ["foura<|im_end|>"]
        assert "no_end" in batch.report.warnings

    def test_a_template_that_ends_no_turn_is_told(self):
        batch = read(FAMILIES["torchrl-falcon"], TURNS)
        assert (
            "renders no token that ends the assistant's turn in sample 0" in batch.report.warnings["no_end"]
        )


class TestMarks:
    @pytest.mark.parametrize("words", ["<think>\n\n</think>\n\n", "Answer: "])
    def test_words_that_nobody_said_between_the_tags_are_told(self, words):
        template = CHATML.replace("{% generation %}", "{% generation %}{{ " + repr(words) + " }}")
        chat = [say("user", "2 + 2?"), say("assistant", "n")]  # which is in those words too
        report = read(make(template), chat, TURNS).report
        assert report.metrics["template_inserted_chars"] == 3 * len(words)
        assert f"The first: sample 0: {words!r}" in report.warnings["inserted"]

    def test_a_role_that_is_marked_as_the_assistants_is_told(self):
        report = read(FAMILIES["mistral"], [*TURNS[:2], say("tool", "seven"), say("assistant", "ok")]).report
        assert "' seven'" in report.warnings["inserted"]

    def test_what_the_assistant_says_outside_the_tags_is_told(self):
        template = CHATML.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
        report = read(make(template), TURNS).report
        assert report.metrics["template_unmarked_chars"] == 4
        assert "outside its tags" in report.warnings["unmarked"]


class TestTheDate:
    def test_it_is_noted_once_in_the_log(self, make_reference, caplog):
        reference = make_reference(chat_template=LLAMA3.replace("bos_token", "''"))
        with caplog.at_level(logging.WARNING, logger="vllm_kl"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this tokenizer has no <|eot_id|>
            for _ in range(2):
                reference(history_batch(chats=[TURNS[:2]]))
        assert sum("writes the current date into the text" in line for line in caplog.messages) == 1

    @pytest.mark.parametrize(
        "cure", [{"date_string": "26 Jul 2024"}, {"strftime_now": lambda form: "26 Jul 2024"}]
    )
    def test_a_date_that_is_passed_is_written_and_needs_no_note(self, cure):
        tokenizer = FAMILIES["llama3"]
        batch = read(tokenizer, TURNS, **cure)
        assert "Today Date: 26 Jul 2024" in tokenizer.decode(batch.token_ids[0])
        assert "date" not in batch.report.notes
        assert "date" in read(tokenizer, TURNS).report.notes


class TestErrors:
    @pytest.mark.parametrize(
        ("tokenizer", "chat", "message"),
        [
            (
                FAMILIES["gemma"],
                [say("system", "Be short."), *TURNS],
                r"message 0 \(role 'system'\).*System role not supported",
            ),
            (
                FAMILIES["gemma"],
                [*TURNS[:2], *TURNS[1:]],
                r"message 2 \(role 'assistant'\).*roles must alternate",
            ),
            (  # beginnings that raise something else say nothing
                make(
                    "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}"
                    "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
                    + CHATML
                ),
                [*TURNS[:2], say("tool", "7")],
                r"message 2 \(role 'tool'\).*no tools",
            ),
            (
                FAMILIES["chatml"],
                [TURNS[0], say("assistant", None)],
                r"message 1 \(role 'assistant'\).*UndefinedError.*content",
            ),
            (
                FAMILIES["chatml"],
                [say("user", [{"type": "text", "text": "x"}])],
                r"message 0 \(role 'user'\).*TypeError",
            ),
            (
                make(CHATML + "{{ tools[0].name }}"),
                TURNS,
                r"message 0 \(role 'user'\).*TypeError|UndefinedError",
            ),
            (
                make(CHATML + "{% if messages | length > 3 %}{{ 1 / 0 }}{% endif %}"),
                TURNS,
                r"message 3 \(role 'assistant'\).*ZeroDivision",
            ),
        ],
    )
    def test_a_template_that_raises_names_sample_message_and_role(self, tokenizer, chat, message):
        with pytest.raises(InputError, match=rf"sample 1, {message}.*What works"):
            read(tokenizer, TURNS[:2], chat)

    def test_it_is_said_whose_template_it_is(self):
        broken = "{% generation %}{% endgeneration %}{{ raise_exception('no') }}"
        keys = InputKeys(input_mode="history", key=("history", "full"), tokenizer=make(broken))
        with pytest.raises(InputError, match="the tokenizer's own chat template raised TemplateError: no"):
            read_batch(history_batch(chats=[TURNS]), keys, assistant_only=True)
        with pytest.raises(InputError, match="the chat_template that was passed is no valid Jinja: line 1"):
            read(make("{% if %}"), TURNS)
        with pytest.raises(InputError, match="TorchRL's chat template 'qwen' raised"):
            read(make(CHATML), [say("user", None)], chat_template=None, chat_template_name="qwen")
        with pytest.raises(
            OptionError, match="chat_template_name='qwen9': TorchRL has no template of that name"
        ):
            read(make(CHATML), TURNS, chat_template=None, chat_template_name="qwen9")

    def test_a_tokenizer_that_raises_names_the_sample(self):
        with pytest.raises(InputError, match=r"sample 1: the tokenizer \(.*\) cannot turn None into ids: "):
            tokenize(["a", None], make(CHATML), {})
        with pytest.raises(
            InputError,
            match=r"sample 0: the tokenizer .* cannot turn what the chat_template that was passed rendered",
        ):
            read(make(CHATML), TURNS, truncation="sometimes")

    def test_threads_may_render_one_template(self):
        def render(_):
            return kept(FAMILIES["chatml"], read(FAMILIES["chatml"], *[TURNS * 20] * 4))

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                texts = list(pool.map(render, range(8)))
        finally:
            sys.setswitchinterval(interval)
        assert set(itertools.chain(*texts)) == {"four<|im_end|>a<|im_end|>" * 20}

    def test_a_fork_while_another_thread_renders_can_render(self):
        tokenizer, stop = make(CHATML), threading.Event()

        def work():
            while not stop.is_set():
                read(tokenizer, TURNS * 10)

        rendering = threading.Thread(target=work)
        rendering.start()
        try:
            for _ in range(5):
                time.sleep(0.01)
                if (pid := os.fork()) == 0:
                    read(tokenizer, TURNS)
                    os._exit(0)
                deadline = time.monotonic() + 30
                while not (ended := os.waitpid(pid, os.WNOHANG)[0]) and time.monotonic() < deadline:
                    time.sleep(0.01)
                if not ended:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                assert ended
        finally:
            stop.set()
            rendering.join()


class TestOddDialogs:
    def test_an_empty_response_counts_the_end_of_its_turn(self):
        tokenizer = FAMILIES["chatml"]
        batch = read(tokenizer, [say("user", "hi"), say("assistant", "")])
        assert kept(tokenizer, batch) == ["<|im_end|>"]
        assert not batch.report.warnings

    def test_no_content_is_nothing_where_the_template_takes_it(self):
        tokenizer = make(CHATML.replace("m.content + '<|im_end|>'", "(m.content or '') + '<|im_end|>'"))
        batch = read(tokenizer, [say("user", "hi"), say("assistant", None)])
        assert kept(tokenizer, batch) == ["<|im_end|>"]
        assert not batch.report.warnings

    def test_an_assistant_that_speaks_first_is_scored_after_its_header(self):
        tokenizer = FAMILIES["chatml"]
        assert kept(tokenizer, read(tokenizer, [say("assistant", "ho"), say("user", "hi")])) == [
            "ho<|im_end|>"
        ]
        bare = make("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
        with pytest.raises(InputError, match="sample 0: the assistant mask keeps token 0"):
            read(bare, [say("assistant", "ho")])


@pytest.mark.parametrize("answer", ["日本", "yes 🙂", "é"])
def test_a_last_character_of_several_tokens_counts_where_tags_close_behind_it(answer):
    turns = [say("user", "q"), say("assistant", answer), say("user", "日本"), say("assistant", answer)]
    batch = read(FAMILIES["phi3"], turns)
    assert kept(FAMILIES["phi3"], batch) == [f"{answer}<|end|>" * 2]
    assert set(batch.report.warnings) == set()


def test_an_empty_answer_that_tags_cannot_mark_is_said():
    turns = [say("user", "q"), say("assistant", ""), say("user", "r"), say("assistant", "yes")]
    batch = read(FAMILIES["phi3"], TURNS, turns)
    assert "message 1 of sample 1 is empty" in batch.report.warnings["blank"]
    assert set(read(FAMILIES["phi3"], TURNS, turns, assistant_only=False).report.warnings) == set()
    assert set(read(FAMILIES["phi3"], TURNS).report.warnings) == set()
    batch = read(FAMILIES["chatml"], turns)  # its tags close behind the token that ends a turn
    assert kept(FAMILIES["chatml"], batch) == ["<|im_end|>yes<|im_end|>"]
    assert set(batch.report.warnings) == set()


@pytest.mark.parametrize("content", ["", "ok"])
def test_calls_outside_of_the_tags_are_unmarked(content):
    call = (
        "{% endgeneration %}{{ m.tool_calls[0].function | tojson if m.tool_calls else '' }}{{ '<|im_end|>' }}"
    )
    template = CHATML.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}" + call)
    turns = [say("user", "?"), say("assistant", content, tool_calls=[tool_call("weather", city="Paris")])]
    batch = read(make(template), [*turns, say("tool", "weather: rain"), say("assistant", "rain")])
    assert figures(batch)["unmarked_chars"] == len("weather" + "Paris")
    assert "'weather'" in batch.report.warnings["unmarked"]


def test_a_dialog_that_renders_to_nothing_is_refused_where_texts_begin_with_bos():
    tokenizer = make("{% for m in messages %}{{ m.content }}{% endfor %}", bos="<s>", adds="<s> $A")
    with pytest.raises(InputError, match="sample 1 has no tokens"):
        read(tokenizer, TURNS, [say("user", ""), say("assistant", "")], assistant_only=False)
