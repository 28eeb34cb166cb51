"""A server on loopback, of a tiny model: what it answers, refuses and survives. One server for all tests."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import importlib
import json
import pickle
import random
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import hypothesis
import msgpack
import numpy as np
import psutil
import pytest
import torch

from tests import local_ray
from tests.collectors import NUM_ENVS, check_kl, collect
from tests.oracle import LOG_PROB_TOLERANCE
from tests.serving.server import serving
from vllm_kl import RetrieveKL, VLLMReference, VLLMScorer, push_weights
from vllm_kl.client import AsyncClient, Client
from vllm_kl.client.wire_format import MSGPACK, Question, pack_question
from vllm_kl.errors import FrozenError, InputError, OptionError, ReadoutUnavailableError, WeightsError

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = local_ray.MARKS

EXAMPLES = Path(__file__).parents[2] / "examples"
KEY = "a key of the tests"
LIMITS = {
    "max_sequences": 500,
    "max_tokens": 60_000,
    "max_bytes": 1 << 20,
    "max_numbers": 1 << 20,
    "max_waiting_tokens": 120_000,
    "max_body_s": 3,
}


@pytest.fixture(scope="module")
def server(cluster, ref_path):
    address = ray.get_runtime_context().gcs_address
    limits = [part for name, value in LIMITS.items() for part in ("--limit", f"{name}={value}")]
    with serving(ref_path, *limits, cluster=address, key=KEY) as server:
        yield server


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("VLLM_KL_API_KEY", KEY)


@pytest.fixture
def remote(server, key):
    with VLLMScorer(server.address) as scorer:
        yield scorer


@pytest.fixture
def http(server):
    with httpx.Client(
        base_url=server.address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ) as client:
        yield client


def many(num_prompts, seed=0):
    draw = random.Random(seed)
    prompts = [[draw.randrange(200) for _ in range(draw.randrange(1, 60))] for _ in range(num_prompts)]
    found = [
        ([*prompt, *(draw.randrange(200) for _ in range(draw.randrange(30)))], len(prompt))
        for prompt in prompts * 4
    ]
    draw.shuffle(found)
    return [list(one) for one in zip(*found, strict=True)]


IDS, STARTS = many(40)


def far(some, others):
    pairs = [(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(some, others, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def test_a_server_scores_as_a_local_engine_does(remote, ref_scorer, ref_oracle):
    theirs = ref_scorer.score(IDS, STARTS)
    found, stats = remote.score_and_tell(IDS, STARTS)
    assert far(found, theirs) < 2e-6
    oracle = [torch.tensor(ref_oracle.log_probs(IDS[i])[STARTS[i] :]) for i in range(4)]
    assert far(found[:4], oracle) < LOG_PROB_TOLERANCE
    assert stats.num_scored_tokens == ref_scorer.stats.num_scored_tokens
    assert stats.weight_version == remote.weight_version == 0
    local = ref_scorer.info
    local = replace(local, hidden_size=None)  # its answers have no place for hidden states
    assert (remote.readout, remote.info) == (ref_scorer.readout, local)
    assert (
        far(remote.score(IDS, STARTS, temperature=0.5), ref_scorer.score(IDS, STARTS, temperature=0.5)) < 4e-6
    )
    chosen = [[[7, 9]] * (len(ids) - start) for ids, start in zip(IDS, STARTS, strict=True)]
    assert far(remote.score_ids(IDS, chosen, STARTS), ref_scorer.score_ids(IDS, chosen, STARTS)) < 2e-6
    best, of_local = (scorer.score_topk(IDS[:8], 3, STARTS[:8]) for scorer in (remote, ref_scorer))
    assert far([b.log_probs for b in best], [b.log_probs for b in of_local]) < 2e-6
    assert all((a.token_ids == b.token_ids).all() for a, b in zip(best, of_local, strict=True))
    pairs = [scorer.score(IDS, STARTS, entropy=True) for scorer in (remote, ref_scorer)]
    assert all(far(ours, of_local) < 2e-6 for ours, of_local in zip(*pairs, strict=True))


def test_bits_are_those_of_a_local_engine_in_each_form(remote, ref_scorer, http):
    request = remote._canary._request
    (ours,), (theirs,) = remote._score_alone(request), ref_scorer._score_alone(request)
    bits = theirs.values[:, 0].tobytes()
    assert ours.values[:, 0].tobytes() == bits
    body = {"token_ids": [request.token_ids.tolist()], "alone": True}
    lists = http.post("/v1/logprobs", json=body).json()
    assert np.array(lists["log_probs"][0], np.float32).tobytes() == bits
    encoded = http.post("/v1/logprobs", json=body | {"encoding": "base64"}).json()
    assert base64.b64decode(encoded["log_probs"]) == bits
    question = Question(token_ids=[request.token_ids], starts=[1], alone=True)
    headers = {"Content-Type": MSGPACK, "Accept": MSGPACK}
    packed = http.post("/v1/logprobs", content=pack_question(question), headers=headers)
    assert msgpack.unpackb(packed.content)["log_probs"] == bits
    lines = http.post("/v1/logprobs", json=body | {"stream": True})
    assert lines.headers["content-type"] == "application/x-ndjson"
    first, last = map(json.loads, lines.text.splitlines())
    assert np.array(first["log_probs"][0], np.float32).tobytes() == bits
    assert set(last["timings"]) == {"queue_s", "compute_s"}
    assert lists["weights"] == first["weights"] == remote._engine.settings["the model's files"]


def test_many_clients_at_a_time_get_their_own_results(server, key, ref_scorer):
    async def ask():
        async with AsyncClient(server.address) as client:
            parts = [many(2, seed) for seed in range(64)]
            return parts, await asyncio.gather(*(client.score(*part) for part in parts))

    parts, found = asyncio.run(ask())
    for (ids, starts), rows in zip(parts, found, strict=True):
        assert far(rows, ref_scorer.score(ids, starts)) < 2e-6


def test_a_stream_gives_each_sequence_once(server, key, ref_scorer):
    async def ask():
        async with AsyncClient(server.address) as client:
            return [one async for one in client.stream(IDS, STARTS)]

    found = dict(asyncio.run(ask()))
    assert sorted(found) == list(range(len(IDS)))
    assert far([found[i] for i in range(len(IDS))], ref_scorer.score(IDS, STARTS)) < 2e-6


def test_a_server_refuses_what_a_local_engine_refuses(server, key, ref_scorer):
    with Client(server.address) as client:
        for ids, start in (([[5, 6], [5, 6, 4000]], 1), ([[5, 6], []], 1), ([[5, 6], [5, 6]], [1, 3])):
            with pytest.raises(InputError) as theirs:
                ref_scorer.score(ids, start)
            with pytest.raises(InputError) as ours:
                client.score(ids, start)
            assert str(ours.value) == str(theirs.value)
        with pytest.raises(InputError, match="k is 9999, expected 1 <= k"):
            client.score_topk([[5, 6]], 9999)
        with pytest.raises(InputError, match="temperature must be positive"):
            client.score([[5, 6]], temperature=0.0)


def test_the_weights_of_a_server_are_frozen_from_here(remote, policy_model, policy_path):
    assert remote.check_frozen() == 0.0
    for change in (lambda: remote.refresh(policy_path), lambda: push_weights(remote, policy_model)):
        with pytest.raises(WeightsError, match="cannot be replaced.*over HTTP"):
            change()


def test_a_scorer_is_pickled_and_asks_the_same_server(remote, ref_scorer):
    with pickle.loads(pickle.dumps(remote)) as copy:
        assert far(copy.score(IDS[:8], STARTS[:8]), ref_scorer.score(IDS[:8], STARTS[:8])) < 2e-6
        assert copy.check_frozen() == 0.0
        copy._canary._known[0] += 1
        with pytest.raises(FrozenError, match="moved"):
            copy.check_frozen()
    with pytest.raises(OptionError, match="serve it"):
        pickle.dumps(ref_scorer)


def test_options_of_an_engine_have_no_effect_on_a_server(server, key):
    for given, message in (
        ({"dtype": "float32"}, "no effect on a server: dtype"),
        ({"replicas": 2}, "replicas has no effect on a server"),
    ):
        with pytest.raises(OptionError, match=message):
            VLLMScorer(server.address, **given)
    with pytest.raises(ReadoutUnavailableError, match="the server has 'pooling'"):
        VLLMScorer(server.address, readout="flat")
    with pytest.raises(OptionError, match="expected addresses only"):
        VLLMScorer([server.address, "my-model"])


def test_without_the_key_nobody_may_ask(server, monkeypatch):
    for key in ("", "wrong", KEY + "x"):
        monkeypatch.setenv("VLLM_KL_API_KEY", key)
        with (
            pytest.raises(OptionError, match="the key is missing or wrong"),
            Client(server.address) as client,
        ):
            client.score([[5, 6]])
    for path in ("/v1/model", "/metrics"):
        refused = httpx.get(server.address + path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
    assert httpx.get(server.address + "/health").json() == {"status": "ok"}


JSON = {"Content-Type": "application/json"}
PACKED = {"Content-Type": MSGPACK}


@pytest.mark.parametrize(
    ("content", "headers", "status", "detail"),
    [
        (b"{}", {"Content-Type": "text/plain"}, 415, "text/plain"),
        (b"{}", {}, 415, "missing"),
        (b'{"token_ids": [[5, 6]]}', JSON | {"Accept": "image/png"}, 406, "application/json"),
        (b"", JSON, 422, "Invalid JSON"),
        (b"[" * 5000, JSON, 422, "recursion"),
        (b"[" * 100_000, JSON, 422, "more lists and objects than"),
        (b'{"model":' * 100_000, JSON, 422, "more lists and objects than"),
        (b"{}", JSON, 422, "token_ids: Field required"),
        (b'{"token_ids": [[5, 6.5]]}', JSON, 422, "sequence 0, token 1: Input should be a valid integer"),
        (b'{"token_ids": [[5, 99999999999]]}', JSON, 422, "sequence 0, token 1: Input should be less"),
        (b'{"token_ids": [[5, 6]], "start": [1, 1]}', JSON, 422, "start has 2 entries for 1 sequences"),
        (b'{"token_ids": [[5, 6]], "ids": [[[1], [2, 3]]]}', JSON, 422, "ids has rows of 1 to 2 ids"),
        (b'{"token_ids": [[5, 6]], "ids": [[[1]], []]}', JSON, 422, "ids has 2 entries for 1 sequences"),
        (b'{"token_ids": [[5, 6]], "temperature": -1}', JSON, 422, "temperature must be positive"),
        (b'{"token_ids": [[5, 6]], "temperature": NaN}', JSON, 422, ""),
        (b'{"token_ids": [[5, 6]], "prompt": "x"}', JSON, 422, "prompt: Extra inputs"),
        (b'{"token_ids": [[5, 6]], "model": "gpt"}', JSON, 404, "model 'gpt' is not served here"),
        (b'{"token_ids": [[5, 6]], "top_k": 99999}', JSON, 422, "k is 99999, expected 1 <= k"),
        (json.dumps({"token_ids": [[5, 6]] * 501}).encode(), JSON, 413, "501 sequences.*at most 500"),
        (json.dumps({"token_ids": [[5] * 300] * 250}).encode(), JSON, 413, "74999 numbers.*at most 60000"),
        (b'{"token_ids": [%s], "top_k": 250}' % b",".join([b"[5,6,7]"] * 5), JSON, 200, ""),
        (b" " * (LIMITS["max_bytes"] + 1), JSON, 413, "exceeds 1048576 bytes"),
        (b"\xc1", PACKED, 422, "not msgpack"),
        (msgpack.packb({"token_ids": b"12"}), PACKED, 422, "lengths is NoneType"),
    ],
)
def test_a_body_that_is_wrong_is_a_problem_that_says_why(http, content, headers, status, detail):
    answer = http.post("/v1/logprobs", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["status"] == status
        assert re.search(detail, problem["detail"]), problem


def test_a_body_of_unknown_length_is_bounded_too(http):
    chunks = (b" " * 65536 for _ in range(100))
    answer = http.post("/v1/logprobs", content=chunks, headers=JSON)
    assert answer.status_code == 413


def test_other_routes_are_problems_and_the_document_names_ours(http):
    assert http.get("/v1/logprobs").status_code == 405
    assert http.get("/nothing").json()["title"] == "Not Found"
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) == {"/health", "/v1/model", "/metrics", "/v1/logprobs"}
    body = document["paths"]["/v1/logprobs"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", MSGPACK}
    assert {"token_ids", "start", "top_k"} <= set(body["application/json"]["schema"]["properties"])
    told = http.get("/v1/model").json()
    assert "entropy" in told["can"]
    assert "hidden_states" not in told["can"]  # its answers have no place for them
    assert (told["readout"], told["vocab_size"], told["dtype"]) == ("pooling", 259, "float32")
    assert {"vllm-kl", "torch"} <= set(told["versions"])
    assert told["limits"] | LIMITS == told["limits"]


def figures(http):
    lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_the_figures_count_tokens_and_requests(http):
    before = figures(http)
    body = {"token_ids": [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6]], "start": [2, 2, 1]}
    assert http.post("/v1/logprobs", json=body).status_code == 200
    assert http.post("/v1/logprobs", json={"token_ids": []}).json()["log_probs"] == []
    after = figures(http)
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    assert gained["vllm_kl_fed_tokens_total"] == 10
    assert gained["vllm_kl_computed_tokens_total"] == 6  # equal sequences are computed once
    assert gained['vllm_kl_requests_total{status="200"}'] == 2
    assert gained["vllm_kl_request_seconds_count"] == 2
    assert after["vllm_kl_waiting_tokens"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_work(http, server, stream):
    draw = random.Random(7)
    token_ids = [[draw.randrange(200) for _ in range(300)] for _ in range(190)]
    before = figures(http)
    body = {"token_ids": token_ids, "stream": stream, "share_prefix": False}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.Client(headers=http.headers, timeout=httpx.Timeout(60, read=0.3)) as client,
        client.stream("POST", f"{server.address}/v1/logprobs", json=body) as answer,
    ):
        next(answer.iter_lines())
    deadline = time.monotonic() + 20
    while figures(http)["vllm_kl_waiting_tokens"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert figures(http)["vllm_kl_fed_tokens_total"] == before["vllm_kl_fed_tokens_total"]


def test_a_reference_of_a_server_is_a_reference(server, key, make_reference):
    from tensordict import TensorDict

    batch = TensorDict({}, batch_size=[2])
    batch["tokens", "full"] = torch.randint(0, 200, (2, 12))
    batch["tokens", "prompt"] = batch["tokens", "full"][:, :5]
    options = {"input_mode": "tokens", "pad_output": True}
    served = VLLMReference(server.address, **options)
    found, theirs = (
        reference(batch.clone())["ref_log_probs", "full"] for reference in (served, make_reference(**options))
    )
    served.close()
    assert far(list(found), list(theirs)) < 2e-6


def test_a_full_server_says_when_to_come_again_and_the_client_does(server, http, key, ref_scorer):
    draw = random.Random(11)
    calls = [[[draw.randrange(200) for _ in range(280)] for _ in range(200)] for _ in range(4)]

    async def at_once():
        async with httpx.AsyncClient(headers=http.headers, timeout=60) as asked:
            posts = (asked.post(f"{server.address}/v1/logprobs", json={"token_ids": ids}) for ids in calls)
            return await asyncio.gather(*posts)

    answers = asyncio.run(at_once())
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert re.search(r"tokens wait, of at most 120000: ask again later", refused.json()["detail"])

    async def until_they_are_answered():
        async with AsyncClient(server.address) as client:
            return await asyncio.gather(*(client.score(ids) for ids in calls))

    for ids, rows in zip(calls, asyncio.run(until_they_are_answered()), strict=True):
        assert far(rows[:3], ref_scorer.score(ids[:3])) < 2e-6


def test_connections_that_send_slowly_cost_nobody_else(server, http):
    """Half of them never end their headers, half never end their body: those are answered with 408."""
    host, port = httpx.URL(server.address).host, httpx.URL(server.address).port
    line = b"POST /v1/logprobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    line += f"Authorization: Bearer {KEY}\r\n".encode()
    with contextlib.ExitStack() as opened:
        slow = [opened.enter_context(socket.create_connection((host, port))) for _ in range(100)]
        for n, connection in enumerate(slow):
            connection.sendall(line if n % 2 else line + b'Content-Length: 1000\r\n\r\n{"tok')
        began = time.monotonic()
        assert http.post("/v1/logprobs", json={"token_ids": [[5, 6]]}).status_code == 200
        assert time.monotonic() - began < 3
        for connection in slow[::2]:
            connection.settimeout(30)
            assert b" 408 " in connection.recv(100)


def test_a_collector_takes_the_kl_to_the_served_model(
    server, key, make_env, make_policy, tokenizer, policy_oracle, ref_oracle
):
    """A reference of a server can be pickled: collectors in other processes get it so."""
    reference = pickle.loads(pickle.dumps(VLLMReference(server.address, tokenizer)))
    env = make_env(1).append_transform(RetrieveKL("from_collector", reference))
    for data in collect(env, make_policy(), turns=NUM_ENVS):
        check_kl(data, policy_oracle, ref_oracle)
    reference.close()


@pytest.mark.parametrize("loss", ["grpo", "distill"])
def test_a_plain_training_loop_asks_the_server(server, key, ref_path, policy_path, loss, monkeypatch):
    """A policy that is the reference has no KL to it at first; another one has, and learns from a teacher."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("served_reference")
    small = ["--server", server.address, "--updates", "4", "--prompts", "2", "--group", "4", "--lr", "1e-3"]
    kls = example.train(example.parse_arguments([str(ref_path), "--loss", loss, *small]))
    assert abs(kls[0]) < 1e-5
    kls = example.train(example.parse_arguments([str(policy_path), "--loss", loss, *small]))
    assert kls[0] > 0.1
    if loss == "distill":
        assert kls[-1] < 0.8 * kls[0]


