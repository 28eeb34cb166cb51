"""Compares two runs of the benchmark row by row: is the second one slower, or less exact?

Seconds of two machines cannot be compared. Where the hardware differs, or is not known, the fraction of the
floor is compared, which each run has measured within itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from vllm_kl.bench.floor import owner_of
from vllm_kl.errors import OptionError

Figure = Literal["tok_per_s", "ratio_to_torchrl", "fraction_of_floor"]
Row = dict[str, Any]
_SAME = ("model", "parameters", "dtype", "fed_tokens", "share_prefix", "replicas", "engine", "readout")
_TOLD_LATER = ("instructions", "threads")
_EXACT = 1e-5  # nats; errors below it are rounding of float32
_MOST_ERROR = 2.0  # times the error before


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One provider on one shape, in both runs."""

    provider: str
    shape: str
    figure: str
    before: float
    after: float | None  # None: the second run has no such row
    is_worse: bool
    message: str


def figure_for(before: Sequence[Row], after: Sequence[Row]) -> Figure:
    """Return the figure that two runs can be compared by."""
    machines = [row.get("hardware") or {} for row in (*before, *after)]
    first = machines[0] if machines else {}
    is_one = all(one and all(_is_same(one, first, part) for part in one.keys() | first) for one in machines)
    return "tok_per_s" if machines and is_one else "fraction_of_floor"


def _is_same(one: Row, other: Row, part: str) -> bool:
    """Return whether a part of two machines is the same, as far as files of earlier versions tell."""
    is_told = part not in _TOLD_LATER or part in one.keys() & other
    return not is_told or one.get(part) == other.get(part)


def compare(
    before: Sequence[Row], after: Sequence[Row], *, tolerance: float, figure: Figure
) -> list[Difference]:
    """Return one difference for each row of the first run that has the figure.

    Args:
        tolerance: a figure may be smaller by this share: 0.1 allows 0.9 of it.

    Raises:
        OptionError: the first run has no row with this figure, or the runs measured different things.
    """
    _check_same(before, after)
    then = {(row["provider"], row["shape"]): row for row in after}
    pairs = [
        (row, then.get((row["provider"], row["shape"])))
        for row in before
        if row.get(figure) is not None and owner_of(row["provider"]) != "floor"
    ]
    if not pairs:
        raise OptionError(f"the first run {_why_none(before, figure)}")
    return [_difference(old, new, tolerance, figure) for old, new in pairs]


def _why_none(rows: Sequence[Row], figure: Figure) -> str:
    """Return why no row of a run can be compared, and what to do."""
    if not rows:
        return "has no rows: give the folder of --out, or the results.jsonl, of a run that measured something"
    if all(owner_of(row["provider"]) == "floor" for row in rows):
        return "measured the floor alone, and nothing to compare: run it with --providers ours floor"
    needed = {"ratio_to_torchrl": " torchrl", "fraction_of_floor": " floor"}.get(figure, "")
    return f"has no {figure}: run it with --providers ours{needed}"


def _check_same(before: Sequence[Row], after: Sequence[Row]) -> None:
    """Refuse runs of other things: a row of one says nothing about a row of the other."""
    then = {(row["provider"], row["shape"]): row for row in after}
    for row in before:
        other = then.get((row["provider"], row["shape"]), {})
        for name in _SAME:
            given = _setting(row, name), _setting(other, name)
            if None not in given and given[0] != given[1]:
                raise OptionError(
                    f"{row['provider']}, {row['shape']}: {name} is {given[0]!r} in the first run and "
                    f"{given[1]!r} in the second: compare runs of the same model and options"
                )


def _setting(row: Row, name: str) -> Any:
    """Return what a run was told. Of a model's path only the last part: folders differ between machines."""
    value = row.get(name)
    return PurePath(value).name if name == "model" and isinstance(value, str) else value


def _difference(old: Row, new: Row | None, tolerance: float, figure: Figure) -> Difference:
    before = old[figure]
    after = None if new is None else new.get(figure)
    where = f"{old['provider']}, {old['shape']}"
    if new is None or after is None:
        is_worse, message = True, f"{where}: {figure} was {before:,.4g}, and the second run has none"
    else:
        share = after / before
        is_worse = share < 1 - tolerance
        verdict = "worse" if is_worse else "within the tolerance" if share <= 1 + tolerance else "better"
        message = (
            f"{where}: {figure} {before:,.4g} -> {after:,.4g}, {share:.3f} of before; {verdict}, tolerance "
            f"{tolerance:g}"
        )
        if (told := _error_grew(old, new)) is not None:
            is_worse, message = True, f"{message}; {told}"
    return Difference(
        provider=old["provider"],
        shape=old["shape"],
        figure=figure,
        before=before,
        after=after,
        is_worse=is_worse,
        message=message,
    )


def _error_grew(old: Row, new: Row) -> str | None:
    before, after = old.get("max_abs_err"), new.get("max_abs_err")
    if before is None:
        return None
    if after is None:
        return f"max_abs_err was {before:.1e} nats, and the second run was not checked"
    if after <= max(_EXACT, _MOST_ERROR * before):
        return None
    return f"max_abs_err {before:.1e} -> {after:.1e} nats, more than {_MOST_ERROR:g} times before"
