"""Scores a data set with Ray Data, from Dataset to Dataset: :func:`score_dataset`.

    files  -> a read task per part (parts.py)
           -> ReadRows   tasks: token ids, or an error text (rows.py)
           -> ScoreRows  a pool of actors, each with an engine (score_rows.py); a second pool with --policy
           -> WritePart  tasks: one file per part (write_part.py)

Ray Data's own checkpoints (Ray 2.60) keep every row once, but a resumed run numbers its files anew: their
names cannot give the order of the input. So the parts are fixed here before the first run, each has one
file, and a resumed run leaves out the parts whose files are there.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from ray.data import ActorPoolStrategy, DataContext, Dataset

from vllm_kl.checks import check_temperature
from vllm_kl.errors import InputError, OptionError
from vllm_kl.kl import TOKEN_ESTIMATORS, check_estimator
from vllm_kl.offline.cluster import Resources
from vllm_kl.offline.columns import OF_STAGES, POLICY, REFERENCE, Columns, Layout, layout_of, visible
from vllm_kl.offline.rows import ReadRows, Texts
from vllm_kl.offline.score_rows import CompareRows, Model, ScoreRows

_MAX_RESTARTS = 3  # of an actor; Ray Data's default is to restart it for ever


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do with each row."""

    model: Model
    policy: Model | None = None
    columns: Columns = field(default_factory=Columns)
    texts: Texts = field(default_factory=Texts)
    top_k: int = 0
    entropy: bool = False
    estimator: str = "k1"
    max_len_policy: Literal["reject", "left"] = "reject"
    on_error: Literal["mark", "stop"] = "mark"
    resources: Resources = field(default_factory=Resources)

    def check_free(self, names: Sequence[str], layout: Layout) -> None:
        """Refuse a data set that has a column which this job would add.

        Raises:
            InputError: it has one.
        """
        if taken := sorted(set(names) & set(OF_STAGES)):
            raise InputError(f"the data set has a column {taken[0]!r}, a name that is used here: rename it")
        if taken := sorted((set(names) - set(layout.read.values())) & set(self.columns.all_added)):
            raise InputError(
                f"the data set has a column {taken[0]!r} already, which this run would add: give a prefix "
                "for the added columns (--prefix, prefix=)"
            )

    def apply(self, ds: Dataset, layout: Layout) -> Dataset:
        """Return the data set with the stages that read, score and compare its rows."""
        ds = map_blocks(ds, ReadRows(layout, self.columns, self.texts))
        ds = self._scored(ds, layout, 0, REFERENCE, top_k=self.top_k, entropy=self.entropy)
        if self.policy is None:
            return ds
        ds = self._scored(ds, layout, 1, POLICY)
        return map_blocks(ds, CompareRows(layout, self.columns, self.estimator, self.on_error))

    def _scored(self, ds: Dataset, layout: Layout, n: int, name: str, **wanted: Any) -> Dataset:
        model, environment = (self.model, self.policy)[n], self.resources.environment_of(n)
        return map_blocks(
            ds,
            ScoreRows,
            fn_constructor_args=(model, layout, self.columns),
            fn_constructor_kwargs={
                "name": name,
                **wanted,
                "max_len_policy": self.max_len_policy,
                "on_error": self.on_error,
            },
            # One call of ScoreRows runs at a time. The actor writes the last block and fetches the next one
            # meanwhile: without a second call the engine waits 15 ms for each block.
            compute=ActorPoolStrategy(size=self.resources.replicas, max_concurrent_calls_per_actor=2),
            num_cpus=self.resources.num_cpus,
            num_gpus=self.resources.gpus_of(n) or None,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=_MAX_RESTARTS,
            **({"runtime_env": {"env_vars": environment}} if environment else {}),
        )


def map_blocks(ds: Dataset, fn: Any, **options: Any) -> Dataset:
    """Return ``ds.map_batches`` of whole blocks, as Arrow tables.

    The public method refuses whole blocks on GPUs, where it cannot know the size of a batch; and it has no
    named argument for the number of restarts (Ray 2.60). The method behind it takes both.
    """
    method = getattr(ds, "map_batches_internal", ds.map_batches)
    return method(fn, batch_size=None, batch_format="pyarrow", **options)