@pytest.mark.nightly
def test_trls_trainer_gets_the_numbers_of_its_own_reference(server, key, ref_path, policy_path, tmp_path):
    pytest.importorskip("trl", minversion="1.16", reason="pip install 'trl>=1.16'")
    code = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import torch, trl_grpo
from transformers import AutoModelForCausalLM
own = AutoModelForCausalLM.from_pretrained({str(ref_path)!r}, dtype=torch.float32).eval()
ask, seen = trl_grpo.served_log_probs, []

def compared(client, input_ids, mask, num_kept, *, temperature):
    found = ask(client, input_ids, mask, num_kept, temperature=temperature)
    with torch.no_grad():
        logits = own(input_ids, attention_mask=mask).logits[:, :-1] / temperature
    theirs = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[:, -num_kept:, 0]
    kept = mask[:, -num_kept:].bool()
    seen.append((found - theirs)[kept].abs().max().item())
    return found

trl_grpo.served_log_probs = compared
options = ["--server", {server.address!r}, "--steps", "2", "--group", "4", "--out", {str(tmp_path)!r}]
trainer = trl_grpo.main([{str(policy_path)!r}, *options])
kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
print("RESULT", max(seen), *kl)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    farthest, *kls = map(float, done.stdout.rpartition("RESULT")[2].split())
    assert farthest < 1e-5
    assert len(kls) == 2
    assert min(kls) > 0.01


