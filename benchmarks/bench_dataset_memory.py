"""Measures the memory of ``vllm-kl score`` beside its engine: does it grow with the data set?

    python benchmarks/bench_dataset_memory.py --rows 500 --rows 4000
    python benchmarks/bench_dataset_memory.py --rows 10000 --rows 100000 --stand-in

The rows hold token ids, in Parquet. Each size is scored by a driver of its own, in a local Ray of its own.
Every half second the resident memory is read, without shared pages: of the driver, of the scoring actor, of
Ray's workers (they read and write), and of the engine and Ray's own services, which are not counted.
The object store is shared memory; its pages are in a column of their own.

``--stand-in`` puts an object that answers -1.0 for each token in the place of the engine, because two CPU
cores need hours for 100 million tokens. All the rest is the same: files, Ray Data, the scorer and its checks.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table

ENGINE = ("dtype=float32", "max_model_len=1024", "kv_cache_memory_bytes=67108864", "enforce_eager=true")
COUNTED = ("driver", "actor", "workers")
OF_RAY = ("Agent", "_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker")  # one each a Ray
# Runs the command with a stand-in for the engine. The class is pickled by value, so actors find it.
STAND_IN = """
import sys
import numpy as np
from vllm_kl.offline import pipeline
from vllm_kl.offline.score_rows import ScoreRows as Scores
from vllm_kl.types import EngineInfo, ScoreResult


class StandIn:
    info = EngineInfo(readout="pooling", vocab_size=301, max_sequence_len=1024)
    weights = None

    def score(self, requests, *, share_prefix, on_done=None, alone=False):
        shapes = [(len(one.token_ids) - one.start, 1) for one in requests]
        return [ScoreResult(values=np.full(shape, -1.0, np.float32)) for shape in shapes]

    def close(self):
        pass


class ScoreRows(Scores):
    def __init__(self, *args, **kwargs):
        from vllm_kl.offline import score_rows
        from vllm_kl.scorer import VLLMScorer

        score_rows.VLLMScorer = lambda *_, **__: VLLMScorer(StandIn())
        super().__init__(*args, **kwargs)


pipeline.ScoreRows = ScoreRows
from vllm_kl.cli import main
main()
"""


def write_rows(path: Path, num_rows: int, num_tokens: int) -> None:
    """Write rows of random ids, a thousand at a time."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    schema = pa.schema([("prompt_ids", pa.list_(pa.int32())), ("response_ids", pa.list_(pa.int32()))])
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(0, num_rows, 1000):
            ids = draw.integers(0, 250, (min(1000, num_rows - begin), num_tokens), dtype=np.int32)
            half = num_tokens // 2
            columns = [pa.array(list(part), schema.types[0]) for part in (ids[:, :half], ids[:, half:])]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def kind_of(process: psutil.Process, driver: int) -> str:
    """Return what a process is: driver, actor, worker, engine or a service of Ray."""
    if process.pid == driver:
        return "driver"
    command = " ".join(process.cmdline())
    if command.startswith("ray::"):
        if any(name in command for name in OF_RAY):
            return "services"
        return "actor" if "ScoreRows" in command else "workers"
    parents = [" ".join(parent.cmdline()) for parent in process.parents()]
    return "engine" if any("ScoreRows" in parent for parent in parents) else "services"


def measure(command: list[str]) -> tuple[dict[str, int], float]:
    """Run a command; return the most bytes of each kind of process, and the seconds."""
    began = time.perf_counter()
    most: dict[str, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        driver = psutil.Process(run.pid)
        while run.poll() is None:
            now: dict[str, int] = {}
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [driver, *driver.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        memory = process.memory_info()
                        kind = kind_of(process, run.pid)
                        now[kind] = now.get(kind, 0) + memory.rss - memory.shared
                        if kind == "services":  # the raylet, whose shared pages are the object store
                            now["store"] = max(now.get("store", 0), memory.shared)
            now["counted"] = sum(now.get(kind, 0) for kind in COUNTED)
            most = {kind: max(most.get(kind, 0), now.get(kind, 0)) for kind in {*most, *now}}
            time.sleep(0.5)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {run.returncode}")
    return most, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="size of a data set; repeatable")
    parser.add_argument("--tokens", type=int, default=1000, help="of each row")
    parser.add_argument("--stand-in", action="store_true", help="no engine: see above")
    add_markdown_option(parser)
    args = parser.parse_args()
    from tests.tiny import build_architecture

    table = make_table(
        "memory beside engine and Ray, MB", "rows", *COUNTED, "together", "store", "engine", "seconds"
    )
    with tempfile.TemporaryDirectory() as home:
        model = build_architecture(Path(home, "model"), "qwen2", max_position_embeddings=1024)
        for num_rows in args.rows or [2000, 8000]:
            data = Path(home, f"{num_rows}.parquet")
            write_rows(data, num_rows, args.tokens)
            code = STAND_IN if args.stand_in else "from vllm_kl.cli import main; main()"
            run = [sys.executable, "-c", code, "score", str(data)]
            run += ["--model", str(model), "--out", f"{home}/out-{num_rows}", "--num-gpus", "0"]
            most, seconds = measure(run + [f"--engine={option}" for option in ENGINE])
            kinds = (*COUNTED, "counted", "store", "engine")
            figures = [f"{most.get(kind, 0) / 1e6:,.0f}" for kind in kinds]
            table.add_row(f"{num_rows:,}", *figures, f"{seconds:,.0f}")
    report = Report(args.markdown)
    report.table(table)
    way = "an object that answers at once in the place of the engine" if args.stand_in else "with an engine"
    report.line(machine_line(f"{args.tokens:,} token ids a row, {way}"))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
