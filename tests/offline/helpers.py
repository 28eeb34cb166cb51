"""A data set of token ids with bad rows in it, and what its rows must become."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import psutil
import pyarrow as pa
import pyarrow.dataset
import torch

from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl.offline.pipeline import make_job
from vllm_kl.offline.score_files import Files, score_files

VOCABULARY = 250
PART_BYTES = 1500
ENGINE = {**tiny.ENGINE_OPTIONS, "enforce_eager": True}
# Place in the data set -> a line that cannot be scored, and a part of its error.
BAD = {
    7: ('{"id": 7, "prompt_ids": "abc", "response_ids": [1]}', "'abc'"),
    19: ('{"id": 19, "prompt_ids": [1, 2], "response_ids": [100000]}', "outside the vocabulary"),
    20: ("not JSON", "not JSON"),
    33: ('{"id": 33, "prompt_ids": [], "response_ids": [1]}', "start is 0"),
    41: (json.dumps({"id": 41, "prompt_ids": [1] * 300, "response_ids": [2] * 30}), "330 tokens"),
    42: ('{"id": 42, "prompt_ids": [1]}', "null"),
}


def write_data(path, num_rows=60, seed=0):
    """Write JSONL; return its rows by place, without the bad ones."""
    draw = random.Random(seed)
    good, lines = {}, []
    for i in range(num_rows):
        if i in BAD:
            lines.append(BAD[i][0])
            continue
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 20))]
        response = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 30))]
        good[i] = {"id": i, "prompt_ids": prompt, "response_ids": response}
        lines.append(json.dumps(good[i]))
    path.write_text("\n".join(lines) + "\n")
    return good


def job(model, **options):
    """Return the job of a tiny model on a CPU."""
    return make_job(str(model), **{"num_gpus": 0, "engine_options": ENGINE, **options})


def run(data, out, model, *, files=None, on_plan=None, on_part=None, **options):
    """Score files in the cluster of this process; return the summary."""
    given = {"data": (str(data),), "out": str(out), "part_bytes": PART_BYTES, **(files or {})}
    return score_files(Files(**given), job(model, **options), on_plan=on_plan, on_part=on_part)


def start(data, out, model, *options, address=None, stdin=None):
    """Start ``vllm-kl score`` in this process's cluster, in another one, or (``""``) in one of its own."""
    import ray

    address = ray.get_runtime_context().gcs_address if address is None else address
    options_of_engine = [f"--engine={name}={json.dumps(value)}" for name, value in ENGINE.items()]
    args = [
        "score",
        data,
        "--model",
        model,
        "--out",
        out,
        *(["--address", address] if address else []),
        "--num-gpus",
        0,
        *options_of_engine,
    ]
    args += ["--part-bytes", PART_BYTES, *options]
    code = "from vllm_kl.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition, process, timeout_s=240, every_s=0.002):
    """Wait until a condition is true; the process must live."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(every_s)
    return found


def table_of(out):
    """Return the rows of an output in the order of its files' names."""
    return pa.dataset.dataset(sorted(map(str, out.glob("part-*.parquet")))).to_table()


def check_oracle(row, ids, start, oracle):
    want = torch.tensor(oracle.log_probs(ids)[start:], dtype=torch.float64)
    got = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=LOG_PROB_TOLERANCE)


def check_same(found, expected):
    """Check that two outputs have the same rows in the same order, up to the rounding of log-probs."""
    assert found.num_rows == expected.num_rows
    numbers = ("ref_log_probs", "sum")
    assert found.drop_columns(numbers).equals(expected.drop_columns(numbers))
    for name in numbers:
        for one, other in zip(found[name].to_pylist(), expected[name].to_pylist(), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                one, other = torch.tensor(one), torch.tensor(other)
                torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * (30 if name == "sum" else 1))


def scoring_actors():
    """Return the processes of this cluster's scoring actors, each with those of its engine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ScoreRows" in " ".join(process.cmdline()):
                found.append((process, process.children(recursive=True)))
        except psutil.NoSuchProcess:
            continue
    return found
