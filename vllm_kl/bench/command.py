"""The command ``vllm-kl bench``: its options, its progress and its exit codes.

The options are read without torch, vLLM or Ray, but for an --engine name that only vLLM may know. The
processes of the benchmark load them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from vllm_kl.bench import models, traffic
from vllm_kl.bench.compare import Figure, compare, figure_for
from vllm_kl.bench.providers import check_names, usable
from vllm_kl.bench.report import Report
from vllm_kl.bench.results import read_rows, rows_of, write_rows
from vllm_kl.bench.run import Bench, Measured, Plan, kind_of
from vllm_kl.bench.tables import caption, cost_table, result_tables
from vllm_kl.bench.types import Setup
from vllm_kl.engines.arguments import parse_engine_options
from vllm_kl.engines.options import NAMES, check_options
from vllm_kl.engines.options import check_names as check_engine_options
from vllm_kl.environment import on_a_gpu, quiet_bench
from vllm_kl.errors import InputError, OptionError, VLLMKLError

FAILED, WORSE = 1, 3  # exit codes; 2 is typer's, for an option that is wrong
_READOUTS = ("auto", "pooling", "token_ids", "flat")
_WIDTH = 132
# Arguments of VLLMScorer that are no options of an engine, and what to give instead.
_NO_ENGINE_OPTIONS = {
    "dtype": "give --dtype, which all providers take",
    "readout": "give --readouts",
    "share_prefix": "give --no-share",
    "replicas": "give --replicas",
    "devices": "set CUDA_VISIBLE_DEVICES, which all providers see",
    **dict.fromkeys(
        ("temperature", "canary", "lora_request", "placeholders", "timeout_s"),
        "it is an argument of VLLMScorer, no option of vLLM. Leave it out",
    ),
}
_MANY = ("--shapes", "--providers", "--readouts")  # options that take several values


class _Group(TyperGroup):
    """Lets options take several values: ``--shapes A B`` is ``--shapes A --shapes B``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread, option, is_first = [], "", False
        for argument in args:
            name, equals, _ = argument.partition("=")
            if argument.startswith("-"):
                option, is_first = (name, not equals) if name in _MANY else ("", False)
            elif option and not is_first:
                spread.append(option)
            else:
                is_first = False
            spread.append(argument)
        return super().parse_args(ctx, spread)


bench = typer.Typer(cls=_Group, invoke_without_command=True, no_args_is_help=True, add_completion=False)

ModelName = Annotated[str | None, typer.Option(help="Path or name of the model to score with.")]
Shape = Annotated[
    str | None,
    typer.Option(
        help="Instead of --model: a model with random weights, hidden,layers,vocab such as 512,6,32000; or "
        f"{', '.join(models.NAMED)}."
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        help="P,R,G [P,R,G ...]: tokens of a prompt, tokens of a response, responses of a prompt; default: "
        "256,128,8."
    ),
]
Lengths = Annotated[
    Path | None,
    typer.Option(
        help='Instead of --shapes: real lengths, JSON lines such as {"prompt": 512, "responses": [120, 80]}.'
    ),
]
NumSequences = Annotated[
    int | None,
    typer.Option(
        min=1, max=1_000_000, help="Sequences of one call with --shapes, in whole groups; default: 32."
    ),
]
Providers = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME [NAME ...]: ours torchrl flat token_ids sglang transformers trl floor, or module:function "
        "of your own; default: all that this machine can run."
    ),
]
Readouts = Annotated[
    list[str] | None,
    typer.Option(help="NAME [NAME ...] of ours: auto pooling token_ids flat; default: auto."),
]
NoShare = Annotated[
    bool, typer.Option("--no-share", help="Ours and the floor compute the prompt of each response anew.")
]
Replicas = Annotated[int, typer.Option(min=1, help="Engines of ours; more than 1 need Ray Serve.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32; auto: the model's own.")]
Engine = Annotated[list[str] | None, typer.Option(help="NAME=VALUE: an engine option of vLLM. Repeatable.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed calls of ours and of the floor.")]
PeerRounds = Annotated[int, typer.Option(min=1, help="Timed calls of the other providers, which are slow.")]
Out = Annotated[Path | None, typer.Option(help="Folder for results.jsonl, bench.md, bench.png and the logs.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on standard output.")]


