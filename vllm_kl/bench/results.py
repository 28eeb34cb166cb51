"""Makes the rows of a benchmark: one for each provider and shape, with all that is needed to judge it.

A row is a dict that JSON can hold. A value that was not measured is ``None``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_kl.bench.cost import Cost
from vllm_kl.bench.data_sheets import peak_flop_per_s
from vllm_kl.bench.floor import ENGINE, HEAD, PARTS, owner_of
from vllm_kl.bench.providers import num_gpus_of
from vllm_kl.bench.report import median_ratio, p20_p50_p80, ratio_of_medians, ratios_of_rounds
from vllm_kl.bench.run import Measured, Plan, kind_of
from vllm_kl.bench.traffic import Traffic
from vllm_kl.bench.types import Setup
from vllm_kl.errors import InputError, OptionError

Row = dict[str, Any]
# What two runs are compared by, and the numbers of which ratios can be made.
_COMPARED = ("tok_per_s", "ratio_to_torchrl", "fraction_of_floor", "max_abs_err")
_LEAST, _HUGE = 1e-100, 1e100
# In the order of a row. A provider without figures has its reason in "not_measured".
_FIGURES = (
    *("tok_per_s", "ratio_to_torchrl", "fraction_of_floor", "max_abs_err", "not_measured", "check"),
    *("fraction_of_floor_p20", "fraction_of_floor_p80"),
    *("s_p20", "s_p50", "s_p80", "seconds", "scored_tok_per_s", "computed_tok_per_s", "flop_per_s", "mfu"),
    *("no_mfu", "joules", "tok_per_joule", "ratios", "peak_bytes", "gpu_peak_bytes"),
)


def rows_of(plan: Plan, measured: Measured, model: str) -> list[Row]:
    """Return the rows, in the order of the shapes and the providers."""
    order = [*plan.providers]
    if "floor" in order:
        place = order.index("floor") + 1
        order[place:place] = PARTS
    common = _common(plan, measured, model)
    settings = {name: _settings(name, setup) for name, setup in plan.providers.items()}
    rows = []
    for traffic in plan.traffics:
        for name in order:
            if name in measured.seconds[traffic.name]:
                figures = _figures(measured, traffic, name) | _mfu(plan, measured, traffic, name)
            elif (reason := _why_not(measured, name)) is not None:
                figures = dict.fromkeys(_FIGURES) | {"not_measured": reason}
            else:  # not yet, or Ctrl-C came before
                continue
            what = {"provider": name, "shape": traffic.name, "unit": "tokens/s"}
            told = measured.told[traffic.name].get(name, {})
            lengths = _lengths(measured, traffic)
            rows.append(what | figures | lengths | told | settings[owner_of(name)] | common)
    return rows


def _why_not(measured: Measured, name: str) -> str | None:
    """Return why a provider has no figures; ``None``: it was not tried."""
    if name in measured.failures:
        return f"failed: {measured.failures[name]}"
    return measured.not_measured.get(name)


def _figures(measured: Measured, traffic: Traffic, name: str) -> Row:
    seconds, cost = measured.seconds[traffic.name], measured.costs[traffic.name]
    runs = seconds[name]
    p20, p50, p80 = p20_p50_p80(runs)
    ratios = {
        peer: _ratio(measured, peer, name)(others, runs)
        for peer, others in seconds.items()
        if peer not in PARTS
    }
    flop = _flop(cost, name)
    joules = measured.joules[traffic.name].get(name)
    return dict.fromkeys(_FIGURES) | {
        "tok_per_s": cost.fed_tokens / p50,
        "ratio_to_torchrl": ratios.get("torchrl"),
        "fraction_of_floor": ratios.get("floor"),
        "max_abs_err": measured.errors[traffic.name].get(name),
        "check": measured.checks.get(traffic.name),
        "s_p20": p20,
        "s_p50": p50,
        "s_p80": p80,
        "seconds": runs,
        "scored_tok_per_s": cost.scored_tokens / p50,
        "computed_tok_per_s": cost.computed_tokens / p50,
        "flop_per_s": None if flop is None else flop / p50,
        "joules": None if joules is None else statistics.median(joules),
        "tok_per_joule": None if not joules else cost.fed_tokens / statistics.median(joules),
        "ratios": ratios,
        **_spread(measured, traffic, name),
        **{name: value or None for name, value in measured.peaks.get(name, {}).items()},
    }


def _ratio(measured: Measured, *names: str) -> Callable[[Sequence[float], Sequence[float]], float]:
    """Return how to compare the seconds of two providers: by rounds if they took turns, else by medians."""
    return median_ratio if _took_turns(measured, *names) else ratio_of_medians


def _took_turns(measured: Measured, *names: str) -> bool:
    both = {owner_of(name) for name in names}
    return any(both <= {*group} for group in measured.groups)


def _spread(measured: Measured, traffic: Traffic, name: str) -> Row:
    """Return how far the fractions of the floor of single rounds are apart; nothing if there are no such."""
    seconds = measured.seconds[traffic.name]
    if "floor" not in seconds or owner_of(name) == "floor" or not _took_turns(measured, "floor", name):
        return {}
    p20, _, p80 = p20_p50_p80(ratios_of_rounds(seconds["floor"], seconds[name]))
    return {"fraction_of_floor_p20": p20, "fraction_of_floor_p80": p80}


def _mfu(plan: Plan, measured: Measured, traffic: Traffic, name: str) -> Row:
    """Return the share of the GPUs' data sheets, or the reason why there is none."""
    gpu = measured.facts["limits"].gpu
    flop = _flop(measured.costs[traffic.name], name)
    if gpu is None or flop is None:
        return {}
    peak = peak_flop_per_s(gpu, measured.facts["dtype"])
    owner = owner_of(name)
    num_gpus = num_gpus_of(kind_of(owner), plan.providers[owner])
    if peak is None:
        return {"no_mfu": f"the data sheet of {gpu} is not in vllm_kl/bench/data_sheets.py"}
    if num_gpus is None:
        return {"no_mfu": "Ray chooses the GPUs of replicas, so neither their number nor their kind is known"}
    seconds = statistics.median(measured.seconds[traffic.name][name])
    return {"mfu": flop / seconds / (num_gpus * peak)}


