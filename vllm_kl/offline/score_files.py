"""Scores files into files: plans the parts, runs the pipeline, and goes on where a killed run ended."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.data import Dataset

from vllm_kl.doctor import package_versions
from vllm_kl.errors import EngineError, InputError, OptionError, VLLMKLError
from vllm_kl.offline import jsonl
from vllm_kl.offline.cluster import connected
from vllm_kl.offline.columns import Columns, layout_of
from vllm_kl.offline.manifest import NAME, Manifest, checksum, model_settings
from vllm_kl.offline.parts import (
    Part,
    cut,
    features_of,
    find_files,
    numbered,
    part_bytes_of,
    read_part,
    survey,
)
from vllm_kl.offline.pipeline import Job, map_blocks, whole_blocks
from vllm_kl.offline.source import read_parts, surveys
from vllm_kl.offline.storage import Folder
from vllm_kl.offline.write_part import COUNTS, WritePart, file_name


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where the rows come from, and where they go."""

    data: tuple[str, ...]  # paths, folders, globs
    out: str
    format: str = "parquet"  # or "jsonl"
    limit: int | None = None  # only the first rows
    shard: tuple[int, int] = (0, 1)  # (i, n): every n-th part, beginning with part i
    part_bytes: int | None = None  # size of a part in the input; None: chosen by the size of the data
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a run."""

    rows: int  # of this output so far, or of the shard
    rejected: int  # those of them with an error
    tokens: int  # of all rows that were scored now
    scored_tokens: int
    shared_tokens: int  # those of ``tokens`` that were not computed, because other sequences had them
    tok_per_s: float
    seconds: float
    files: list[str]


def score_files(
    files: Files,
    job: Job,
    *,
    address: str | None = None,
    on_plan: Callable[[Sequence[Part], Sequence[Part]], None] | None = None,
    on_part: Callable[[Mapping[str, Any]], None] | None = None,
) -> Summary:
    """Score the rows of files into the files of a folder, which may hold a part of them already.

    Args:
        files: input and output.
        job: what to do with each row.
        address: of a Ray cluster; ``None`` starts a local Ray, which ends with this call.
        on_plan: is called with all parts of the shard, and with those that are not there yet.
        on_part: is called with the figures of each part when its file is there.

    Raises:
        InputError: the input is gone, has changed or has no columns that can be scored; or it cannot be
            written.
        OptionError: the folder was begun with other settings; or the cluster is too small.
        EngineError: an engine did not start, or died too often.
    """
    began = time.perf_counter()
    folder = Folder(files.out)
    settings = _settings(files, job)
    if files.overwrite:
        _check_removable(folder, files.shard)
    manifest = None if files.overwrite else Manifest.read(folder)
    if manifest is not None:
        manifest.check_same(settings, files.out)
    elif not files.overwrite and any(name.startswith("part-") for name in folder.names()):
        raise OptionError(f"{files.out} holds files of parts, but no {NAME} that tells what made them")
    with connected(address, job.resources), whole_blocks(), plain_errors():
        is_continued = manifest is not None
        if manifest is None:
            manifest = plan(files, job, settings)
            if files.overwrite:  # now that nothing is wrong with the new run
                _clear(folder)
            folder.make(COUNTS)
            manifest.write(folder)
        first, step = files.shard
        parts = manifest.parts[first::step]
        todo = _missing(folder, parts, files.format)
        if is_continued:
            manifest.check_files(files.data, is_done=not todo)
        if on_plan is not None:
            on_plan(parts, todo)
        figures = list(_score(manifest, todo, folder, files.format, job, on_part)) if todo else []
    return _summary(folder, parts, files.format, figures, time.perf_counter() - began)


def plan(files: Files, job: Job, settings: dict[str, Any]) -> Manifest:
    """Return the manifest of a new output: the input's files, columns and parts."""
    found = find_files(files.data)
    if inside := [file.path for file in found if files.out and Folder(files.out).holds(file.path)]:
        raise InputError(f"{inside[0]} is in the folder of the output, {files.out}: give another --out")
    cut_parts = cut(found, files.part_bytes or part_bytes_of(found))
    parts, types = _surveyed(cut_parts, job)
    schema = jsonl.schema_of(types, job.columns.role_of).with_metadata(features_of(cut_parts))
    job.check_free(schema.names, layout_of(schema, job.columns))
    for field in schema:
        if field.metadata and any(part.format != "jsonl" for part in parts):
            raise InputError(f"column {field.name!r} has types in the files of the data set that do not fit")
    parts = numbered(parts, files.limit)
    if not parts:
        raise InputError(f"{', '.join(files.data)}: no rows")
    return Manifest(settings=settings, files=found, schema=schema, parts=parts)


def _surveyed(parts: list[Part], job: Job) -> tuple[list[Part], jsonl.Types]:
    """Return the parts with the numbers of their rows, and the types of all columns.

    The lines of JSONL are read once for it, by tasks of Ray.
    """
    role_of = job.columns.role_of
    asked = [part for part in parts if part.format == "jsonl"]
    found = surveys(asked, role_of) if asked else []
    others = {part.path: part for part in parts if part.format != "jsonl"}
    found += [survey(part, role_of) for part in others.values()]
    num_rows = {(part.path, part.begin): part.num_rows for part, _ in found}
    types: jsonl.Types = {}
    for _, of_part in found:
        for name, seen in of_part.items():
            types.setdefault(name, set()).update(seen)
    return [
        replace(part, num_rows=num_rows[part.path, part.begin]) if part.format == "jsonl" else part
        for part in parts
    ], types