@bench.callback()
def measure(
    context: typer.Context,
    model: ModelName = None,
    shape: Shape = None,
    shapes: Shapes = None,
    lengths: Lengths = None,
    sequences: NumSequences = None,
    providers: Providers = None,
    readouts: Readouts = None,
    no_share: NoShare = False,
    replicas: Replicas = 1,
    dtype: Dtype = "auto",
    engine: Engine = None,
    rounds: Rounds = 5,
    peer_rounds: PeerRounds = 3,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast log-probs of a model are read here, by this package and by other ways.

    Log-probs are checked before anything is timed. Exit codes: 0, ours and all providers that were named were
    measured, as far as they are installed and this machine can run them; 1, one of them failed, the others
    were measured; 2, an option or a file is wrong.
    """
    if context.invoked_subcommand is not None:
        _refuse_given(context)
        return
    quiet_bench()
    with _told_errors(), tempfile.TemporaryDirectory(prefix="vllm_kl_bench_") as home:
        traffics = _traffics(shapes, lengths, sequences)
        _check_installed()
        setup = _setup(model, shape, dtype, engine, traffics, Path(home))
        names = _provider_names(providers, setup.device)
        _check_of_ours(names, readouts, no_share, replicas)
        setup = dataclasses.replace(setup, share_prefix=not no_share, replicas=replicas)
        plan = Plan(
            setup=setup,
            traffics=traffics,
            providers=_settings(names, readouts or ["auto"], setup),
            rounds=rounds,
            peer_rounds=min(rounds, peer_rounds),
            log_folder=_log_folder(out, Path(home)),
            are_asked_for=bool(providers),
        )
        figures = _run(plan, shape or str(model), out, as_json)
    if as_json:
        typer.echo(json.dumps(figures))
    raise typer.Exit(FAILED if _is_failed(plan, figures["failures"]) else 0)


def _refuse_given(context: typer.Context) -> None:
    """Refuse options of a measurement that stand before another command."""
    given = (one for one in context.params if context.get_parameter_source(one).name != "DEFAULT")
    if (name := next(given, None)) is not None:
        with _told_errors():
            option = "--json" if name == "as_json" else f"--{name.replace('_', '-')}"
            raise OptionError(f"{option} has no effect before {context.invoked_subcommand}")


def _is_failed(plan: Plan, failures: Mapping[str, str]) -> bool:
    """Return whether one of those failed that the user wants: ours, those that were named, or the run."""
    return any(
        plan.are_asked_for or name not in plan.providers or kind_of(name) == "ours" for name in failures
    )


def _run(plan: Plan, model: str, out: Path | None, as_json: bool) -> dict[str, Any]:
    """Measure, print and write; return the figures of ``--json``."""
    console = _console(is_error=True)
    for line in _before(plan, out):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    measured = _measured(plan, model, out, console)
    rows = rows_of(plan, measured, model)
    _keep(out, rows)
    file = None if out is None else out / "bench.md"
    report = Report(file, console=console if as_json else _console(is_error=False))
    for table in result_tables(rows):
        report.table(table)
    for name, error in measured.failures.items():
        report.line(f"{name} failed: {error}")
    for name, reason in measured.not_measured.items():
        report.line(f"{name} is not measured: {reason}")
    for reason in dict.fromkeys(row["no_mfu"] for row in rows if row.get("no_mfu")):
        report.line(f"no MFU: {reason}")
    report.line(caption(rows))
    files = [] if out is None else _draw(out, rows, console)
    return {
        "results": rows,
        "failures": measured.failures,
        "not_measured": measured.not_measured,
        "costs": {name: dataclasses.asdict(cost) for name, cost in measured.costs.items()},
        "files": files,
    }


def _measured(plan: Plan, model: str, out: Path | None, console: Console) -> Measured:
    """Run the plan, and show its progress."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=Bench.num_steps(plan))

        def tell_step(what: str, num: int) -> None:
            progress.update(task, description=what, advance=num)
            if not console.is_terminal:  # a log gets lines instead of a bar
                passed = f"{time.monotonic() - began:7.1f} s"
                console.print(f"{passed}  {what}", highlight=False, markup=False, soft_wrap=True)

        return Bench(
            plan,
            on_costs=lambda found: _print_costs(found, model, console),
            on_shape=lambda found: _keep(out, rows_of(plan, found, model)),
            on_line=lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
            on_step=tell_step,
        ).run()


def _before(plan: Plan, out: Path | None) -> Iterator[str]:
    """Yield what a user should know before anything starts."""
    yield f"providers: {', '.join(plan.providers)}"
    if not plan.are_asked_for:
        yield "the other ways take most of the time: --providers ours floor is the quick run without them"
    if out is None:
        yield "nothing is kept but this output: --out FOLDER keeps rows, tables, a picture and logs"


def _print_costs(measured: Measured, model: str, console: Console) -> None:
    console.print(cost_table(measured.costs))
    size, limits = measured.facts["size"], measured.facts["limits"]
    weights = "size not known" if size is None else f"{size['parameters'] / 1e6:,.1f} M weights"
    console.print(
        f"{model}: {weights}, {measured.facts['dtype']}. Measured here: a product of matrices "
        f"{limits.flop_per_s / 1e12:.3g} TFLOP/s, a copy {limits.bytes_per_s / 1e9:.3g} GB/s",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _keep(out: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows that are known, so that they stay, whatever ends the command later.

    The tables and the picture of an earlier run go: they are not of these rows.
    """
    if out is not None:
        write_rows(out / "results.jsonl", rows)
        for name in ("bench.md", "bench.png"):
            out.joinpath(name).unlink(missing_ok=True)


def _draw(out: Path, rows: Sequence[dict[str, Any]], console: Console) -> list[str]:
    """Draw the picture; return all files that were written."""
    files = [str(out / "results.jsonl"), str(out / "bench.md")]
    is_measured = any(row["tok_per_s"] is not None for row in rows)
    if is_measured and importlib.util.find_spec("matplotlib") is not None:
        from vllm_kl.bench.plot import plot

        files.append(str(plot(out / "bench.png", rows)))
    elif is_measured:
        console.print("no picture without matplotlib: pip install 'vllm-kl\\[plot]'")
    console.print(f"wrote {', '.join(files)}", highlight=False, markup=False, soft_wrap=True)
    return files


def _traffics(
    shapes: Sequence[str] | None, lengths: Path | None, num_sequences: int | None
) -> list[traffic.Traffic]:
    if lengths is not None:
        if shapes:
            raise OptionError("--lengths has lengths of its own: give it or --shapes")
        if num_sequences is not None:
            raise OptionError("--sequences has no effect with --lengths, whose lines are the sequences")
        return [traffic.from_file(lengths)]
    found = [traffic.from_shape(text, num_sequences or 32) for text in shapes or ["256,128,8"]]
    return list({one.name: one for one in found}.values())


def _setup(
    model: str | None,
    shape: str | None,
    dtype: str,
    engine: Sequence[str] | None,
    traffics: Sequence[traffic.Traffic],
    home: Path,
) -> Setup:
    if (model is None) == (shape is None):
        raise OptionError("give --model PATH, or --shape hidden,layers,vocab for a model with random weights")
    if shape is not None:
        models.sizes_of(shape)
        model = str(home / "model")
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise OptionError(f"--dtype {dtype!r}: expected auto, bfloat16, float16 or float32")
    options = parse_engine_options(engine or ())
    if (own := next((name for name in options if name in _NO_ENGINE_OPTIONS), None)) is not None:
        raise OptionError(f"--engine {own}=...: {_NO_ENGINE_OPTIONS[own]}")
    options = check_options(options)
    if unknown := sorted(options.keys() - NAMES):
        from vllm import EngineArgs

        check_engine_options(unknown, (field.name for field in dataclasses.fields(EngineArgs)))
    longest = max(one.longest for one in traffics)
    device = "cuda" if on_a_gpu() else "cpu"
    return Setup(
        model=str(model), dtype=dtype, device=device, engine=options, shape=shape, max_tokens=longest
    )


def _provider_names(providers: Sequence[str] | None, device: str) -> list[str]:
    names = list(providers or usable(device))
    check_names(names)
    return names


def _check_of_ours(
    names: Sequence[str], readouts: Sequence[str] | None, no_share: bool, replicas: int
) -> None:
    for option, is_given, takers in (
        ("--readouts", bool(readouts), ["ours"]),
        ("--no-share", no_share, ["ours", "floor"]),
        ("--replicas", replicas > 1, ["ours"]),
    ):
        if is_given and not {*takers} & {*names}:
            without = f"without the provider {' or '.join(takers)} among --providers"
            raise OptionError(f"{option} has no effect {without}")
    for readout in readouts or ():
        if readout not in _READOUTS:
            raise OptionError(f"--readouts {readout!r}: expected {', '.join(_READOUTS)}")


def _check_installed() -> None:
    missing = [name for name in ("torch", "transformers", "vllm") if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"vllm-kl bench needs {' and '.join(missing)}: pip install 'vllm-kl[gpu]', or 'vllm-kl[cpu]'"
        )


def _settings(names: Sequence[str], readouts: Sequence[str], setup: Setup) -> dict[str, Setup]:
    """Return the setup of each row of the tables: ours has one for each read-out."""
    settings = {}
    for name in names:
        if name != "ours" or len(readouts) == 1:
            settings[name] = dataclasses.replace(setup, readout=readouts[0])
        else:
            settings |= {
                name if readout == "auto" else f"{name}[{readout}]": dataclasses.replace(
                    setup, readout=readout
                )
                for readout in dict.fromkeys(readouts)
            }
    return settings


def _log_folder(out: Path | None, temporary: Path) -> Path:
    """Return the folder for the providers' logs, without those of an earlier run."""
    if out is None:
        return temporary
    folder = out / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: no path has this name
        raise OptionError(f"--out {out}: {error}") from error
    for log in folder.glob("*.log"):
        log.unlink()
    return folder


def _console(*, is_error: bool) -> Console:
    """Return the console; a file or a pipe gets lines that are wide enough for the tables."""
    console = Console(stderr=is_error)
    return console if console.is_terminal else Console(stderr=is_error, width=_WIDTH)


@contextlib.contextmanager
def _told_errors() -> Iterator[None]:
    """Print an error of this package, and exit."""
    try:
        yield
    except (OptionError, InputError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except (VLLMKLError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(FAILED) from None


@bench.command("compare")
def compare_runs(
    before: Annotated[Path, typer.Argument(help="The folder of --out of a run, or its results.jsonl.")],
    after: Annotated[Path, typer.Argument(help="The same of a later run.")],
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="The share by which a figure may be smaller.")
    ] = 0.1,
    by: Annotated[
        Figure | None,
        typer.Option(
            help="What to compare; default: tok_per_s on the same hardware, else fraction_of_floor."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two runs; exit with 3 if a row of the second is slower, less exact or missing."""
    with _told_errors():
        if math.isnan(tolerance):
            raise OptionError("--tolerance nan: expected a share between 0 and 1")
        first, second = read_rows(before), read_rows(after)
        found = compare(first, second, tolerance=tolerance, figure=by or figure_for(first, second))
    is_worse = any(one.is_worse for one in found)
    for one in found:
        typer.echo(one.message, err=as_json)
    if as_json:
        typer.echo(
            json.dumps({"ok": not is_worse, "differences": [dataclasses.asdict(one) for one in found]})
        )
    raise typer.Exit(WORSE if is_worse else 0)
