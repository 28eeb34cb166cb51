"""Content that a chat template cuts, trims or moves is found in the rendered dialog, message by message."""

from __future__ import annotations

import random

import pytest

from tests.batch.helpers import (
    CHATML,
    FAMILIES,
    QWEN3,
    R1,
    THOUGHT,
    TURNS,
    figures,
    kept,
    make,
    read,
    say,
    tool_call,
)
from vllm_kl.batch.rendered_content import find_messages
from vllm_kl.batch.tokenize_texts import TextWatch


class TestContentIsCompared:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_template_that_gives_everything_back_is_silent(self, family):
        report = read(FAMILIES[family], TURNS, [say("user", "hi"), say("assistant", "hi")]).report
        assert not report.warnings.keys() - {"no_end", "inserted" if family == "harmony" else ""}
        assert report.metrics["template_content_chars"] == 23
        assert report.metrics["template_cut_chars"] == report.metrics["template_moved_messages"] == 0

    @pytest.mark.parametrize(
        "family", ["chatml", "llama3", "mistral", "gemma", "qwen3", "phi3", "torchrl-deepseek"]
    )
    def test_words_that_are_in_the_tags_too_raise_no_false_alarm(self, family):
        rng, words = (
            random.Random(0),
            ["a", "user", "assistant\n", "s", " ", "im_end", "|>", "model", "[INST]", "hi"],
        )
        pick = lambda: "".join(rng.choices(words, k=rng.randint(1, 4))).strip() or "x"  # noqa: E731
        for _ in range(20):
            chat = [say(role, pick()) for role in ("user", "assistant") * rng.randint(1, 4)]
            assert not read(FAMILIES[family], chat).report.warnings

    @pytest.mark.parametrize(
        ("family", "chat", "cut", "example"),
        [
            (
                "qwen3",
                THOUGHT,
                (1, 45),
                r"sample 0, message 1 \(assistant\): 4 of its 49 .* missing: '<think>\\nTwo and two",
            ),
            ("r1", THOUGHT, (2, 86), r"message 1 \(assistant\): 6 of its 49 "),
            ("r1", THOUGHT[2:], (1, 43), r"message 1 \(assistant\): 3 of its 46 "),
            (
                "llama3",
                [say("user", " hi"), say("assistant", "ho \n")],
                (2, 3),
                r"message 0 \(user\): 2 of its 3 .*white space",
            ),
            (
                "gemma",
                [say("user", "hi"), say("assistant", "ho \n")],
                (1, 2),
                r"message 1 \(assistant\).*white space was trimmed",
            ),
            (
                "llama3",
                [say("user", "hi"), say("assistant", " "), say("user", "so?"), say("assistant", "so it is")],
                (1, 1),
                r"message 1 \(assistant\): 0 of its 1 .*white space was trimmed",
            ),
            (
                "torchrl-dialogpt",
                [say("system", "Be short."), *TURNS],
                (1, 9),
                r"message 0 \(system\): 0 of its 9 .*'Be short.'",
            ),
            (
                "r1",
                [*TURNS[:2], say("tool", "seven"), say("assistant", "ok")],
                (1, 5),
                r"message 2 \(tool\): 0 of its 5",
            ),
            (
                "harmony",
                [
                    say("user", "hi"),
                    say("assistant", "<|channel|>analysis<|message|>hm<|channel|>final<|message|>ho"),
                    *TURNS[:2],
                ],
                (1, 32),
                r"message 1 \(assistant\): 29 of its 61 .*'<\|channel\|>analysis",
            ),
        ],
    )
    def test_what_is_cut_is_counted_and_shown(self, family, chat, cut, example):
        report = read(FAMILIES[family], chat).report
        assert (report.metrics["template_cut_messages"], report.metrics["template_cut_chars"]) == cut
        assert report.metrics["template_messages"] == len(chat)
        with pytest.warns(UserWarning, match=f"leaves out content of {cut[0]} of .*{example}"):
            TextWatch().see(report)

    def test_a_system_message_in_a_later_turn_is_moved(self):
        chat = [say("system", "Be short."), *TURNS]
        assert not read(
            FAMILIES["mistral"], chat[:3]
        ).report.warnings  # in the first turn it stands where it belongs
        report = read(FAMILIES["mistral"], chat).report
        assert report.metrics["template_moved_messages"] == 1
        assert r"sample 0, message 0 (system)" in report.warnings["moved"]
        assert list(report.warnings) == ["moved"]

    def test_tool_calls_are_content_in_whatever_format(self):
        arguments = {"city": 'K\u00f6ln "Mitte"', "days": [1, "two"]}
        for given in (arguments, '{"city": "K\\u00f6ln \\"Mitte\\"", "days": [1, "two"]}'):
            call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": given}}
            chat = [
                say("user", "hi"),
                say("assistant", "", tool_calls=[call]),
                say("tool", "rain"),
                say("assistant", "Rain."),
            ]
            assert not read(FAMILIES["torchrl-qwen"], chat).report.warnings
            report = read(FAMILIES["chatml"], chat).report
            assert report.metrics["template_cut_chars"] == len('weatherK\u00f6ln "Mitte"two')
            assert "missing: 'weather'" in report.warnings["cut"]

    def test_a_list_of_parts_that_is_printed_as_one_is_told(self):
        chat = [say("user", [{"type": "text", "text": "2 + 2?"}]), say("assistant", "four")]
        printing = make(CHATML.replace("m.content", "(m.content | string)"))
        assert (
            "prints the content of 1 of 2 messages as a Python list"
            in read(printing, chat).report.warnings["printed"]
        )
        parts = make(CHATML.replace("m.content", "(m.content if m.content is string else m.content[0].text)"))
        assert not read(parts, chat).report.warnings

    def test_a_template_without_tags_is_compared_too(self):
        report = read(
            make("{% for m in messages %}{{ m.content | trim }}{% endfor %}"),
            [say("user", "hi ")],
            assistant_only=False,
        ).report
        assert report.metrics["template_cut_chars"] == 1

    @pytest.mark.parametrize("length", [1, 50, 2000])
    def test_any_cut_of_any_message_is_found(self, length):
        rng = random.Random(length)
        words = [f"{rng.randrange(10**9)}\n" for _ in range(length)]
        content = "".join(words)
        for cut in (
            slice(0, 1),
            slice(length - 1, length),
            slice(length // 2, length // 2 + 1),
            slice(0, length),
        ):
            left = words.copy()
            left[cut] = []
            (found,) = find_messages(f"<a>{''.join(left)}<b>", [say("user", content)])
            assert found.num_chars - found.num_found == pytest.approx(len("".join(words[cut])), abs=3)
            assert found.missing.strip()[:4] in content

    def test_long_dialogs_are_compared_in_no_time(self):
        """Worst cases: everything repeats, half of it is gone; a message of a megabyte is cut."""
        same = [say("user", "yes")] * 2000
        found = find_messages("".join(f"<{m['content']}>" for m in same[1000:]), same)
        assert sum(message.num_found for message in found) == 3000
        (found,) = find_messages("<" + "ab" * 250_000 + ">", [say("user", "ab" * 500_000 + "c")])
        assert found.num_found == 500_000

    def test_a_result_that_is_printed_as_json_is_all_there(self):
        template = CHATML.replace(
            "{% else %}{{ m.content +",
            "{% else %}{{ (m.content | tojson if m.role == 'tool' else m.content) +",
        )
        dialog = [
            say("user", "warm?"),
            say("tool", '{"temp": 22, "sky": "blue"}'),
            say("assistant", "22 \u00b0C"),
        ]
        report = read(make(template), dialog).report
        assert not report.warnings
        assert report.metrics["template_cut_chars"] == report.metrics["template_inserted_chars"] == 0
        assert report.metrics["template_unmarked_chars"] == 0

    def test_it_may_be_trimmed_before_it_is_printed_as_json(self):
        as_json = CHATML.replace(
            "{% else %}{{ m.content + '<|im_end|>' }}",
            "{% else %}{{ (m.content | trim | tojson) + '<|im_end|>' }}",
        )
        tokenizer = make(as_json)
        report = read(tokenizer, [say("system", ' be\n"brief" '), *TURNS]).report
        assert report.warnings == {}

    @pytest.mark.parametrize(
        "content",
        [
            "<think>because</think>four",
            "<think>\nbecause\n</think>\nfour",
            "<think>\nbecause\n</think>\n\nfour",
        ],
    )
    def test_white_space_that_a_template_puts_around_reasoning_is_no_loss(self, content):
        wraps = CHATML.replace(
            "{{ m.content + '<|im_end|>' }}{% endgen",
            "{% set parts = m.content.split('</think>') %}{{ '<think>\n' + "
            "parts[0].split('<think>')[-1].strip('\n') + "
            "'\n</think>\n\n' + parts[-1].lstrip('\n') + '<|im_end|>' }}{% endgen",
        )
        tokenizer = make(wraps)
        batch = read(tokenizer, [say("user", "2 + 2?"), say("assistant", content)])
        assert kept(tokenizer, batch) == ["<think>\nbecause\n</think>\n\nfour<|im_end|>"]
        assert batch.report.warnings == {}
        assert batch.report.metrics["template_cut_chars"] == 0

    def test_equal_words_in_a_call_its_result_and_the_answer_are_three(self):
        calls = [{"function": {"name": "add", "arguments": {"a": "12", "b": "12"}}}]
        template = CHATML.replace(
            "{{ m.content + '<|im_end|>' }}{% endgen",
            "{{ (m.tool_calls[0].function | tojson if m.tool_calls else m.content) + '<|im_end|>' }}{% "
            "endgen",
        )
        tokenizer = make(template)
        turns = [
            say("user", "12?"),
            say("assistant", "", tool_calls=calls),
            say("tool", "12"),
            say("assistant", "12"),
        ]
        batch = read(tokenizer, turns)
        assert batch.report.warnings == {}


@pytest.mark.parametrize(("template", "eos"), [(QWEN3, "<|im_end|>"), (R1, "</s>")])
def test_short_and_repeated_sentences_are_found_in_their_own_turns_where_a_template_cuts(template, eos):
    choose = random.Random(0).choice
    words = ["a", "4", "no", "yes", "user", "model", "assistant", "The answer is 4."]
    thoughts = ["no", "I think the answer is 4.", "The user asks again.", "Hm.\n\nLet me think."]
    tokenizer = make(template, eos=eos, bos="<s>")
    for _ in range(100):
        messages = []
        for _ in range(choose([1, 2, 3, 4])):
            answer = f"<think>\n{choose(thoughts)}\n</think>\n\n{choose(words)}"
            messages += [say("user", choose(words)), say("assistant", answer)]
        said = [message["content"] for message in messages[1::2]]
        if template is QWEN3:
            cut = sum(len(text) - len(text.split("</think>")[-1].lstrip("\n")) for text in said[:-1])
        else:
            cut = sum(len(text) - len(text.split("</think>")[-1]) for text in said)
        report = read(tokenizer, messages).report
        assert set(report.warnings) <= {"cut"}, messages
        assert report.metrics["template_cut_chars"] == cut, messages


def test_channels_of_a_repeated_answer_are_cut_where_they_are_cut():
    analysis, final = (
        "<|channel|>analysis<|message|>think<|end|><|start|>assistant",
        "<|channel|>final<|message|>yo",
    )
    turns = [say("user", "hi"), say("assistant", analysis + final)] * 2
    batch = read(FAMILIES["harmony"], turns)
    assert kept(FAMILIES["harmony"], batch) == [f"{final}<|end|>{analysis}{final}<|return|>"]
    cut = {"cut_messages": 1, "cut_chars": len(analysis)}
    assert figures(batch) == {"messages": 4, "content_chars": 4 + 2 * len(analysis + final), **cut}
    assert "message 1 (assistant)" in batch.report.warnings["cut"]


def test_tool_calls_that_a_template_leaves_out_are_missed_though_others_say_their_words():
    calls = [tool_call("weather", city="Paris")]
    turns = [
        say("user", "weather in Paris"),
        say("assistant", "ok", tool_calls=calls),
        say("tool", "Paris weather: rain"),
    ]
    batch = read(FAMILIES["chatml"], [*turns, say("assistant", "Paris weather is rain")])
    assert (figures(batch)["cut_messages"], figures(batch)["cut_chars"]) == (1, len("weather" + "Paris"))


@pytest.mark.parametrize(("printed", "num_lost"), [("", 0), ("[:1]", len("add"))])
def test_the_second_of_two_calls_is_missed(printed, num_lost):
    template = CHATML.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}",
        f"{{{{ m.content }}}}{{% for c in (m.tool_calls or []){printed} %}}{{{{ '<call>' + (c.function | "
        f"tojson) }}}}{{% endfor %}}"
        "{{ '<|im_end|>' }}{% endgeneration %}",
    )
    calls = [tool_call("add", a=1, b=2), tool_call("add", a=3, b=4)]
    turns = [
        say("user", "?"),
        say("assistant", "", tool_calls=calls),
        say("tool", "3"),
        say("assistant", "3, add 7"),
    ]
    assert figures(read(make(template), turns)).get("cut_chars", 0) == num_lost


