"""Which room may import which. A room is a file or folder directly in ``vllm_kl/``.

The floor of a room is one above all rooms that it imports.
"""

from __future__ import annotations

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

import vllm_kl

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.joinpath("vllm_kl").rglob("*.py"))
APPS = {"bench", "demo", "view", "cli", "doctor"}


@cache
def imported_by(path: Path) -> set[tuple[str, ...]]:
    """Return the modules that a file imports, at its top or in a function: the parts of each one's name."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {tuple(name.split(".")) for name in names}


def told(name: tuple[str, ...]) -> tuple[str, ...]:
    """Return the module behind a public name: ``from vllm_kl import RetrieveKL`` loads its module."""
    home = vllm_kl._MODULE_OF.get(name[1]) if name[0] == "vllm_kl" and len(name) == 2 else None
    return name if home is None else ("vllm_kl", *home.split("."), name[1])


def names_in(module: Path) -> set[str]:
    """Return what a file has at its top, and a folder: names that another file can import from it."""
    if module.is_dir():
        inside = {path.stem for path in module.iterdir()}
        return inside | (names_in(module / "__init__.py") if "__init__" in inside else set())
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "vllm_kl").parts[0].removesuffix(".py")


def rooms() -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if room_of(path) != "__init__":
            below = {
                name[1] for name in map(told, imported_by(path)) if name[0] == "vllm_kl" and len(name) > 1
            }
            graph.setdefault(room_of(path), set()).update(below - {room_of(path), "__version__"})
    return graph


ALLOWED = {
    "errors": set(),
    "types": set(),
    "columns": set(),
    "environment": set(),
    "fingerprint": set(),
    "lifetime": set(),
    "mkl": set(),
    "routing": set(),
    "ray_address": {"errors"},
    "arrays": {"errors"},
    "client": {"errors", "arrays", "columns", "routing"},
    "batch": {"errors", "types", "lifetime"},
    "exact_kl": {"errors", "mkl"},
    "kl": {"errors", "types", "mkl", "batch"},
    "diagnostics": {"errors", "types", "batch", "kl"},
    "importance": {"errors", "types", "batch", "kl"},
    "plugin": {"errors", "types", "columns", "environment", "lifetime", "mkl"},
    "weights": {"errors", "types", "fingerprint", "lifetime", "batch", "plugin"},
    "engines": {
        "errors",
        "types",
        "columns",
        "environment",
        "lifetime",
        "ray_address",
        "routing",
        "client",
        "plugin",
        "weights",
    },
}


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_rooms_below_it(room):
    assert rooms()[room] <= ALLOWED[room]


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("torchrl", {"batch", "transforms"}),
        ("ray", {"transforms", "weights", "engines", "offline", "serving"}),
        ("vllm", {"engines", "plugin", "weights", "transforms"}),
    ],
)
def test_a_package_is_imported_in_its_rooms_only(package, homes):
    users = {room_of(path) for path in FILES if any(name[0] == package for name in imported_by(path))}
    assert users - APPS <= homes


def test_of_the_engines_only_the_replicas_import_ray():
    users = {path.parent.name for path in FILES if any(name[0] == "ray" for name in imported_by(path))}
    assert "replicas" in users
    assert "engines" not in users


def test_there_is_no_circle_and_there_are_at_most_nine_floors():
    graph, floors = rooms(), {}
    for room in graphlib.TopologicalSorter(graph).static_order():  # raises where there is a circle
        floors[room] = 1 + max((floors[below] for below in graph.get(room, ())), default=0)
    assert max(floors.values()) <= 9, floors


def test_no_file_imports_itself_through_others():
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
    }

    def file_of(name: tuple[str, ...]) -> str:
        """Return the longest beginning of a name that is a file: the rest is what is in it."""
        return next(
            (file for n in (len(name), len(name) - 1) if (file := ".".join(name[:n])) in files), "vllm_kl"
        )

    graph = {
        file: {file_of(name) for name in map(told, imported_by(path))} - {"vllm_kl"}
        for file, path in files.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_functions_stay_small():
    """A function is a screen: at most sixty lines, its signature included and its docstring not."""
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) else None
                num_lines = node.end_lineno - node.lineno + 1
                num_lines -= 0 if docstring is None else docstring.end_lineno - docstring.lineno + 1
                if num_lines > 60:
                    long.append(f"{path.name}: {node.name}")
    assert not long


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tests", "vllm_kl"])
def test_what_files_import_from_this_project_is_there(folder):
    """No test starts the long scripts, and a move of a module must not break them."""
    for path in ROOT.joinpath(folder).rglob("*.py"):
        for name in map(told, imported_by(path)):
            if name[0] in ("vllm_kl", "tests", "benchmarks") and len(name) > 1:
                module = ROOT.joinpath(*name[:-1])
                module = module if module.is_dir() else module.with_suffix(".py")
                there = names_in(module) if module.exists() else set()
                assert name[-1] in there, f"{path} imports {'.'.join(name)}"
