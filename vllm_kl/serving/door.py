"""The HTTP door of the replicas: a FastAPI application in a deployment of its own on Ray Serve.

    POST /v1/logprobs   limits.py: its body has room  -> bodies.py: a question  -> job.py: the replicas score
                        -> bodies.py: the answer, whole or as it comes
    GET  /health  /v1/model  /metrics  /openapi.json  /docs

Serve's proxy passes each request to the door, and cancels it there if the client goes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from vllm_kl import __version__
from vllm_kl.client.wire_format import Answer
from vllm_kl.doctor import package_versions
from vllm_kl.engines.replicas.engine import Replicas
from vllm_kl.engines.replicas.fleet import Fleet
from vllm_kl.engines.replicas.service import Deployed
from vllm_kl.errors import VLLMKLError
from vllm_kl.serving.bodies import JSON, MSGPACK, Body, Settings, Writer, read_question, writer_for
from vllm_kl.serving.job import Job, joined
from vllm_kl.serving.limits import Limits, Room, body_of
from vllm_kl.serving.metrics import Metrics
from vllm_kl.serving.problems import (
    MEDIA_TYPE,
    Refusal,
    answer_errors_with_problems,
    document_of,
    log_unforeseen,
    response_of,
)

DOOR = "door"
_MOST_REQUESTS = 2048  # that Serve passes on; limits.py refuses others by their size, long before
_LOOK_EVERY_S = 0.1
_HEALTH_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a door is told when it is made."""

    model: str  # the name that answers have
    weights: str | None  # a fingerprint of the checkpoint
    limits: Limits = field(default_factory=Limits)
    key_digest: bytes | None = None  # of the API key (:func:`digest`); None: everybody may ask
    timeout_s: float | None = None  # how long a request may be without a replica


def digest(key: str) -> bytes:
    """Return what the door keeps of an API key."""
    return hashlib.sha256(key.encode()).digest()


