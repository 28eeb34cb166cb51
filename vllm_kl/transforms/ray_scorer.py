"""``RayScorer`` scores through a Ray actor, which holds the reference's engine.

Ray places, restarts and names the actor. The caller sends token ids and gets log-probs back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch

from vllm_kl.errors import EngineError
from vllm_kl.types import Scorer, ScoreStats

Build = Callable[[], tuple[Scorer, dict[str, Any]]]


class _ScorerActor:
    """Runs in the actor's process and holds the scorer."""

    def __init__(self, build: Build) -> None:
        self._scorer, self._attributes = build()

    def attributes(self) -> dict[str, Any]:
        return self._attributes

    def of_the_scorer(self, name: str, default: Any) -> Any:
        return getattr(self._scorer, name, default)

    def score(
        self, token_ids: list[np.ndarray], start: list[int]
    ) -> tuple[list[np.ndarray], ScoreStats | None]:
        ids = [torch.from_numpy(row.copy()) for row in token_ids]
        with torch.no_grad():
            if hasattr(self._scorer, "score_and_tell"):
                scored, stats = self._scorer.score_and_tell(ids, start)
            else:
                scored, stats = self._scorer.score(ids, start), None
        return [t.float().cpu().numpy() for t in scored], stats


class RayScorer:
    """Scores through a Ray actor.

    Args:
        build: makes the scorer, in the actor; returns the scorer and the values of :attr:`attributes`.
            ``None``: use an actor that exists.
        actor_name: the actor's name. An actor that already has this name is used as it is. A new actor is
            detached: it lives until :meth:`close` or the end of the cluster. An actor without a name ends
            with its last handle.
        num_cpus, num_gpus: the actor's resources.

    Raises:
        EngineError: there is no such actor, or the actor failed to start.
    """

    def __init__(
        self, build: Build | None, *, actor_name: str | None = None, num_cpus: float = 1, num_gpus: float = 0
    ) -> None:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        if build is None:
            try:
                self._actor = ray.get_actor(actor_name)
            except ValueError as error:
                raise EngineError(
                    f"there is no Ray actor named {actor_name!r}, and no ref_model_factory to make one"
                ) from error
        else:
            named = (
                {}
                if actor_name is None
                else {"name": actor_name, "get_if_exists": True, "lifetime": "detached"}
            )
            remote = ray.remote(_ScorerActor).options(num_cpus=num_cpus, num_gpus=num_gpus, **named)
            self._actor = remote.remote(build)
        self.stats: ScoreStats | None = None
        self.attributes: dict[str, Any] = self._get(self._actor.attributes.remote())

    @property
    def weight_version(self) -> int | None:
        """The version of the weights that the actor serves; ``None``: not known."""
        return self._get(self._actor.of_the_scorer.remote("weight_version", None))

    @property
    def temperature(self) -> float:
        """The log-probs are those of ``softmax(logits / temperature)``."""
        return self._get(self._actor.of_the_scorer.remote("temperature", 1.0))

    def score(self, token_ids: list[Any], start: list[int]) -> list[torch.Tensor]:
        """Return B float32 CPU tensors ``[L - start]``, nats. Errors are those of the actor's scorer."""
        return self.score_and_tell(token_ids, start)[0]

    def score_and_tell(
        self, token_ids: list[Any], start: list[int]
    ) -> tuple[list[torch.Tensor], ScoreStats | None]:
        """As :meth:`score`; also return this call's figures, or ``None`` if the actor's scorer has none."""
        arrays = [np.asarray(ids) for ids in token_ids]
        scored, stats = self._get(self._actor.score.remote(arrays, list(start)))
        self.stats = stats  # for display only: other threads replace it
        return [torch.from_numpy(array.copy()) for array in scored], stats

    def close(self) -> None:
        """End the actor and its engine, for all callers."""
        ray.kill(self._actor)

    @staticmethod
    def _get(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            raise EngineError(f"the reference's Ray actor is gone: {error}") from error
