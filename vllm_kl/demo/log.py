"""Logs the training of the demo with one of TorchRL's loggers."""

from __future__ import annotations

from torchrl.record.loggers import get_logger

from vllm_kl.demo.types import TrainConfig, UpdateRow
from vllm_kl.transforms.log_metrics import LogMetrics
from vllm_kl.transforms.retrieve_kl import RetrieveKL


class Log:
    """Logs the figures of each update: those of the transform, and those of the trainer.

    Args:
        config: says which logger. ``config.out / "log"`` gets its files; wandb works offline.
        kl: the transform.
    """

    def __init__(self, config: TrainConfig, kl: RetrieveKL) -> None:
        self._metrics = LogMetrics(kl)
        self._logger = get_logger(
            config.log, str(config.out / "log"), "grpo", wandb_kwargs={"offline": True, "project": "vllm_kl"}
        )

    def __call__(self, row: UpdateRow) -> None:
        """Log an update. The step is the version of the policy that sampled."""
        if self._logger is None:
            return
        figures = {
            "reward": row.collected.reward,
            "loss": row.loss,
            "clip_fraction": row.clip_fraction,
            "staleness": row.staleness,
            "mismatch": row.mismatch,
            "max_abs_err_nats": row.collected.max_abs_err,
        }
        self._metrics.log(self._logger, row.policy_version)
        self._logger.log_metrics(
            {f"demo/{name}": value for name, value in figures.items()}, row.policy_version
        )

    def close(self) -> None:
        """Write what is not written yet."""
        if self._logger is not None:
            self._logger.close()
