"""Scores whole data sets with one pipeline of Ray Data: ``vllm-kl score`` and :func:`score_dataset`.

    files -> parts.py: ranges of rows -> rows.py: ids -> score_rows.py: log-probs -> write_part.py: files

``pipeline.py`` puts the stages together; read it first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_kl.offline.pipeline import score_dataset as score_dataset

__all__ = ["score_dataset"]


def __getattr__(name: str) -> Any:
    if name != "score_dataset":
        raise AttributeError(f"module 'vllm_kl.offline' has no attribute {name!r}")
    from vllm_kl.offline.pipeline import score_dataset

    return score_dataset
