"""``HttpServer`` is the engine of ``VLLMScorer("http://host:port")``: servers of ``vllm-kl serve`` score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vllm_kl.client.client import Client
from vllm_kl.client.wire_format import Question
from vllm_kl.errors import ReadoutUnavailableError, WeightsError
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult


class HttpServer:
    """One server, or several that serve the same weights. It can be pickled: no engine moves.

    Args:
        client: asks the servers.
        readout: ``"auto"``, or the one that the servers have.
        told: what a server says of itself (``GET /v1/model``).

    Raises:
        ReadoutUnavailableError: the servers have another read-out.
    """

    def __init__(self, client: Client, readout: str, told: dict[str, Any]) -> None:
        self.client = client
        self.info = EngineInfo(
            **{
                name: told[name]
                for name in ("readout", "vocab_size", "max_sequence_len", "max_ids", "length_side", "dtype")
            },
            can=frozenset(told["can"]),
            notes=tuple(told["notes"]),
            placeholders={int(token): what for token, what in told["placeholders"].items()},
        )
        if readout not in ("auto", self.info.readout):
            raise ReadoutUnavailableError(
                f"readout={readout!r} is not available: the server has {self.info.readout!r}"
            )
        self.settings = {"model": told["model"], "the model's files": told["weights"], "readout": readout}
        self.weights = _ServedWeights(self.client)

    def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        share_prefix: bool,
        on_done: Callable[[int], None] | None = None,
        alone: bool = False,
    ) -> list[ScoreResult]:
        first = requests[0]  # a call has one temperature and one k
        question = Question(
            token_ids=[request.token_ids for request in requests],
            starts=[request.start for request in requests],
            temperature=first.temperature,
            ids=None if first.ids is None else [request.ids for request in requests],
            top_k=first.top_k,
            entropy=first.entropy,
            share_prefix=share_prefix,
            alone=alone,
            placeholders="as_text",  # the scorer has checked the requests, and checks the results
            allow_nan=True,
        )
        found = self.client.values(question, on_done)
        self._check_same(found[0][0].origin)
        return [
            ScoreResult(
                values=answer.values[n],
                num_cached_tokens=answer.num_cached_tokens[n],
                rescored=answer.rescored[n],
                weight_version=answer.origin["weight_version"],
            )
            for answer, n in found
        ]

    def _check_same(self, origin: dict[str, Any]) -> None:
        """Raise an error if the server has another model now than when this was made."""
        was = self.settings["model"], self.settings["the model's files"]
        now = origin["model"], origin["weights"]
        if was != now:
            raise WeightsError(
                f"the server's model was {was[0]!r} (weights {was[1]}) when this scorer was made, and is "
                f"{now[0]!r} ({now[1]}) now: it was started again with another one.\n"
                "If this is meant, make a new scorer"
            )

    def close(self) -> None:
        self.client.close()


class _ServedWeights:
    """The weights of a server: their version can be asked, and they cannot be replaced from here."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def version(self) -> int | None:
        return self._client.model()["weight_version"]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise WeightsError(
            f"the weights of a server ({self._client.addresses[0]}) cannot be replaced, read or put to sleep "
            "over HTTP. Start another server with the new weights"
        )

    skeleton = source = property(_refuse)
    next_version = load = sleep = wake_up = _refuse
