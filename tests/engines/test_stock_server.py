"""``VLLMScorer`` on a stock vLLM server: a real one, which knows nothing of this package."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
import torch

from tests import tiny
from tests.compat import VLLM
from tests.engines.helpers import random_ids
from vllm_kl import EngineError, InputError, OptionError, ReadoutUnavailableError, VLLMReference, VLLMScorer
from vllm_kl.engines import stock_server

pytestmark = pytest.mark.compat
KEY = "a secret"
SEQUENCES = [random_ids(n, 4 + 9 * n, vocab=256) for n in range(8)]
STARTS = [1 + n for n in range(8)]

# Nats. vLLM's own log-softmax in float32 is 2.2e-6 off on a CPU with AVX-512, and less on others.
ATOL = 4e-6


class Server:
    """A vLLM server in a process group of its own."""

    def __init__(self, path, log, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
        command += ["--host=127.0.0.1", f"--port={self.port}", "--dtype=float32", "--enforce-eager"]
        command += [f"--max-model-len={tiny.MAX_MODEL_LEN}", f"--kv-cache-memory-bytes={64 << 20}"]
        command += ["--served-model-name=ref", *options]
        # No plugin of ours: a stock server.
        environment = os.environ | {"VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1"}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def wait(self):
        until = time.monotonic() + 240
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.address}/health", timeout=1).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        raise AssertionError(self.log.read_text()[-3000:])

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(ref_path, tmp_path_factory):
    # vLLM 0.27.1 has the route for ids without it; 0.30.0 must be asked for it.
    options = ["--enable-scale-out"] if VLLM.minor >= 30 else []
    server = Server(ref_path, tmp_path_factory.mktemp("server") / "log", *options)
    try:
        server.wait()
        yield server
    finally:
        server.end()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("VLLM_KL_API_KEY", KEY)


def of(oracle, ids):
    """Return the oracle's log-probs of all tokens but the first."""
    return torch.tensor(oracle.log_probs(ids)[1:], dtype=torch.float64)


@pytest.mark.parametrize("path", [stock_server.TOKENS, stock_server.COMPLETIONS])
def test_a_stock_server_gives_the_oracles_log_probs_in_order(server, ref_oracle, path, monkeypatch):
    if path == stock_server.COMPLETIONS:
        monkeypatch.setattr(stock_server, "TOKENS", "/no/such/route")
    with VLLMScorer(server.address) as scorer:
        assert scorer._engine._path == path
        assert scorer.readout == "http-flat"
        assert scorer.weight_version is None
        found = scorer.score(SEQUENCES, STARTS)
    for row, ids, start in zip(found, SEQUENCES, STARTS, strict=True):
        assert row.dtype == torch.float32
        torch.testing.assert_close(row.double(), of(ref_oracle, ids)[start - 1 :], rtol=0, atol=ATOL)


def test_it_says_once_that_it_is_slow_and_what_is_fast(server, caplog):
    VLLMScorer(server.address).close()
    assert "5 to 100 times slower than vllm-kl serve" in caplog.text


def test_a_reference_scores_through_it_and_it_can_be_pickled(server, ref_oracle, tokenizer):
    with VLLMScorer(server.address, readout="http-flat") as scorer:
        with pickle.loads(pickle.dumps(scorer)) as twin:
            found = twin.score(SEQUENCES[:2])
        for row, ids in zip(found, SEQUENCES, strict=False):
            torch.testing.assert_close(row.double(), of(ref_oracle, ids), rtol=0, atol=ATOL)
        assert VLLMReference(scorer, tokenizer).scorer is scorer


def test_an_id_that_the_server_refuses_is_an_error_that_names_the_sequence(server):
    with VLLMScorer(server.address) as scorer:
        with pytest.raises(InputError, match=r"sequence 2: .*out of vocabulary"):
            scorer.score([[5, 6], [7, 8], [5, 60_000], [9, 9]])
        with pytest.raises(InputError, match=f"scores at most {tiny.MAX_MODEL_LEN - 1}"):
            scorer.score([np.full(tiny.MAX_MODEL_LEN, 5)])
        assert len(scorer.score([np.full(tiny.MAX_MODEL_LEN - 1, 5)])[0]) == tiny.MAX_MODEL_LEN - 2


def test_what_it_cannot_do_is_refused_before_anything_is_sent(server):
    with VLLMScorer(server.address) as scorer:
        with pytest.raises(ReadoutUnavailableError, match="'http-flat' cannot apply temperature"):
            scorer.score([[5, 6]], temperature=0.5)
        with pytest.raises(ReadoutUnavailableError, match="return the most likely tokens"):
            scorer.score_topk([[5, 6]], 2)
    with pytest.raises(OptionError, match="served_model_name='other': the server at .* has 'ref'"):
        VLLMScorer(server.address, served_model_name="other")
    with pytest.raises(ReadoutUnavailableError, match="readout='pooling' is not available"):
        VLLMScorer(server.address, readout="pooling")


def test_a_wrong_key_is_refused(server, monkeypatch):
    monkeypatch.setenv("VLLM_KL_API_KEY", "another")
    with pytest.raises(OptionError, match="401"):
        VLLMScorer(server.address)


def test_no_probability_is_minus_infinity_and_a_lost_row_is_nan():
    ids = np.array([5, 6, 7], np.int32)
    request = stock_server.ScoreRequest(token_ids=ids, start=1)
    tokens = [None, {"6": {"logprob": -9999.0}}, {"8": {"logprob": -1.0}}]
    response = httpx.Response(200, json={"prompt_logprobs": tokens})
    values = stock_server._values(0, request, response)
    assert values[0, 0] == -np.inf
    assert np.isnan(values[1, 0])
    short = stock_server._values(0, request, httpx.Response(200, json={"prompt_logprobs": tokens[:2]}))
    assert short.shape == (0, 1)


def test_a_server_that_dies_is_an_error(server):
    """The last test: it ends the server."""
    with VLLMScorer(server.address, retry_s=1.0) as scorer:
        scorer.score([[5, 6]])
        server.end()
        with pytest.raises(EngineError, match=r"no server answers at http://127\.0\.0\.1"):
            scorer.score([[5, 6]])
