"""Checks how texts and messages become ids: BOS, changes by templates, tokens of a turn that count."""

from __future__ import annotations

import itertools
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensordict import TensorDict
from tokenizers.processors import TemplateProcessing
from torchrl.data.llm.history import _CHAT_TEMPLATES
from torchrl.modules.llm.policies import Text

from tests.batches import history_batch, ids_batch
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl import RetrieveKL, RetrieveLogProb, VLLMReference
from vllm_kl.batch.read_tokens import InputKeys, read_batch
from vllm_kl.batch.rendered_content import find_messages
from vllm_kl.batch.tokenize_texts import TextWatch, tokenize
from vllm_kl.demo.task import make_tokenizer
from vllm_kl.errors import InputError, OptionError

SPECIALS = [
    *(
        "<s>",
        "</s>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<eos>",
    ),
    *(
        "<|end|>",
        "<|return|>",
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
    ),
]


def say(role, content, **others):
    return {"role": role, "content": content, **others}


def make(template, *, eos="<|im_end|>", bos=None, adds=None):
    """A byte-level tokenizer with special tokens of many families. ``adds``: tokens around every text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS, "eos_token": eos})
    if bos is not None:
        tokenizer.bos_token = bos
    if adds is not None:
        names = [(name, tokenizer.convert_tokens_to_ids(name)) for name in adds.split() if name != "$A"]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=names)
    tokenizer.chat_template = template
    return tokenizer


def read(tokenizer, *chats, assistant_only=True, **template_kwargs):
    options = {"chat_template": tokenizer.chat_template, **template_kwargs}
    keys = InputKeys(
        input_mode="history", key=("history", "full"), tokenizer=tokenizer, template_kwargs=options
    )
    return read_batch(history_batch(chats=list(chats)), keys, assistant_only=assistant_only)


def read_texts(tokenizer, *texts, **options):
    keys = InputKeys(input_mode="text", key=("text", "full"), tokenizer=tokenizer, tokenizer_kwargs=options)
    td = TensorDict(text=Text(full=list(texts)), batch_size=(len(texts),)).to_lazystack(0)
    batch = read_batch(td, keys, assistant_only=False)
    return [ids.tolist() for ids in batch.token_ids], batch.report


def kept(tokenizer, batch):
    return [tokenizer.decode(ids[keep]) for ids, keep in zip(batch.token_ids, batch.keep, strict=True)]


# Stand-ins of the families' templates: what they cut, trim, move and end turns with.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation "
    "%}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ "
    "'\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% set day = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + day + '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] "
    "%}{% endif %}"
    "{{ '<|eot_id|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{{ '<|eot_id|>' }}{% endgeneration "
    "%}"
    "{% else %}{{ m.content | trim }}{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{%- set system = '' %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + "
    "'\n\n' %}"
    "{%- set messages = messages[1:] %}{%- endif %}{{- bos_token }}{%- for m in messages %}{%- if m.role == "
    "'user' %}"
    "{%- set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{- '[INST] ' + (system if m == last else '') + m.content + '[/INST]' }}"
    "{%- else %}{% generation %}{{- ' ' + m.content + eos_token }}{% endgeneration %}{%- endif %}{%- endfor "
    "%}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') "
    "}}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}{% generation %}{{ m.content | trim }}{{ "
    "'<end_of_turn>\n' }}"
    "{% endgeneration %}{% else %}{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + "
    "'<end_of_turn>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = "
    "loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set c = m.content if loop.index0 > ns.last else m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% generation %}{{ c + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% "
    "endif %}{{ '\n' }}"
    "{% endfor %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor "
    "%}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% elif m.role == 'assistant' %}{{ "
    "'<|assistant|>' }}{% generation %}"
    "{{ m.content.split('</think>')[-1] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}{{ "
    "m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
HARMONY = (  # drops the analysis channel of all turns but the last
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else '<|channel|>final' + m.content.split('<|channel|>final')[-1] }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endgeneration %}{% else %}{{ '<|message|>' + "
    "m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}"
)
FAMILIES = {
    "chatml": make(CHATML),
    "llama3": make(LLAMA3, eos="<|eot_id|>", bos="<s>"),
    "mistral": make(MISTRAL, eos="</s>", bos="<s>"),
    "gemma": make(GEMMA, eos="<eos>", bos="<s>"),
    "qwen3": make(QWEN3),
    "r1": make(R1, eos="</s>", bos="<s>"),
    "phi3": make(PHI3, eos="</s>"),
    "harmony": make(HARMONY, eos="<|return|>"),
    **{f"torchrl-{name}": make(text, bos="<s>") for name, text in _CHAT_TEMPLATES.items()},
}
TURNS = [say("user", "2 + 2?"), say("assistant", "four"), say("user", "and one?"), say("assistant", "a")]
THINK = "<think>\nTwo and two, that is four.\n</think>\n\n"
THOUGHT = [m if m["role"] == "user" else say("assistant", THINK + m["content"]) for m in TURNS]


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


def figures(batch):
    return {
        name.removeprefix("template_"): int(value) for name, value in batch.report.metrics.items() if value
    }


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


def _call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_tool_calls_that_a_template_leaves_out_are_missed_though_others_say_their_words():
    calls = [_call("weather", city="Paris")]
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
    calls = [_call("add", a=1, b=2), _call("add", a=3, b=4)]
    turns = [
        say("user", "?"),
        say("assistant", "", tool_calls=calls),
        say("tool", "3"),
        say("assistant", "3, add 7"),
    ]
    assert figures(read(make(template), turns)).get("cut_chars", 0) == num_lost


@pytest.mark.parametrize("content", ["", "ok"])
def test_calls_outside_of_the_tags_are_unmarked(content):
    call = (
        "{% endgeneration %}{{ m.tool_calls[0].function | tojson if m.tool_calls else '' }}{{ '<|im_end|>' }}"
    )
    template = CHATML.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}" + call)
    turns = [say("user", "?"), say("assistant", content, tool_calls=[_call("weather", city="Paris")])]
    batch = read(make(template), [*turns, say("tool", "weather: rain"), say("assistant", "rain")])
    assert figures(batch)["unmarked_chars"] == len("weather" + "Paris")
    assert "'weather'" in batch.report.warnings["unmarked"]


def test_content_beside_a_call_is_not_found_in_the_call():
    call = "{{ m.tool_calls[0].function | tojson }}{{ '<|im_end|>' }}{% endgeneration %}"
    template = CHATML.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}", call)
    turns = [say("user", "?"), say("assistant", "all of it", tool_calls=[_call("lookup", where="Oslo")])]
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


@pytest.mark.parametrize("template", [R1, "{{ bos_token }}" + LLAMA3])
def test_two_bos_of_a_template_are_said(template):
    tokenizer = make(template, eos="</s>", bos="<s>")
    system = "<s>Be brief." if template is R1 else "Be brief."
    turns = [say("system", system), *TURNS]
    batch = read(tokenizer, turns)
    assert tokenizer.decode(batch.token_ids[0]).count("<s>") == 2
    assert "1 of 1 samples begin with two BOS tokens" in batch.report.warnings["double_bos"]
    assert "double_bos" not in read(FAMILIES["r1"], TURNS).report.warnings
