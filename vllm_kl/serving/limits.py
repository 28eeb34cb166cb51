"""Bounds what one request may hold, and what all requests together may hold while they wait.

A request that alone is too large is refused for good (413). One that finds no room is told when to come again
(429, ``Retry-After``): the server keeps no queue without an end. Sizes are counted before memory is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator

from fastapi import Request
from pydantic import BaseModel, ConfigDict, PositiveInt

from vllm_kl.client.wire_format import TooLargeError
from vllm_kl.serving.problems import Refusal


class Limits(BaseModel):
    """The limits of a server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_sequences: PositiveInt = 8192  # of a request
    max_tokens: PositiveInt = 1 << 20  # of a request, with the chosen ids
    max_numbers: PositiveInt = 1 << 24  # of an answer: rows times columns
    max_bytes: PositiveInt = 32 << 20  # of a request's body
    max_body_s: PositiveInt = 60  # until a request's body has come
    max_waiting_bytes: PositiveInt = 256 << 20  # bodies of all requests that are not answered yet
    max_waiting_tokens: PositiveInt = 8 << 20  # tokens of all requests that are not answered yet

    def check(self, *, sequences: int, tokens: int, numbers: int) -> None:
        """Refuse a request that is too large.

        Raises:
            TooLargeError: it has too many sequences or tokens, or its answer has too many numbers.
        """
        for what, found, most in (
            ("sequences", sequences, self.max_sequences),
            ("tokens", tokens, self.max_tokens),
            ("numbers in the answer", numbers, self.max_numbers),
        ):
            if found > most:
                raise TooLargeError(
                    f"{found} {what}, but this server takes at most {most} of them in a request: cut it"
                )


class Room:
    """Room for so many bytes or tokens.

    Args:
        what: what it holds.
        most: how many.
    """

    def __init__(self, what: str, most: int) -> None:
        self._what, self._most = what, most
        self.used = 0
        self._per_s = 0.0  # how fast room becomes free

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Take room for the block. One request always finds room.

        Raises:
            Refusal: there is not enough.
        """
        if self.used and self.used + amount > self._most:
            wait_s = math.ceil(self.used / self._per_s) if self._per_s else 1
            raise Refusal(
                429,
                f"{self.used} {self._what} wait, of at most {self._most}: ask again later",
                {"Retry-After": str(min(max(wait_s, 1), 60))},
            )
        self.used += amount
        began = time.monotonic()
        try:
            yield
        finally:
            self.used -= amount
            self._per_s += 0.2 * (amount / max(time.monotonic() - began, 1e-3) - self._per_s)


@contextlib.asynccontextmanager
async def body_of(request: Request, limits: Limits, room: Room):  # noqa: ANN201
    """Yield a request's body; hold its room in the block.

    Raises:
        TooLargeError: it has too many bytes; this is known before they have come, if the request says so.
        Refusal: there is no room, or the body does not come in time.
    """
    try:
        size = int(request.headers.get("content-length", limits.max_bytes))
    except ValueError:
        raise Refusal(400, "Content-Length is not a number") from None
    too_large = TooLargeError(f"the body exceeds {limits.max_bytes} bytes, which this server takes at most")
    if size > limits.max_bytes:
        raise too_large
    with room.hold(size):
        chunks, found = [], 0
        try:
            async with asyncio.timeout(limits.max_body_s):
                async for chunk in request.stream():
                    found += len(chunk)
                    if found > limits.max_bytes:
                        raise too_large
                    chunks.append(chunk)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {limits.max_body_s} s") from None
        yield b"".join(chunks)
