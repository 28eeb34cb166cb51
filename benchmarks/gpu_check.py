"""Runs all checks that need a GPU, and writes tests, errors, speed and memory to one Markdown file.

    make gpu-check                             # an hour on one H100; writes gpu-check.md
    make gpu-check ARGS="--parts tests readout-0.5B"
    python benchmarks/gpu_check.py --small     # with tiny models, also on a CPU: two minutes

    tests           pytest -m gpu
    architectures   bench_architectures.py: float32 and bfloat16 against float64
    lm-head         bench_lm_head.py: the kernel beside the plain product
    readout-0.5B    vllm-kl bench: ours, TorchRL's way, vLLM's own, transformers, TRL's fused head and SGLang
    readout-7B      if they are installed, and the floor of prefill; with peak memory

Each part runs as its own command. If a part fails or takes longer than --timeout, the file gets the end of
its log, the next part starts, and the exit status becomes 1. The file is written anew after every part.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from rich.markup import escape

from vllm_kl.bench.report import as_markdown, machine, make_table
from vllm_kl.environment import on_a_gpu

ROOT = Path(__file__).parents[1]
_MOST_LINES = 30  # lines of a failed part's log


def commands(small: bool) -> dict[str, list[str]]:
    """Return names and commands of the parts, without the option that names the output file."""
    script = lambda name: [sys.executable, str(ROOT / "benchmarks" / name)]  # noqa: E731
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    bench = [sys.executable, "-c", "from vllm_kl.cli import main; main()", "bench", "--shape"]
    if small:
        few = ["--providers", "ours", "flat", "transformers", "floor", "--sequences", "8"]
        rounds = ["--rounds", "2", "--peer-rounds", "2"]
        return {
            "tests": [*tests, "tests/test_gpu.py"],
            "architectures": [*script("bench_architectures.py"), "--names", "llama"],
            "lm-head": [*script("bench_lm_head.py"), "--sizes", "64,64", "--vocab", "1000"],
            "readout-tiny": [*bench, "tiny", "--shapes", "64,16,4", *few, *rounds],
        }
    shapes = ["--shapes", "1024,1024,16", "4096,512,8", "--readouts", "auto", "flat"]
    return {
        "tests": [*tests, "tests"],
        "architectures": script("bench_architectures.py"),
        "lm-head": script("bench_lm_head.py"),
        **{f"readout-{model}": [*bench, model, *shapes] for model in ("0.5B", "7B")},
    }


@dataclass(frozen=True)
class Outcome:
    """The result of a part."""

    markdown: str  # tables of the part
    error: str  # empty if the part passed
    wall_s: float


def run(name: str, command: list[str], folder: Path, timeout_s: float) -> Outcome:
    """Run a part; at its end, kill all processes that it started."""
    tables, log = folder / f"{name}.md", folder / f"{name}.log"
    is_pytest = "pytest" in command
    target = [f"--junitxml={tables}"] if is_pytest else ["--markdown", str(tables)]
    if "bench" in command:
        tables = folder / name / "bench.md"
        target = ["--out", str(tables.parent)]
    began = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *target],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = f"exit status {process.wait(timeout_s)}"
        except subprocess.TimeoutExpired:
            status = f"not done after {timeout_s:,.0f} s"
        finally:
            end_group(process.pid)
            process.wait()
    markdown = tables.read_text() if tables.exists() else ""
    if is_pytest and markdown:
        markdown = tests_table(markdown)
        if on_a_gpu() and "| passed " not in markdown:
            status = "no test ran: is this a CUDA build of torch?"
    lines = log.read_text(errors="replace").splitlines()
    error = "" if status == "exit status 0" else "\n".join([status, *lines[-_MOST_LINES:]])
    return Outcome(markdown, error, time.monotonic() - began)


def end_group(pid: int) -> None:
    """Kill the processes that a part left, because its engines would hold GPU memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def tests_table(junit: str) -> str:
    """Return pytest's report as a Markdown table of one row per test."""
    table = make_table("", "test", "outcome", "s", "why", left=("outcome", "why"))
    for case in ElementTree.fromstring(junit).iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        why = "" if bad is None else (bad.get("message") or "").strip().split("\n")[0][:300]
        cells = (
            case.get("name"),
            "passed" if bad is None else bad.tag,
            f"{float(case.get('time')):.1f}",
            why,
        )
        table.add_row(*(escape(cell.replace("|", "/")) for cell in cells))
    return as_markdown(table)


def written(outcomes: dict[str, Outcome], num_parts: int) -> str:
    """Return the text of the file."""
    summary = make_table("", "part", "outcome", "s", left=("outcome",))
    for name, outcome in outcomes.items():
        summary.add_row(name, "failed" if outcome.error else "passed", f"{outcome.wall_s:,.0f}")
    facts = make_table("", "machine", "", left=("",))
    known = machine()
    for fact in {**known.pop("hardware"), **known.pop("versions"), **known}.items():
        facts.add_row(*fact)
    parts = [
        f"# GPU check: {len(outcomes)} of {num_parts} parts done",
        as_markdown(facts),
        as_markdown(summary),
    ]
    for name, outcome in outcomes.items():
        parts += [f"## {name}", outcome.markdown]
        parts += [f"Failed:\n\n```\n{outcome.error}\n```"] if outcome.error else []
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny models, few providers")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="run only these parts")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.md"))
    parser.add_argument(
        "--timeout", type=float, default=3600, metavar="S", help="time limit of each part; default 3600"
    )
    args = parser.parse_args()
    if not (args.small or on_a_gpu()):
        parser.error("there is no NVIDIA GPU here. --small runs the same way on a CPU")
    todo = commands(args.small)
    if unknown := set(args.parts or ()) - todo.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(todo)}")
    todo = {name: todo[name] for name in args.parts or todo}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # SystemExit ends the running part
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in todo.items():
            print(f"{name}: running", flush=True)
            outcomes[name] = run(name, command, Path(folder), args.timeout)
            print(
                f"{name}: {'failed' if outcomes[name].error else 'passed'}, {outcomes[name].wall_s:,.0f} s",
                flush=True,
            )
            args.out.write_text(written(outcomes, len(todo)))
    print(f"written to {args.out}")
    sys.exit(any(outcome.error for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
