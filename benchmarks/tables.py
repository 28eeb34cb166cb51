"""Writes the tables of README.md and benchmarks/README.md from the files of results in benchmarks/results/.

    python benchmarks/tables.py           # writes the tables anew
    python benchmarks/tables.py --check   # exit status 1: a table is not that of its file, or is nowhere

A table stands between two comments, each at the end of a line; the first names its file and its kind:

    Some text. <!-- results: readout-zen3.jsonl, whole -->

    | the table | ... and what is written here is replaced. <!-- end of results -->

whole: all providers and columns of each shape. headline: times as fast as the other ways. A file is
``results.jsonl`` of ``vllm-kl bench --out``. A file that another script has written with ``--markdown`` has
no kind, and stands on the page as it is:

    <!-- results: lm-head-h200.md -->
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_kl.bench.report import as_markdown, make_table
from vllm_kl.bench.results import read_rows
from vllm_kl.bench.tables import caption, result_tables, title_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
_BLOCK = re.compile(
    r"(<!-- results: ([\w.-]+)(?:, (\w+))? -->\n\n)(?:(?!<!-- results:).)*?( <!-- end of results -->)",
    flags=re.S,
)
Rows = Sequence[dict[str, Any]]


def whole(rows: Rows) -> str:
    return "\n".join(map(as_markdown, result_tables(rows))) + "\n" + _wrapped(caption(rows))


def headline(rows: Rows) -> str:
    all_names = {
        "torchrl": "TorchRL's `vLLMWrapper`",
        "flat": "vLLM's leanest way, `flat`",
        "transformers": "transformers, padded",
    }
    names = {key: name for key, name in all_names.items() if key in _ours(rows)[0]["ratios"]}
    table = make_table(
        "", "", *(f"times as fast as {name}" for name in names.values()), "of the floor's speed"
    )
    for row in _ours(rows):
        ratios = (row["ratios"][name] for name in names)
        table.add_row(
            title_of(row["shape"]),
            *(_two_digits(ratio) for ratio in ratios),
            f"{row['fraction_of_floor']:.2f}",
        )
    errors = [row["max_abs_err"] for row in rows if row["max_abs_err"] is not None]
    layers = "" if rows[0]["dtype"] == "float32" else f", those of layers in {rows[0]['dtype']}"
    found = f"Errors of all ways: at most {min(errors):.1g} to {max(errors):.1g} nats{layers}."
    return f"{as_markdown(table)}\n{_wrapped(f'{caption(rows)}. {found}')}"


def as_written(text: str) -> str:
    """Return the tables of a script's Markdown, and its lines wrapped."""
    lines = text.strip().splitlines()
    return "\n".join(line if line.startswith("|") else _wrapped(line) for line in lines)


KINDS: dict[str, Callable[[Rows], str]] = {"whole": whole, "headline": headline}


def _ours(rows: Rows) -> Rows:
    return [row for row in rows if row["provider"] == "ours"]


def _two_digits(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=115, break_long_words=False, break_on_hyphens=False)


def with_tables(text: str) -> str:
    """Return a page with every table made anew from its file."""

    def table(block: re.Match[str]) -> str:
        file = RESULTS / block[2]
        if (block[3] is None) != (file.suffix == ".md"):
            raise SystemExit(f"{block[1].strip()}: a kind stands after a .jsonl, and after no .md")
        made = as_written(file.read_text()) if block[3] is None else KINDS[block[3]](read_rows(file))
        return f"{block[1]}{made}{block[4]}"

    return _BLOCK.sub(table, text)


def without_table() -> list[str]:
    """Return the names of files of results whose table no page has."""
    named = {block[2] for page in PAGES for block in _BLOCK.finditer(page.read_text())}
    return sorted({file.name for file in RESULTS.iterdir() if file.suffix in (".md", ".jsonl")} - named)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    stale = [page for page in PAGES if with_tables(page.read_text()) != page.read_text()]
    for page in stale:
        if args.check:
            print(f"{page.relative_to(ROOT)}: a table is not that of its file: python benchmarks/tables.py")
        else:
            page.write_text(with_tables(page.read_text()))
    unused = without_table()
    for name in unused:
        print(f"{name}: no page has its table; a page needs <!-- results: {name} -->")
    sys.exit(bool(args.check and (stale or unused)))


if __name__ == "__main__":
    main()
