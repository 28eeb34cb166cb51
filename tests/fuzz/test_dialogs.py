"""Dialogs of any roles and contents, and templates of many families: ids and masks, or an error."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.batch.helpers import CHATML, FAMILIES, make
from tests.fuzz.strategies import JSON_VALUES, NASTY, SCALARS, TEXTS, fuzz, told
from vllm_kl.batch.chat_templates import render
from vllm_kl.batch.read_messages import read_messages
from vllm_kl.batch.rendered_content import find_messages

ROLES = st.sampled_from(["user", "assistant", "assistant", "system", "tool", "", "\x00", None, 5])
CONTENTS = st.one_of(
    TEXTS, TEXTS, SCALARS, st.lists(st.one_of(TEXTS, st.builds(dict, text=TEXTS)), max_size=2)
)
MESSAGES = st.fixed_dictionaries(
    {"role": ROLES, "content": CONTENTS},
    optional={
        "tool_calls": st.one_of(JSON_VALUES, st.lists(st.builds(dict, function=JSON_VALUES), max_size=2)),
        "tool_responses": JSON_VALUES,
        "name": SCALARS,
    },
)
TURNS = st.lists(st.tuples(TEXTS, TEXTS, JSON_VALUES), min_size=1, max_size=2).map(
    lambda turns: [
        message
        for asked, said, calls in turns
        for message in (
            {"role": "user", "content": asked},
            {"role": "assistant", "content": said, **({"tool_calls": calls} if calls else {})},
        )
    ]
)
DIALOGS = st.one_of(
    TURNS,
    TURNS,
    st.lists(MESSAGES, max_size=4),
    st.lists(MESSAGES, max_size=3).map(lambda m: [{"role": "user", "content": "a"}, *m]),
    st.lists(SCALARS, max_size=2),
    SCALARS,
)


@fuzz(
    dialogs=st.one_of(st.lists(DIALOGS, min_size=1, max_size=2), st.lists(TURNS, min_size=1, max_size=2)),
    family=st.sampled_from(sorted(FAMILIES)),
    few=100,
    share=0.15,
)
def test_any_dialog_is_read_or_refused(dialogs, family):
    tokenizer = FAMILIES[family]
    batch = told(lambda: read_messages(dialogs, tokenizer))
    if batch is not None:
        assert len(batch) == len(dialogs)
        for ids, keep in zip(batch.token_ids, batch.keep, strict=True):
            assert len(ids) == len(keep)
            assert not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < len(tokenizer)


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=6)


@fuzz(turns=st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=3), share=0.2)
def test_the_mask_has_what_the_assistant_said_and_its_end(turns):
    tokenizer = FAMILIES["chatml"]
    dialog = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    batch = read_messages([dialog], tokenizer)
    (ids,), (keep,) = batch.token_ids, batch.keep
    assert tokenizer.decode(ids[keep]) == "".join(f"{said}<|im_end|>" for _, said in turns)


TEMPLATES = st.lists(
    st.sampled_from(
        [
            "{% for m in messages %}",
            "{% endfor %}",
            "{% generation %}",
            "{% endgeneration %}",
            "{{ m.content }}",
            "{{ m.role }}",
            "{{ messages[0].content }}",
            "{{ messages[9].content }}",
            "{{ raise_exception('no') }}",
            "{% if m.role == 'assistant' %}",
            "{% endif %}",
            "<|im_end|>",
            "{{ strftime_now('%Q') }}",
            "{{ 1 / 0 }}",
            "{{ m.content | trim }}",
            "{{",
            "a",
            "\ud800",
            "{{ eos_token }}",
        ]
    ),
    max_size=7,
).map("".join)
BOS = make(CHATML, bos="<s>", adds="<s> $A")  # a tokenizer that begins every text with BOS


@fuzz(
    template=st.one_of(
        TEMPLATES,
        TEMPLATES.map(lambda text: f"{{% for m in messages %}}{text}{{% endfor %}}"),
        TEMPLATES.map(
            lambda text: (
                f"{{% for m in messages %}}{{% generation %}}{text}{{% endgeneration %}}{{% endfor %}}"
            )
        ),
    ),
    content=st.one_of(TEXTS, st.just("a")),
    few=60,
    share=0.2,
)
def test_any_template_renders_or_is_refused(template, content):
    dialog = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    options = {
        "chat_template": template,
        "tokenize": True,
        "return_dict": True,
        "return_assistant_tokens_mask": True,
    }
    for tokenizer in (FAMILIES["chatml"], BOS):
        told(lambda tokenizer=tokenizer: render([dialog], tokenizer, options, whose="the chat template"))
        told(lambda tokenizer=tokenizer: read_messages([dialog], tokenizer, {"chat_template": template}))


@fuzz(
    before=TEXTS,
    contents=st.lists(TEXTS, min_size=1, max_size=3),
    after=TEXTS,
    cut=st.lists(NASTY, max_size=2),
    share=2.0,
)
def test_contents_are_found_where_they_are(before, contents, after, cut):
    text = before + "|".join(contents) + after
    messages = [{"role": "user", "content": content} for content in contents]
    for one in find_messages(text, messages):
        assert one.num_found == one.num_chars
        assert not one.missing
    for lost in cut:
        text = text.replace(lost, "") if lost else text
    for one, content in zip(find_messages(text, messages), contents, strict=True):
        assert one.num_chars == len(content)
        assert 0 <= one.num_found <= one.num_chars
        assert all(0 <= start <= stop <= len(text) for start, stop in one.spans)
        assert (one.num_found == one.num_chars) == (not one.missing)
