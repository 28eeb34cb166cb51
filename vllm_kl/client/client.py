"""``AsyncClient`` asks servers over HTTP; ``Client`` is the same for callers without an event loop."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import msgpack
import numpy as np
import tenacity

from vllm_kl.client import calls
from vllm_kl.client.calls import BusyError, Origin, Part
from vllm_kl.client.wire_format import Answer, Question, TooLargeError
from vllm_kl.errors import EngineError, OptionError
from vllm_kl.routing.dialogs import Dialogs

logger = logging.getLogger("vllm_kl")

KEY_VARIABLE = "VLLM_KL_API_KEY"
_CONNECT_S = 5.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 10.0
# Nothing was answered, so the same request may be sent again: scoring changes nothing.
_AGAIN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout, httpx.PoolTimeout, BusyError)
T = TypeVar("T")


class TopK(NamedTuple):
    """The k most likely tokens of every scored row of one sequence, most likely first."""

    token_ids: np.ndarray  # [R, k] int32
    log_probs: np.ndarray  # [R, k] float32, nats
    target_log_probs: np.ndarray  # [R] float32, nats: of the sequence's own tokens


class AsyncClient:
    """Asks one server, or several that serve the same model.

    Args:
        addresses: such as ``"http://127.0.0.1:8000"``, or a list of them. Sequences of one prompt go to the
            server that the prompt prefers, and to the next one if that cannot be reached.
        api_key_file: a file with the server's API key; ``None`` reads the environment variable
            ``VLLM_KL_API_KEY``, if it is set.
        timeout_s: how long a server may say nothing while it scores; ``None``: for ever.
        retry_s: for how long after its first failure a request is sent again, while servers cannot be reached
            or are busy. Each address is asked once in any case.
        concurrency: how many requests of a call are on their way at a time.

    Raises:
        OptionError: an address is not one, or the key's file cannot be read.

    >>> # async with AsyncClient("http://127.0.0.1:8000") as client:
    >>> #     log_probs = await client.score([[5, 6, 7]], start=1)    # one float32 array [2], nats
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        api_key_file: str | os.PathLike[str] | None = None,
        timeout_s: float | None = 600.0,
        retry_s: float = 120.0,
        concurrency: int = 8,
    ) -> None:
        self.addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        for address in self.addresses:
            if httpx.URL(address).scheme not in ("http", "https"):
                raise OptionError(f"address {address!r}: expected http://host:port or https://host:port")
        if not self.addresses:
            raise OptionError("no address is given: expected http://host:port")
        self.addresses = [address.rstrip("/") for address in self.addresses]
        self._api_key_file, self._timeout_s, self._retry_s = api_key_file, timeout_s, retry_s
        self._concurrency, self._dialogs = concurrency, Dialogs()
        self._http_of: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None
        self._http_headers()  # refuse a wrong file now

    async def score(
        self,
        token_ids: Sequence[Any],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Any:
        """Return the log-probs of every sequence's tokens from ``start`` on.

        Args:
            token_ids: B sequences of ints (lists or arrays), of any lengths.
            start: the index of the first token to score, one for all sequences or one for each;
                ``1 <= start <= len``. ``None`` is 1.
            temperature: the log-probs are those of ``softmax(logits / temperature)``.
            entropy: also return the entropy of the distribution that each token was scored with.

        Returns:
            B float32 arrays ``[len - start]``, in nats. With ``entropy=True`` a pair: these, and as many
            arrays of the same shapes with the entropies.

        Raises:
            InputError: a sequence cannot be scored; the message names it.
            ReadoutUnavailableError: the server's read-out cannot do what is asked for.
            OptionError: the key is missing or wrong.
            EngineError: no server answers, or the server failed.
            WeightsError: the weights changed during the call.
        """
        sequences, starts = calls.rows_of(token_ids, start)
        question = Question(token_ids=sequences, starts=starts, temperature=temperature, entropy=entropy)
        values = [answer.values[n] for answer, n in await self.values(question)]
        log_probs = [rows[:, 0] for rows in values]
        return (log_probs, [rows[:, -1] for rows in values]) if entropy else log_probs

    async def score_ids(
        self,
        token_ids: Sequence[Any],
        ids: Sequence[Any],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float = 1.0,
    ) -> list[np.ndarray]:
        """Return the log-probs of chosen tokens at every position from ``start`` on.

        Args:
            token_ids, start, temperature: as in :meth:`score`.
            ids: for each sequence the tokens to score, ``[len - start, K]`` ints; K is the same for all.

        Returns:
            B float32 arrays ``[len - start, K]``, in nats.
        """
        sequences, starts = calls.rows_of(token_ids, start)
        chosen = calls.ids_of(ids, sequences, starts)
        question = Question(token_ids=sequences, starts=starts, temperature=temperature, ids=chosen)
        return [answer.values[n][:, 1:] for answer, n in await self.values(question)]

    async def score_topk(
        self,
        token_ids: Sequence[Any],
        k: int,
        start: int | Sequence[int] | None = None,
        *,
        temperature: float = 1.0,
    ) -> list[TopK]:
        """Return the k most likely tokens at every position from ``start`` on, with their log-probs.

        Args:
            token_ids, start, temperature: as in :meth:`score`.
            k: how many tokens per position, from 1 to the size of the vocabulary.
        """
        sequences, starts = calls.rows_of(token_ids, start)
        question = Question(token_ids=sequences, starts=starts, temperature=temperature, top_k=k)
        return [
            TopK(rows[:, 1 : 1 + k].astype(np.int32), rows[:, 1 + k :], rows[:, 0])
            for rows in (answer.values[n] for answer, n in await self.values(question))
        ]

    async def stream(
        self, token_ids: Sequence[Any], start: int | Sequence[int] | None = None, *, temperature: float = 1.0
    ) -> AsyncIterator[tuple[int, np.ndarray]]:
        """Yield the index of a sequence and its log-probs, as :meth:`score` returns them, as they finish."""
        sequences, starts = calls.rows_of(token_ids, start)
        question = Question(token_ids=sequences, starts=starts, temperature=temperature, stream=True)
        async with aclosing(self._answers(question)) as answers:
            async for answer in answers:
                for i, rows in zip(answer.index, answer.values, strict=True):
                    yield i, rows[:, 0]

    async def model(self) -> dict[str, Any]:
        """Return what the first server that answers says of itself: its model, its weights, its limits."""

        async def get(address: str) -> dict[str, Any]:
            response = await self._http().get(f"{address}/v1/model", timeout=_CONNECT_S)
            told: dict[str, Any] = calls.checked(response).json()
            return told

        return await self._persist(get, self.addresses)

    async def send(self, method: str, path: str, *, json: Any = None, number: int = 0) -> httpx.Response:
        """Return the answer of a server to any request, errors too, unless another try may go better.

        Args:
            method, path, json: of the request; its body is JSON.
            number: of the request: one server after the other is the first to be asked.
        """

        async def ask(address: str) -> httpx.Response:
            response = await self._http().request(method, f"{address}{path}", json=json)
            return calls.not_busy(response)

        first = number % len(self.addresses)
        return await self._persist(ask, self.addresses[first:] + self.addresses[:first])

    async def values(
        self, question: Question, on_done: Callable[[int], None] | None = None
    ) -> list[tuple[Answer, int]]:
        """Return for each sequence its answer, and its place there.

        Args:
            on_done: called with the number of sequences that finished since its last call.
        """
        found: dict[int, tuple[Answer, int]] = {}
        async with aclosing(self._answers(question)) as answers:
            async for answer in answers:
                found.update((i, (answer, n)) for n, i in enumerate(answer.index))
                if on_done is not None:
                    on_done(len(answer.index))
        return [found[i] for i in range(len(question.token_ids))]

    async def _answers(self, question: Question) -> AsyncGenerator[Answer, None]:
        """Yield answers as they come, each sequence once."""
        origin, turn = Origin(), asyncio.Semaphore(self._concurrency)
        found: asyncio.Queue[Answer | Exception | None] = asyncio.Queue()
        told: set[int] = set()  # a stream whose connection broke begins anew
        ask = self._stream_part if question.stream else self._ask_part

        async def ask_in_pieces(part: Part) -> None:
            try:
                await ask(part, found.put_nowait)
            except TooLargeError:
                if len(part.places) == 1:
                    raise
                for half in part.halves():
                    await ask_in_pieces(half)

        async def run(part: Part) -> None:
            try:
                async with turn:
                    await ask_in_pieces(part)
                found.put_nowait(None)
            except Exception as error:
                found.put_nowait(error)

        parts = calls.parts_of(question, self.addresses, self._dialogs)
        tasks = [asyncio.create_task(run(part)) for part in parts]
        try:
            num_running = len(tasks)
            while num_running:
                one = await found.get()
                if isinstance(one, Exception):
                    raise one
                if one is None:
                    num_running -= 1
                    continue
                origin.add(one)
                if (new := calls.untold(one, told)).index:
                    yield new
        finally:
            for task in tasks:
                task.cancel()

    async def _ask_part(self, part: Part, on_answer: Callable[[Answer], None]) -> None:
        async def post(address: str) -> Answer:
            response = await self._http().post(
                f"{address}/v1/logprobs", content=part.body, headers=part.headers
            )
            return calls.whole_answer(calls.checked(response, part).content, part)

        on_answer(await self._persist(post, part.addresses))

    async def _stream_part(self, part: Part, on_answer: Callable[[Answer], None]) -> None:
        async def post(address: str) -> None:
            path, unpacker = f"{address}/v1/logprobs", msgpack.Unpacker(max_buffer_size=0)
            missing = set(part.places)
            async with self._http().stream("POST", path, content=part.body, headers=part.headers) as response:
                if not response.is_success:
                    await response.aread()
                calls.checked(response, part)
                async for chunk in response.aiter_bytes():
                    for fields in calls.frames(unpacker, chunk):
                        answer = calls.answer_in(fields, part)
                        if answer.index:  # the last one has none
                            missing.difference_update(answer.index)
                            on_answer(answer)
            if missing:
                raise BusyError(f"{address} ended its answer before its end")

        await self._persist(post, part.addresses)

    async def _persist(self, ask: Callable[[str], Coroutine[Any, Any, T]], addresses: Sequence[str]) -> T:
        """Ask one server after the other, until one answers.

        Raises:
            EngineError: none did in time.
        """
        patience = _Patience(self._retry_s, len(addresses))
        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_AGAIN),
            stop=patience.is_over,
            wait=patience.wait_s,
            before_sleep=functools.partial(_tell, retry_s=self._retry_s),
            reraise=True,
        )
        try:
            async for attempt in tries:
                with attempt:
                    number = attempt.retry_state.attempt_number - 1
                    return await ask(addresses[number % len(addresses)])
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            silent_s = error.request.extensions["timeout"]["read"]
            raise EngineError(
                f"{error.request.url.host} said nothing for {silent_s:g} s (timeout_s)"
            ) from error
        except httpx.HTTPError as error:
            raise EngineError(
                f"no server answers at {', '.join(addresses)} ({type(error).__name__}: {error}). Start one: "
                "vllm-kl serve MODEL"
            ) from error
        raise AssertionError("tenacity returns or raises")

    def _http(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._http_of is None or self._http_of[0] is not loop:
            is_tls = any(address.startswith("https") for address in self.addresses)
            self._http_of = (
                loop,
                httpx.AsyncClient(
                    headers=self._http_headers(),
                    timeout=httpx.Timeout(self._timeout_s, connect=_CONNECT_S),
                    limits=httpx.Limits(
                        max_connections=None, max_keepalive_connections=2 * self._concurrency
                    ),
                    verify=is_tls,  # loading certificates takes 20 ms
                ),
            )
        return self._http_of[1]

    def _http_headers(self) -> dict[str, str]:
        if self._api_key_file is None:
            key = os.environ.get(KEY_VARIABLE)
        else:
            try:
                key = Path(self._api_key_file).read_text().strip()
            except OSError as error:
                raise OptionError(f"the file of the API key cannot be read: {error}") from error
        return {"Authorization": f"Bearer {key}"} if key else {}

    async def aclose(self) -> None:
        """Close the connections. A call opens new ones."""
        if self._http_of is not None:
            loop, http = self._http_of
            self._http_of = None
            if loop is asyncio.get_running_loop():
                await http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_http_of": None}


class Client:
    """:class:`AsyncClient` for callers without an event loop. Threads may share it; it can be pickled.

    The arguments, methods and errors are those of :class:`AsyncClient`.

    >>> # with Client(["http://one:8000", "http://two:8000"]) as client:
    >>> #     log_probs, entropies = client.score([[5, 6, 7]], start=1, entropy=True)
    """

    def __init__(self, addresses: str | Sequence[str], **options: Any) -> None:
        self.asynchronous = AsyncClient(addresses, **options)

    @property
    def addresses(self) -> list[str]:
        """The addresses of the servers."""
        return self.asynchronous.addresses

    def score(
        self,
        token_ids: Sequence[Any],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Any:
        """As :meth:`AsyncClient.score`."""
        return run(self.asynchronous.score(token_ids, start, temperature=temperature, entropy=entropy))

    def score_ids(
        self,
        token_ids: Sequence[Any],
        ids: Sequence[Any],
        start: int | Sequence[int] | None = None,
        *,
        temperature: float = 1.0,
    ) -> list[np.ndarray]:
        """As :meth:`AsyncClient.score_ids`."""
        return run(self.asynchronous.score_ids(token_ids, ids, start, temperature=temperature))

    def score_topk(
        self,
        token_ids: Sequence[Any],
        k: int,
        start: int | Sequence[int] | None = None,
        *,
        temperature: float = 1.0,
    ) -> list[TopK]:
        """As :meth:`AsyncClient.score_topk`."""
        return run(self.asynchronous.score_topk(token_ids, k, start, temperature=temperature))

    def model(self) -> dict[str, Any]:
        """As :meth:`AsyncClient.model`."""
        return run(self.asynchronous.model())

    def send(self, method: str, path: str, *, json: Any = None) -> httpx.Response:
        """As :meth:`AsyncClient.send`."""
        return run(self.asynchronous.send(method, path, json=json))

    def values(
        self, question: Question, on_done: Callable[[int], None] | None = None
    ) -> list[tuple[Answer, int]]:
        """As :meth:`AsyncClient.values`."""
        return run(self.asynchronous.values(question, on_done))

    def close(self) -> None:
        """Close the connections. A call opens new ones."""
        run(self.asynchronous.aclose())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def score(
    addresses: str | Sequence[str],
    token_ids: Sequence[Any],
    start: int | Sequence[int] | None = None,
    **options: Any,
) -> list[np.ndarray]:
    """Return the log-probs of every sequence's tokens from ``start`` on: one call of a new :class:`Client`.

    Args:
        addresses: of the server, such as ``"http://127.0.0.1:8000"``, or of several.
        token_ids, start: as in :meth:`AsyncClient.score`; ``temperature=`` too.
        **options: of :class:`AsyncClient`.

    >>> # score("http://127.0.0.1:8000", [[5, 6, 7]], start=1)[0].shape    # (2,)
    """
    return run(ascore(addresses, token_ids, start, **options))


async def ascore(
    addresses: str | Sequence[str],
    token_ids: Sequence[Any],
    start: int | Sequence[int] | None = None,
    *,
    temperature: float = 1.0,
    **options: Any,
) -> list[np.ndarray]:
    """As :func:`score`, in a running event loop.

    >>> # (log_probs,) = await ascore("http://127.0.0.1:8000", [[5, 6, 7]], start=1)
    """
    async with AsyncClient(addresses, **options) as client:
        log_probs: list[np.ndarray] = await client.score(token_ids, start, temperature=temperature)
        return log_probs


class _Patience:
    """When a request is sent again, and until when.

    Args:
        retry_s: for how long after the first failure. Each address is asked once in any case.
        num_addresses: how many servers there are, which are asked in turn.
    """

    def __init__(self, retry_s: float, num_addresses: int) -> None:
        self._retry_s, self._num_addresses = retry_s, num_addresses
        self._until: float | None = None

    def is_over(self, state: tenacity.RetryCallState) -> bool:
        """Return whether this failure is the last one."""
        return state.attempt_number >= self._num_addresses and self._left_s() <= 0

    def wait_s(self, state: tenacity.RetryCallState) -> float:
        """Return how long to wait: as the server asks, else longer from round to round."""
        if state.attempt_number < self._num_addresses:
            return 0.0  # another server
        error = _error_of(state)
        if isinstance(error, BusyError) and error.retry_after_s is not None:
            wanted = error.retry_after_s
        else:
            num_rounds = min(state.attempt_number // self._num_addresses, 16)
            longest = min(_FIRST_WAIT_S * 2**num_rounds, _LONGEST_WAIT_S)
            wanted = float(np.random.default_rng().uniform(0.5, 1.0)) * longest
        return max(0.0, min(wanted, self._left_s()))

    def _left_s(self) -> float:
        if self._until is None:
            self._until = time.monotonic() + self._retry_s
        return self._until - time.monotonic()


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    assert state.outcome is not None, "tenacity waits after a try, not before"
    return state.outcome.exception()


def _tell(state: tenacity.RetryCallState, *, retry_s: float) -> None:
    level = logging.WARNING if math.log2(state.attempt_number).is_integer() else logging.DEBUG
    error = _error_of(state)
    where = f"{error.request.url.netloc.decode()}: " if isinstance(error, httpx.RequestError) else ""
    what = f"{where}{error or type(error).__name__}"
    logger.log(level, "vllm_kl: try %d: %s. Asked again for up to %g s", state.attempt_number, what, retry_s)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns that runs in the event loop of all clients of this process."""
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()  # Ctrl-C in this thread
        raise


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="vllm_kl-client", daemon=True).start()
    return loop


os.register_at_fork(after_in_child=_loop.cache_clear)  # a fork has no such thread
