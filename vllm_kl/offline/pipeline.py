"""Scores a data set with Ray Data: :func:`score_dataset` from Dataset to Dataset, :class:`Run` from files to files.

    files  -> a read task per part (parts.py)
           -> ReadRows   tasks: token ids, or an error text (rows.py)
           -> ScoreRows  a pool of actors, each with an engine (score_rows.py); a second pool with --policy
           -> WritePart  tasks: one file per part (write_part.py)

Ray Data's own checkpoints (Ray 2.60) keep every row once, but a resumed run numbers its files anew: their names
cannot give the order of the input. So the parts are fixed here before the first run, each has one file, and a
resumed run leaves out the parts whose files are there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata

from vllm_kl.offline.cluster import Resources
from vllm_kl.offline.columns import Columns, Layout, layout_of, visible
from vllm_kl.offline.parts import Part
from vllm_kl.offline.rows import ReadRows, Texts
from vllm_kl.offline.score_rows import POLICY, REFERENCE, CompareRows, Model, ScoreRows

_MAX_RESTARTS = 3  # of an actor; Ray Data's default is to restart it for ever


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do with each row."""

    model: Model
    policy: Model | None = None
    columns: Columns = field(default_factory=Columns)
    texts: Texts = field(default_factory=Texts)
    top_k: int = 0
    estimator: str = "k1"
    max_len_policy: Literal["reject", "left"] = "reject"
    on_error: Literal["mark", "stop"] = "mark"
    resources: Resources = field(default_factory=Resources)

    def apply(self, ds: Dataset, layout: Layout) -> Dataset:
        """Return the data set with the stages that read, score and compare its rows."""
        whole = {"batch_size": None, "batch_format": "pyarrow"}
        ds = ds.map_batches(ReadRows(layout, self.columns, self.texts), **whole)
        ds = self._scored(ds, layout, self.model, REFERENCE, top_k=self.top_k)
        if self.policy is None:
            return ds
        ds = self._scored(ds, layout, self.policy, POLICY)
        return ds.map_batches(CompareRows(layout, self.columns, self.estimator), **whole)

    def _scored(self, ds: Dataset, layout: Layout, model: Model, name: str, *, top_k: int = 0) -> Dataset:
        environment = self.resources.environment
        return ds.map_batches(
            ScoreRows,
            fn_constructor_args=(model, layout, self.columns),
            fn_constructor_kwargs={
                "name": name,
                "top_k": top_k,
                "max_len_policy": self.max_len_policy,
                "on_error": self.on_error,
            },
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=self.resources.replicas),
            num_cpus=self.resources.num_cpus,
            num_gpus=self.resources.num_gpus or None,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=_MAX_RESTARTS,
            **({"runtime_env": {"env_vars": environment}} if environment else {}),
        )


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


@contextlib.contextmanager
def whole_blocks() -> Iterator[None]:
    """Let Ray Data neither cut nor join blocks, and show no progress of its own, in pipelines made here."""
    context = DataContext.get_current()
    mine = context.copy()
    mine.target_max_block_size = None
    mine.enable_progress_bars = False
    DataContext._set_current(mine)
    try:
        yield
    finally:
        DataContext._set_current(context)


def score_dataset(
    ds: Dataset,
    model: str,
    *,
    policy: str | None = None,
    columns: Mapping[str, str] | None = None,
    prefix: str = "",
    tokenizer: str | None = None,
    chat_template: str | None = None,
    add_eos: bool = False,
    temperature: float = 1.0,
    topk: int = 0,
    estimator: str = "k1",
    max_len_policy: Literal["reject", "left"] = "reject",
    on_error: Literal["mark", "stop"] = "mark",
    replicas: int = 1,
    num_gpus: float = 0,
    num_cpus: float = 1,
    rows_per_block: int | None = None,
    policy_options: Mapping[str, Any] | None = None,
    **engine_options: Any,
) -> Dataset:
    columns_ = Columns.renamed(columns or {}, prefix)
    layout = layout_of(_arrow_schema(ds), columns_)
    job = Job(
        model=Model(path=model, temperature=temperature, engine_options=engine_options),
        policy=None
        if policy is None
        else Model(
            path=policy, temperature=temperature, engine_options=dict(policy_options or engine_options)
        ),
        columns=columns_,
        texts=Texts(tokenizer=tokenizer or model, chat_template=chat_template, add_eos=add_eos),
        top_k=topk,
        estimator=estimator,
        max_len_policy=max_len_policy,
        on_error=on_error,
        resources=Resources(
            replicas=replicas,
            num_gpus=num_gpus,
            num_cpus=num_cpus,
            num_models=1 if policy is None else 2,
        ),
    )
    job.resources.check()
    if rows_per_block is not None:
        ds = ds.repartition(target_num_rows_per_block=rows_per_block)
    return job.apply(ds, layout).map_batches(_finish, batch_size=None, batch_format="pyarrow")


def _finish(table: pa.Table) -> pa.Table:
    return table.select(visible(table.column_names))


def _arrow_schema(ds: Dataset) -> pa.Schema:
    schema = ds.schema()
    return pa.schema(list(zip(schema.names, schema.types, strict=True)))
