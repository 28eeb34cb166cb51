"""``LogMetrics`` gives the figures of a transform to a TorchRL logger, in a trainer or in a plain loop."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torchrl.record.loggers import Logger
from torchrl.trainers import Trainer, TrainerHookBase

from vllm_kl.errors import OptionError


class LogMetrics(TrainerHookBase):
    """Logs the ``metrics`` of a transform: as a hook of a TorchRL ``Trainer``, or in a loop by :meth:`log`.

    The figures are those of the transform's last batch. The transform must run in this process: in an env, a
    ``postproc`` or a replay buffer of another process (``RayLLMCollector``) it counts there.

    Args:
        transform: :class:`~vllm_kl.RetrieveKL`, :class:`~vllm_kl.KLComputation`,
            :class:`~vllm_kl.RetrieveLogProb`, :class:`~vllm_kl.ImportanceWeights`,
            :class:`~vllm_kl.RetokenizedTurns`, or another object with ``metrics``.

    Keyword Args:
        prefix: what the names begin with: ``"vllm_kl"`` makes ``vllm_kl/kl_k1_token_mean_nats``; ``""``
            leaves them as they are. Each transform of a run needs a prefix of its own.

    Raises:
        OptionError: the transform has no ``metrics``.

    >>> from vllm_kl import KLComputation
    >>> transform = KLComputation(("log_probs", "full"), ("ref_log_probs", "full"), add_to_reward=False)
    >>> sides = {"log_probs": {"full": [[0.0, -1.0]]}, "ref_log_probs": {"full": [[0.0, -1.5]]}}
    >>> _ = transform(TensorDict({**sides, "kl_mask": [[False, True]]}, batch_size=1))
    >>> LogMetrics(transform, prefix="kl")()["kl/kl_k1_token_mean_nats"]
    0.5
    >>> # In a trainer: LogMetrics(transform).register(trainer)
    >>> # In a loop:    LogMetrics(transform).log(CSVLogger("run"), step=7)
    """

    def __init__(self, transform: Any, *, prefix: str = "vllm_kl") -> None:
        if not hasattr(transform, "metrics"):
            raise OptionError(
                f"a {type(transform).__name__} has no metrics to log: pass a transform of this package"
            )
        self._transform, self._prefix = transform, prefix

    def __call__(self, batch: TensorDictBase | None = None) -> dict[str, float]:
        """Return the figures by their names in the log. A trainer calls this with each collected batch."""
        before = f"{self._prefix}/" if self._prefix else ""
        return {f"{before}{name}": value for name, value in self._transform.metrics.items()}

    def log(self, logger: Logger, step: int | None = None) -> dict[str, float]:
        """Give the figures to a TorchRL logger (csv, tensorboard, wandb, mlflow, ...); return them."""
        return logger.log_metrics(self(), step=step)

    def register(self, trainer: Trainer, name: str | None = None) -> None:
        """Let a trainer log the figures of each batch before it trains on it.

        A trainer logs a name once in ``log_interval`` frames, 10,000 unless you say otherwise.

        Args:
            trainer: the trainer, which has a logger.
            name: of the hook in the trainer's checkpoint; ``None`` takes ``log_`` and the prefix.
        """
        trainer.register_op("pre_steps_log", self)
        trainer.register_module(f"log_{self._prefix}" if name is None else name, self)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the transform's own ``state_dict`` has its counters."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""
