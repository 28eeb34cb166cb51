"""The command ``vllm-kl score``: its options, its progress bar and its exit codes.

The options are read without Ray, vLLM or torch; they are loaded when the work begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_kl.engines.arguments import parse_engine_options
from vllm_kl.environment import quiet_ray
from vllm_kl.errors import OptionError, VLLMKLError

if TYPE_CHECKING:
    from vllm_kl.offline.parts import Part

FAILED, REJECTED = 1, 3  # exit codes; 2 is typer's, for an option that is wrong


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a file as the defaults of the options, as if they were texts on the command line."""
    if path is None:
        return path
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    # A date such as 2001-13-45 is a ValueError of the datetime module.
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path} holds a {type(content).__name__}, expected options and values")
    known = {name.lstrip("-").replace("-", "_"): p for p in context.command.params for name in p.opts}
    values: dict[str, str | list[str]] = {}
    for name, value in content.items():
        option = known.get(str(name).replace("-", "_"))
        if option is None:
            raise typer.BadParameter(
                f"{path} has the unknown option {name!r}; known are {', '.join(sorted(known))}"
            )
        if option.name in values:
            raise typer.BadParameter(f"{path} has the option {name!r} twice")
        if value is not None:
            takes_many = option.multiple or option.nargs == -1
            values[option.name] = _as_arguments(f"{path}: {name}", value, takes_many)
    context.default_map = values
    return path


def _as_arguments(where: str, value: Any, takes_many: bool) -> str | list[str]:
    """Return a value of YAML as the texts that the command line would have."""
    if not takes_many:
        if isinstance(value, (dict, list)):
            raise typer.BadParameter(f"{where} is {str(value)[:60]}, expected one value")
        return _text(value)
    if isinstance(value, dict):
        return [f"{key}={_text(one)}" for key, one in value.items()]
    each = value if isinstance(value, list) else [value]
    if any(isinstance(one, (dict, list)) for one in each):
        raise typer.BadParameter(f"{where} is {str(value)[:60]}, expected values, or names and values")
    return [_text(one) for one in each]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)  # a date, for example


Data = Annotated[
    list[str],
    typer.Argument(
        help="JSONL, Parquet or Arrow: files, folders, globs, s3:// and what fsspec reads; a folder of "
        "datasets.save_to_disk; or - for JSONL on standard input."
    ),
]
ModelName = Annotated[str, typer.Option(help="Path or name of the reference.")]
Out = Annotated[str | None, typer.Option(help="Folder of the output; - for JSONL on standard output.")]
Format = Annotated[Literal["parquet", "jsonl"], typer.Option("--format", help="Format of the files.")]
Column = Annotated[
    list[str] | None,
    typer.Option(help="NAME=YOURS: your name of the column NAME, such as response=chosen. Repeatable."),
]
Prefix = Annotated[str, typer.Option(help="Before the names of the added columns.")]
Tokenizer = Annotated[str | None, typer.Option(help="Of texts and messages; default: the model's.")]
ChatTemplate = Annotated[
    Path | None, typer.Option(help="File of a chat template; default: the tokenizer's.", exists=True)
]
AddEos = Annotated[bool, typer.Option("--add-eos", help="Put EOS after each response text.")]
Temperature = Annotated[float, typer.Option(help="Log-probs of softmax(logits / temperature).")]
Topk = Annotated[int, typer.Option(min=0, help="Also the K most likely tokens of each position.")]
Entropy = Annotated[
    bool, typer.Option("--entropy", help="Also the entropy of the reference's distribution at each position.")
]
Policy = Annotated[str | None, typer.Option(help="A second model: adds its log-probs and the per-token KL.")]
Estimator = Annotated[str, typer.Option(help="Of the KL: k1, k2, k3 or abs.")]
MaxLenPolicy = Annotated[
    Literal["reject", "left"],
    typer.Option(help="Too long for the engine: reject the row, or cut the prompt at the left."),
]
OnError = Annotated[
    Literal["mark", "stop"], typer.Option(help="A row that cannot be scored: mark it, or stop.")
]
Engine = Annotated[list[str] | None, typer.Option(help="NAME=VALUE: an engine option of vLLM. Repeatable.")]
PolicyEngine = Annotated[
    list[str] | None, typer.Option(help="The same for the policy's engine; default: those of --engine.")
]
Replicas = Annotated[int, typer.Option(min=1, help="Engines of each model.")]
NumGpus = Annotated[
    float | None,
    typer.Option(min=0, help="GPUs of each engine; default: tensor x pipeline parallel, 0 on a CPU."),
]
NumCpus = Annotated[float, typer.Option(min=0.1, help="Logical CPUs of each engine.")]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster; default: a local Ray.")]
Shard = Annotated[str, typer.Option(help="i/n: only every n-th part, from part i (from 0) on.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first rows.")]
PartBytes = Annotated[
    int | None, typer.Option(min=1, help="Bytes of the input per output file; default: by its size.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew in a folder of ours.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count only; no engine starts.")]
