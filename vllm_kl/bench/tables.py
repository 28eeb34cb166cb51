"""Turns the rows of a benchmark into tables: on the screen, in the Markdown file, and in the README."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich.markup import escape
from rich.table import Table

from vllm_kl.bench.cost import Cost
from vllm_kl.bench.floor import ENGINE, HEAD
from vllm_kl.bench.models import NAMED
from vllm_kl.bench.report import make_table, origin
from vllm_kl.bench.run import is_peer, turns_of

Row = Mapping[str, Any]
_NOT_MEASURED, _REASON_WIDTH = "not measured", 40
_SHOWN_AS = {ENGINE: "  engine without LM head", HEAD: "  LM-head product"}


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else format(value / scale, form)

    return cell


def _of_the_floor(row: Row) -> str:
    """Return the median of the rounds; in brackets the 20th and 80th percentile, which older files lack."""
    names = ("fraction_of_floor", "fraction_of_floor_p20", "fraction_of_floor_p80")
    median, *spread = (_number(name, ".2f")(row) for name in names)
    return f"{median} ({' to '.join(spread)})" if all(spread) else median


def _reason(row: Row) -> str:
    """Return the beginning of the reason why a provider has no figures; the lines below have all of it."""
    return textwrap.shorten(row.get("not_measured") or "", _REASON_WIDTH, placeholder=" ...")


# Columns that no row has a value for are left out.
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "s p20": _number("s_p20", ".3g"),
    "s p50": _number("s_p50", ".3g"),
    "s p80": _number("s_p80", ".3g"),
    "tokens/s fed": _number("tok_per_s", ",.0f"),
    "needed": _number("computed_tok_per_s", ",.0f"),
    "TFLOP/s": _number("flop_per_s", ",.3g", 1e12),
    "MFU": _number("mfu", ".2f"),
    "tokens/J": _number("tok_per_joule", ",.0f"),
    "times TorchRL": _number("ratio_to_torchrl", ".2f"),
    "of the floor": _of_the_floor,
    "largest error": _number("max_abs_err", ".1e"),
    _NOT_MEASURED: _reason,
}
_MEMORY: dict[str, Callable[[Row], str]] = {
    "process, MiB": _number("peak_bytes", ",.0f", 1 << 20),
    "GPU, MiB": _number("gpu_peak_bytes", ",.0f", 1 << 20),
}


def result_tables(rows: Sequence[Row]) -> list[Table]:
    """Return one table for each shape, and one of the peak memory."""
    tables = [
        _table(title_of(shape), _COLUMNS, [row for row in rows if row["shape"] == shape])
        for shape in dict.fromkeys(row["shape"] for row in rows)
    ]
    last = {row["provider"]: row for row in rows if row.get("peak_bytes") or row.get("gpu_peak_bytes")}
    return [*tables, _table("peak memory", _MEMORY, list(last.values()))] if last else tables


def caption(rows: Sequence[Row]) -> str:
    """Return when, where and with what rows of one run were measured, and which model."""
    row, sizes = rows[0], sorted({row["sequences"] for row in rows})
    sequences = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    has_peers = any(is_peer(row["provider"]) for row in rows)
    rounds = f"{row['rounds']} rounds" + f", of other ways {row['peer_rounds']}" * has_peers
    told = f"{origin(row)}; {_model(row)}, {row['dtype']}, {sequences} sequences, {rounds}"
    return "; ".join(filter(None, (told, turns_of(row.get("groups", [])))))  # older files do not tell


def _model(row: Row) -> str:
    """Return the model's name, its size where the row has it, and whether the command made its weights."""
    name, num = row["model"], row.get("parameters")
    size = "" if num is None else f"{num / 1e6:,.0f} M "
    is_made = name in NAMED or re.fullmatch(r"[0-9,]+", name) is not None  # as --shape takes them
    weights = f"{size}{'random ' * is_made}weights" if size or is_made else "size not known"
    return f"model {PurePath(name).name} ({weights})"


def title_of(shape: str) -> str:
    """Return the title of a shape's table.

    >>> title_of("256,128,8")
    'P=256 R=128 G=8'
    """
    parts = shape.split(",")
    return "P={} R={} G={}".format(*parts) if len(parts) == 3 else shape


def _table(title: str, columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> Table:
    used = {name: cell for name, cell in columns.items() if any(cell(row) for row in rows)}
    table = make_table(title, "provider", *used, left=(_NOT_MEASURED,))
    table.columns[0].no_wrap = True
    for row in rows:
        name = row["provider"]
        cells = (_SHOWN_AS.get(name, name), *(cell(row) for cell in used.values()))
        table.add_row(*map(escape, cells))  # "ours[flat]" is no markup of Rich
    return table


def cost_table(costs: Mapping[str, Cost]) -> Table:
    """Return the cost card."""
    names = ("sequences", "fed", "needed", "scored", "TFLOP", "GB", "at least, s", "bound")
    table = make_table("One call: tokens, operations, bytes, and the bound of this machine", "shape", *names)
    for shape, cost in costs.items():
        tokens = (cost.sequences, cost.fed_tokens, cost.computed_tokens, cost.scored_tokens)
        work = (_or_blank(cost.flop, 1e12), _or_blank(cost.bytes, 1e9), _or_blank(cost.least_s, 1))
        table.add_row(escape(shape), *(f"{number:,}" for number in tokens), *work, cost.bound)
    return table


def _or_blank(value: float | None, scale: float) -> str:
    return "" if value is None else f"{value / scale:.3g}"
