"""Brings the pages that lie outside of docs/ into the site, and mends the links between them and docs/.

mkdocs calls the two functions by their names (``hooks`` in mkdocs.yml).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# File of the repository: its page in the site.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/LOG.md": "benchmarks-log.md",
    "benchmarks/results/soak-amx.png": "soak-amx.png",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and their pictures."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to the page of a file. A file that has no page is named, not linked."""
    source = {to: of for of, to in OUTSIDE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def mended(link: re.Match[str]) -> str:
        mark, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        if "://" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        to = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if to is not None:
            return f"{mark}[{text}]({to}{anchor})"
        return text if (ROOT / path).exists() and not mark else link[0]

    return _LINK.sub(mended, markdown)