def memory_of_the_door():
    doors = [p for p in psutil.process_iter() if ":door" in " ".join(p.cmdline()[:1])]
    assert len(doors) == 1
    return doors[0].memory_info().rss


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_twenty_thousand_hostile_bodies_never_fail_or_hang(server, http, ref_scorer):
    """From the OpenAPI document, and from msgpack bodies that were changed; memory stays."""
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    counts, sizes = collections.Counter(), []

    def check(answer):
        counts[answer.status_code] += 1
        assert answer.status_code < 500, answer.text
        if counts.total() % 2000 == 0:
            sizes.append(memory_of_the_door())

    schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    every = hypothesis.settings(
        max_examples=2600,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    for operation in schema.get_all_operations():

        @every
        @hypothesis.given(case=operation.ok().as_strategy())
        def ask(case):
            sent = case.as_transport_kwargs(base_url=server.address)
            sent = {
                name: value for name, value in sent.items() if name in ("method", "url", "json", "params")
            }
            headers = {"Accept": random.choice(["application/json", MSGPACK, "*/*"])}
            check(http.request(**sent, headers=headers))

        ask()

    draw = random.Random(5)
    whole = [
        pack_question(Question(token_ids=[np.arange(n, dtype=np.int32)] * 3, starts=[1] * 3, **more))
        for n, more in [(2, {}), (9, {"top_k": 3}), (40, {"stream": True}), (5, {"entropy": True})]
    ]
    while counts.total() < 20_000:
        body = bytearray(draw.choice(whole))
        for _ in range(draw.choice([1, 1, 2, 8])):
            kind, at = draw.randrange(4), draw.randrange(len(body))
            if kind == 0:
                body[at] = draw.randrange(256)
            elif kind == 1:
                del body[at : at + draw.randrange(1, 9)]
                body = body or bytearray(b"\x80")
            elif kind == 2:
                body[at:at] = draw.randbytes(draw.randrange(1, 9))
            else:
                body[at:at] = draw.choice(whole)[: draw.randrange(60)]
        accept = draw.choice([MSGPACK, "application/json"])
        check(http.post("/v1/logprobs", content=bytes(body), headers=PACKED | {"Accept": accept}))
    print(counts, [size >> 20 for size in sizes])
    assert sizes[-1] < sizes[1] + (32 << 20)
    ids = [[5, 6, 7, 8]]
    found = http.post("/v1/logprobs", json={"token_ids": ids}).json()["log_probs"]
    assert far(found, ref_scorer.score(ids)) < 2e-6


def test_sigterm_lets_requests_end_and_takes_no_more(server, http, key, ref_scorer):
    """The last test: the server ends."""
    found = {}
    ids, starts = many(100, seed=3)

    def ask():
        with Client(server.address) as client:
            found["rows"] = client.score(ids, starts)

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive() and not figures(http)["vllm_kl_waiting_tokens"]:
        time.sleep(0.02)
    assert server.end() == 0
    thread.join(60)
    assert far(found["rows"], ref_scorer.score(ids, starts)) < 2e-6
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.address + "/health")
