"""``ReplicatedEngine`` scores with replicas on Ray Serve, each of which owns an engine.

    the requests of a call, sorted
        -> shards.py: whole groups               -> prompt_router.py: the replica that knows the prompt
        -> replica.py: an engine of its own      -> results as they come, put in the order of the requests

A shard whose replica dies is asked again. A call whose shards come from two versions of the weights asks the
older ones again.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ray.exceptions import RayError, RayTaskError

from vllm_kl.engines.process import TIMEOUT_S
from vllm_kl.engines.replicas.prompt_router import RUNNING
from vllm_kl.engines.replicas.replica import MAX_ONGOING
from vllm_kl.engines.replicas.service import Service, fleet_of
from vllm_kl.engines.replicas.shards import Shard, cut
from vllm_kl.engines.wire_format import pack, unpack
from vllm_kl.errors import EngineError
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult

_TRIES = 3  # replicas that may die of one shard
_LOOK_EVERY_S = 5.0


class ReplicatedEngine:
    """An engine of replicas. Several threads may call it at a time.

    The arguments and errors are those of :class:`~vllm_kl.VLLMScorer`.
    """

    info: EngineInfo
    weights = None

    def __init__(
        self,
        model: str,
        *,
        replicas: int,
        readout: str,
        options: dict[str, Any],
        lora_request: Any = None,
        timeout_s: float | None = TIMEOUT_S,
    ) -> None:
        start = {"readout": readout, "options": options, "lora_request": lora_request, "timeout_s": timeout_s}
        self._timeout_s = timeout_s
        self._service = Service(model, start, fleet_of(replicas, options), timeout_s=timeout_s)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm_kl-shards", daemon=True).start()
        self.info, self.settings, _ = self.on_all("describe")[0]

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: Callable[[int], None] | None = None,
        alone: bool = False,
    ) -> list[ScoreResult]:
        if alone:
            return unpack(ScoreResult, self.on_all("score_alone", pack(requests))[0])
        shards = cut(requests, RUNNING.get(self._service.name, ()))
        return self._wait_for(_Call(self, requests, shards, share_prefix, on_done).run())

    def on_all(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every replica that runs; return the results, or raise the first error."""
        return self._service.handle.broadcast(method, *args).results(timeout_s=self._timeout_s)

    def close(self) -> None:
        self._service.close()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait_for(self, steps: Coroutine[Any, Any, Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(steps, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in this thread
            raise

    @property
    def limit(self) -> int:
        """How many shards of a call are on their way at a time."""
        return MAX_ONGOING * self._service.fleet.most


class _Call:
    """One call: its shards, and the results so far."""

    def __init__(
        self,
        engine: ReplicatedEngine,
        requests: Sequence[ScoreRequest],
        shards: list[Shard],
        share_prefix: bool,
        on_done: Callable[[int], None] | None,
    ) -> None:
        self._engine, self._requests, self._share_prefix = engine, requests, share_prefix
        self._shards, self._on_done = shards, on_done
        self._results: dict[int, list[ScoreResult]] = {}  # by the shard's index
        self._deaths: dict[int, int] = {}

    async def run(self) -> list[ScoreResult]:
        waiting = deque(range(len(self._shards)))
        running: dict[asyncio.Task, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._engine.limit:
                    n = waiting.popleft()
                    running[asyncio.ensure_future(self._ask(self._shards[n]))] = n
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    self._take(running.pop(task), task, waiting)
        finally:
            for task in running:
                task.cancel()
        found = [None] * len(self._requests)
        for n, results in self._results.items():
            for place, result in zip(self._shards[n].places, results, strict=True):
                found[place] = result
        return found

    async def _ask(self, shard: Shard) -> list[ScoreResult]:
        packed = pack([self._requests[place] for place in shard.places])
        answer = await self._engine._service.handle.score.remote(shard.key, packed, self._share_prefix)
        return unpack(ScoreResult, answer)

    def _take(self, n: int, task: asyncio.Task, waiting: deque[int]) -> None:
        try:
            results = task.result()
        except RayTaskError as error:
            raise error.cause or error from error
        except RayError as error:
            raise EngineError(f"a replica died: {error}") from error
        if n not in self._results and self._on_done is not None:
            self._on_done(len(results))
        self._results[n] = results
