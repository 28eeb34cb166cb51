"""Gives the parts of a data set to Ray Data: a read task, so a block, for each part.

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
from vllm_kl.offline.parts import Part, survey


class PartsSource(Datasource):
    """A source for ``ray.data.read_datasource`` with one read task, so one block, for each part."""

    def __init__(self, parts: Sequence[Part], read: Callable[[Part], pa.Table]) -> None:
        self._parts, self._read = parts, read

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        def task(part: Part) -> ReadTask:
            metadata = BlockMetadata(
                num_rows=part.num_rows or None,
                size_bytes=None,
                exec_stats=None,
                input_files=[part.path],
            )
            return ReadTask(functools.partial(_one_block, self._read, part), metadata)

        return [task(part) for part in self._parts]


def _one_block(read: Callable[[Part], pa.Table], part: Part) -> Iterator[pa.Table]:
    yield read(part)


def read_parts(parts: Sequence[Part], read: Callable[[Part], pa.Table]) -> Dataset:
    """Return a data set of one block for each part."""
    return ray.data.read_datasource(PartsSource(parts, read), override_num_blocks=len(parts))


def surveys(parts: Sequence[Part], role_of: Mapping[str, str]) -> list[tuple[Part, jsonl.Types]]:
    """Return :func:`~vllm_kl.offline.parts.survey` of each part, in the order of the parts."""
    ds = read_parts(parts, functools.partial(_survey_block, role_of=role_of))
    found = [pickle.loads(row["survey"]) for row in ds.iter_rows()]
    return sorted(found, key=lambda one: (one[0].path, one[0].begin))


def _survey_block(part: Part, role_of: Mapping[str, str]) -> pa.Table:
    return pa.table({"survey": [pickle.dumps(survey(part, role_of))]})
