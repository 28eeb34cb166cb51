"""The client keeps order, comes back after faults, and raises the server's errors under their own types."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import pickle
import random
import time

import msgpack
import numpy as np
import pytest

from tests.client import faulty_server
from tests.client.faulty_server import ORIGIN, answer_to, hang_up, log_probs, problem, serving
from vllm_kl.client import AsyncClient, Client, ascore, calls, score
from vllm_kl.errors import EngineError, InputError, OptionError, ReadoutUnavailableError, WeightsError
from vllm_kl.routing.shards import Sizes

GONE = "http://127.0.0.1:9"  # nothing listens at the port "discard"
busy = functools.partial(problem, detail="wait", Retry_After="0")


@pytest.fixture(autouse=True)
def many_small_parts(monkeypatch):
    monkeypatch.setattr(calls, "SIZES", Sizes(per_replica=8, fewest_tokens=40, most_tokens=120))


def many(num_prompts=12, seed=0):
    draw = random.Random(seed)
    prompts = [[draw.randrange(99) for _ in range(draw.randrange(1, 30))] for _ in range(num_prompts)]
    found = [(p, [*p, *(draw.randrange(99) for _ in range(draw.randrange(20)))]) for p in prompts * 4]
    draw.shuffle(found)
    return [ids for _, ids in found], [len(p) for p, _ in found]


IDS, STARTS = many()


def check(rows, ids=IDS, starts=STARTS):
    assert len(rows) == len(ids)
    for row, sequence, start in zip(rows, ids, starts, strict=True):
        assert row.dtype == np.float32
        assert row.tobytes() == log_probs(sequence, start).tobytes()


def test_results_have_the_order_of_the_call():
    with serving() as server:
        check(score(server.address, IDS, STARTS))
        assert len(server.seen) > 4
        assert score(server.address, [], 1) == []
        check(score(server.address, [[5, 6]] * 3), [[5, 6]] * 3, [1] * 3)


def test_many_callers_share_a_client():
    with serving() as server:

        async def ask():
            async with AsyncClient(server.address) as client:
                parts = [many(4, seed) for seed in range(64)]
                found = await asyncio.gather(*(client.score(*part) for part in parts))
                for rows, part in zip(found, parts, strict=True):
                    check(rows, *part)

        asyncio.run(ask())


def test_ascore_is_score_in_an_event_loop():
    with serving() as server:
        check(asyncio.run(ascore(server.address, IDS, STARTS)))


@pytest.mark.parametrize(
    "fault",
    [
        busy(429, "EngineError"),
        busy(502, "EngineError"),
        busy(503, "EngineError"),
        lambda request: request.send(504, b"a proxy's text", {}),
        hang_up,
        lambda request: (
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nx"),
            hang_up(request),
        ),
    ],
    ids=["429", "502", "503", "504", "no answer", "half an answer"],
)
def test_after_a_fault_the_request_is_sent_again(fault):
    with serving(*[fault] * 3) as server:
        check(score(server.address, IDS, STARTS))


def test_a_server_says_how_long_to_wait():
    with serving(problem(429, "EngineError", "full", Retry_After="1")) as server:
        began = time.monotonic()
        check(score(server.address, IDS[:1], STARTS[:1]), IDS[:1], STARTS[:1])
        assert time.monotonic() - began >= 1.0


def test_tries_end():
    with pytest.raises(EngineError, match=r"no server answers at http://127.0.0.1:9 .*vllm-kl serve MODEL"):
        score(GONE, [[5, 6]], retry_s=0.2)
    with (
        serving(*[busy(429, "EngineError")] * 999) as server,
        pytest.raises(EngineError, match="127.0.0.1 is busy: wait"),
    ):
        score(server.address, [[5, 6]], retry_s=0.2)
    with (
        serving(lambda _: time.sleep(1)) as server,
        pytest.raises(EngineError, match="said nothing for 0.2 s"),
    ):
        score(server.address, [[5, 6]], timeout_s=0.2)


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (422, "InputError", InputError),
        (413, "InputError", InputError),
        (422, "ReadoutUnavailableError", ReadoutUnavailableError),
        (500, "WeightsError", WeightsError),
        (500, "SystemExit", EngineError),
        (401, "EngineError", OptionError),
    ],
)
def test_errors_have_their_own_types(status, error, kind):
    with serving(problem(status, error, "because")) as server, pytest.raises(kind, match="because"):
        score(server.address, [[5, 6]])


@pytest.mark.parametrize(("status", "told"), [(422, "told no more"), (401, "401 ")])
@pytest.mark.parametrize("detail", ["", " \n", "\x00"])
def test_an_error_without_a_text_has_one(status, told, detail):
    refused = pytest.raises((InputError, OptionError), match=told)
    with serving(problem(status, "InputError", detail)) as server, refused:
        score(server.address, [[5, 6]])


def test_an_error_names_the_sequence_of_the_call():
    def refuse(request):
        fields = faulty_server.unpack_question(request.body, most_sequences=999)
        wrong = next((i for i, ids in enumerate(fields["token_ids"]) if 999 in ids), None)
        if wrong is None:
            return faulty_server.score(request)
        return problem(422, "InputError", f"sequence {wrong}, token 1: id 999 is outside")(request)

    for place in (0, 7, len(IDS)):
        with serving(*[refuse] * 99) as server, pytest.raises(InputError, match=f"sequence {place}, token 1"):
            score(server.address, [*IDS[:place], [999, 999, 7], *IDS[place:]])


def test_another_server_is_named_as_such():
    with (
        serving(lambda request: request.send(404, b"<html>", {})) as server,
        pytest.raises(EngineError, match=r"404 .*no vllm-kl server at this address"),
    ):
        score(server.address, [[5, 6]])


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Please log in</html>",
        b"",
        msgpack.packb([1]),
        msgpack.packb({"problem": 5}),
        msgpack.packb({"index": b"", "rows": b""}),
        lambda request: answer_to(request.body, origin={}),
        lambda request: answer_to(request.body, sequences=slice(0, 0)),
        lambda request: answer_to(request.body) + b"more",
        lambda request: msgpack.packb(msgpack.unpackb(answer_to(request.body)) | {"num_ids": 2**31}),
        lambda request: msgpack.packb(
            msgpack.unpackb(answer_to(request.body)) | {"index": np.int32([7]).tobytes()}
        ),
        lambda request: msgpack.packb(
            msgpack.unpackb(answer_to(request.body)) | {"rows": np.int32([0]).tobytes(), "log_probs": b""}
        ),
    ],
)
def test_what_is_no_answer_of_ours_is_an_error_of_ours(body):
    def answer(request):
        request.send(200, body(request) if callable(body) else body, {})

    with serving(answer) as server, pytest.raises(EngineError, match=r"no answer of vllm-kl serve \("):
        score(server.address, [[5, 6]])


def test_settings_may_be_numbers_of_numpy_and_nothing_else():
    with serving() as server:
        check(score(server.address, [[5, 6]], temperature=np.float32(0.5)), [[5, 6]], [1])
    for wrong in (None.__class__, 10**400, "\ud800"):
        with pytest.raises(InputError, match="a setting cannot be sent .*temperature="):
            score(GONE, [[5, 6]], temperature=wrong)


def test_a_server_that_cannot_be_reached_is_left_out():
    with serving() as one, serving() as other:
        check(score([GONE, one.address, other.address], IDS, STARTS))
        assert one.seen
        assert other.seen


def test_sequences_of_a_prompt_go_to_one_server_and_name_it():
    with serving() as one, serving() as other:
        with Client([one.address, other.address]) as client:
            for sequences in (IDS, IDS[::-1]):
                client.score([[*ids, 5] for ids in sequences], [len(ids) for ids in sequences])
        of_one, of_other = ({seen["X-Session-ID"] for seen in server.seen} for server in (one, other))
        assert of_one
        assert of_other
        assert not of_one & of_other


def test_answers_of_other_weights_never_meet():
    other = lambda request: request.send(200, answer_to(request.body, ORIGIN | {"weight_version": 1}), {})  # noqa: E731
    with serving(other) as server, pytest.raises(WeightsError, match="weights changed during the call"):
        score(server.address, IDS, STARTS)


def chunked(*chunks):
    """Return what answers with chunks, and hangs up before the end of the answer if the last one is None."""

    def answer(request):
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for chunk in chunks:
            if chunk is None:
                return hang_up(request)
            data = chunk(request.body)
            request.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            request.wfile.flush()
        return request.wfile.write(b"0\r\n\r\n")

    return answer


@pytest.mark.parametrize("cut", [5, 9], ids=["as the first try", "otherwise"])
def test_a_stream_gives_each_sequence_once_although_its_connection_breaks(monkeypatch, cut):
    monkeypatch.setattr(calls, "SIZES", Sizes())
    part = lambda *bounds: lambda body: answer_to(body, sequences=slice(*bounds))  # noqa: E731
    with serving(chunked(part(0, 5), None), chunked(part(0, cut), part(cut, None))) as server:

        async def ask():
            async with AsyncClient(server.address) as client:
                return [one async for one in client.stream(IDS, STARTS)]

        found = asyncio.run(ask())
    assert sorted(i for i, _ in found) == list(range(len(IDS)))
    check([row for _, row in sorted(found, key=lambda one: one[0])])


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    key = tmp_path / "key"
    key.write_text("from-file\n")
    monkeypatch.setenv("VLLM_KL_API_KEY", "from-environment")
    with serving() as server:
        score(server.address, [[5, 6]])
        with Client(server.address, api_key_file=key) as client:
            client.score([[5, 6]])
            assert b"from-file" not in pickle.dumps(client)
            with pickle.loads(pickle.dumps(client)) as copy:
                copy.score([[5, 6]])
        keys = [seen["Authorization"] for seen in server.seen]
    assert keys == ["Bearer from-environment", "Bearer from-file", "Bearer from-file"]
    with pytest.raises(OptionError, match="key cannot be read"):
        Client(GONE, api_key_file=tmp_path / "none")


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://host", []])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(OptionError, match="http://host:port"):
        Client(address)


def test_a_fork_has_its_own_connections():
    with serving() as server, Client(server.address) as client:
        client.score(IDS, STARTS)
        fork = multiprocessing.get_context("fork").Process(target=client.score, args=(IDS, STARTS))
        fork.start()
        fork.join(30)
        assert fork.exitcode == 0
        check(client.score(IDS, STARTS))


@pytest.mark.parametrize(
    ("token_ids", "start", "message"),
    [
        ([[5, 6], [[7]]], 1, "sequence 1 must be a flat sequence of ints"),
        ([[5, 6], [7.5, 1]], 1, "sequence 1 must be a flat sequence of ints.*dtype float64"),
        ([[5, 2**31]], 1, "sequence 0 has an id that is outside any vocabulary"),
        ([[5, 6]], [1, 1], "start has 2 entries for 1 sequences"),
        (None, 1, "token_ids is None, expected ints for each of the sequences"),
        ([[5, 6, 7]], [1.7], "start must be an int, or one int per sequence"),
        ([[5, 6], [5, 6]], [1, 2**31], "sequence 1: start is outside 32 bits"),
        ([[5, 6]], "ab", "start must be an int, or one int per sequence"),
    ],
)
def test_what_cannot_be_sent_is_refused_here(token_ids, start, message):
    with pytest.raises(InputError, match=message):
        score(GONE, token_ids, start)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        # As many rows in all as there are scored tokens, but of the wrong sequences.
        ([[[1], [2], [3]], [[4]]], r"ids of sequence 0 must be ints of shape \[2, 1\].*got shape \[3, 1\]"),
        (
            [[[1], [2]], [[3, 4], [5, 6]]],
            r"ids of sequence 1 must be ints of shape .* got shape \[2, 2\]",
        ),
        ([[[1], [2]]], "ids has 1 entries for 2 sequences"),
    ],
)
def test_chosen_ids_of_other_rows_are_refused_here(ids, message):
    with Client(GONE) as client, pytest.raises(InputError, match=message):
        client.score_ids([[5, 6, 7], [5, 6, 8]], ids)


def takes_at_most(most):
    """Return what refuses requests with more sequences."""

    def answer(request):
        fields = faulty_server.unpack_question(request.body, most_sequences=999)
        if len(fields["token_ids"]) > most:
            return problem(413, "InputError", f"at most {most} sequences: cut it")(request)
        return faulty_server.score(request)

    return answer


def test_a_part_that_is_too_large_for_a_server_is_cut(monkeypatch):
    monkeypatch.setattr(calls, "SIZES", Sizes())
    with serving(*[takes_at_most(5)] * 99) as server:
        check(score(server.address, IDS, STARTS))
        assert len(server.seen) > len(IDS) / 5
    with (
        serving(*[lambda request: request.send(413, b"a proxy's text", {})] * 99) as server,
        pytest.raises(InputError, match="127.0.0.1: 413"),
    ):
        score(server.address, IDS, STARTS)


def test_time_in_which_a_server_scored_is_no_time_of_failures():
    def long_work(request):
        time.sleep(0.5)
        hang_up(request)

    with serving(long_work) as server:
        check(score(server.address, [[5, 6]], retry_s=0.3), [[5, 6]], [1])


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (404, b"Path '/v1/logprobs' not found. Ping http://.../-/routes for available routes."),
        (500, b"Internal Server Error"),
    ],
)
def test_a_proxy_of_serve_without_its_door_is_asked_again(status, text):
    with serving(*[lambda request: request.send(status, text, {"Content-Type": "text/plain"})] * 2) as server:
        check(score(server.address, [[5, 6]]), [[5, 6]], [1])


def test_another_server_is_asked_before_a_busy_one_has_rested():
    full = problem(429, "EngineError", "full", Retry_After="60")
    with serving(full) as one, serving(full) as other:
        began = time.monotonic()
        check(score([one.address, other.address], [[5, 6]], retry_s=0.5), [[5, 6]], [1])
        assert one.seen
        assert other.seen
        assert time.monotonic() - began < 10
