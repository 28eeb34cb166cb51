"""The engine of ``VLLMScorer("http://...")``, with a client that answers as told. No server."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_kl.client.wire_format import Answer
from vllm_kl.engines.http_server import HttpServer
from vllm_kl.errors import ReadoutUnavailableError, WeightsError
from vllm_kl.types import ScoreRequest

TOLD = {
    "model": "reference",
    "weights": "a1",
    "readout": "pooling",
    "vocab_size": 300,
    "max_sequence_len": 64,
    "max_ids": 8,
    "length_side": 0,
    "dtype": "float32",
    "can": [],
    "notes": [],
    "placeholders": {},
}


class Scripted:
    """A client whose server is of some origin."""

    addresses = ("http://one",)

    def __init__(self, **origin):
        self.origin = {"model": "reference", "weights": "a1", "weight_version": 0} | origin

    def values(self, question, on_done=None):
        count = {"num_ids": 0, "top_k": 0, "has_entropy": False}
        values = [np.full((len(ids) - 1, 1), -1.0, np.float32) for ids in question.token_ids]
        nothing = [0] * len(values)
        answer = Answer(
            index=list(range(len(values))),
            values=values,
            num_cached_tokens=nothing,
            rescored=nothing,
            origin=self.origin,
            **count,
        )
        return [(answer, n) for n in range(len(values))]


REQUEST = ScoreRequest(token_ids=np.int32([5, 6, 7]), start=1)


def test_results_have_the_version_that_made_them():
    (result,) = HttpServer(Scripted(weight_version=3), "auto", TOLD).score([REQUEST], share_prefix=True)
    assert (result.values.shape, result.weight_version) == ((2, 1), 3)


@pytest.mark.parametrize("origin", [{"weights": "b2"}, {"model": "another"}])
def test_a_server_that_was_started_again_with_another_model_is_an_error(origin):
    engine = HttpServer(Scripted(**origin), "auto", TOLD)
    with pytest.raises(WeightsError, match=r"was 'reference' \(weights a1\) when .*started again"):
        engine.score([REQUEST], share_prefix=True)


def test_another_readout_than_the_servers_is_refused():
    with pytest.raises(ReadoutUnavailableError, match="the server has 'pooling'"):
        HttpServer(Scripted(), "flat", TOLD)
