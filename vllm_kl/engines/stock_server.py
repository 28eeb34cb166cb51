"""Scores with a stock vLLM server, one of ``vllm serve`` without this package: the ``http-flat`` read-out.

Each sequence is one request for one new token and the prompt's log-probs (``prompt_logprobs=0``), which come
back as a JSON object per token. The server computes the logits of the whole vocabulary at every token, and a
shared prompt again for each of its responses: vLLM does not read its prefix cache for prompt log-probs.

Source: ``entrypoints/openai/completion/protocol.py`` and
``entrypoints/scale_out/token_in_token_out/protocol.py``, vLLM 0.32 (``entrypoints/serve/disagg`` before).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np

from vllm_kl.client.client import Client, run
from vllm_kl.errors import EngineError, InputError, OptionError, ReadoutUnavailableError
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult

TOKENS, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
_NO_PROBABILITY = -9999.0  # vLLM writes it for -inf, which JSON has not
_NOTE = (
    "a stock vLLM server is 5 to 100 times slower than vllm-kl serve: it computes the log-probs of the whole "
    "vocabulary at every token of the prompt, computes a prompt again for each of its responses, and returns "
    "a JSON object per token"
)


class StockServer:
    """One stock vLLM server, or several that serve the same weights. It can be pickled.

    Args:
        client: asks the servers.
        readout: ``"auto"`` or ``"http-flat"``.
        served_model_name: the model's name there; ``None`` takes the only one.
        concurrency: how many requests are on their way at a time.

    Raises:
        OptionError: the server has no such model, or several; or the key is missing or wrong.
        ReadoutUnavailableError: another read-out is asked for.
        EngineError: no vLLM server answers.
    """

    weights = None  # nobody tells here when the server's weights change

    def __init__(
        self,
        client: Client,
        readout: str = "auto",
        served_model_name: str | None = None,
        *,
        concurrency: int = 64,
    ) -> None:
        if readout not in ("auto", "http-flat"):
            raise ReadoutUnavailableError(
                f"readout={readout!r} is not available: {client.addresses[0]} is a stock vLLM server, which "
                "does 'http-flat'. vllm-kl serve MODEL starts a server that does 'pooling'"
            )
        self._client, self._concurrency = client, concurrency
        told = client.send("GET", "/v1/models")
        served = _answer(told).get("data")
        if not isinstance(served, list):
            raise EngineError(f"{told.url} names no models. Expected a vLLM server")
        self._model, most = _chosen(served, served_model_name, client.addresses[0])
        # 403 or 404: vLLM 0.30 and later was started without --enable-scale-out; or it is another server.
        probe = self._body(TOKENS, ScoreRequest(token_ids=np.zeros(2, np.int32), start=1))
        self._path = TOKENS if client.send("POST", TOKENS, json=probe).is_success else COMPLETIONS
        self.info = EngineInfo(
            readout="http-flat",
            vocab_size=None,  # the server refuses ids outside it
            max_sequence_len=most and most - 1,  # one token is generated
            notes=(_NOTE,),
        )

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: Callable[[int], None] | None = None,
        alone: bool = False,
    ) -> list[ScoreResult]:
        """Return one result per request; ``share_prefix`` and ``alone`` change nothing here."""
        return run(self._score(requests, on_done))

    async def _score(
        self, requests: Sequence[ScoreRequest], on_done: Callable[[int], None] | None
    ) -> list[ScoreResult]:
        turn = asyncio.Semaphore(self._concurrency)

        async def ask(n: int, request: ScoreRequest) -> ScoreResult:
            async with turn:
                response = await self._client.asynchronous.send(
                    "POST", self._path, json=self._body(self._path, request), number=n
                )
            values = _values(n, request, response)
            if on_done is not None:
                on_done(1)
            return ScoreResult(values=values)

        tasks = [asyncio.create_task(ask(n, request)) for n, request in enumerate(requests)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def _body(self, path: str, request: ScoreRequest) -> dict[str, Any]:
        ids, options = request.token_ids.tolist(), {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0}
        if path == TOKENS:
            return {
                "model": self._model,
                "token_ids": ids,
                "sampling_params": {**options, "detokenize": False},
            }
        return {"model": self._model, "prompt": ids, **options}

    def close(self) -> None:
        self._client.close()


def _chosen(served: list[dict[str, Any]], name: str | None, address: str) -> tuple[str, int | None]:
    """Return the name of the model to ask for, and the longest sequence that it takes."""
    lengths = {model["id"]: model.get("max_model_len") for model in served}
    if name is None and len(lengths) == 1:
        name = next(iter(lengths))
    if name not in lengths:
        raise OptionError(
            f"served_model_name={name!r}: the server at {address} has {', '.join(map(repr, lengths))}"
        )
    return name, lengths[name]


def _values(n: int, request: ScoreRequest, response: httpx.Response) -> np.ndarray:
    """Return ``[L - start, 1]`` float32.

    Raises:
        InputError: the server refused the sequence. Its ``sample`` is n.
    """
    if response.status_code in (400, 413, 422):
        refused = InputError(f"the server refuses it: {_told(response)}")
        refused.sample = n
        raise refused
    answer = _answer(response)
    tokens = answer.get("prompt_logprobs") or answer["choices"][0].get("prompt_logprobs") or []
    if len(tokens) != len(request.token_ids):
        return np.full((0, 1), np.nan, np.float32)  # the scorer raises an error that names the sequence
    rows = [
        (tokens[t] or {}).get(str(request.token_ids[t]), {}).get("logprob")
        for t in range(request.start, len(tokens))
    ]
    values = np.array([[np.nan if value is None else value] for value in rows], np.float32)
    values[values == _NO_PROBABILITY] = -np.inf
    return values


def _answer(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object of an answer.

    Raises:
        OptionError: the key is missing or wrong.
        EngineError: it is another error, or no JSON object.
    """
    try:
        answer = response.json() if response.is_success else None
    except ValueError:
        answer = None
    if response.status_code in (401, 403):
        raise OptionError(
            f"{response.url} answered {response.status_code}: {_told(response)}. The key is that of the "
            "environment's VLLM_KL_API_KEY, or of api_key_file="
        )
    if not isinstance(answer, dict):
        raise EngineError(
            f"{response.url} answered {response.status_code} {response.reason_phrase}: {_told(response)}. "
            "Expected a vLLM server"
        )
    return answer


def _told(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