def _missing(folder: Folder, parts: Sequence[Part], suffix: str) -> list[Part]:
    """Return the parts that have no file; remove what their killed writers left."""
    there = folder.names()
    missing = [part for part in parts if file_name(part.index, suffix) not in there]
    names = {file_name(part.index, suffix) for part in missing}
    for name in there:
        if name.startswith(".") and name[1:].rpartition(".")[0] in names:
            folder.remove(name)
    return missing


def read(manifest: Manifest, parts: Sequence[Part], columns: Columns) -> Dataset:
    """Return the rows of some parts, a block for each part."""
    return read_parts(parts, functools.partial(read_part, schema=manifest.schema, columns=columns))


def _score(
    manifest: Manifest,
    parts: Sequence[Part],
    folder: Folder,
    suffix: str,
    job: Job,
    on_part: Callable[[Mapping[str, Any]], None] | None,
) -> Iterator[Mapping[str, Any]]:
    """Run the pipeline; return the figures of each part when its file is there."""
    ds = job.apply(read(manifest, parts, job.columns), layout_of(manifest.schema, job.columns))
    num_rows = {part.index: part.num_rows for part in parts}
    write = WritePart(folder, suffix, job.columns, num_rows)
    for n, figures in enumerate(map_blocks(ds, write).iter_rows()):
        if n == 0 and file_name(figures["part"], suffix) not in folder.names():
            raise InputError(
                f"{folder.path(file_name(figures['part'], suffix))} was written on another machine, and is "
                "not here. Give an --out that all machines of the cluster share, such as s3://..."
            )
        if on_part is not None:
            on_part(figures)
        yield figures


def _summary(
    folder: Folder, parts: Sequence[Part], suffix: str, figures: Sequence[Mapping[str, Any]], seconds: float
) -> Summary:
    counts = [folder.read_json(f"{COUNTS}/{file_name(part.index, 'json')}") for part in parts]
    now = Counter()
    for one in figures:
        now.update({name: one[name] for name in ("tokens", "scored_tokens", "shared_tokens")})
    return Summary(
        rows=sum(one["rows"] for one in counts),
        rejected=sum(one["rejected"] for one in counts),
        tokens=now["tokens"],
        scored_tokens=now["scored_tokens"],
        shared_tokens=now["shared_tokens"],
        tok_per_s=now["tokens"] / seconds,
        seconds=seconds,
        files=[folder.path(file_name(part.index, suffix)) for part in parts],
    )


def _check_removable(folder: Folder, shard: tuple[int, int]) -> None:
    """Refuse to begin anew where others would lose their files.

    Raises:
        OptionError: the folder holds files of others; or other shards write into it.
    """
    if shard[1] > 1:
        raise OptionError(
            f"--overwrite with --shard {shard[0]}/{shard[1]} would remove the files of the other shards: "
            f"remove {folder.place} before the first of them starts"
        )
    names = folder.names()
    others = names - _ours(names)
    if NAME not in names:
        others |= {name for name in names if name.startswith("part-")}
    if others:
        raise OptionError(
            f"{folder.place} holds files that no run of vllm-kl score made "
            f"({min(others)}): --overwrite removes nothing there. Give another --out"
        )


def _ours(names: set[str]) -> set[str]:
    """Return the names of what a run writes."""
    return {name for name in names if name.lstrip(".").startswith(("part-", NAME)) or name == COUNTS}


def _clear(folder: Folder) -> None:
    """Remove the files of an earlier run."""
    # The manifest last: a killed removal can be done again.
    for name in sorted(_ours(folder.names()), key=NAME.__eq__):
        folder.remove(name)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the error of this package that a task or an actor of Ray raised, as itself."""
    try:
        yield
    except ray.exceptions.RayError as error:
        found = _cause(error)
        if isinstance(found, VLLMKLError):
            raise found from error
        raise EngineError(f"Ray ended the pipeline: {error}") from error


def _cause(error: BaseException | None) -> BaseException | None:
    seen = error
    while seen is not None and not (
        isinstance(seen, VLLMKLError) and not isinstance(seen, ray.exceptions.RayError)
    ):
        seen = getattr(seen, "cause", None) or seen.__cause__
    return seen


def _settings(files: Files, job: Job) -> dict[str, Any]:
    """Return everything that changes the output."""
    models = {"model": job.model} | ({} if job.policy is None else {"policy": job.policy})
    settings: dict[str, Any] = {
        "data": list(files.data),
        "limit": files.limit,
        "part_bytes": files.part_bytes,
        "format": files.format,
        "topk": job.top_k,
        "entropy": job.entropy,
        "max_len_policy": job.max_len_policy,
        "chat_template": job.texts.chat_template,
        "template_options": job.texts.options,
        "add_eos": job.texts.add_eos,
    }
    for name, model in models.items():
        settings |= model_settings(name, model.path, model.engine_options)
        settings[f"{name}.temperature"] = model.temperature
    if job.policy is not None:
        settings["estimator"] = job.estimator
    if job.texts.tokenizer not in (None, job.model.path):
        settings["tokenizer.checksum"] = checksum(
            job.texts.tokenizer, revision=job.texts.loading.get("revision")
        )
    versions = {f"version.{package}": found for package, found in package_versions().items()}
    return {**settings, **job.columns.settings, **versions}
