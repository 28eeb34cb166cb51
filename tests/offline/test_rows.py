"""Rows of tables become token ids, starts and masks, or the text of an error. No Ray, no engine."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from tensordict import TensorDict
from torchrl.data.llm import History
from transformers import AutoTokenizer

from tests import tiny
from vllm_kl.batch.read_messages import read_messages
from vllm_kl.batch.read_tokens import InputKeys, read_batch
from vllm_kl.errors import InputError, OptionError
from vllm_kl.offline.columns import IDS, MASKS, OF_STAGES, STARTS, Columns, layout_of, visible
from vllm_kl.offline.dry_run import shared_tokens
from vllm_kl.offline.jsonl import schema_of
from vllm_kl.offline.parts import cut, find_files, read_part, survey
from vllm_kl.offline.pipeline import make_job
from vllm_kl.offline.rows import ReadRows, Texts

DIALOG = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 3?"},
    {"role": "assistant", "content": "5 é"},
]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return str(tiny.build(tmp_path_factory.mktemp("model") / "tiny", seed=0))


def read(table, columns=None, **texts):
    columns = columns or Columns()
    found = ReadRows(layout_of(table.schema, columns), columns, Texts(**texts))(table)
    rows = {name: found[name].to_pylist() for name in found.column_names}
    return rows[IDS], rows[STARTS], rows.get(MASKS), rows[columns.added("error")]


@pytest.mark.parametrize(
    ("options", "tokenizer", "expected"),
    [
        ({}, None, ("m", {})),
        ({"revision": "r"}, None, ("m", {"revision": "r"})),
        ({"revision": "r", "tokenizer_revision": "t"}, None, ("m", {"revision": "t"})),
        ({"revision": "r", "tokenizer": "x"}, None, ("x", {})),
        ({"revision": "r"}, "x", ("x", {})),
        ({"trust_remote_code": True}, "x", ("x", {"trust_remote_code": True})),
    ],
)
def test_texts_are_read_with_the_tokenizer_that_the_engine_loads(options, tokenizer, expected):
    texts = make_job("m", tokenizer=tokenizer, engine_options=options).texts
    assert (texts.tokenizer, texts.loading) == expected


def test_a_response_follows_its_prompt():
    table = pa.table({"prompt_ids": [[5, 6], [7]], "response_ids": [[8], []]})
    assert read(table) == ([[[5, 6, 8]], [[7]]], [[2], [1]], None, [None, None])


def test_the_responses_of_a_group_share_the_prompt():
    ids, starts, _, errors = read(pa.table({"prompt_ids": [[5, 6]], "response_ids": [[[8], [9, 9]]]}))
    assert (ids, starts, errors) == ([[[5, 6, 8], [5, 6, 9, 9]]], [[2, 2]], [None])


def test_ids_have_a_start_or_begin_at_token_1():
    assert read(pa.table({"ids": [[5, 6, 7]], "start": [2]}))[:2] == ([[[5, 6, 7]]], [[2]])
    assert read(pa.table({"ids": [[5, 6, 7]]}))[:2] == ([[[5, 6, 7]]], [[1]])


def test_ids_win_over_texts_and_columns_may_have_other_names():
    table = pa.table({"prompt": ["a"], "response": ["b"], "p": [[1]], "r": [[2]]})
    names = Columns.renamed({"prompt_ids": "p", "response_ids": "r"}, prefix="x_")
    assert read(table, names)[0] == [[[1, 2]]]
    with pytest.raises(OptionError, match="'answer' cannot be renamed"):
        Columns.renamed({"answer": "x"})


@pytest.mark.parametrize("type_", [pa.int8(), pa.int32(), pa.int64(), pa.uint16()])
@pytest.mark.parametrize("list_", [pa.list_, pa.large_list])
def test_any_list_of_ints_is_read(type_, list_):
    column = pa.array([[5, 6, 7], [8, 9]], list_(type_))
    table = pa.table({"ids": pa.chunked_array([column.slice(1), column])})
    assert read(table)[0] == [[[8, 9]], [[5, 6, 7]], [[8, 9]]]


def test_a_bad_row_has_an_error_and_its_neighbours_have_none():
    table = pa.table(
        {
            "prompt_ids": pa.array([[5], None, [6, None], [7]], pa.list_(pa.int64())),
            "response_ids": pa.array([[1], [1], [1], None], pa.list_(pa.int64())),
        }
    )
    ids, _, _, errors = read(table)
    assert ids == [[[5, 1]], None, None, None]
    assert [error and error.split(",")[0] for error in errors] == [
        None,
        "column 'prompt_ids' is null",
        "column 'prompt_ids' has a null among its ids",
        "column 'response_ids' is null",
    ]


@pytest.mark.parametrize("is_group", [False, True])
def test_texts_are_tokenized_prompt_and_response_apart(tokenizer_path, tokenizer, is_group):
    response = ["yes", "no"] if is_group else "yes"
    table = pa.table({"prompt": ["Really?"], "response": [response]})
    ids, starts, _, errors = read(table, tokenizer=tokenizer_path, add_eos=True)
    assert errors == [None]
    for one, start, text in zip(ids[0], starts[0], response if is_group else [response], strict=True):
        assert tokenizer.decode(one[:start]) == "Really?"
        assert tokenizer.decode(one[start:]) == text + tokenizer.eos_token


def test_the_mask_of_messages_is_that_of_the_same_history(tokenizer_path, tokenizer):
    table = pa.table({"messages": [DIALOG]})
    ids, starts, masks, errors = read(table, tokenizer=tokenizer_path)
    history = History.from_chats([DIALOG])
    td = TensorDict({("history", "full"): history}, batch_size=[1])
    keys = InputKeys(input_mode="history", key=("history", "full"), tokenizer=tokenizer)
    batch = read_batch(td, keys, assistant_only=True)
    assert errors == [None]
    assert ids[0] == [batch.token_ids[0].tolist()]
    assert masks[0] == [batch.keep[0].tolist()]
    assert starts[0] == [masks[0][0].index(True)]
    assert tokenizer.decode(torch.tensor(ids[0][0])[torch.tensor(masks[0][0])]) == "2<|im_end|>5 é<|im_end|>"


def test_keys_of_messages_that_arrow_filled_with_null_are_not_given_to_the_template(tokenizer_path):
    named = [{"role": "user", "content": "a", "name": "bob"}, {"role": "assistant", "content": "b"}]
    template = (
        "{% for m in messages %}{{ m['name'] if 'name' in m else '-' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    ids, *_ = read(pa.table({"messages": [named]}), tokenizer=tokenizer_path, chat_template=template)

    tokenizer = tiny.make_tokenizer()
    assert tokenizer.decode(ids[0][0]) == "boba-b"


@pytest.mark.parametrize(
    ("dialog", "told"),
    [
        (None, "expected a list of messages"),
        ([], "expected a list of messages"),
        ([{"role": "user", "content": "a"}], "no message is the assistant's"),
        ([{"content": "a"}], "expected a dict with 'role'"),
    ],
)
def test_a_bad_dialog_has_an_error_and_its_neighbours_have_none(tokenizer_path, dialog, told):
    type_ = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    table = pa.table({"messages": pa.array([DIALOG, dialog, DIALOG], type_)})
    ids, _, _, errors = read(table, tokenizer=tokenizer_path)
    assert (errors[0], errors[2]) == (None, None)
    assert told in errors[1]
    assert ids[1] is None
    assert ids[0] == ids[2]


def test_a_template_without_tags_is_refused(tokenizer):
    with pytest.raises(OptionError, match="does not mark the tokens of the assistant"):
        read_messages([DIALOG], tokenizer, {"chat_template": "{{ messages[0]['content'] }}"})


def test_columns_that_cannot_be_scored_are_named():
    with pytest.raises(InputError, match="columns 'a': nothing that can be scored"):
        layout_of(pa.schema([("a", pa.string())]), Columns())
    with pytest.raises(InputError, match="'prompt' holds int64, expected text"):
        layout_of(pa.schema([("prompt", pa.int64()), ("response", pa.string())]), Columns())


TEXT, DIALOGS_TYPE = pa.string(), pa.list_(pa.struct([("role", pa.string())]))
TWO_KINDS = pa.schema([("prompt", TEXT), ("best", TEXT), ("response", TEXT), ("messages", DIALOGS_TYPE)])


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ({}, {"messages": "messages"}),
        ({"response": "best"}, {"prompt": "prompt", "response": "best"}),
        ({"prompt": "best"}, {"prompt": "best", "response": "response"}),
        ({"prompt": "prompt"}, {"prompt": "prompt", "response": "response"}),
    ],
)
def test_a_column_that_was_named_is_read(names, read):
    assert layout_of(TWO_KINDS, Columns.renamed(names)).read == read


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"messages": "dialgo"}, "there is no column 'dialgo', which was named for 'messages'"),
        ({"messages": "messages", "prompt": "prompt"}, "'messages' and 'prompt', which are never read"),
        ({"ids": "best", "start": "nothing"}, "there is no column 'nothing', which was named for 'start'"),
        ({"response_ids": "best"}, r"Expected 'prompt_ids' and 'best'\. Rename"),
    ],
)
def test_a_named_column_that_would_not_be_read_is_refused(names, told):
    with pytest.raises(InputError, match=told):
        layout_of(TWO_KINDS, Columns.renamed(names))


def test_dialogs_of_jsonl_are_rendered_as_they_were_written(tmp_path, tokenizer_path):
    """One struct for all messages would make 5 to 5.0, add keys and drop nulls."""
    said = [{"a": 5}, {"a": 2.5, "b": None}, {"b": None, "a": 5}, None, {}]
    dialogs = [[{"role": "assistant", "content": "x", "arguments": one}] for one in said]
    dialogs.append([{"role": "assistant", "content": "x"}])
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"messages": d}) + "\n" for d in dialogs))
    columns = Columns()
    (part,) = cut(find_files(str(tmp_path)), 1 << 20)
    part, types = survey(part, columns.role_of)
    schema = schema_of(types, columns.role_of)
    table = read_part(part, schema, columns)
    template = (
        "x{% generation %}{{ messages[0].arguments | tojson if 'arguments' in "
        "messages[0] else 'none' }}{% endgeneration %}"
    )
    texts = {"tokenizer": tokenizer_path, "chat_template": template}
    ids, _, _, errors = read(table, **texts)
    assert pa.types.is_struct(schema.field("messages").type.value_type)
    assert errors == [None] * 6
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    assert [tokenizer.decode(one[0]) for one in ids] == [f"x{json.dumps(one)}" for one in said] + ["xnone"]
    found = ReadRows(layout_of(table.schema, columns), columns, Texts(**texts))(table)
    assert visible(found.column_names) == ["messages", "error"]


def test_shared_tokens_are_those_of_a_perfect_prefix_cache():
    """Against a set of all beginnings: what must be computed is each distinct beginning, once."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 3, 6).tolist() for _ in range(4)]
    sequences = [(np.array(p + draw.integers(0, 3, 3).tolist()), 6) for p in prompts for _ in range(3)]
    distinct = {(tuple(ids[: t + 1]), t >= start - 1) for ids, start in sequences for t in range(start - 1)}
    rest = {tuple(ids) for ids, _ in sequences}
    must = len(distinct) + sum(len(ids) - 5 for ids in rest)
    assert sum(len(ids) for ids, _ in sequences) - shared_tokens(sequences) == must


def test_only_the_columns_of_the_stages_are_hidden():
    """pandas writes an index as the column ``__index_level_0__``."""
    assert visible(["x", "__index_level_0__", *OF_STAGES]) == ["x", "__index_level_0__"]