def _flop(cost: Cost, name: str) -> float | None:
    """Return the operations of a provider's call: each part of the floor has its own."""
    if cost.flop is None or cost.head_flop is None:
        return None
    return {HEAD: cost.head_flop, ENGINE: cost.flop - cost.head_flop}.get(name, cost.flop)


def _lengths(measured: Measured, traffic: Traffic) -> Row:
    """Return what was scored, which is the same for all providers."""
    cost = measured.costs[traffic.name]
    prompt, response, group = traffic.means
    return {
        "sequences": cost.sequences,
        "fed_tokens": cost.fed_tokens,
        "computed_tokens": cost.computed_tokens,
        "scored_tokens": cost.scored_tokens,
        "prompt_tokens": prompt,
        "response_tokens": response,
        "group": group,
    }


def _settings(name: str, setup: Setup) -> Row:
    """Return the settings of ours and of the floor; other ways have their own (``None``)."""
    kind = kind_of(name)
    return {
        "share_prefix": setup.share_prefix if kind in ("ours", "floor") else None,
        "replicas": setup.replicas if kind == "ours" else None,
    }


def _common(plan: Plan, measured: Measured, model: str) -> Row:
    """Return what all rows of a run share."""
    size, setup = measured.facts["size"], next(iter(plan.providers.values()))
    return {
        "question": "readout",
        "model": model,
        "parameters": None if size is None else size["parameters"],
        "dtype": measured.facts["dtype"],
        "engine": dict(setup.engine),
        "rounds": plan.rounds,
        "peer_rounds": plan.peer_rounds,
        "groups": measured.groups,
        **measured.machine,
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, or of ``results.jsonl`` in a folder.

    Raises:
        OptionError: the file cannot be read.
        InputError: a line is no row of a benchmark; the message names the line.
    """
    file = path / "results.jsonl" if path.is_dir() else path
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:  # ValueError: it is not UTF-8, or no path has this name
        raise OptionError(f"{path}: expected a file of results, or the folder of --out: {error}") from error
    rows = []
    for n, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not {"provider", "shape", "tok_per_s"} <= row.keys():
            raise InputError(f"{file}, line {n}: no row of vllm-kl bench, but {line[:60]!r}")
        if not all(isinstance(row[name], str) and row[name].isprintable() for name in ("provider", "shape")):
            raise InputError(f"{file}, line {n}: provider and shape are no text of one line: {line[:60]!r}")
        if not isinstance(row.get("hardware"), dict | None):
            raise InputError(f"{file}, line {n}: hardware is no object, but {str(row['hardware'])[:60]!r}")
        for name in _COMPARED:
            if not _is_figure(row.get(name), least=0 if name == "max_abs_err" else _LEAST):
                told = str(row[name])[:60]
                raise InputError(f"{file}, line {n}: {name} is {told!r}, no number that can be compared")
        rows.append(row)
    return rows


def _is_figure(value: object, least: float) -> bool:
    """Return whether a value of a row can be compared: ``None``, or a number of which ratios can be made."""
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < _HUGE