def test_content_beside_a_call_is_not_found_in_the_call():
    call = "{{ m.tool_calls[0].function | tojson }}{{ '<|im_end|>' }}{% endgeneration %}"
    template = CHATML.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}", call)
    turns = [say("user", "?"), say("assistant", "all of it", tool_calls=[tool_call("lookup", where="Oslo")])]
    assert figures(read(make(template), turns))["cut_chars"] == len("all of it")


@pytest.mark.parametrize(
    ("side", "tokens", "lost"), [("right", ["<|im_end|>", "\n"], " long"), ("left", ["<|im_start|>"], "a qu")]
)
def test_truncated_content_is_missed_and_no_template_is_blamed(side, tokens, lost):
    tokenizer = make(CHATML)  # a token for each byte
    tokenizer.truncation_side = side
    turns = [say("user", "a question"), say("assistant", "an answer that is too long")]
    num_tokens = len(read(tokenizer, turns).token_ids[0])
    whole = read(tokenizer, turns, truncation=True, max_length=num_tokens)
    assert set(whole.report.warnings) == set()
    num_cut = len(tokens) + len(lost) + (len("user\n") if side == "left" else 0)
    batch = read(tokenizer, turns, truncation=True, max_length=num_tokens - num_cut)
    assert set(batch.report.warnings) == {"truncated"}
    assert (figures(batch)["cut_messages"], figures(batch)["cut_chars"]) == (1, len(lost))


DEEP = "[" * 100_000


@pytest.mark.parametrize("calls", [5, True, DEEP, [DEEP], [{"function": {"arguments": DEEP}}], {"a": 1}])
def test_tool_calls_of_any_kind_are_looked_at(calls):
    (found,) = find_messages("yes", [{"role": "assistant", "content": "yes", "tool_calls": calls}])
    assert found.num_found <= found.num_chars
    assert found.spans == [(0, 3)]