class _FixedWeights:
    """The weights of replicas that nobody refreshes."""

    version = 0

    def unchanged(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


class _ServedReplicas(Replicas):
    weights = _FixedWeights()


class Door:
    """The deployment that requests over HTTP come to.

    Args:
        handle: of the replicas.
        fleet: how many they are.
        setup: everything else.
    """

    async def __init__(self, handle: DeploymentHandle, fleet: Fleet, setup: Setup) -> None:
        name = serve.get_replica_context().app_name
        deployed = Deployed(name, handle, fleet, setup.timeout_s)
        self._replicas = await asyncio.to_thread(_ServedReplicas, deployed)  # waits until a replica runs
        self._setup, self._deployed, self._metrics = setup, deployed, Metrics()
        self._bytes = Room("bytes", setup.limits.max_waiting_bytes)
        self._tokens = Room("tokens", setup.limits.max_waiting_tokens)
        self._metrics.waiting.set_function(lambda: self._tokens.used)
        self._is_draining, self._num_requests = False, 0
        self._looked, self._is_alive = -math.inf, True

    def __serve_build_asgi_app__(self) -> FastAPI:
        about = "Log-probs of given tokens, by a reference model."
        app = FastAPI(title="vllm-kl", version=__version__, description=about)
        answer_errors_with_problems(app)
        app.get("/health", summary="Whether a replica runs", responses=_PROBLEMS)(self.health)
        needs_key = {"dependencies": [Depends(self._check_key)], "responses": _PROBLEMS}
        app.get("/v1/model", summary="What is served", **needs_key)(self.model)
        raw = {"response_class": Response, **needs_key}
        app.get("/metrics", summary="Figures for Prometheus", **raw)(self.metrics)
        app.post("/v1/logprobs", summary="Score sequences", openapi_extra=_BODY, **raw)(self.logprobs)
        return app

    async def _check_key(self, request: Request) -> None:
        expected = self._setup.key_digest
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if expected is not None and not hmac.compare_digest(digest(given), expected):
            raise Refusal(
                401,
                "the key is missing or wrong: send Authorization: Bearer KEY (VLLM_KL_API_KEY of the client)",
                {"WWW-Authenticate": "Bearer"},
            )

    async def health(self) -> dict[str, str]:
        if self._is_draining:
            raise Refusal(503, "the server ends")
        if time.monotonic() - self._looked > _HEALTH_S:  # anyone may ask, as often as he likes
            self._looked = time.monotonic()
            try:
                self._is_alive = await asyncio.to_thread(self._deployed.check_alive, 0.0)
            except VLLMKLError:  # why it does not start is for those who have the key
                self._is_alive = False
        if not self._is_alive:
            raise Refusal(503, "no replica runs")
        return {"status": "ok"}

    async def model(self) -> dict[str, Any]:
        setup, info = self._setup, asdict(self._replicas.info)
        return {
            **self._origin,
            **info,
            "can": sorted(info["can"]),
            "placeholders": {str(token): what for token, what in info["placeholders"].items()},
            "limits": setup.limits.model_dump(),
            "versions": package_versions(),
        }

    @property
    def _origin(self) -> dict[str, Any]:
        weights = self._replicas.weights
        return {
            "model": self._setup.model,
            "weights": self._setup.weights,
            "weight_version": weights.version,
        }

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def logprobs(self, request: Request) -> Response:
        async with contextlib.AsyncExitStack() as held:
            try:
                response = await self._logprobs(request, held)
            except Exception as error:
                response = response_of(error)
        self._metrics.requests.labels(response.status_code).inc()
        return response

    async def _logprobs(self, request: Request, held: contextlib.AsyncExitStack) -> Response:
        held.enter_context(self._running())
        limits = self._setup.limits
        data = await held.enter_async_context(body_of(request, limits, self._bytes))
        content_type = request.headers.get("content-type", "")
        question, settings = await asyncio.to_thread(read_question, data, content_type, limits)
        self._check_model(settings)
        writer = writer_for(request, settings)
        job = await asyncio.to_thread(Job, question, self._replicas, limits)
        held.enter_context(self._tokens.hold(job.num_tokens))
        if question.stream:
            frames = self._frames(job, writer, held.pop_all())
            return StreamingResponse(frames, media_type=writer.media_type)
        answers: list[Answer] = []
        origin = await self._run(job, answers.append)
        content = await asyncio.to_thread(lambda: writer.write(joined(answers, origin)))
        return Response(content, media_type=writer.media_type)

    @contextlib.contextmanager
    def _running(self):  # noqa: ANN202
        if self._is_draining:
            raise Refusal(503, "the server ends: ask another one, or again later", {"Retry-After": "5"})
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    def _check_model(self, settings: Settings) -> None:
        if settings.model not in (None, self._setup.model):
            raise Refusal(404, f"model {settings.model!r} is not served here: {self._setup.model!r} is")

    async def _run(self, job: Job, on_answer: Any) -> dict[str, Any]:
        """Run a job; return what is said of it at its end."""
        began = time.monotonic()
        await job.run(on_answer)
        took_s = time.monotonic() - began
        metrics = self._metrics
        metrics.sequences.inc(job.num_sequences)
        metrics.fed.inc(job.num_tokens)
        metrics.computed.inc(job.num_computed_tokens)
        metrics.seconds.observe(took_s)
        metrics.queued.observe(job.queued_s)
        timings = {"queue_s": round(job.queued_s, 6), "compute_s": round(took_s - job.queued_s, 6)}
        return {**self._origin, "timings": timings}

    def _frames(self, job: Job, writer: Writer, held: contextlib.AsyncExitStack) -> AsyncIterator[bytes]:
        """Return an iterator of an answer for each shard that finishes, and one without sequences at the end.

        The last one has the timings; or after an error the problem document.
        """
        found: asyncio.Queue[Answer | None] = asyncio.Queue()

        async def run() -> dict[str, Any]:
            async with held:
                return await self._run(job, found.put_nowait)

        async def frames() -> AsyncIterator[bytes]:
            try:
                while (answer := await found.get()) is not None:
                    yield writer.write(joined([answer], self._origin))
                yield writer.write(job.answer([], [], await running))
            except Exception as error:
                log_unforeseen(error)
                yield writer.write_problem(document_of(error))
            finally:
                running.cancel()

        running = asyncio.create_task(
            run()
        )  # now: a client that is gone before the first frame frees its room
        running.add_done_callback(lambda _: found.put_nowait(None))
        return frames()

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; return when those that run have ended, or the time is over."""
        self._is_draining, until = True, time.monotonic() + timeout_s
        while self._num_requests and time.monotonic() < until:
            await asyncio.sleep(_LOOK_EVERY_S)


_PROBLEM = {
    "description": "Problem",
    "content": {
        MEDIA_TYPE: {
            "schema": {
                "type": "object",
                "properties": {
                    name: {"type": "integer" if name == "status" else "string"}
                    for name in ("type", "title", "status", "detail")
                },
                "required": ["type", "title", "status", "detail"],
            }
        }
    },
}
_STATUSES = (400, 401, 404, 406, 408, 413, 415, 422, 429, 500, 503)
_PROBLEMS: dict[int | str, dict[str, Any]] = dict.fromkeys(_STATUSES, _PROBLEM)
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {JSON: {"schema": Body.model_json_schema()}, MSGPACK: _BINARY},
    }
}


class Front:
    """Puts a door in front of replicas.

    Args:
        setup: of the door.
        http: Serve's HTTP options.
    """

    def __init__(self, setup: Setup, http: Mapping[str, Any]) -> None:
        self._setup, self.http = setup, http

    def bind(self, replicas: serve.Application, fleet: Fleet) -> serve.Application:
        deployment = serve.deployment(
            name=DOOR,
            max_ongoing_requests=_MOST_REQUESTS,
            max_queued_requests=_MOST_REQUESTS,  # more get 503
            graceful_shutdown_timeout_s=5,
            graceful_shutdown_wait_loop_s=0.2,
            ray_actor_options={"num_cpus": 0},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )(serve.ingress()(Door))
        return deployment.bind(replicas, fleet, self._setup)
