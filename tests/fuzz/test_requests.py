"""Ids, starts, chosen ids and settings of a call: checked requests, or an error that names the sequence."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from tests.fuzz.strategies import FLOATS, INTS, NO_IDS, SCALARS, Odd, fuzz, told
from vllm_kl.checks import make_requests
from vllm_kl.client.calls import parts_of, rows_of
from vllm_kl.client.wire_format import Question, unpack_question
from vllm_kl.routing.dialogs import Dialogs
from vllm_kl.types import EngineInfo

VOCABULARY, LONGEST = 10, 6
INFO = EngineInfo(
    readout="pooling",
    vocab_size=VOCABULARY,
    max_sequence_len=LONGEST,
    can=frozenset({"temperature", "ids", "top_k", "entropy"}),
    placeholders={9: "an image"},
)
AS = st.sampled_from([list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, np.uint16)])
GOOD = st.builds(lambda ids, kind: kind(ids), st.lists(st.integers(0, 8), min_size=1, max_size=LONGEST), AS)
STARTS = st.one_of(
    st.none(),
    st.integers(-1, 7),
    st.lists(st.integers(1, 3), max_size=4),
    st.lists(st.one_of(INTS, FLOATS), max_size=3),
    SCALARS,
    st.sampled_from([np.array(1), np.array([1.5]), torch.tensor([1, 1]), torch.tensor(1), Odd(), np.int8(1)]),
)
MANY = st.one_of(st.lists(GOOD, max_size=4), st.lists(st.one_of(GOOD, GOOD, NO_IDS), max_size=4), NO_IDS)
TEMPERATURES = st.one_of(st.just(1.0), FLOATS, SCALARS, st.sampled_from([np.float32(0.5), torch.tensor(0.7)]))
KS = st.one_of(st.none(), st.integers(1, 3), SCALARS, st.just(np.int64(2)))


def as_starts(start, number):
    """What ``start`` means, in plain words."""
    return [1 if start is None else start] * number if start is None or np.ndim(start) == 0 else list(start)


@fuzz(
    token_ids=MANY,
    start=STARTS,
    temperature=TEMPERATURES,
    top_k=KS,
    entropy=st.booleans(),
    share=3.0,
    few=150,
)
def test_requests_are_what_was_given_or_refused(token_ids, start, temperature, top_k, entropy):
    found = told(
        lambda: make_requests(INFO, token_ids, start, temperature=temperature, top_k=top_k, entropy=entropy)
    )
    if found is None:
        return
    assert len(found) == len(token_ids)
    starts = as_starts(start, len(found))
    for request, ids, first in zip(found, token_ids, starts, strict=True):
        assert request.token_ids.dtype == np.int32
        assert request.token_ids.tolist() == [int(one) for one in ids]
        assert request.start == first
        assert 1 <= first <= len(request.token_ids) <= LONGEST
        assert all(
            0 <= one < VOCABULARY and one not in INFO.placeholders for one in request.token_ids.tolist()
        )
        assert isinstance(request.temperature, float)
        assert 0 < request.temperature < float("inf")
        assert (request.temperature, request.top_k) == (float(temperature), top_k or 0)


@fuzz(
    token_ids=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=LONGEST), max_size=4),
    data=st.data(),
)
def test_a_good_call_is_never_refused(token_ids, data):
    start = [data.draw(st.integers(1, len(ids))) for ids in token_ids]
    found = make_requests(INFO, token_ids, start, temperature=0.7)
    assert [request.token_ids.tolist() for request in found] == token_ids
    assert [request.start for request in found] == start


@fuzz(
    ids=st.one_of(
        st.lists(st.one_of(st.lists(st.lists(INTS, max_size=2), max_size=2), NO_IDS), max_size=3), NO_IDS
    ),
    share=2.0,
    few=100,
)
def test_chosen_ids_are_what_was_given_or_refused(ids):
    token_ids, start = [[1, 2, 3], [4]], [1, 1]
    found = told(lambda: make_requests(INFO, token_ids, start, temperature=1.0, ids=ids))
    if found is not None and ids is not None:
        assert found[0].ids.tolist() == [[int(one) for one in row] for row in ids[0]]
        assert found[1].ids.shape == (0, found[0].ids.shape[1])


@fuzz(token_ids=MANY, start=STARTS, temperature=TEMPERATURES, top_k=KS, share=2.0, few=100)
def test_a_client_sends_what_it_was_given_or_refuses(token_ids, start, temperature, top_k):
    rows = told(lambda: rows_of(token_ids, start))
    if rows is None:
        return
    sequences, starts = rows
    assert starts == as_starts(start, len(token_ids))
    question = Question(
        token_ids=sequences, starts=starts, temperature=temperature, top_k=1 if top_k is None else top_k
    )
    parts = told(lambda: list(parts_of(question, ["http://a", "http://b"], Dialogs())))
    if parts is None:
        return
    assert sorted(place for part in parts for place in part.places) == list(range(len(sequences)))
    for part in parts:
        fields = unpack_question(part.body, most_sequences=10)
        assert [ids.tolist() for ids in fields["token_ids"]] == [
            [int(one) for one in token_ids[place]] for place in part.places
        ]
        assert fields["starts"] == [starts[place] for place in part.places]
        assert fields["temperature"] == temperature or temperature != temperature
