"""Counts what a run would score, before any engine starts.

A token must be computed unless a sequence before it, in the order in which the engine gets them, begins
with the same tokens. Of such a beginning the tokens before the last unscored one are shared; the engine
needs the row of that one to score the next. A sequence that is there twice is computed once.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vllm_kl.offline.cluster import Resources, connected
from vllm_kl.offline.columns import IDS, MASKS, STARTS, layout_of
from vllm_kl.offline.pipeline import Job, map_blocks, whole_blocks
from vllm_kl.offline.rows import ReadRows
from vllm_kl.offline.score_files import Files, plain_errors, plan, read


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a run would score."""

    rows: int
    unreadable: int  # rows that are no row of this data set; the engine may reject more
    sequences: int
    tokens: int
    scored_tokens: int
    shared_tokens: int  # tokens that an engine with a perfect prefix cache does not compute
    floor_tokens: int  # tokens that must be computed: ``tokens - shared_tokens``


def dry_run(files: Files, job: Job, *, address: str | None = None) -> Counts:
    """Return what a run would score. Nothing is written, and no engine starts.

    Raises:
        InputError: as :func:`~vllm_kl.offline.score_files.score_files`.
    """
    with connected(address, Resources(replicas=0)), whole_blocks(), plain_errors():
        manifest = plan(files, job, {})
        first, step = files.shard
        layout = layout_of(manifest.schema, job.columns)
        parts = read(manifest, manifest.parts[first::step], job.columns)
        ds = map_blocks(parts, ReadRows(layout, job.columns, job.texts))
        sums: Counter[str] = Counter()
        for counts in map_blocks(ds, functools.partial(_count, error=job.columns.added("error"))).iter_rows():
            sums.update(counts)
    return Counts(**sums, floor_tokens=sums["tokens"] - sums["shared_tokens"])


def _count(table: pa.Table, error: str) -> pa.Table:
    sequences, num_scored = [], 0
    for i, starts in enumerate(table.column(STARTS)):
        if not starts.is_valid:
            continue
        rows = [one.values.to_numpy() for one in table.column(IDS)[i].values]
        sequences += zip(rows, starts.as_py(), strict=True)
        if MASKS in table.column_names:
            num_scored += sum(sum(mask.values.to_pylist()) for mask in table.column(MASKS)[i].values)
        else:
            num_scored += sum(len(ids) - start for ids, start in zip(rows, starts.as_py(), strict=True))
    counts = {
        "rows": table.num_rows,
        "unreadable": table.num_rows - table.column(error).null_count,
        "sequences": len(sequences),
        "tokens": sum(len(ids) for ids, _ in sequences),
        "scored_tokens": num_scored,
        "shared_tokens": shared_tokens(sequences),
    }
    return pa.table({name: [count] for name, count in counts.items()})


def shared_tokens(sequences: Sequence[tuple[np.ndarray, int]]) -> int:
    """Return how many tokens of sequences with their starts need not be computed, in one call.

    >>> a, b = np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])
    >>> shared_tokens([(a, 3), (b, 3), (a, 3)])  # b shares 2 of its tokens: token 2 predicts token 3
    6
    """
    # As vllm_kl.plan orders them: by the bytes of the ids.
    ordered = sorted((np.asarray(ids, np.int32).tobytes(), start) for ids, start in sequences)
    shared, last = 0, np.empty(0, np.int32)
    seen: set[tuple[bytes, int]] = set()
    for content, start in ordered:
        ids = np.frombuffer(content, np.int32)
        if (content, start) in seen:
            shared += len(ids)
            continue
        seen.add((content, start))
        num = min(len(ids), len(last))
        differs = np.flatnonzero(ids[:num] != last[:num])
        common = int(differs[0]) if len(differs) else num
        shared += min(common, max(0, start - 1))
        last = ids
    return shared
