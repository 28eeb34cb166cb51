"""Bodies become questions, or errors that name what is wrong. No server, no engine."""

from __future__ import annotations

import json
import tracemalloc

import pytest

pytest.importorskip("fastapi", reason="pip install 'vllm-kl[ray]'")

from vllm_kl.client.wire_format import TooLargeError
from vllm_kl.errors import InputError
from vllm_kl.serving.bodies import JSON, MSGPACK, Settings, read_question, writer_for
from vllm_kl.serving.limits import Limits
from vllm_kl.serving.problems import Refusal


@pytest.mark.parametrize("ids", [[[[]]], [[[], []]]])
def test_rows_of_no_ids_are_refused(ids):
    body = json.dumps({"token_ids": [[5, 6, 7]], "ids": ids}).encode()
    with pytest.raises(InputError, match="rows of 0 ids, expected at least one"):
        read_question(body, JSON, Limits())


def test_sequences_without_rows_may_have_no_ids():
    question, _ = read_question(b'{"token_ids": [[5]], "ids": [[]]}', JSON, Limits())
    assert question.ids[0].shape == (0, 1)


def test_a_body_of_many_errors_costs_no_more_than_one_of_them():
    body = b'{"token_ids": [[' + b",".join([b'""'] * 500_000) + b"]]}"
    tracemalloc.start()
    with pytest.raises(InputError, match="sequence 0, token 0"):
        read_question(body, JSON, Limits())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10 << 20


def test_numbers_are_counted_before_they_become_objects():
    body = b'{"token_ids": [[' + b",".join([b"1"] * 200) + b"]]}"
    with pytest.raises(TooLargeError, match="about 199 numbers, but this server takes at most"):
        read_question(body, JSON, Limits(max_tokens=100, max_sequences=10))


class Asking:
    def __init__(self, accept):
        self.headers = {"accept": accept}


def test_lists_in_json_hold_no_nan():
    for accept, encoding in ((JSON, "base64"), (MSGPACK, "list")):
        writer_for(Asking(accept), Settings(allow_nan=True, encoding=encoding))
    with pytest.raises(Refusal, match="cannot tell NaN from -inf"):
        writer_for(Asking(JSON), Settings(allow_nan=True))
