"""Reaches the collector behind TorchRL's ``RayLLMCollector``, which is a Ray actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_kl.errors import CollectorError


def actor_of(collector: Any) -> Any:
    """Return the actor of a ``RayLLMCollector``; ``None``: the collector is in this process."""
    actor = getattr(collector, "_collector", None)  # torchrl 0.14
    return actor if hasattr(actor, "__ray_call__") else None


def call_in_actor(actor: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(collector, *args)``, called in the collector's process.

    Raises:
        Exception: what the function raised.
        CollectorError: the process died.
    """
    import ray

    try:
        return ray.get(actor.__ray_call__.remote(function, *args))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayActorError as error:
        raise CollectorError(
            "the process of a RayLLMCollector died. What it had not sent yet is lost; buffers, other "
            f"collectors and engines of other processes live on. Make another collector.\n{error}"
        ) from error