@contextlib.contextmanager
def whole_blocks() -> Iterator[None]:
    """Let Ray Data neither cut nor join blocks, and show no progress of its own, in pipelines made here."""
    context = DataContext.get_current()
    mine = context.copy()
    mine.target_max_block_size = None
    mine.enable_progress_bars = False
    DataContext._set_current(mine)
    log = logging.getLogger("ray.data")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        DataContext._set_current(context)


def make_job(
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
    entropy: bool = False,
    estimator: str = "k1",
    max_len_policy: Literal["reject", "left"] = "reject",
    on_error: Literal["mark", "stop"] = "mark",
    replicas: int = 1,
    num_gpus: float | None = None,
    num_cpus: float = 1,
    engine_options: Mapping[str, Any] | None = None,
    policy_options: Mapping[str, Any] | None = None,
) -> Job:
    """Return the job of these options; :func:`score_dataset` tells what they mean.

    Raises:
        OptionError: an option does not exist, or has no effect.
        InputError: the temperature is not positive.
    """
    check_estimator(estimator, known=TOKEN_ESTIMATORS)
    if policy is None and policy_options is not None:
        raise OptionError("options of the policy's engine have an effect only with a policy")
    model = _absolute(model)
    policy, tokenizer = (None if name is None else _absolute(name) for name in (policy, tokenizer))
    options = dict(engine_options or {})
    theirs = dict(options if policy_options is None else policy_options)
    temperature = check_temperature(temperature)
    workers = [_num_workers(one) for one in ((options,) if policy is None else (options, theirs))]
    return Job(
        model=Model(path=model, temperature=temperature, engine_options=options),
        policy=None if policy is None else Model(path=policy, temperature=temperature, engine_options=theirs),
        columns=Columns.renamed(columns or {}, prefix),
        texts=Texts(**_tokenizer(model, tokenizer, options), chat_template=chat_template, add_eos=add_eos),
        top_k=topk,
        entropy=entropy,
        estimator=estimator,
        max_len_policy=max_len_policy,
        on_error=on_error,
        resources=Resources(replicas=replicas, workers=tuple(workers), num_gpus=num_gpus, num_cpus=num_cpus),
    )


def _num_workers(options: Mapping[str, Any]) -> int:
    return math.prod(int(options.get(f"{name}_parallel_size") or 1) for name in ("tensor", "pipeline"))


