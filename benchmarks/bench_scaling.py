"""Measures what replicas and Ray Data cost and gain on one machine.

    python benchmarks/bench_scaling.py                 # all three cases, half an hour on two cores
    python benchmarks/bench_scaling.py --case dialogs --replicas 6

    replicas  groups of 8 responses (P=256, R=128): two replicas of one thread each, one replica of one
              thread, one of two threads; without Ray two engines of one thread each, and one of two
    dialogs   turns of dialogs that grow, one call a turn: with the router's affinity, and without
    files     2,000 rows of ids: `vllm-kl score` from the first file to the last, the bare scorer on the same
              rows, and the pipeline without an engine

Every provider runs in a process of its own, in turns. The first log-probs of each are compared with
transformers in float64 before a time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.update(RAY_USAGE_STATS_ENABLED="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import numpy as np

from vllm_kl.bench import models
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table

VOCAB = 8_192
OPTIONS = {"dtype": "float32", "max_model_len": 2048, "kv_cache_memory_bytes": 512 << 20}
GROUP, PROMPT, RESPONSE = 8, 256, 128
TOLERANCE = 1e-4  # nats, against float64
ROWS_OF_A_CALL = 60  # of the bare scorer: about as many as a file of `vllm-kl score` has


def groups(seed: int, num_groups: int) -> tuple[list[np.ndarray], list[int]]:
    """Return responses to prompts, and the lengths of the prompts."""
    draw = np.random.default_rng(seed)
    sequences = []
    for _ in range(num_groups):
        prompt = draw.integers(0, VOCAB, PROMPT)
        sequences += [np.concatenate([prompt, draw.integers(0, VOCAB, RESPONSE)]) for _ in range(GROUP)]
    return sequences, [PROMPT] * len(sequences)


def make_scorer(model: str, replicas: object):
    from vllm_kl import VLLMScorer

    return VLLMScorer(model, **({} if replicas is None else {"replicas": replicas}), **OPTIONS)


def time_groups(model: str, rounds: int, num_groups: int, replicas: object) -> dict:
    with make_scorer(model, replicas) as scorer:
        first = check(model, scorer)
        seconds = []
        for n in range(rounds + 1):
            work = groups(n, num_groups)
            began = time.perf_counter()
            scorer.score(*work)
            seconds.append(time.perf_counter() - began)
        return {"first": first, "seconds": seconds[1:], "tokens": num_groups * GROUP * (PROMPT + RESPONSE)}


def time_two_engines(model: str, rounds: int, num_groups: int) -> dict:
    """Return what two engines of a thread each do at once without Ray: what the machine allows."""
    os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    with make_scorer(model, None) as one, make_scorer(model, None) as other, ThreadPoolExecutor(2) as pool:
        first = check(model, one)
        seconds = []
        for n in range(rounds + 1):
            sequences, starts = groups(n, num_groups)
            half = num_groups // 2 * GROUP
            parts = [(sequences[:half], starts[:half]), (sequences[half:], starts[half:])]
            began = time.perf_counter()
            list(pool.map(lambda scorer, part: scorer.score(*part), (one, other), parts))
            seconds.append(time.perf_counter() - began)
        return {"first": first, "seconds": seconds[1:], "tokens": num_groups * GROUP * (PROMPT + RESPONSE)}


def time_dialogs(model: str, rounds: int, num_replicas: int, has_affinity: bool) -> dict:
    from vllm_kl.engines.replicas import prompt_router

    if not has_affinity:
        draw = random.Random(0)
        prompt_router.choose = lambda key, loads, spill: min(loads, key=lambda r: (loads[r], draw.random()))
    num_dialogs, num_turns, turn = 48, 5, 256
    with make_scorer(model, num_replicas) as scorer:
        first, seconds, cached, prompts = check(model, scorer), [], 0, 0
        for n in range(rounds + 1):
            dialogs = [
                np.random.default_rng([n, i]).integers(0, VOCAB, num_turns * turn) for i in range(num_dialogs)
            ]
            began = time.perf_counter()
            for end in range(2 * turn, num_turns * turn + 1, turn):
                order = np.random.default_rng([n, end]).permutation(num_dialogs)
                for few in np.split(order, 6):  # a call of some dialogs, as their turns end
                    scorer.score([dialogs[i][:end] for i in few], end - turn)
                    if n:
                        cached += scorer.stats.num_cached_tokens
                        prompts += len(few) * (end - turn)
            seconds.append(time.perf_counter() - began)
        return {"first": first, "seconds": seconds[1:], "cached": cached / prompts}


def check(model: str, scorer) -> float:
    """Return the largest distance of a group's log-probs to float64; it must be small."""
    import torch
    from transformers import AutoModelForCausalLM

    sequences, starts = groups(10**6, 1)
    found = scorer.score(sequences, starts)
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    ids = torch.tensor(np.stack(sequences))
    with torch.no_grad():
        log_probs = oracle(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    error = (torch.stack(found).double() - log_probs[:, PROMPT - 1 :]).abs().max().item()
    if error > TOLERANCE:
        raise SystemExit(f"{error:.1e} nats from float64")
    return error


def write_rows(path: Path, num_rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    rows = [draw.integers(0, VOCAB, PROMPT + RESPONSE) for _ in range(num_rows)]
    table = pa.table({"prompt_ids": [r[:PROMPT] for r in rows], "response_ids": [r[PROMPT:] for r in rows]})
    pq.write_table(table, path)


def time_scorer(model: str, data: str) -> dict:
    import pyarrow.parquet as pq

    table = pq.read_table(data)
    columns = [table.column(name).to_pylist() for name in ("prompt_ids", "response_ids")]
    rows = [np.array(p + r) for p, r in zip(*columns, strict=True)]
    with make_scorer(model, None) as scorer:
        first = check(model, scorer)
        scorer.score(rows[:ROWS_OF_A_CALL], PROMPT)
        began = time.perf_counter()
        for low in range(ROWS_OF_A_CALL, len(rows), ROWS_OF_A_CALL):
            scorer.score(rows[low : low + ROWS_OF_A_CALL], PROMPT)
        seconds = time.perf_counter() - began
    tokens = sum(map(len, rows[ROWS_OF_A_CALL:]))
    return {"first": first, "rate": tokens / seconds, "rows": (len(rows) - ROWS_OF_A_CALL) / seconds}


def time_files(model: str, data: str, is_scored: bool) -> dict:
    """Return the rates from the first file to the last, so without any start."""
    import pyarrow.parquet as pq

    from vllm_kl.offline.pipeline import make_job
    from vllm_kl.offline.score_files import Files, score_files

    times = []
    if not is_scored:
        return time_pipeline(data)
    with tempfile.TemporaryDirectory() as out:
        score_files(
            Files(data=(data,), out=out),
            make_job(model, engine_options=OPTIONS, num_gpus=0),
            on_part=lambda figures: times.append((time.perf_counter(), figures["tokens"], figures["rows"])),
        )
        names = sorted(Path(out).glob("part-*"))
        found = [row for name in names for row in pq.read_table(name).column("ref_log_probs").to_pylist()]
    import torch
    from transformers import AutoModelForCausalLM

    table = pq.read_table(data).slice(0, 4)
    ids = torch.tensor([p.as_py() + r.as_py() for p, r in zip(*table.columns, strict=True)])
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    with torch.no_grad():
        want = oracle(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[:, PROMPT - 1 :, 0]
    error = (torch.tensor(found[:4]).double() - want).abs().max().item()
    if error > TOLERANCE or len(found) != pq.read_metadata(data).num_rows:
        raise SystemExit(f"{error:.1e} nats from float64, {len(found)} rows")
    seconds = times[-1][0] - times[0][0]
    tokens, rows = (sum(one[k] for one in times[1:]) for k in (1, 2))
    return {"first": error, "rate": tokens / seconds, "rows": rows / seconds}


def time_pipeline(data: str) -> dict:
    """Return the rate of the reader and the first stage alone."""
    import functools

    import ray

    from vllm_kl.offline.columns import Columns, layout_of
    from vllm_kl.offline.parts import cut, file_schema, find_files, numbered, part_bytes_of, read_part
    from vllm_kl.offline.pipeline import map_blocks, whole_blocks
    from vllm_kl.offline.rows import ReadRows, Texts
    from vllm_kl.offline.source import read_parts

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    files, columns = find_files([data]), Columns()
    parts = numbered(cut(files, part_bytes_of(files)))
    schema = file_schema(parts[0])
    read = functools.partial(read_part, schema=schema, columns=columns)
    times = []
    with whole_blocks():
        ds = map_blocks(read_parts(parts, read), ReadRows(layout_of(schema, columns), columns, Texts()))
        for batch in ds.iter_batches(batch_size=None, batch_format="pyarrow"):
            times.append((time.perf_counter(), batch.num_rows))
    ray.shutdown()
    seconds = times[-1][0] - times[0][0]
    return {"first": 0.0, "rows": sum(n for _, n in times[1:]) / seconds}


PROVIDERS = {
    "replicas": {
        "two replicas, a thread each": lambda a: time_groups(a.model, a.rounds, a.groups, 2),
        "one replica, one thread": lambda a: time_groups(
            a.model, a.rounds, a.groups, {"min": 1, "max": 1, "cpus": 1}
        ),
        "one replica, two threads": lambda a: time_groups(
            a.model, a.rounds, a.groups, {"min": 1, "max": 1, "cpus": 2}
        ),
        "two engines without Ray, a thread each": lambda a: time_two_engines(a.model, a.rounds, a.groups),
        "an engine without Ray, two threads": lambda a: time_groups(a.model, a.rounds, a.groups, None),
    },
    "dialogs": {
        "affinity": lambda a: time_dialogs(a.model, a.rounds, a.replicas, True),
        "the least loaded, at random": lambda a: time_dialogs(a.model, a.rounds, a.replicas, False),
    },
    "files": {
        "vllm-kl score": lambda a: time_files(a.model, a.data, True),
        "the bare scorer": lambda a: time_scorer(a.model, a.data),
        "the pipeline without an engine": lambda a: time_files(a.model, a.data, False),
    },
}


def run(case: str, provider: str, arguments: list[str]) -> dict:
    """Run a provider in a process of its own; return its figures."""
    command = [sys.executable, __file__, "--case", case, "--provider", provider, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=PROVIDERS, action="append", help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="of each process")
    parser.add_argument("--turns", type=int, default=2, help="processes of each provider")
    parser.add_argument("--groups", type=int, default=48, help="of a round")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--replicas", type=int, default=2, help="of the case dialogs")
    add_markdown_option(parser)
    parser.add_argument("--provider", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.provider is not None:
        print(json.dumps(PROVIDERS[args.case[0]][args.provider](args)))
        return
    report = Report(args.markdown, width=100)
    with tempfile.TemporaryDirectory() as home:
        models.size_5m(max_position_embeddings=2048).save_pretrained(f"{home}/model")
        data = Path(home, "rows.parquet")
        write_rows(data, args.rows)
        arguments = [f"--model={home}/model", f"--data={data}"]
        arguments += [f"--rounds={args.rounds}", f"--groups={args.groups}", f"--replicas={args.replicas}"]
        for case in args.case or PROVIDERS:
            found: dict[str, list[dict]] = {name: [] for name in PROVIDERS[case]}
            for _ in range(args.turns):
                for name in found:
                    found[name].append(run(case, name, arguments))
            report.table(TABLES[case](found))
    report.line(machine_line(f"{args.turns} processes each, {args.rounds} rounds"))


def table_of_groups(found: dict[str, list[dict]]):
    table = make_table("replicas", "provider", "fed tok/s", "times one thread", "from float64")
    rate = {name: runs[0]["tokens"] / median(runs, "seconds") for name, runs in found.items()}
    for name, runs in found.items():
        ratio = rate[name] / rate["one replica, one thread"]
        table.add_row(name, f"{rate[name]:,.0f}", f"{ratio:.2f}", f"{max(r['first'] for r in runs):.1e}")
    return table


def table_of_dialogs(found: dict[str, list[dict]]):
    table = make_table("dialogs", "rule", "seconds", "prompt tokens in the cache")
    for name, runs in found.items():
        cached = statistics.median(run["cached"] for run in runs)
        table.add_row(name, f"{median(runs, 'seconds'):.2f}", f"{cached:.2f}")
    return table


def table_of_files(found: dict[str, list[dict]]):
    table = make_table("files", "provider", "tok/s", "of the bare scorer", "rows/s")
    bare = statistics.median(run["rate"] for run in found["the bare scorer"])
    for name, runs in found.items():
        rates = [run["rate"] for run in runs if "rate" in run]
        told = (
            (f"{statistics.median(rates):,.0f}", f"{statistics.median(rates) / bare:.2f}")
            if rates
            else ("", "")
        )
        table.add_row(name, *told, f"{statistics.median(run['rows'] for run in runs):,.0f}")
    return table


def median(runs: list[dict], name: str) -> float:
    return statistics.median(value for run in runs for value in run[name])


TABLES = {"replicas": table_of_groups, "dialogs": table_of_dialogs, "files": table_of_files}


if __name__ == "__main__":
    main()
