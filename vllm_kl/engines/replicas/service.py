"""Starts and ends a deployment of replicas on Ray Serve, and Ray and Serve themselves where there are none.

Ray     this process is in a cluster, or RAY_ADDRESS names one: it is used. Else a local Ray is started,
        for all scorers of this process, and ends with the last of them.
Serve   started without a proxy if the cluster has none: nothing comes over HTTP.
the deployment has one user, this process. It ends with the scorer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from vllm_kl.engines.replicas.prompt_router import PromptRouter
from vllm_kl.engines.replicas.replica import MAX_ONGOING, Replica, from_text
from vllm_kl.errors import EngineError, OptionError

logger = logging.getLogger("vllm_kl")

_SPILL = 2  # shards that the preferred replica may be behind the least loaded one
_LOOK_EVERY_S = 0.2
_NOTE_AFTER_S = 60.0
_DEPLOYMENT = "replica"


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """How many replicas there are, and what each of them takes."""

    fewest: int
    most: int
    num_cpus: float  # of Ray's, for one replica
    num_gpus: int
    num_threads: int  # of the engine, on a CPU

    @property
    def is_elastic(self) -> bool:
        return self.fewest != self.most


class _LocalRay:
    """The local Ray that this process started, if it did, and the number of its users."""

    def __init__(self) -> None:
        self._lock, self._num_users, self._is_ours = threading.Lock(), 0, False

    def enter(self, num_cpus: int) -> None:
        with self._lock:
            if not ray.is_initialized():
                quiet = {"log_to_driver": False, "include_dashboard": False, "configure_logging": False}
                if os.environ.get("RAY_ADDRESS"):
                    ray.init(log_to_driver=False)
                else:
                    ray.init(address="local", num_cpus=num_cpus, **quiet)
                    self._is_ours = True
            self._num_users += 1

    def leave(self) -> None:
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0 and self._is_ours:
                self._is_ours = False
                if ray.is_initialized():
                    serve.shutdown()
                    ray.shutdown()


_RAY = _LocalRay()


class Service:
    """A deployment that runs.

    Args:
        model: the path or name of the model.
        start: arguments of :class:`~vllm_kl.engines.process.ProcessEngine`, which each replica gets.
        fleet: how many replicas, and what each takes.
        timeout_s: how long the start may take; ``None``: for ever.

    Raises:
        EngineError, OptionError, ...: of the replica that did not start.
    """

    def __init__(
        self, model: str, start: Mapping[str, Any], fleet: Fleet, *, timeout_s: float | None
    ) -> None:
        self.name = f"vllm_kl-{uuid.uuid4().hex[:12]}"
        self.fleet, self._timeout_s = fleet, timeout_s
        _RAY.enter(num_cpus=max(os.cpu_count() or 1, round(fleet.most * fleet.num_cpus)))
        self._is_open = True
        try:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(proxy_location="Disabled")
            self._app = _deployment(fleet).bind(model, dict(start))
            self.handle = self._run()
            self._wait()
        except BaseException:
            self.close()
            raise

    def _run(self) -> Any:
        target = serve.RunTarget(target=self._app, name=self.name, route_prefix=None)
        return serve.run_many([target], wait_for_applications_running=False)[0]

    def _wait(self) -> None:
        """Wait until the deployment runs."""
        began, has_told = time.monotonic(), False
        while True:
            app = serve.status().applications[self.name]
            self.raise_failure()
            if app.status == "RUNNING":
                return
            waited = time.monotonic() - began
            if self._timeout_s is not None and waited > self._timeout_s:
                raise EngineError(
                    f"the replicas did not start within {self._timeout_s:g} s (timeout_s): {self.state()}"
                )
            if waited > _NOTE_AFTER_S and not has_told:
                has_told = True
                logger.warning("vllm_kl: the replicas are not ready yet: %s", self.state())
            time.sleep(_LOOK_EVERY_S)

    def raise_failure(self) -> None:
        """Raise the error of a replica that did not start, if none runs."""
        deployment = serve.status().applications[self.name].deployments.get(_DEPLOYMENT)
        if deployment is None or deployment.replica_states.get("RUNNING"):
            return
        if (error := from_text(deployment.message)) is not None:
            raise type(error)(f"a replica did not start: {error}")
        if deployment.status == "DEPLOY_FAILED":
            raise EngineError(f"the replicas did not start: {deployment.message}")

    def state(self) -> str:
        """Return what Serve says of the replicas, and what Ray has left."""
        deployment = serve.status().applications[self.name].deployments.get(_DEPLOYMENT)
        if deployment is None:
            return "Serve does not know them yet"
        found = ", ".join(f"{n} {state}" for state, n in deployment.replica_states.items())
        need = {"CPU": self.fleet.num_cpus, "GPU": self.fleet.num_gpus}
        return (
            f"{found or 'none is there'}. {deployment.message} Each needs {need}; "
            f"free are {ray.available_resources()}"
        )

    def close(self) -> None:
        """End the replicas, and Ray if it was started for them. Safe to call twice."""
        if self._is_open:
            self._is_open = False
            if ray.is_initialized():
                with contextlib.suppress(Exception):  # Serve is gone, or ends
                    serve.delete(self.name)
            _RAY.leave()


def _deployment(fleet: Fleet) -> serve.Deployment:
    environment = {}
    if not fleet.num_gpus:
        environment = {"OMP_NUM_THREADS": str(fleet.num_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    number: dict[str, Any] = {"num_replicas": fleet.most}
    if fleet.is_elastic:
        number = {
            "autoscaling_config": {
                "min_replicas": fleet.fewest,
                "max_replicas": fleet.most,
                "target_ongoing_requests": MAX_ONGOING / 2,
            }
        }
    return serve.deployment(
        name=_DEPLOYMENT,
        max_ongoing_requests=MAX_ONGOING,
        max_constructor_retry_count=3,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={
            "num_cpus": fleet.num_cpus,
            "num_gpus": fleet.num_gpus,
            "runtime_env": {"env_vars": environment},
        },
        request_router_config=RequestRouterConfig(
            request_router_class=PromptRouter, request_router_kwargs={"spill": _SPILL}
        ),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **number,
    )(Replica)


def fleet_of(replicas: int, options: Mapping[str, Any]) -> Fleet:
    """Return the fleet that the argument ``replicas`` of :class:`~vllm_kl.VLLMScorer` asks for."""
    if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1:
        raise OptionError(f"replicas={replicas!r}: expected a number of at least 1")
    num_threads = max(1, (os.cpu_count() or 1) // replicas)
    return Fleet(fewest=replicas, most=replicas, num_cpus=1, num_gpus=0, num_threads=num_threads)
