"""Reads the folder that ``vllm-kl score --policy`` has written, as samples for ``vllm-kl view``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_kl.errors import InputError
from vllm_kl.offline.columns import POLICY, REFERENCE, Columns, Layout, layout_of
from vllm_kl.offline.manifest import Manifest
from vllm_kl.offline.parts import open_parquet
from vllm_kl.offline.storage import Folder
from vllm_kl.offline.write_part import file_name
from vllm_kl.view.samples import Sample


def read_scored(folder: str | Path) -> list[Sample]:
    """Return all rows of the folder that were scored, a group's responses one by one.

    Raises:
        InputError: the folder is of no run, of one without ``--policy``, or not a row of it was scored.
    """
    manifest = Manifest.read(Folder(str(folder)))
    if manifest is None:
        raise InputError(f"{folder} is no output of vllm-kl score: it has no manifest")
    columns = Columns.from_settings(manifest.settings)
    if "policy.checksum" not in manifest.settings:
        raise InputError(
            f"{folder} has the log-probs of one model: a page compares two. Score with --policy MODEL2"
        )
    layout = layout_of(manifest.schema, columns)
    suffix = manifest.settings["format"]
    samples: list[Sample] = []
    for part in manifest.parts:
        path = Path(folder, file_name(part.index, suffix))
        if not path.exists():  # a run that was stopped, or one shard of several
            continue
        for i, row in enumerate(_rows(path)):
            if row[columns.added("error")] is None:
                samples += _samples(row, columns, layout, f"{part.path}, row {part.first_row + i}")
    if not samples:
        raise InputError(f"{folder} has no row that was scored")
    return samples


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
        return
    for batch in open_parquet(str(path), path).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def _samples(row: dict[str, Any], columns: Columns, layout: Layout, where: str) -> Iterator[Sample]:
    """Yield the responses of one row."""
    found = {
        "token_ids": _token_ids(row, columns, layout),
        **{
            name: row.get(columns.added(column))
            for name, column in (
                ("log_probs", POLICY),
                ("ref_log_probs", REFERENCE),
                ("mask", "mask"),
                ("kl", "kl"),
            )
        },
    }
    responses = [found]
    if layout.is_group:
        names = [name for name, values in found.items() if values is not None]
        responses = [
            dict(zip(names, each, strict=True)) for each in zip(*(found[n] for n in names), strict=True)
        ]
    for response in responses:
        try:
            yield Sample(**response)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _token_ids(row: dict[str, Any], columns: Columns, layout: Layout) -> list[Any]:
    """Return the ids of the row's sequence; of a group, those of each response."""
    if layout.has_texts:
        return row[columns.added("token_ids")]
    if layout.kind == "ids":
        return row[columns.ids]
    prompt, response = row[columns.prompt_ids], row[columns.response_ids]
    return [[*prompt, *each] for each in response] if layout.is_group else [*prompt, *response]
