"""A server that answers as told: for faults that a real server has seldom.

Its log-probs depend on the whole beginning of a sequence, so a row of another sequence or place is seen.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from vllm_kl.client.wire_format import Answer, pack_answer, unpack_question

ORIGIN = {"model": "m", "weights": "w", "weight_version": 0}


def log_probs(ids, start):
    return -np.log1p(np.cumsum(np.asarray(ids, np.float64) + 1)[start:]).astype(np.float32)


def answer_to(body, origin=ORIGIN, sequences=slice(None)):
    fields = unpack_question(body, most_sequences=10_000)
    pairs = list(zip(fields["token_ids"], fields["starts"], strict=True))
    index = list(range(len(pairs)))[sequences]
    return pack_answer(
        Answer(
            index=index,
            values=[log_probs(*pairs[i])[:, None] for i in index],
            num_ids=0,
            top_k=0,
            has_entropy=False,
            num_cached_tokens=[0] * len(index),
            rescored=[False] * len(index),
            origin=origin,
        )
    )


def problem(status, error, detail, **headers):
    """Return what answers a request with a problem document."""
    document = {"type": f"urn:vllm-kl:{error}", "title": "", "status": status, "detail": detail}
    return lambda request: request.send(status, json.dumps(document).encode(), headers)


def score(request):
    request.send(200, answer_to(request.body), {})


def hang_up(request):
    request.close_connection = True
    request.connection.close()


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        with server.lock:
            server.seen.append(dict(self.headers))
            answer = server.script.pop(0) if server.script else score
        answer(self)

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(*script: Callable):
    """Yield a server; it answers its first requests as the script says, and scores after that."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
    server.daemon_threads = True
    server.script, server.seen, server.lock = list(script), [], threading.Lock()
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
