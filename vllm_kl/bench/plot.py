"""Draws the results: throughput against the group and against the lengths, and the fraction of the floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_kl.bench.floor import PARTS

Row = Mapping[str, Any]


def plot(path: Path, rows: Sequence[Row]) -> Path:
    """Write a PNG of the rows; needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["tok_per_s"] is not None]
    figure = Figure(figsize=(12, 4), layout="constrained")
    groups, lengths, floors = figure.subplots(1, 3)
    _throughput(groups, rows, "responses of a prompt (G)", lambda row: row["group"])
    _throughput(
        lengths, rows, "prompt : response (P:R)", lambda row: row["prompt_tokens"] / row["response_tokens"]
    )
    lengths.legend(fontsize=8)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = [name for name in _names(rows) if name != "floor"] or ["floor"]
    for n, name in enumerate(names):
        own = [row for row in rows if row["provider"] == name and row.get("fraction_of_floor") is not None]
        places = [shapes.index(row["shape"]) + (n + 0.5) / len(names) * 0.8 - 0.4 for row in own]
        heights = [row["fraction_of_floor"] for row in own]
        floors.bar(places, heights, 0.8 / len(names), label=name, color=_color(rows, name))
    floors.set_xticks(range(len(shapes)), shapes, fontsize=7, rotation=15)
    floors.axhline(1, color="gray", linewidth=0.8)
    floors.set_ylabel("fraction of the floor's speed")
    figure.savefig(path, dpi=120)
    return path


def _names(rows: Sequence[Row]) -> list[str]:
    return [name for name in dict.fromkeys(row["provider"] for row in rows) if name not in PARTS]


def _color(rows: Sequence[Row], name: str) -> str:
    """Return the color of a provider, in all parts of the picture."""
    return f"C{_names(rows).index(name)}"


def _throughput(axes: Any, rows: Sequence[Row], label: str, place: Callable[[Row], float]) -> None:
    for name in _names(rows):
        points = sorted((place(row), row["tok_per_s"]) for row in rows if row["provider"] == name)
        color = _color(rows, name)
        axes.plot(*zip(*points, strict=True), "o", markersize=5, alpha=0.8, color=color, label=name)
    axes.set_xscale("log")
    ticks = sorted({place(row) for row in rows})
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("tokens fed per second")
    axes.grid(alpha=0.3)