Config = Annotated[
    Path | None,
    typer.Option(
        help="YAML file of these options; the command line wins.", callback=_read_config, is_eager=True
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on standard output.")]


def score(
    data: Data,
    model: ModelName,
    out: Out = None,
    output_format: Format = "parquet",
    column: Column = None,
    prefix: Prefix = "",
    tokenizer: Tokenizer = None,
    chat_template: ChatTemplate = None,
    add_eos: AddEos = False,
    temperature: Temperature = 1.0,
    topk: Topk = 0,
    entropy: Entropy = False,
    policy: Policy = None,
    estimator: Estimator = "k1",
    max_len_policy: MaxLenPolicy = "reject",
    on_error: OnError = "mark",
    engine: Engine = None,
    policy_engine: PolicyEngine = None,
    replicas: Replicas = 1,
    num_gpus: NumGpus = None,
    num_cpus: NumCpus = 1,
    address: Address = None,
    shard: Shard = "0/1",
    limit: Limit = None,
    part_bytes: PartBytes = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Score a data set: log-probs of a model for every row, written as Parquet or JSONL.

    A run that was stopped or killed goes on where it was when the same command is given again. Exit codes: 0,
    all rows are scored; 3, some rows have an error instead; 1, the run failed; 2, an option is wrong.
    """
    given = dict(locals())
    if out is None and not dry_run:
        raise typer.BadParameter("is missing: where to write", param_hint="--out")
    quiet_ray()
    with (
        _told_errors(),
        _streams(data, out or "", output_format, overwrite, as_json) as (data_, out_, format_),
    ):
        options = {name: given[name] for name in _OF_JOB} | {
            "columns": dict(_pair(one) for one in column or ()),
            "chat_template": None if chat_template is None else _read_template(chat_template),
            "engine_options": parse_engine_options(engine or ()),
            "policy_options": None if not policy_engine else parse_engine_options(policy_engine),
        }
        files = {name: given[name] for name in ("limit", "part_bytes", "overwrite")} | {
            "data": tuple(data_),
            "out": out_,
            "format": format_,
            "shard": _shard(shard),
        }
        figures, num_rejected = _work(model, options, files, address, dry_run)
    if as_json:
        typer.echo(json.dumps(figures))
    raise typer.Exit(REJECTED if num_rejected else 0)


# Options that go to make_job() as they are.
_OF_JOB = (
    "policy",
    "prefix",
    "tokenizer",
    "add_eos",
    "temperature",
    "topk",
    "entropy",
    "estimator",
    "max_len_policy",
    "on_error",
    "replicas",
    "num_gpus",
    "num_cpus",
)


def _work(
    model: str, options: Mapping[str, Any], given: Mapping[str, Any], address: str | None, is_dry: bool
) -> tuple[dict[str, Any], int]:
    """Count or score; return the figures, and how many rows were rejected."""
    if importlib.util.find_spec("ray") is None:
        raise OptionError("vllm-kl score needs Ray Data: pip install 'vllm-kl[ray]'")
    from vllm_kl.offline.dry_run import dry_run
    from vllm_kl.offline.pipeline import make_job
    from vllm_kl.offline.score_files import Files, score_files

    console = Console(stderr=True)
    job, files = make_job(model, **options), Files(**given)
    if is_dry:
        counts = dry_run(files, job, address=address)
        _print_counts(counts, console)
        return dataclasses.asdict(counts), 0
    with Bar(console) as bar:
        summary = score_files(files, job, address=address, on_plan=bar.plan, on_part=bar.part)
    console.print(
        f"{summary.rows:,} rows in {len(summary.files)} files in {given['out']}, {summary.rejected:,} of "
        f"them with an error; now {summary.tokens:,} tokens, {summary.tok_per_s:,.0f} per second",
        highlight=False,
        soft_wrap=True,
    )
    return dataclasses.asdict(summary), summary.rejected


def _print_counts(counts: Any, console: Console) -> None:
    table = Table(box=None, show_header=False)
    for name, value in dataclasses.asdict(counts).items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)
    console.print(
        "floor tokens must be computed; the others have the beginning of another sequence of their part"
    )


class Bar:
    """The progress on standard error: rows, tokens per second, shared fraction and time left."""

    def __init__(self, console: Console) -> None:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(TextColumn("rows"), *columns, console=console)
        self._task = self._progress.add_task("", total=None, told="")
        self._tokens = self._shared = 0
        self._began = 0.0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def plan(self, parts: Sequence[Part], todo: Sequence[Part]) -> None:
        """Show how many rows are there, and how many were scored by an earlier run."""
        total = sum(part.num_rows for part in parts)
        done = total - sum(part.num_rows for part in todo)
        self._began = time.perf_counter()
        self._progress.update(self._task, total=total, completed=done)

    def part(self, figures: Mapping[str, Any]) -> None:
        """Add the figures of a part."""
        self._tokens += figures["tokens"]
        self._shared += figures["shared_tokens"]
        rate = self._tokens / (time.perf_counter() - self._began)
        told = f"{rate:,.0f} tok/s, {self._shared / max(1, self._tokens):.0%} shared"
        self._progress.update(self._task, advance=figures["rows"], told=told)


@contextlib.contextmanager
def _streams(
    data: Sequence[str], out: str, output_format: str, is_anew: bool, as_json: bool
) -> Iterator[tuple[Sequence[str], str, str]]:
    """Put standard input into a file, and the files of the output on standard output after the block."""
    if "-" not in data and out != "-":
        yield data, out, output_format
        return
    if list(data) != ["-"] and "-" in data:
        raise OptionError("- for standard input cannot be given with other data")
    if out == "-" and as_json:
        raise OptionError("--json writes to standard output, as --out - does: give one of them")
    from vllm_kl.offline.storage import Folder

    if "-" in data and out not in ("-", "") and not is_anew and Folder(out).names():
        raise OptionError(
            f"{out} is not empty: what comes from standard input cannot be continued. --overwrite"
        )
    with tempfile.TemporaryDirectory(prefix="vllm_kl_score_") as home:
        if "-" in data:
            stored = Path(home, "input.jsonl")
            with stored.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            data = [str(stored)]
        if out != "-":
            yield data, out, output_format
            return
        folder = Path(home, "out")
        yield data, str(folder), "jsonl"
        _print_files(sorted(folder.glob("part-*")))


def _print_files(paths: Sequence[Path]) -> None:
    try:
        for path in paths:
            with path.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # What is left in the buffer must go somewhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        typer.echo("error: the reader of standard output left before all rows were written", err=True)
        raise typer.Exit(FAILED) from None


@contextlib.contextmanager
def _told_errors() -> Iterator[None]:
    """Print an error of this package, and exit."""
    try:
        yield
    except (VLLMKLError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(FAILED) from None


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}, expected NAME=YOURS", param_hint="--column")
    return name, value


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"--chat-template {path} is not UTF-8: {error}") from error


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise typer.BadParameter(f"{text!r}, expected i/n with 0 <= i < n", param_hint="--shard")
    return int(match[1]), int(match[2])
