"""The command ``vllm-kl``. Arguments only: the work is in ``demo`` and ``doctor``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Reference log-probs and per-token KL for RL post-training on TorchRL, served by vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON on standard output.")]


@app.command()
def demo(
    batches: Annotated[int, typer.Option(min=1, help="Batches to collect.")] = 8,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 8,
    group: Annotated[int, typer.Option(min=1, help="Responses per prompt.")] = 8,
    coeff: Annotated[float, typer.Option(min=0.0, help="Coefficient of the KL in the reward.")] = 0.1,
    pad_output: Annotated[bool, typer.Option(help="Dense padded tensors instead of ragged ones.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of problems and sampling.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for rollouts and picture.")] = Path("demo_out"),
    as_json: Json = False,
) -> None:
    """Train a small model on arithmetic (cached), collect GRPO groups, and check every KL against float64."""
    # Read by vLLM, torch and torchrl when they are imported, so before the first import of any.
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "RL_LOGGING_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)
    from vllm_kl.demo.run import DemoConfig, run

    console = Console(stderr=as_json)
    config = DemoConfig(
        batches=batches, prompts=prompts, group=group, coeff=coeff, pad_output=pad_output, seed=seed, out=out
    )
    figures = run(config, console)
    console.print(f"wrote {' and '.join(figures['files'])}", highlight=False)
    if as_json:
        typer.echo(json.dumps(figures))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check versions, hardware and known clashes; exit with 1 if anything would fail."""
    from vllm_kl.doctor import Status, examine, print_findings

    findings = examine()
    print_findings(findings, Console(stderr=as_json))
    failed = any(finding.status is Status.FAIL for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "findings": [finding.as_dict() for finding in findings]}))
    raise typer.Exit(code=int(failed))


def main() -> None:
    """Entry point of the command ``vllm-kl``."""
    app()
