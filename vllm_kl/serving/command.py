"""The command ``vllm-kl serve``: its options, and its end by SIGTERM or Ctrl-C."""

from __future__ import annotations

import ipaddress
import json
import math
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_kl.engines.arguments import parse_engine_options
from vllm_kl.environment import quiet_ray
from vllm_kl.errors import OptionError, VLLMKLError

ModelName = Annotated[str, typer.Argument(help="Path or name of the reference.")]
Host = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: at all of this machine's.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")]
Name = Annotated[str | None, typer.Option(help="Of the model in answers; default: the path's last part.")]
Replicas = Annotated[str, typer.Option(help="How many engines score; or auto.")]
NumGpus = Annotated[float | None, typer.Option(min=0, help="GPUs of each engine; default: one per worker.")]
NumCpus = Annotated[float | None, typer.Option(min=0.1, help="Logical CPUs of each; default: a share.")]
Readout = Annotated[str, typer.Option(help="pooling, token_ids or flat; auto: the first that works.")]
Engine = Annotated[list[str] | None, typer.Option(help="NAME=VALUE: an engine option of vLLM. Repeatable.")]
Limit = Annotated[list[str] | None, typer.Option(help="NAME=NUMBER: a limit, as GET /v1/model names them.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="File of the API key; default: the environment's VLLM_KL_API_KEY; without: no key."),
]
TlsKey = Annotated[Path | None, typer.Option(help="Key for HTTPS, PEM.", exists=True)]
TlsCertificate = Annotated[Path | None, typer.Option(help="Certificate for HTTPS, PEM.", exists=True)]
Drain = Annotated[float, typer.Option(min=0, help="Seconds that requests may take after SIGTERM.")]


def serve(
    model: ModelName,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    replicas: Replicas = "1",
    num_gpus: NumGpus = None,
    num_cpus: NumCpus = None,
    readout: Readout = "auto",
    engine: Engine = None,
    limit: Limit = None,
    api_key_file: KeyFile = None,
    ssl_keyfile: TlsKey = None,
    ssl_certfile: TlsCertificate = None,
    drain_s: Drain = 60.0,
) -> None:
    """Serve log-probs of a model over HTTP, until SIGTERM or Ctrl-C.

    Ray Serve runs the engines: in the cluster that RAY_ADDRESS names, else on this machine.
    """
    if not math.isfinite(drain_s):
        raise typer.BadParameter(f"{drain_s}, expected a number of seconds", param_hint="--drain-s")
    try:
        http = {"host": host, "port": port, "ssl_keyfile": ssl_keyfile, "ssl_certfile": ssl_certfile}
        http = {key: str(value) if isinstance(value, Path) else value for key, value in http.items()}
        arguments = {
            "model": model,
            "name": name,
            "replicas": _replicas(replicas, num_gpus, num_cpus),
            "readout": readout,
            "engine": parse_engine_options(engine or ()),
            "limits": parse_engine_options(limit or ()),
            "api_key_file": None if api_key_file is None else str(api_key_file),
        }
        _serve(arguments, http, drain_s)
    except (VLLMKLError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _replicas(number: str, num_gpus: float | None, num_cpus: float | None) -> Any:
    if number != "auto" and not number.isdecimal():
        raise typer.BadParameter(f"{number!r}, expected a number or auto", param_hint="--replicas")
    of_each = {"gpus": num_gpus, "cpus": num_cpus}
    of_each = {key: value for key, value in of_each.items() if value is not None}
    if number == "auto":
        return {"min": 1, **of_each} if of_each else "auto"
    return {"min": int(number), "max": int(number), **of_each}


def _serve(arguments: dict[str, Any], http: dict[str, Any], drain_s: float) -> None:
    quiet_ray()
    try:
        from vllm_kl.serving.application import started
    except ImportError as error:
        raise OptionError(
            f"vllm-kl serve needs Ray Serve and vLLM ({error}): pip install 'vllm-kl[cpu,ray]', or gpu"
        ) from error
    console = Console(stderr=True)
    has_ended = threading.Event()
    with started(arguments, http) as server:
        for number in (signal.SIGTERM, signal.SIGINT):  # now, because Ray's start sets handlers of its own
            signal.signal(number, lambda *_: has_ended.set())
        address = f"{'https' if http['ssl_certfile'] else 'http'}://{http['host']}:{http['port']}"
        console.print(f"serving {server.setup.model} at {address}, Ctrl-C ends it", highlight=False)
        if server.setup.key_digest is None and not _is_loopback(http["host"]):
            console.print("without an API key everybody who reaches this address may ask: --api-key-file")
        typer.echo(json.dumps({"address": address, "model": server.setup.model}))
        has_ended.wait()
        console.print(f"no new requests; those that run have {drain_s:g} s", highlight=False)
        server.drain(drain_s)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
