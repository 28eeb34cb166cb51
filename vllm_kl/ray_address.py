"""Refuses the address of a Ray cluster that is not there, before Ray waits for it."""

from __future__ import annotations

import os
import socket

from vllm_kl.errors import EngineError

_TIMEOUT_S = 10.0


def check_address(address: str | None) -> None:
    """Refuse an address at which nothing listens. ``ray.init`` would wait there for three minutes.

    Args:
        address: as ``ray.init`` takes it. ``None`` or ``"auto"``: that of ``RAY_ADDRESS``, if it is set.

    Raises:
        EngineError: no connection can be made.
    """
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or "auto"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto", "local", or a word that Ray knows
    try:
        _connect(host.strip("[]"), int(port))
    except OSError as error:
        raise EngineError(
            f"no Ray cluster at {address}: {error}. Start one there (ray start --head), or correct the "
            "address (--address, ray.init(address=...) or RAY_ADDRESS)"
        ) from error


def _connect(host: str, port: int) -> None:
    if not 0 < port < 2**16:  # the C library would connect to the remainder, at which something may listen
        raise OSError(f"there is no port {port}")
    socket.create_connection((host, port), timeout=_TIMEOUT_S).close()
