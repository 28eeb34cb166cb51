"""Bodies become questions, or errors that name what is wrong. No server, no engine."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi", reason="pip install 'vllm-kl[ray]'")

from vllm_kl.errors import InputError
from vllm_kl.serving.bodies import JSON, read_question
from vllm_kl.serving.limits import Limits


@pytest.mark.parametrize("ids", [[[[]]], [[[], []]]])
def test_rows_of_no_ids_are_refused(ids):
    body = json.dumps({"token_ids": [[5, 6, 7]], "ids": ids}).encode()
    with pytest.raises(InputError, match="rows of 0 ids, expected at least one"):
        read_question(body, JSON, Limits())


def test_sequences_without_rows_may_have_no_ids():
    question, _ = read_question(b'{"token_ids": [[5]], "ids": [[]]}', JSON, Limits())
    assert question.ids[0].shape == (0, 1)
