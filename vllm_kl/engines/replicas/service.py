"""Starts and ends a deployment of replicas on Ray Serve, and Ray and Serve themselves where there are none.

    Ray             if this process is in a cluster, or RAY_ADDRESS names one, this one is used. Else a local
                    Ray is started, for all scorers of this process; it ends with the last of them.
    Serve           is started, if the cluster has none; without a proxy, unless there is a door: else nothing
                    comes over HTTP.
    the deployment  has one user, this process. It ends with the scorer, or when the process is gone.

Serve checks the health of replicas, restarts them, and adds or removes some between ``min`` and ``max``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from vllm_kl.engines.replicas.fleet import Fleet, Wish, fleet_of
from vllm_kl.engines.replicas.prompt_router import PromptRouter
from vllm_kl.engines.replicas.replica import MAX_ONGOING, USERS, Replica, from_text
from vllm_kl.errors import EngineError, OptionError
from vllm_kl.ray_address import check_address
from vllm_kl.weights.checkpoint import Identity

logger = logging.getLogger("vllm_kl")

_TARGET_ONGOING = 2  # requests per replica at which Serve adds or removes none: one runs, one is ready
_SPILL = 2  # shards that the preferred replica may be behind the least loaded one
_LOOK_EVERY_S = 0.2
_NOTE_AFTER_S = 60.0
_DELETED_AFTER_S = 30.0
_FREE_WITHIN_S = 10.0
DEPLOYMENT = "replica"
# With a new version Serve would start all replicas anew, with an equal one it calls their reconfigure().
_CODE_VERSION = "1"


class _Ray:
    """Ray and Serve as this process uses them; what it started ends with the last user."""

    def __init__(self) -> None:
        self._lock, self._num_users = threading.Lock(), 0
        self.is_ours = self._is_serve_ours = False

    def enter(self, num_replicas: int, http: Mapping[str, Any] | None) -> None:
        """Join Ray and Serve; start them where there are none, Serve with a proxy if ``http`` is given."""
        with self._lock:
            if not ray.is_initialized():
                self._join(num_replicas)
            try:
                if self._num_users == 0:
                    actors = ray.util.list_named_actors(all_namespaces=True)
                    self._is_serve_ours = all(actor["namespace"] != "serve" for actor in actors)
                if self._is_serve_ours:
                    logging.getLogger("ray.serve").setLevel(logging.ERROR)
                elif http is not None:
                    raise RayServeException(
                        "Serve runs in this cluster, with its own HTTP options. Deploy into it: "
                        "serve run vllm_kl.serving:app model=..."
                    )
                serve.start(
                    proxy_location="Disabled" if http is None else "HeadOnly",
                    http_options=None if http is None else dict(http),
                    logging_config={"log_level": "WARNING", "enable_access_log": False},
                )
            except BaseException:
                self._end_if_unused()
                raise
            self._num_users += 1

    def leave(self) -> None:
        """End what was started, if nobody else in this process uses it."""
        with self._lock:
            self._num_users -= 1
            if ray.is_initialized():
                self._end_if_unused()

    def _join(self, num_replicas: int) -> None:
        if address := os.environ.get("RAY_ADDRESS"):
            check_address(address)
            ray.init(log_to_driver=False)
            return
        ray.init(
            address="local",
            num_cpus=max(len(os.sched_getaffinity(0)), num_replicas),
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        self.is_ours = True

    def _end_if_unused(self) -> None:
        if self._num_users:
            return
        with contextlib.suppress(RayError, RayServeException):
            if self._is_serve_ours and not serve.status().applications:
                serve.shutdown()
        if self.is_ours:
            self.is_ours = False
            ray.shutdown()


_RAY = _Ray()


class _User:
    """An actor that ends with the process that made it: while it lives, the deployment has its user."""


class Deployed:
    """A deployment of replicas that runs, as any process of the cluster sees it.

    Args:
        name: of the Serve application.
        handle: of the deployment.
        fleet: how many replicas it has.
        timeout_s: how long a call may be without a replica; ``None``: for ever.
    """

    is_open = True
    _missing_since: float | None = None

    def __init__(self, name: str, handle: DeploymentHandle, fleet: Fleet, timeout_s: float | None) -> None:
        self.name, self.handle, self.fleet, self.timeout_s = name, handle, fleet, timeout_s

    def is_changing(self) -> bool:
        """Whether a replica is in its ``reconfigure``. Serve sends no call to it then."""
        deployment = self._status()
        return deployment is not None and bool(deployment.replica_states.get("UPDATING"))

    def check_alive(self, silent_s: float) -> bool:
        """Return whether a replica runs, by what Serve knows.

        Args:
            silent_s: for how long none did.

        Raises:
            EngineError, OptionError, ...: none does, and none can start, or none did for ``timeout_s``.
        """
        deployment = self._status()
        if deployment is not None and deployment.replica_states.get("RUNNING"):
            return True
        self._raise_failure(deployment)
        if self._is_deleted():
            raise EngineError(
                "Serve has no replicas of this scorer any more: they were deleted. Make a new one"
            )
        if self.timeout_s is not None and silent_s > self.timeout_s:
            raise EngineError(f"no replica runs for {self.timeout_s:g} s (timeout_s): {self.state()}")
        return False

    def _is_deleted(self) -> bool:
        """Whether Serve answers and does not know the replicas for a while: it may have started anew."""
        try:
            is_missing = self.name not in serve.status().applications
        except (RayError, RayServeException):
            is_missing = False
        now = time.monotonic()
        self._missing_since = (self._missing_since or now) if is_missing else None
        return self._missing_since is not None and now - self._missing_since > _DELETED_AFTER_S

    def _raise_failure(self, deployment: Any) -> None:
        """Raise the error of a replica that did not start, if there is one."""
        if deployment is None:
            return
        if (error := from_text(deployment.message)) is not None:
            raise type(error)(f"a replica did not start: {error}")
        if deployment.status == "DEPLOY_FAILED":
            raise EngineError(f"the replicas did not start: {deployment.message}")

    def state(self) -> str:
        """Return what Serve says of the replicas, and what Ray has left."""
        deployment = self._status()
        if deployment is None:
            return "Serve does not know them, or cannot be asked"
        found = ", ".join(f"{n} {state}" for state, n in deployment.replica_states.items()) or "none is there"
        need = {"CPU": self.fleet.num_cpus, "GPU": self.fleet.num_gpus}
        free = {name: n for name, n in ray.available_resources().items() if name in need}
        return f"{found}. {deployment.message}\nEach needs {need}; free are {free}"

    def _status(self) -> Any:
        with contextlib.suppress(RayError, RayServeException, KeyError):
            return serve.status().applications[self.name].deployments.get(DEPLOYMENT)
        return None


class Front(Protocol):
    """Puts another deployment in front of the replicas: the one that requests over HTTP come to."""

    http: Mapping[str, Any]  # Serve's HTTP options

    def bind(self, replicas: serve.Application, fleet: Fleet) -> serve.Application:
        """Return the application of both deployments."""
        ...


class Service(Deployed):
    """A deployment that this process starts and ends.

    Args:
        model: the path or name of the model.
        start: arguments of :class:`~vllm_kl.engines.process.ProcessEngine`, which each replica gets.
        wish: how many replicas.
        files: what the model's files must be when a replica starts; ``None``: no local files.
        timeout_s: how long the start may take, and a call may be without a replica; ``None``: for ever.
        front: what stands before the replicas; ``None``: only this process calls them.

    Raises:
        EngineError, OptionError, ...: of the replica that did not start.
    """

    def __init__(
        self,
        model: str,
        start: dict[str, Any],
        wish: Wish,
        *,
        files: Identity | None,
        timeout_s: float | None,
        front: Front | None = None,
    ) -> None:
        self.name, self.timeout_s, self._front = f"vllm_kl-{uuid.uuid4().hex[:12]}", timeout_s, front
        try:
            _RAY.enter(wish.most or wish.fewest, None if front is None else front.http)
        except Exception as error:  # Ray raises Exception itself where its node does not start in time
            raise EngineError(f"Ray or Ray Serve did not start: {error}") from error
        self._finalizer = weakref.finalize(self, _end, self.name, os.getpid())
        try:
            self.fleet = fleet_here(wish, start["options"])
            _check_room(self.fleet)
            user = None
            if not _RAY.is_ours:  # a cluster that may outlive this process
                user = self.name
                # It starts anew where its machine is lost, and ends with this process all the same.
                actor = ray.remote(num_cpus=0, max_restarts=-1)(_User)
                self._user = actor.options(name=user, namespace=USERS).remote()
            self._deployment, self._args = deployment_of(self.fleet), (model, start, files, user)
            self._run()
            self.handle = serve.get_deployment_handle(DEPLOYMENT, app_name=self.name)
            self._wait()
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        return self._finalizer.alive

    def _run(self) -> None:
        target = self._deployment.bind(*self._args)
        if self._front is not None:
            target = self._front.bind(target, self.fleet)
        prefix = None if self._front is None else "/"
        target = serve.RunTarget(target=target, name=self.name, route_prefix=prefix)
        serve.run_many([target], wait_for_applications_running=False)

    def keep(self, config: Mapping[str, Any]) -> None:
        """Let each replica call ``reconfigure(config)``: those that run, and those that start from now on."""
        self._deployment = self._deployment.options(user_config=dict(config))
        self._run()

    def _wait(self) -> None:
        """Wait until all replicas run."""
        began, has_told = time.monotonic(), False
        while True:
            with contextlib.suppress(RayError, RayServeException, KeyError):
                if serve.status().applications[self.name].status == "RUNNING":
                    return
            self._raise_failure(self._status())
            waited = time.monotonic() - began
            if self.timeout_s is not None and waited > self.timeout_s:
                raise EngineError(
                    f"the replicas did not start within {self.timeout_s:g} s (timeout_s): {self.state()}"
                )
            if waited > _NOTE_AFTER_S and not has_told:
                has_told = True
                logger.warning("vllm_kl: the replicas are not ready yet: %s", self.state())
            time.sleep(_LOOK_EVERY_S)

    def close(self) -> None:
        """End the replicas, and Ray if it was started for them. Safe to call twice."""
        self._finalizer()


def _end(name: str, owner_pid: int) -> None:
    if os.getpid() != owner_pid:  # a fork
        return
    if ray.is_initialized():
        with contextlib.suppress(RayError, RayServeException, TimeoutError):  # Serve is gone, or ends
            serve.delete(name)
        with contextlib.suppress(RayError, ValueError):
            ray.kill(ray.get_actor(name, namespace=USERS))
    _RAY.leave()


def fleet_here(wish: Wish, options: Mapping[str, Any]) -> Fleet:
    """Return the fleet on the cluster of this process: it shares out the CPUs that nobody else has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fleet = fleet_of(wish, options, nodes)
    free = _free(fleet)
    return fleet if _fits(fleet, free) else fleet_of(wish, options, nodes, free_cpus=free.get("CPU", 0))


