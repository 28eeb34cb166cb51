"""``service_of`` reads the arguments that say whether a reference is kept in a Ray actor, and in which.

TorchRL 0.14 spells them ``service_backend="ray", service_backend_options={...}``. Its older
``use_ray_service`` goes with its version 0.16, and goes here then.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchrl._comm.backends import _get_service_backend

from vllm_kl.errors import OptionError

BACKENDS = ("direct", "ray")
IDLE_TIMEOUT_S = 600.0
OWN_OPTIONS = ("actor_options", "idle_timeout_s", "ray_init_config")
# Ray's options of an actor, but for those that actor_name and the service itself decide.
ACTOR_OPTIONS = (
    "accelerator_type",
    "fallback_strategy",
    "label_selector",
    "max_concurrency",
    "max_pending_calls",
    "max_restarts",
    "max_task_retries",
    "memory",
    "num_cpus",
    "num_gpus",
    "object_store_memory",
    "placement_group",
    "placement_group_bundle_index",
    "placement_group_capture_child_tasks",
    "resources",
    "runtime_env",
    "scheduling_strategy",
)


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """The actor that keeps a reference, as its user asked for it."""

    actor_name: str | None = None  # None: an actor of this user's own
    given: Mapping[str, Any] = field(default_factory=dict)  # ACTOR_OPTIONS and idle_timeout_s, if given
    ray_init_config: Mapping[str, Any] = field(default_factory=dict)  # for ray.init, in a process without Ray


def service_of(
    backend: str | None,
    backend_options: Mapping[str, Any] | None,
    use_ray_service: bool,
    actor_name: str | None,
    resources: Mapping[str, Any],
) -> ServiceOptions | None:
    """Return the service that the arguments of :class:`RetrieveKL` ask for; ``None``: no service.

    Args:
        backend: ``"direct"``, ``"ray"``, or ``None``: that of an enclosing ``torchrl.service_backend``.
        backend_options: options of the service: ``OWN_OPTIONS``, and ``ACTOR_OPTIONS`` in ``actor_options``
            or beside it.
        use_ray_service: the older spelling of ``backend="ray"``.
        actor_name: the name of the service.
        resources: ``num_cpus`` and ``num_gpus``, if they were given as arguments.

    Raises:
        OptionError: the backend or an option does not exist, is given twice, or has no effect.
    """
    if _backend(backend, use_ray_service) == "direct":
        unused = [*(["actor_name"] if actor_name is not None else []), *resources, *(backend_options or {})]
        if unused:
            raise OptionError(
                f"unknown argument, or one without effect unless service_backend='ray': {', '.join(unused)}"
            )
        return None
    if unknown := [name for name in resources if name not in ("num_cpus", "num_gpus")]:
        raise OptionError(f"unknown argument: {', '.join(unknown)}")
    given, ray_init_config = _read(dict(backend_options or {}))
    if twice := sorted(resources.keys() & given.keys()):
        raise OptionError(f"{', '.join(twice)} is given as an argument and in service_backend_options: once")
    given |= resources
    if actor_name is None and "idle_timeout_s" in given:
        raise OptionError(
            "idle_timeout_s has no effect without actor_name: an actor without a name ends with its only user"
        )
    return ServiceOptions(actor_name=actor_name, given=given, ray_init_config=ray_init_config)


def _backend(backend: str | None, use_ray_service: bool) -> str:
    if use_ray_service:
        if backend not in (None, "ray"):
            raise OptionError(f"use_ray_service=True conflicts with service_backend={backend!r}: pass one")
        warnings.warn(
            "use_ray_service is deprecated, as it is in TorchRL, and goes with TorchRL 0.16. Pass "
            "service_backend='ray' instead.",
            FutureWarning,
            stacklevel=4,  # the caller of RetrieveKL
        )
        return "ray"
    where = ""
    if backend is None:
        backend, where = _get_service_backend() or "direct", " (of an enclosing torchrl.service_backend)"
    if backend not in BACKENDS:
        raise OptionError(
            f"service_backend={backend!r}{where} is not known: a reference is made in this process "
            "('direct') or in a Ray actor ('ray')"
        )
    return backend


def _read(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the actor, and those of ``ray.init``."""
    init = dict(options.pop("ray_init_config", None) or {})
    nested = dict(options.pop("actor_options", None) or {})
    if twice := sorted(nested.keys() & options.keys()):
        raise OptionError(
            f"service_backend_options has {', '.join(twice)} inside actor_options and beside it"
        )
    given = {**options, **nested}
    if unknown := [name for name in given if name not in (*ACTOR_OPTIONS, "idle_timeout_s")]:
        raise OptionError(
            f"service_backend_options has no {', '.join(map(str, unknown))}. Known: "
            f"{', '.join(OWN_OPTIONS)}; and of Ray's actors {', '.join(ACTOR_OPTIONS)}.\n"
            "The name of the service is the argument actor_name"
        )
    if given.get("max_restarts") == 0 and given.get("max_task_retries"):
        raise OptionError("max_task_retries has no effect with max_restarts=0: leave it out")
    idle = given.get("idle_timeout_s", IDLE_TIMEOUT_S)
    if idle is not None and not (isinstance(idle, (int, float)) and idle > 0):
        raise OptionError(f"idle_timeout_s must be a number of seconds above 0, or None, got {idle!r}")
    return given, init
