"""What is done to every batch that leaves a collector: torchrl 0.14's call ``postproc`` on each, before a replay buffer too."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase

logger = logging.getLogger("vllm_kl")

Work = Callable[[TensorDictBase], TensorDictBase]


class _Leaving:
    """A collector's ``postproc`` that does its work before the one that the user gave, if any, sees the batch."""

    def __init__(self, postproc: Work | None) -> None:
        self._postproc = postproc
        self.works: list[Work] = []

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        for work in self.works:
            td = work(td)
        return td if self._postproc is None else self._postproc(td)


def on_leaving(collector: Any, work: Work) -> bool:
    """Have work done on every batch that leaves a collector, once; return whether it has a ``postproc``.

    ``None``, which is no collector, has none; that another has none is said once.
    """
    if not hasattr(collector, "postproc"):
        if collector is not None:
            _say_that_it_has_none(type(collector))
        return False
    if not isinstance(
        collector.postproc, _Leaving
    ):  # looked at every step: a postproc may be set at any time
        collector.postproc = _Leaving(collector.postproc)
    if work not in collector.postproc.works:
        collector.postproc.works.append(work)
    return True


@functools.cache
def _say_that_it_has_none(kind: type) -> None:
    logger.warning("vllm_kl: a %s has no postproc: nobody looks at the batches that leave it", kind.__name__)