def _fits(fleet: Fleet, free: Mapping[str, float]) -> bool:
    need = {"CPU": fleet.fewest * fleet.num_cpus, "GPU": fleet.fewest * fleet.num_gpus}
    return all(wanted <= free.get(name, 0) for name, wanted in need.items())


def _free(fleet: Fleet) -> dict[str, float]:
    """Return what the cluster has free. What just ended counts as used for a moment longer."""
    until = time.monotonic() + _FREE_WITHIN_S
    while True:
        free = ray.available_resources()
        if _fits(fleet, free) or time.monotonic() > until:
            return free
        time.sleep(_LOOK_EVERY_S)


def _check_room(fleet: Fleet) -> None:
    """Refuse a fleet that a Ray of this process cannot hold; say of another cluster that it must grow.

    Raises:
        OptionError: too little is free.
    """
    free = ray.available_resources()
    if _fits(fleet, free):
        return
    total = ray.cluster_resources()
    told = (
        f"{fleet.fewest} replicas take {fleet.num_cpus:g} CPUs and {fleet.num_gpus:g} GPUs each, and Ray has "
    )
    told += ", ".join(f"{free.get(n, 0):g} of {total.get(n, 0):g} {n}s free" for n in ("CPU", "GPU"))
    if _RAY.is_ours:
        raise OptionError(
            f"{told}: another scorer of this process has the others. Close it, take fewer replicas, or let "
            "them share the cores: replicas={'min': 2, 'max': 2, 'cpus': 0}"
        )
    logger.warning("vllm_kl: %s. The replicas start when there is room", told)


def deployment_of(fleet: Fleet) -> serve.Deployment:
    """Return the deployment of the replicas, which has no arguments yet."""
    environment = {}
    if not fleet.num_gpus:
        environment = {"OMP_NUM_THREADS": str(fleet.num_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    number: dict[str, Any] = {"num_replicas": fleet.most}
    if fleet.is_elastic:
        number = {
            "autoscaling_config": {
                "min_replicas": fleet.fewest,
                "max_replicas": fleet.most,
                "target_ongoing_requests": _TARGET_ONGOING,
            }
        }
    deployment = serve.deployment(
        name=DEPLOYMENT,
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
    # Ray 2.60 has no public way to keep the version (ray/serve/_private/client.py: deploy_applications).
    return deployment.options(version=_CODE_VERSION, _internal=True)
