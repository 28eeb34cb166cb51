"""Questions and answers come out of msgpack as they went in; bodies that are wrong are refused by name."""

from __future__ import annotations

import contextlib
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kl.client.wire_format import (
    Answer,
    Question,
    TooLargeError,
    answer_of,
    pack_answer,
    pack_question,
    unpack_question,
)
from vllm_kl.errors import InputError

LENGTHS = st.lists(st.integers(0, 6), max_size=6)


def question(lengths, num_ids=0):
    return Question(
        token_ids=[np.arange(n, dtype=np.int32) + 7 * i for i, n in enumerate(lengths)],
        starts=[max(1, n // 2) for n in lengths],
        ids=[np.full((max(n - max(1, n // 2), 0), num_ids), i, np.int32) for i, n in enumerate(lengths)]
        if num_ids
        else None,
        temperature=0.7,
        top_k=3,
    )


@given(LENGTHS, st.integers(0, 3))
def test_a_question_comes_out_as_it_went_in(lengths, num_ids):
    asked = question(lengths, num_ids)
    fields = unpack_question(pack_question(asked), most_sequences=10)
    assert [ids.tolist() for ids in fields["token_ids"]] == [ids.tolist() for ids in asked.token_ids]
    assert fields["starts"] == asked.starts
    assert (fields["temperature"], fields["top_k"], fields["alone"]) == (0.7, 3, False)
    if num_ids:
        assert [rows.tolist() for rows in fields["ids"]] == [rows.tolist() for rows in asked.ids]


@given(LENGTHS, st.integers(0, 2), st.integers(0, 2), st.booleans())
def test_an_answer_keeps_each_bit(lengths, num_ids, top_k, has_entropy):
    draw = np.random.default_rng(len(lengths))
    values = [
        draw.normal(size=(n, 1 + num_ids + 2 * top_k + has_entropy)).astype(np.float32) for n in lengths
    ]
    for rows in values:
        rows[:, 1 + num_ids : 1 + num_ids + top_k] = draw.integers(0, 1 << 24, (len(rows), top_k))
        rows[:1, 0] = -np.inf
    sent = Answer(
        index=[*range(len(lengths))][::-1],
        values=values,
        num_ids=num_ids,
        top_k=top_k,
        has_entropy=has_entropy,
        num_cached_tokens=[n // 2 for n in lengths],
        rescored=[n > 3 for n in lengths],
        origin={"model": "m", "weight_version": None, "timings": {"queue_s": 0.5}},
    )
    got = answer_of(msgpack.unpackb(pack_answer(sent)))
    assert got.index == sent.index
    assert [rows.tobytes() for rows in got.values] == [rows.tobytes() for rows in values]
    assert [rows.shape for rows in got.values] == [rows.shape for rows in values]
    assert (got.num_cached_tokens, got.rescored) == (sent.num_cached_tokens, sent.rescored)
    assert got.origin == sent.origin


def body(**changes):
    fields = msgpack.unpackb(pack_question(question([3, 4], 2))) | changes
    return msgpack.packb({name: value for name, value in fields.items() if value is not ...})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (body()[:-3], "not msgpack"),
        (b"\x91" * 5000, "not msgpack"),
        (msgpack.packb([1]), "not one map without lists"),
        (msgpack.packb("text"), "a msgpack str, expected a map"),
        (body(model={"name": "m"}), "a map in a map"),
        (msgpack.packb({str(n): n for n in range(100)}), "not one map"),
        (msgpack.packb({1: 2}), "int is not allowed for map key"),
        (body(token_ids=...), "token_ids is NoneType, expected raw little-endian int32"),
        (body(token_ids=b"123"), "token_ids is 3 bytes"),
        (body(token_ids=[1, 2]), "not one map without lists"),
        (body(token_ids=b"1234"), "token_ids has 1 numbers, expected 7: the sum of lengths"),
        (body(lengths=np.int32([-1, 8]).tobytes()), "lengths has a number below 0"),
        (body(lengths=np.int32([2**31 - 1] * 4).tobytes()), "expected 8589934588"),
        (body(starts=b""), "starts has 0 numbers for 2 sequences"),
        (body(num_ids=0), "num_ids is 0"),
        (body(num_ids=True), "num_ids is True"),
        (body(num_ids=2**63), "num_ids is 9223372036854775808"),
        # 2**31 rows of 2**24 ids each, 512 times: 2**64 numbers.
        (
            msgpack.packb(
                {
                    "token_ids": b"",
                    "ids": b"",
                    "lengths": bytes(4 * 512),
                    "starts": np.full(512, -(2**31), np.int32).tobytes(),
                    "num_ids": 2**24,
                }
            ),
            "ids has 0 numbers, expected 18446744073709551616",
        ),
        (body(num_ids=2**20), "expected .*: as many as scored rows times num_ids"),
    ],
)
def test_a_body_that_is_wrong_is_refused_by_name(data, message):
    with pytest.raises(InputError, match=message):
        unpack_question(data, most_sequences=1000)


def test_sequences_are_counted_before_they_become_objects():
    with pytest.raises(TooLargeError, match="2 sequences, but this server takes at most 1"):
        unpack_question(body(), most_sequences=1)


@pytest.mark.parametrize("empty", [b"\x90", b"\x80", b"\x81\xa0\x80"], ids=["lists", "maps", "maps in maps"])
def test_many_empty_objects_in_a_small_body_take_no_memory(empty):
    number = (4 << 20) // len(empty)
    data = b"\x81\xa1a\xdd" + number.to_bytes(4, "big") + empty * number
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="not one map without lists"):
            unpack_question(data, most_sequences=10)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
def test_random_bytes_are_an_error_of_ours(data):
    with pytest.raises(InputError):
        unpack_question(data, most_sequences=10)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_a_changed_body_is_read_or_refused(place, change):
    data = bytearray(body())
    place %= len(data)
    data[place : place + len(change)] = change
    with contextlib.suppress(InputError):
        unpack_question(bytes(data), most_sequences=10)
