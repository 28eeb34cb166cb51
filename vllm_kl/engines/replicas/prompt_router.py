"""``PromptRouter`` lets Ray Serve send a shard to the replica that prefers its prompt.

Serve makes the router in the process of each caller. The rule is :mod:`vllm_kl.routing.affinity`; the load of
a replica is the number of its running requests, which Serve knows.

Source: ``ray/serve/request_router.py``, Ray 2.60 (alpha). ``FIFOMixin`` is left out: it gives the chosen
replica to the request that waits longest.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from vllm_kl.engines.replicas import known
from vllm_kl.routing.affinity import choose, order


class PromptRouter(RequestRouter):
    """Sends a request to the replica of its first argument, a key, unless that replica is behind.

    A request without a key goes to a replica with few running requests.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._spill: int = kwargs["spill"]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        ids = sorted(replica.replica_id.unique_id for replica in replicas)
        known.RUNNING[self.app_name] = tuple(ids)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        key = next(iter(pending_request.args), None)
        if not isinstance(key, bytes):
            return [candidate_replicas]
        lengths = self.replica_queue_len_cache
        loads = {name: lengths.get(replica.replica_id) or 0 for name, replica in by_id.items()}
        first = choose(key, loads, spill=self._spill)
        # If the first is full, by requests of other callers, the next one is asked.
        return [[by_id[first]], *([by_id[name]] for name in order(key, loads) if name != first)]
