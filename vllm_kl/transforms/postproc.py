"""Hooks into ``collector.postproc``, which TorchRL 0.14 calls on every finished batch.

TorchRL calls ``postproc`` before the batch enters a replay buffer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase

logger = logging.getLogger("vllm_kl")

Hook = Callable[[TensorDictBase], TensorDictBase]


class _Postproc:
    """A collector's ``postproc`` that calls this package's hooks, and then the user's own ``postproc``."""

    def __init__(self, postproc: Hook | None) -> None:
        self._postproc = postproc
        self.hooks: list[Hook] = []

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        for hook in self.hooks:
            td = hook(td)
        return td if self._postproc is None else self._postproc(td)


def on_leaving(collector: Any, hook: Hook) -> bool:
    """Call ``hook`` on every batch that leaves a collector; return whether the collector has a ``postproc``.

    A hook that is already there is not added again. If a collector has no ``postproc``, a log line says so,
    once for each class. ``None`` is no collector.
    """
    if not hasattr(collector, "postproc"):
        if collector is not None:
            _log_missing_postproc(type(collector).__name__)
        return False
    # Checked at every step, because the user may set a postproc at any time.
    if not isinstance(collector.postproc, _Postproc):
        collector.postproc = _Postproc(collector.postproc)
    if hook not in collector.postproc.hooks:
        collector.postproc.hooks.append(hook)
    return True


@functools.cache
def _log_missing_postproc(kind: str) -> None:
    logger.warning("vllm_kl: a %s has no postproc, so its batches are not checked", kind)
