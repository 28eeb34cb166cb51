"""``ReplicatedEngine`` scores with replicas on Ray Serve, each of which owns an engine.

    the requests of a call, sorted
        -> shards.py: whole groups               -> prompt_router.py: the replica that knows the prompt
        -> replica.py: an engine of its own      -> results as they come, put in the order of the requests

A shard whose replica dies is asked again. A push waits for the calls that run, so a call knows which version
all replicas must serve. A shard with another version, of a replica that has just started, is asked again.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentBroadcastResponse

from vllm_kl.engines.process import TIMEOUT_S
from vllm_kl.engines.replicas.fleet import wish_of
from vllm_kl.engines.replicas.known import RUNNING
from vllm_kl.engines.replicas.replica import DyingError
from vllm_kl.engines.replicas.service import Deployed, Service
from vllm_kl.engines.replicas.weights import ReplicatedWeights
from vllm_kl.engines.wire_format import pack, unpack
from vllm_kl.errors import EngineError, WeightsError
from vllm_kl.routing.dialogs import Dialogs
from vllm_kl.routing.shards import Shard, cut
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult
from vllm_kl.weights.all_or_none import Outcome
from vllm_kl.weights.checkpoint import InitialCheckpoint, Skeleton

OnResults = Callable[[Sequence[int], Sequence[ScoreResult]], None]
_DEATHS = (RayActorError, DyingError, ObjectLostError)  # the last: with its machine, before it was fetched
# Shards of one call on their way at a time. The others wait here, for the replica that is free first.
_SHARDS_PER_REPLICA = 4
_MOST_DEATHS = 3  # replicas that may die of one shard
_LOOK_EVERY_S = 5.0
_AGAIN_AFTER_S = 0.5  # a shard whose replica died, or serves another version than others


class Replicas:
    """Replicas that run, for a process that calls them. Several threads may do so at a time.

    Args:
        service: their deployment.
    """

    info: EngineInfo
    weights: Any  # with ``version`` and ``unchanged()``

    def __init__(self, service: Deployed) -> None:
        self._service, self._owner_pid = service, os.getpid()
        self._dialogs, self._cutting = Dialogs(), threading.Lock()
        self.info, self.settings, _ = self._result(self.on_each("describe")[0])

    @property
    def is_open(self) -> bool:
        """Whether :meth:`close` was not called."""
        return self._service.is_open

    @property
    def pids(self) -> list[int]:
        """The process ids of the replicas that run."""
        return [self._result(outcome)[2] for outcome in self.on_each("describe")]

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: Callable[[int], None] | None = None,
        alone: bool = False,
    ) -> list[ScoreResult]:
        if alone:
            return self.score_on_each(requests)[0]

        def on_results(places: Sequence[int], results: Sequence[ScoreResult]) -> None:
            if on_done is not None:
                on_done(len(results))

        self._check_open()
        with self.weights.unchanged():
            call = self.call(requests, share_prefix=share_prefix, on_results=on_results)
            future = asyncio.run_coroutine_threadsafe(call.run(), _loop())
            try:
                return future.result()
            except BaseException:
                future.cancel()  # Ctrl-C in this thread
                raise

    def call(self, requests: Sequence[ScoreRequest], *, share_prefix: bool, on_results: OnResults) -> Call:
        """Return a call that runs in an event loop. The weights must not change meanwhile."""
        with self._cutting:
            shards = cut(requests, RUNNING.get(self._service.name, ()), self._dialogs)
        return Call(self, requests, shards, share_prefix, on_results)

    def score_on_each(self, requests: Sequence[ScoreRequest]) -> list[list[ScoreResult]]:
        """Score the requests alone on each replica that runs."""
        answers = map(self._result, self.on_each("score_alone", pack(requests)))
        return [unpack(ScoreResult, answer) for answer in answers]

    async def ask_alone(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Score the requests alone on one replica. Cancelling this frees it."""
        asking = asyncio.create_task(self._ask_alone(requests), context=contextvars.Context())  # see Call
        heard = time.monotonic()
        try:
            while not (await asyncio.wait({asking}, timeout=_LOOK_EVERY_S))[0]:
                if await self.check_alive(time.monotonic() - heard):
                    heard = time.monotonic()
            return asking.result()
        finally:
            asking.cancel()

    async def _ask_alone(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        response = self._service.handle.score_alone.remote(pack(requests))
        try:
            return unpack(ScoreResult, await response)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayError as error:
            raise _cause(error) from error

    def on_each(self, method: str, *args: Any) -> list[Outcome]:
        """Call a method of each replica that runs; return the outcomes.

        A replica that dies of it has no outcome. If all die, those that come back are called.

        Raises:
            EngineError: no replica came back in time, or all died again and again.
        """
        self._check_open()
        num_deaths, began = 0, time.monotonic()
        while True:
            try:
                response: DeploymentBroadcastResponse = self._service.handle.broadcast(method, *args)
                answers = response.results(timeout_s=self._service.timeout_s, return_exceptions=True)
            except RayServeException:
                answers = []  # no replica runs
            except TimeoutError as error:
                raise EngineError(
                    f"a replica gave no answer for {self._service.timeout_s:g} s (timeout_s)"
                ) from error
            answers = [_cause(answer) for answer in answers]
            if living := [answer for answer in answers if not isinstance(answer, _DEATHS)]:
                return [(not isinstance(answer, Exception), answer) for answer in living]
            num_deaths += bool(answers)
            if num_deaths == _MOST_DEATHS:
                raise EngineError(
                    f"all replicas died {_MOST_DEATHS} times, one after the other. The last one: {answers[0]}"
                )
            time.sleep(_AGAIN_AFTER_S)
            self._service.check_alive(time.monotonic() - began)

    def _check_open(self) -> None:
        if os.getpid() != self._owner_pid:
            raise EngineError(
                "the replicas belong to the process that started them, not to a fork: make a new VLLMScorer "
                "in the fork"
            )
        if not self.is_open:
            raise EngineError("the engine is closed: make a new VLLMScorer")

    @staticmethod
    def _result(outcome: Outcome) -> Any:
        is_done, result = outcome
        if not is_done:
            raise result
        return result

    @property
    def limit(self) -> int:
        """How many shards of a call are on their way at a time."""
        return _SHARDS_PER_REPLICA * self._service.fleet.most

    async def ask(
        self, shard: Shard, requests: Sequence[ScoreRequest], share_prefix: bool
    ) -> tuple[list[ScoreResult], float]:
        """Return the results of a shard, and how many seconds its replica took."""
        response = self._service.handle.score.remote(shard.key, pack(requests), share_prefix)
        try:
            packed, took_s = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return unpack(ScoreResult, packed), took_s

    async def check_alive(self, silent_s: float) -> bool:
        """Return whether a replica runs, as :meth:`Service.check_alive` does."""
        self._check_open()
        return await asyncio.to_thread(self._service.check_alive, silent_s)

    def check_in_step(self, version: int, waited_s: float) -> None:
        """Raise an error if a replica does not serve the version for too long."""
        if self._service.timeout_s is not None and waited_s > self._service.timeout_s:
            raise WeightsError(
                f"a replica does not serve version {version} of the weights, as the others do, for "
                f"{self._service.timeout_s:g} s (timeout_s).\nRefresh or push again, or make the scorer again"
            )


class ReplicatedEngine(Replicas):
    """An engine of replicas that this process starts and ends.

    The arguments and errors are those of :class:`~vllm_kl.VLLMScorer`.
    """

    def __init__(
        self,
        model: str,
        *,
        replicas: Any,
        readout: str,
        options: dict[str, Any],
        lora_request: Any = None,
        timeout_s: float | None = TIMEOUT_S,
    ) -> None:
        wish = wish_of(replicas)
        checkpoint = InitialCheckpoint(model)
        start = {"readout": readout, "options": options, "lora_request": lora_request, "timeout_s": timeout_s}
        service = Service(model, start, wish, files=checkpoint.identity, timeout_s=timeout_s)
        try:
            super().__init__(service)
        except BaseException:
            service.close()
            raise
        skeleton = functools.partial(
            Skeleton,
            model,
            revision=options.get("revision"),
            trust_remote_code=options.get("trust_remote_code", False),
            hf_overrides=options.get("hf_overrides"),
        )
        self.weights = ReplicatedWeights(
            self.on_each,
            self._service.keep,
            self._service.is_changing,
            skeleton,
            checkpoint,
            wish.weights_folder,
        )

    def close(self) -> None:
        self._service.close()
        if hasattr(self, "weights"):
            self.weights.release()


class Call:
    """One call: its shards, and the results so far.

    Args:
        on_results: called with the indices of requests and their results, once for each shard.
    """

    def __init__(
        self,
        engine: Replicas,
        requests: Sequence[ScoreRequest],
        shards: list[Shard],
        share_prefix: bool,
        on_results: OnResults,
    ) -> None:
        self._engine, self._requests, self._share_prefix = engine, requests, share_prefix
        self._shards, self._on_results = shards, on_results
        self._results: dict[int, list[ScoreResult]] = {}  # by the shard's index
        self._told: set[int] = set()
        self.queued_s = 0.0  # seconds until a replica began with the first shard
        self._deaths: Counter[int] = Counter()
        self._waiting = deque(range(len(shards)))

    async def run(self) -> list[ScoreResult]:
        """Return one result per request, in the order of the requests. Cancelling this frees the replicas."""
        self._version, self._began = self._engine.weights.version, time.monotonic()
        while self._waiting:
            await self._ask_all()
            self._waiting += [n for n, results in self._results.items() if not self._is_in_step(results)]
            if self._waiting:
                self._engine.check_in_step(self._version, time.monotonic() - self._began)
        found: dict[int, ScoreResult] = {}
        for n, results in self._results.items():
            found.update(zip(self._shards[n].places, results, strict=True))
        return [found[place] for place in range(len(self._requests))]

    async def _ask_all(self) -> None:
        """Ask for the shards that wait, until all have come back."""
        running: dict[asyncio.Task, int] = {}
        heard = time.monotonic()
        try:
            while self._waiting or running:
                while self._waiting and len(running) < self._engine.limit:
                    n = self._waiting.popleft()
                    # Inside an HTTP request Ray 2.60 gives all calls of a handle one id, by which its router
                    # finds them again (ray/serve/_private/default_impl.py): so a context without a request.
                    running[asyncio.create_task(self._ask(n), context=contextvars.Context())] = n
                done, _ = await asyncio.wait(
                    running, timeout=_LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                came = [self._take(running.pop(task), task) for task in done]
                if any(came) or await self._engine.check_alive(time.monotonic() - heard):
                    heard = time.monotonic()
        finally:
            for task in running:
                task.cancel()

    def _is_in_step(self, results: Sequence[ScoreResult]) -> bool:
        return all(result.weight_version == self._version for result in results)

    async def _ask(self, n: int) -> list[ScoreResult]:
        if self._deaths[n] or n in self._results:
            await asyncio.sleep(_AGAIN_AFTER_S)
        shard = self._shards[n]
        requests = [self._requests[place] for place in shard.places]
        results, took_s = await self._engine.ask(shard, requests, self._share_prefix)
        if not self._results:
            self.queued_s = time.monotonic() - self._began - took_s
        return results

    def _take(self, n: int, task: asyncio.Task) -> bool:
        """Take a shard's results and return True; or let it be asked again."""
        if (error := task.exception()) is not None:
            self._ask_again_or_raise(n, _cause(error))
            return False
        results = task.result()
        if n not in self._told and self._is_in_step(results):
            self._told.add(n)
            self._on_results(self._shards[n].places, results)
        self._results[n] = results
        return True

    def _ask_again_or_raise(self, n: int, error: Exception) -> None:
        if not isinstance(error, (*_DEATHS, RayServeException)):
            raise error
        self._deaths[n] += not isinstance(error, RayServeException)
        if self._deaths[n] >= _MOST_DEATHS:
            raise EngineError(
                f"{_MOST_DEATHS} replicas died, one after the other, when they scored the same "
                f"{len(self._shards[n].places)} sequences. The last one: {error}"
            ) from error
        self._waiting.append(n)


def _cause(answer: Any) -> Any:
    """Return the error that was raised in a replica, for Ray's error about it."""
    if isinstance(answer, RayTaskError) and isinstance(answer.cause, Exception):
        return answer.cause
    if isinstance(answer, RayError) and not isinstance(answer, _DEATHS):
        return EngineError(f"Ray lost the answer of a replica: {answer}")
    return answer


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all calls of this process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="vllm_kl-shards", daemon=True).start()
    return loop
