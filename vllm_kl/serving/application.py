"""Makes the Serve application of replicas with a door: for Serve to start and end, or for this process."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from vllm_kl import fingerprint
from vllm_kl.client.client import KEY_VARIABLE
from vllm_kl.engines.make_engine import check_model
from vllm_kl.engines.process import TIMEOUT_S
from vllm_kl.engines.replicas.fleet import wish_of
from vllm_kl.engines.replicas.service import Service, deployment_of, fleet_here
from vllm_kl.errors import OptionError
from vllm_kl.serving.door import DOOR, Front, Setup, digest
from vllm_kl.serving.limits import Limits
from vllm_kl.weights.checkpoint import InitialCheckpoint

logger = logging.getLogger("vllm_kl")


class Arguments(BaseModel):
    """What the application is told, by Serve's config file or command."""

    model_config = ConfigDict(extra="forbid")

    model: str  # path or name
    name: str | None = None  # that answers have; None: the last part of the path
    replicas: int | str | dict[str, Any] = 1  # as VLLMScorer's
    readout: str = "auto"
    engine: dict[str, Any] = Field(default_factory=dict)  # vLLM's engine options
    limits: Limits = Field(default_factory=Limits)
    api_key_file: str | None = (
        None  # None: the environment's VLLM_KL_API_KEY; without that, everybody may ask
    )
    timeout_s: float | None = TIMEOUT_S


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """Return the application.

    Raises:
        OptionError: there is no such model, or an option cannot work.
    """
    given = Arguments.model_validate(arguments)
    path, options = check_model(given.model, given.engine)
    setup = setup_of(given, path)
    if setup.key_digest is None:
        logger.warning(
            "vllm_kl: no API key: everybody who reaches Serve's address may ask. Serve's config file takes "
            "api_key_file; %s of your shell does not reach the cluster",
            KEY_VARIABLE,
        )
    fleet = fleet_here(wish_of(given.replicas), options)
    replicas = deployment_of(fleet).bind(path, _start(given, options), InitialCheckpoint(path).identity, None)
    return Front(setup, {}).bind(replicas, fleet)


class Server:
    """A server that this process starts and ends.

    Args:
        given: what is served.
        http: Serve's HTTP options.
    """

    def __init__(self, given: Arguments, http: Mapping[str, Any]) -> None:
        path, options = check_model(given.model, given.engine)
        self.setup = setup_of(given, path)
        start = _start(given, options)
        self._service = Service(
            path,
            start,
            wish_of(given.replicas),
            files=InitialCheckpoint(path).identity,
            timeout_s=given.timeout_s,
            front=Front(self.setup, http),
        )

    def drain(self, timeout_s: float) -> None:
        """Let the door take no more requests; wait for those that run."""
        handle = serve.get_deployment_handle(DOOR, app_name=self._service.name)
        handle.drain.remote(timeout_s).result(timeout_s=timeout_s + 10)

    def close(self) -> None:
        """End the server. A second call does nothing."""
        self._service.close()


@contextlib.contextmanager
def started(arguments: Mapping[str, Any], http: Mapping[str, Any]) -> Iterator[Server]:
    """Start a server; end it after the block."""
    server = Server(Arguments.model_validate(arguments), http)
    try:
        yield server
    finally:
        server.close()


def _start(given: Arguments, options: dict[str, Any]) -> dict[str, Any]:
    """Return what each replica's engine is started with."""
    return {
        "readout": given.readout,
        "options": options,
        "lora_request": None,
        "timeout_s": given.timeout_s,
    }


def setup_of(given: Arguments, path: str) -> Setup:
    """Return the setup of a model's door."""
    key = _key(given.api_key_file)
    return Setup(
        model=given.name or Path(path).name,
        weights=fingerprint.of_model(path, given.engine.get("revision")),
        limits=given.limits,
        key_digest=None if key is None else digest(key),
        timeout_s=given.timeout_s,
    )


def _key(file: str | None) -> str | None:
    """Return the API key of a file, or of the environment."""
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = Path(file).read_text().strip()
    except OSError as error:
        raise OptionError(f"the file of the API key cannot be read: {error}") from error
    if not key:
        raise OptionError(f"the file of the API key, {file!r}, is empty")
    return key
