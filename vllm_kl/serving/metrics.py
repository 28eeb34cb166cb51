"""What ``GET /metrics`` counts, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)


class Metrics:
    """The figures of one door."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vllm_kl_requests", "Requests to score, by HTTP status.", ["status"], registry=registry
        )
        self.sequences = Counter("vllm_kl_sequences", "Sequences scored.", registry=registry)
        self.fed = Counter("vllm_kl_fed_tokens", "Tokens of the sequences scored.", registry=registry)
        self.computed = Counter(
            "vllm_kl_computed_tokens",
            "Of the fed tokens those that neither the prefix cache nor an equal sequence had.",
            registry=registry,
        )
        self.waiting = Gauge("vllm_kl_waiting_tokens", "Tokens of requests in the server.", registry=registry)
        timed = {"registry": registry, "buckets": _SECONDS}
        self.seconds = Histogram("vllm_kl_request_seconds", "Time of a request that was scored.", **timed)
        self.queued = Histogram(
            "vllm_kl_queue_seconds", "Time until a replica began with a request.", **timed
        )

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self._registry)
