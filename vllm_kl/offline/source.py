"""Gives the parts of a data set to Ray Data: a block for each part.

The processes that read and write load this module and no torch: they start in a second.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from vllm_kl.offline import jsonl
from vllm_kl.offline.parts import Part, groups_of, survey

Read = Callable[[Sequence[Part]], Iterator[pa.Table]]


class PartsSource(Datasource):
    """A source for ``ray.data.read_datasource``: a block for each part, a task for each group of parts."""

    def __init__(self, groups: Sequence[Sequence[Part]], read: Read) -> None:
        self._groups, self._read = groups, read

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        def task(parts: Sequence[Part]) -> ReadTask:
            metadata = BlockMetadata(
                num_rows=sum(part.num_rows for part in parts) or None,
                size_bytes=None,
                exec_stats=None,
                input_files=[parts[0].path],
            )
            return ReadTask(functools.partial(self._read, parts), metadata)

        return [task(parts) for parts in self._groups]


def read_parts(parts: Sequence[Part], read: Read) -> Dataset:
    """Return a data set of one block for each part.

    Args:
        parts: in their order.
        read: yields the blocks of the parts of one group.
    """
    groups = groups_of(parts)
    return ray.data.read_datasource(PartsSource(groups, read), override_num_blocks=len(groups))


def surveys(parts: Sequence[Part], role_of: Mapping[str, str]) -> list[tuple[Part, jsonl.Types]]:
    """Return :func:`~vllm_kl.offline.parts.survey` of each part, in the order of the parts."""
    ds = read_parts(parts, functools.partial(_survey_blocks, role_of=role_of))
    found = [pickle.loads(row["survey"]) for row in ds.iter_rows()]
    return sorted(found, key=lambda one: (one[0].path, one[0].begin))


def _survey_blocks(parts: Sequence[Part], role_of: Mapping[str, str]) -> Iterator[pa.Table]:
    for part in parts:
        yield pa.table({"survey": [pickle.dumps(survey(part, role_of))]})
