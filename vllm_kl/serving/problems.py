"""Turns errors into problem documents (RFC 9457), from which the client makes the same errors again.

    {"type": "urn:vllm-kl:InputError", "title": "...", "status": 422, "detail": "sequence 3: start is 0, ..."}

The last part of ``type`` is the name of a class of :mod:`vllm_kl.errors`. An error that is not ours becomes a
500 that says its class only: its message may hold what a caller sent.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vllm_kl.client.wire_format import TooLargeError
from vllm_kl.errors import InputError, OptionError, ReadoutUnavailableError, VLLMKLError

logger = logging.getLogger("vllm_kl")

MEDIA_TYPE = "application/problem+json"


class Refusal(Exception):  # noqa: N818
    """A request that is refused for another reason than its content."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def status_of(error: VLLMKLError) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, TooLargeError):
        return 413
    return 422 if isinstance(error, (InputError, OptionError, ReadoutUnavailableError)) else 500


def document(status: int, detail: str, *, error: str = "EngineError") -> dict[str, str | int]:
    """Return a problem document."""
    return {
        "type": f"urn:vllm-kl:{error}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }


def document_of(error: Exception) -> dict[str, str | int]:
    """Return the problem document of any error."""
    if isinstance(error, Refusal):
        return document(error.status, error.detail)
    if isinstance(error, VLLMKLError):
        kind = "InputError" if isinstance(error, TooLargeError) else type(error).__name__
        return document(status_of(error), str(error), error=kind)
    return document(500, f"the server failed with {type(error).__name__}: its log may say more")


def log_unforeseen(error: Exception) -> None:
    """Log the class of an error that is not ours and the lines of code, but not its message."""
    if not isinstance(error, (Refusal, VLLMKLError)):
        lines = "".join(traceback.format_tb(error.__traceback__))
        logger.error("vllm_kl: a request ended with %s at\n%s", type(error).__name__, lines)


def response_of(error: Exception) -> JSONResponse:
    """Return the answer for an error."""
    log_unforeseen(error)
    found = document_of(error)
    return JSONResponse(found, found["status"], getattr(error, "headers", None), MEDIA_TYPE)


def answer_errors_with_problems(app: FastAPI) -> None:
    """Let an app answer each error with its problem document."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return response_of(error)

    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        return response_of(Refusal(error.status_code, str(error.detail), error.headers))

    app.add_exception_handler(Refusal, answer)
    app.add_exception_handler(VLLMKLError, answer)
    app.add_exception_handler(HTTPException, of_http)
