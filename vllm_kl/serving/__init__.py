"""The HTTP server of replicas on Ray Serve: ``vllm-kl serve MODEL``, or ``serve run`` in a cluster.

command      the command ``vllm-kl serve``
application  the Serve application ``vllm_kl.serving:app``, for ``serve run`` and Serve's config files
door         the routes
limits       how large a request may be, and what may wait
bodies       JSON and msgpack to arrays, and back
job          a question on its way through the replicas
problems     errors to problem documents
metrics      figures for Prometheus

The client, and what it shares with the server, is :mod:`vllm_kl.client`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def app(arguments: dict[str, Any]) -> Application:
    """Return the application of a model: ``serve run vllm_kl.serving:app model=my-model replicas=2``.

    Args:
        arguments: see :class:`vllm_kl.serving.application.Arguments`.
    """
    from vllm_kl.serving.application import application

    return application(arguments)