def _tokenizer(model: str, tokenizer: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return which tokenizer texts are read with, and how it is loaded: as the engine would load it."""
    found = tokenizer or _absolute(options.get("tokenizer") or model)
    revision = options.get("tokenizer_revision", options.get("revision") if found == model else None)
    loading = {"revision": revision, "trust_remote_code": options.get("trust_remote_code")}
    return {
        "tokenizer": found,
        "loading": {name: value for name, value in loading.items() if value is not None},
    }


def _absolute(name: str) -> str:
    """Return a folder's whole path: actors run in other folders."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


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
    entropy: bool = False,
    estimator: str = "k1",
    max_len_policy: Literal["reject", "left"] = "reject",
    on_error: Literal["mark", "stop"] = "mark",
    replicas: int = 1,
    num_gpus: float | None = None,
    num_cpus: float = 1,
    rows_per_block: int | None = None,
    policy_options: Mapping[str, Any] | None = None,
    **engine_options: Any,
) -> Dataset:
    """Return a data set with the log-probs of a model for each row, beside the columns that were there.

    The pipeline runs when the result is used. Its engines live in actors of Ray Data. Rows come in any order,
    unless the data set was made with ``DataContext.execution_options.preserve_order``.

    Args:
        ds: a data set with one of these, the first that is there:

            - ``prompt_ids`` and ``response_ids``: lists of ints; ``response_ids`` may be a list of lists;
            - ``ids``, and ``start``: the index of the first token to score, 1 without the column;
            - ``messages``: a dialog; the assistant's tokens are scored, as the chat template marks them;
            - ``prompt`` and ``responses`` (or ``response``): texts, or a text and a list of texts.

            Several responses in one row are a group, which shares its prompt.
        model: path or name of the model. All nodes of the cluster must reach it.
        policy: a second model, whose log-probs, per-token KL to ``model`` and mismatch are added.
        columns: your names of the columns to read, such as ``{"response": "chosen"}``.
        prefix: put before the names of the added columns.
        tokenizer: path or name of the tokenizer for texts and messages; ``None`` takes that of the model.
        chat_template: a chat template in Jinja; ``None`` takes the tokenizer's.
        add_eos: put the EOS token after each response text.
        temperature: the log-probs are those of ``softmax(logits / temperature)``.
        topk: also add the K most likely tokens of every scored position.
        entropy: also add the entropy of the distribution of ``model`` at every scored position.
        estimator: of the KL: ``"k1"``, ``"k2"``, ``"k3"`` or ``"abs"`` (:func:`vllm_kl.kl_estimate`).
        max_len_policy: ``"reject"`` gives a row that is too long for the engine an error; ``"left"`` cuts its
            prompt from the left.
        on_error: ``"mark"`` writes the error of a row into its column ``error``; ``"stop"`` raises it.
        replicas: how many engines score; twice as many with a policy.
        num_gpus: GPUs of each engine. ``None``: as many as its parallel sizes take, if the cluster has GPUs.
        num_cpus: logical CPUs of each engine in Ray.
        rows_per_block: cut the data set into blocks of so many rows first. A block is one call of an engine.
            Ray Data makes one block of everything below 128 MB.
        policy_options: engine options of the policy; ``None`` takes those of the model.
        **engine_options: vLLM's engine options, as in :class:`~vllm_kl.VLLMScorer`.

    Returns:
        The data set with these columns more; where a row has an error, they are null. In groups, each is a
        list with one entry per response.

        - ``ref_log_probs``: list of float32, nats, of the scored tokens;
        - ``start``: index of the first scored token; ``num_tokens``; ``sum`` of the log-probs, float64;
        - ``error``: null, or why the row could not be scored;
        - of texts and messages ``token_ids``; of messages ``mask``, true at the scored tokens;
        - with ``topk`` ``topk_ids`` and ``topk_log_probs``, K of each scored token, most likely first;
        - with ``entropy`` ``entropy``: list of float32, nats, one of each scored token;
        - with ``max_len_policy="left"`` ``num_cut``, the tokens of the prompt that were cut off;
        - with ``policy`` ``log_probs`` and ``kl``, per token; and ``mismatch``, the metrics of
          :func:`vllm_kl.mismatch`, a struct.

    Raises:
        InputError: the data set has no columns that can be scored, or a column of the wrong type.
        OptionError: an option does not exist or has no effect, or the cluster is too small.

    >>> # ds = ray.data.read_parquet("rollouts")    # columns prompt_ids and response_ids
    >>> # score_dataset(ds, "my-model", dtype="float32").write_parquet("scored")
    """
    job = make_job(
        model,
        policy=policy,
        columns=columns,
        prefix=prefix,
        tokenizer=tokenizer,
        chat_template=chat_template,
        add_eos=add_eos,
        temperature=temperature,
        topk=topk,
        entropy=entropy,
        estimator=estimator,
        max_len_policy=max_len_policy,
        on_error=on_error,
        replicas=replicas,
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        engine_options=engine_options,
        policy_options=policy_options,
    )
    ds, schema = _in_arrow(ds)
    layout = layout_of(schema, job.columns)
    job.check_free(schema.names, layout)
    job.resources.check()
    if rows_per_block is not None:
        ds = ds.repartition(target_num_rows_per_block=rows_per_block)
    return map_blocks(job.apply(ds, layout), _finish)


def _in_arrow(ds: Dataset) -> tuple[Dataset, pa.Schema]:
    """Return the data set in blocks of Arrow, not of pandas, and its columns.

    Raises:
        InputError: it has no rows.
    """
    schema = ds.schema()
    if schema is not None and not isinstance(schema.base_schema, pa.Schema):
        ds = map_blocks(ds, _unchanged)
        schema = ds.schema()
    if schema is None:
        raise InputError("the data set has no rows, so its columns are not known")
    return ds, pa.schema(list(zip(schema.names, schema.types, strict=True)))


def _unchanged(table: pa.Table) -> pa.Table:
    return table


def _finish(table: pa.Table) -> pa.Table:
    return table.select(visible(table.column_names))
