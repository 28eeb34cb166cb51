"""Bodies of questions in JSON and msgpack, and of answers: read as they were meant, or refused."""

from __future__ import annotations

import functools
import json

import msgpack
import numpy as np
from hypothesis import strategies as st

from tests.fuzz.strategies import CHANGES, INTS, JSON_VALUES, KEEPS, SCALARS, TEXTS, fuzz, mutated, told
from vllm_kl.client.calls import Part, answer_in
from vllm_kl.client.wire_format import Answer, Question, pack_answer, pack_question
from vllm_kl.serving.bodies import Settings, read_question
from vllm_kl.serving.limits import Limits

LIMITS = Limits(max_sequences=8, max_tokens=4096)
MSGPACK, JSON = "application/msgpack", "application/json"
SEQUENCES = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), max_size=3)


def check(question, settings):
    """What every question has that was read."""
    assert len(question.token_ids) == len(question.starts)
    assert all(ids.dtype == np.int32 and ids.ndim == 1 for ids in question.token_ids)
    if question.ids is not None:
        assert len(question.ids) == len(question.token_ids)
        assert len({rows.shape[1] for rows in question.ids}) <= 1
        assert all(rows.dtype == np.int32 for rows in question.ids)
    assert type(question.temperature) is float
    assert settings.top_k >= 0


def pack(sequences, starts, num_ids):
    rows = [max(0, len(ids) - start) for ids, start in zip(sequences, starts, strict=True)]
    return pack_question(
        Question(
            token_ids=[np.array(ids, np.int32) for ids in sequences],
            starts=starts,
            ids=[np.arange(n * num_ids, dtype=np.int32).reshape(n, num_ids) for n in rows]
            if num_ids
            else None,
        )
    )


@fuzz(sequences=SEQUENCES, num_ids=st.integers(0, 2), changes=CHANGES, keep=KEEPS, share=3.0, few=100)
def test_a_changed_body_of_msgpack_is_read_or_refused(sequences, num_ids, changes, keep):
    sent = pack(sequences, [1] * len(sequences), num_ids)
    data = mutated(sent, changes, keep)
    found = told(lambda: read_question(data, MSGPACK, LIMITS))
    if found is not None:
        check(*found)
    if data == sent:
        assert found is not None
        assert [ids.tolist() for ids in found[0].token_ids] == sequences


RAW = st.one_of(
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4).map(lambda ns: np.array(ns, "<i4").tobytes()),
    st.binary(max_size=9),
)
MSGPACK_INTS = st.one_of(st.integers(0, 3), st.sampled_from([-1, 2**24, 2**24 + 1, 2**63, -(2**63)]))
FIELDS = st.fixed_dictionaries(
    {"token_ids": RAW, "lengths": RAW, "starts": RAW},
    optional={
        "ids": st.one_of(RAW, st.none()),
        "num_ids": st.one_of(MSGPACK_INTS, st.booleans(), st.none()),
        "temperature": st.one_of(st.floats(), MSGPACK_INTS, st.none(), st.text(max_size=2)),
        "top_k": st.one_of(MSGPACK_INTS, st.booleans(), st.floats()),
        "placeholders": st.sampled_from(["refuse", "as_text", "", b"refuse", None]),
        "stream": st.one_of(st.booleans(), MSGPACK_INTS),
        "encoding": st.sampled_from(["list", "base64", "other"]),
        "model": st.one_of(st.text(max_size=3), st.binary(max_size=3), st.none()),
        "unknown": st.integers(0, 3),
    },
)


@fuzz(fields=FIELDS, share=3.0, few=100)
def test_any_map_of_msgpack_is_read_or_refused(fields):
    found = told(lambda: read_question(msgpack.packb(fields), MSGPACK, LIMITS))
    if found is not None:
        check(*found)
        question, _ = found
        lengths = np.frombuffer(fields["lengths"], "<i4").tolist()
        assert [len(ids) for ids in question.token_ids] == lengths
        assert np.concatenate([np.empty(0, "<i4"), *question.token_ids]).tobytes() == fields["token_ids"]
        if fields.get("ids") is not None:
            for rows, length, start in zip(question.ids, lengths, question.starts, strict=True):
                assert rows.shape == (max(0, length - start), fields["num_ids"])


@fuzz(
    fields=st.dictionaries(
        st.sampled_from(
            [*Settings.model_fields, "token_ids", "start", "ids", "temperature", "top_k", "entropy"]
        ),
        st.one_of(JSON_VALUES, st.lists(st.lists(st.lists(INTS, max_size=2), max_size=2), max_size=2)),
    ),
    token_ids=st.one_of(SEQUENCES, JSON_VALUES),
    share=2.0,
    few=100,
)
def test_any_json_is_read_or_refused(fields, token_ids):
    data = json.dumps({"token_ids": token_ids, **fields}).encode()
    found = told(lambda: read_question(data, JSON, LIMITS))
    if found is not None:
        check(*found)
        sent = json.loads(data)
        assert [ids.tolist() for ids in found[0].token_ids] == sent["token_ids"]
        if sent.get("ids") is not None:
            assert [rows.tolist() for rows in found[0].ids] == sent["ids"]


@fuzz(
    ids=st.lists(st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=3), max_size=3),
    start=st.one_of(st.none(), INTS, st.lists(INTS, max_size=3), SCALARS),
    few=60,
)
def test_chosen_ids_in_json_are_read_or_refused(ids, start):
    fields = {"token_ids": [[1, 2, 3]] * len(ids), "ids": ids}
    fields |= {} if start is None else {"start": start}
    found = told(lambda: read_question(json.dumps(fields).encode(), JSON, LIMITS))
    if found is not None:
        check(*found)
        assert [rows.tolist() for rows in found[0].ids] == ids


@fuzz(
    data=st.one_of(st.binary(max_size=60), TEXTS.map(lambda t: t.encode(errors="surrogatepass"))), share=2.0
)
def test_random_bytes_are_refused(data):
    for kind in (JSON, MSGPACK):
        assert told(functools.partial(read_question, data, kind, LIMITS)) is None


ANSWER = Answer(
    index=[0, 1],
    values=[np.full((2, 5), -1.0, np.float32), np.full((1, 5), -2.0, np.float32)],
    num_ids=1,
    top_k=1,
    has_entropy=True,
    num_cached_tokens=[0, 1],
    rescored=[False, True],
    origin={"model": "m", "weights": "w", "weight_version": 1, "timings": {}},
)
CALL = Question(token_ids=[], starts=[])
PART = Part(call=CALL, places=[3, 5], num_rows=[2, 1], body=b"", headers={}, addresses=["http://a"])


def answer_fields(changes):
    fields = msgpack.unpackb(pack_answer(ANSWER)) | changes
    return {name: value for name, value in fields.items() if value is not ...}


@fuzz(
    changes=st.dictionaries(
        st.sampled_from([*msgpack.unpackb(pack_answer(ANSWER)), "problem"]),
        st.one_of(RAW, SCALARS, st.just(...), st.dictionaries(st.sampled_from(["type", "detail"]), SCALARS)),
        max_size=2,
    ),
    share=2.0,
    few=100,
)
def test_a_wrong_answer_of_a_server_is_an_error_of_ours(changes):
    found = told(lambda: answer_in(answer_fields(changes), PART))
    if found is not None:
        assert set(found.index) <= {3, 5}
        assert len(found.index) == len(found.values) == len(found.rescored) == len(found.num_cached_tokens)
        assert all(rows.dtype == np.float32 for rows in found.values)
        assert all(len(rows) == {3: 2, 5: 1}[i] for i, rows in zip(found.index, found.values, strict=True))
