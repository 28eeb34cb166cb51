"""Measures what HTTP costs: a server of vllm-kl and a stock vLLM server, beside an engine of one's own.

    python benchmarks/bench_serving.py                   # 96M in bfloat16, a quarter of an hour on two cores
    python benchmarks/bench_serving.py --model tiny --rounds 9

    throughput   one call with --groups groups of G=8 responses (P=256, R=128), fed tokens per second
    latency      1, 8 and 64 clients at a time, each asks for one sequence (64 tokens, the last 32 scored)
                 again and again: milliseconds of a call, p50 and p95
    bytes        of request and answer, for each scored token

All engines live at once, each in a process of its own, and take turns within a round; the others wait for
work then. The stock server gets one group. The first log-probs of each are compared with transformers in
float64 before a time counts. Expected: a call over HTTP costs a few milliseconds and 4 bytes a token each
way, so throughput is that of the engine; a stock server computes each prompt G times and writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

os.environ.update(RAY_USAGE_STATS_ENABLED="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import httpx
import numpy as np
import torch

from vllm_kl.bench import models
from vllm_kl.bench.report import (
    Report,
    add_markdown_option,
    machine_line,
    make_table,
    median_ratio,
    p20_p50_p80,
)

MODELS = {"tiny": models.tiny, "5M": models.size_5m, "96M": models.size_96m}
GROUP, PROMPT, RESPONSE = 8, 256, 128
CLIENTS, SHORT = (1, 8, 64), (64, 32)
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}  # nats, against float64: bfloat16 makes the second
Sequences = list[np.ndarray]
Score = Callable[[Sequences, int], list]


def groups(vocab: int, num_groups: int, seed: int) -> Sequences:
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(0, vocab, PROMPT) for _ in range(num_groups)]
    return [np.concatenate([p, draw.integers(0, vocab, RESPONSE)]) for p in prompts for _ in range(GROUP)]


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[str]:
    """Run a server; yield its address when it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=os.environ | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while not is_healthy(address):
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{command} ended: {log.read()[-3000:]}")
                time.sleep(0.3)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


def as_json(address: str) -> Score:
    """Return a function that asks our server with lists in JSON."""
    http = httpx.Client(base_url=address, timeout=600)

    def score(sequences: Sequences, start: int) -> list:
        body = {"token_ids": [ids.tolist() for ids in sequences], "start": start}
        return http.post("/v1/logprobs", json=body).raise_for_status().json()["log_probs"]

    return score


def check(folder: str, dtype: str, vocab: int, providers: dict[str, Score]) -> dict[str, float]:
    """Return the largest distance of each provider's log-probs to float64; it must be small."""
    from transformers import AutoModelForCausalLM

    sequences = groups(vocab, 1, 10**6)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = torch.tensor(np.stack(sequences))
    with torch.no_grad():
        rows = oracle(ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    want = rows.gather(-1, ids[:, PROMPT:, None])[..., 0]
    errors = {}
    for name, score in providers.items():
        found = torch.stack([torch.as_tensor(np.asarray(row)) for row in score(sequences, PROMPT)])
        errors[name] = (found.double() - want).abs().max().item()
        if not errors[name] <= TOLERANCE[dtype]:
            raise SystemExit(f"{name}: {errors[name]:.1e} nats from float64")
    return errors


def latencies(score: Score, num_clients: int, num_calls: int, vocab: int) -> list[float]:
    """Return the milliseconds of every call of some clients at a time."""
    found: list[float] = []

    def ask(n: int) -> None:
        draw = np.random.default_rng([n, num_clients])
        for _ in range(max(2, num_calls // num_clients)):
            ids, began = draw.integers(0, vocab, SHORT[0]), time.perf_counter()
            score([ids], SHORT[0] - SHORT[1])
            found.append(1e3 * (time.perf_counter() - began))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def bytes_per_token(ours: str, stock: str, name: str, sequences: Sequences) -> dict[str, tuple[float, float]]:
    """Return the bytes of request and answer for each scored token."""
    from vllm_kl.client.wire_format import MSGPACK, Question, pack_question

    num_scored = len(sequences) * RESPONSE
    ids = [one.astype(np.int32) for one in sequences]
    question = pack_question(Question(token_ids=ids, starts=[PROMPT] * len(ids)))
    lists = json.dumps({"token_ids": [one.tolist() for one in ids], "start": PROMPT})
    headers = {"Content-Type": MSGPACK, "Accept": MSGPACK}
    packed = httpx.post(f"{ours}/v1/logprobs", content=question, headers=headers, timeout=600)
    in_json = httpx.post(
        f"{ours}/v1/logprobs", content=lists, headers={"Content-Type": "application/json"}, timeout=600
    )
    body = {"model": name, "prompt": [one.tolist() for one in ids], "max_tokens": 1, "prompt_logprobs": 0}
    theirs = httpx.post(f"{stock}/v1/completions", json=body, timeout=600)
    return {
        "msgpack": (len(question) / num_scored, len(packed.content) / num_scored),
        "JSON": (len(lists) / num_scored, len(in_json.content) / num_scored),
        "/v1/completions": (len(theirs.request.content) / num_scored, len(theirs.content) / num_scored),
    }


def measure(args: argparse.Namespace, folder: str, vocab: int, report: Report) -> None:
    from vllm_kl import VLLMScorer

    options = {"dtype": args.dtype, "max_model_len": 1024, "kv_cache_memory_bytes": 512 << 20}
    command = "from vllm_kl.cli import main; main()"
    of_engine = [f"--engine={name}={value}" for name, value in options.items()]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    stock = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--enforce-eager"]
    with (
        VLLMScorer(folder, **options) as local,
        running([sys.executable, "-c", command, "serve", folder, *of_engine], {}) as ours,
        running([*stock, "--host=127.0.0.1", *flags], {"VLLM_PLUGINS": ""}) as theirs,
        VLLMScorer(ours) as remote,
        VLLMScorer(theirs) as flat,
    ):
        providers = {
            "an engine of one's own": local.score,
            "vllm-kl serve": remote.score,
            "vllm-kl serve, lists in JSON": as_json(ours),
            "a stock vLLM server": flat.score,
        }
        errors = check(folder, args.dtype, vocab, providers)
        rates: dict[str, list[float]] = {name: [] for name in providers}
        for n in range(args.rounds + 1):
            for name, score in providers.items():
                work = groups(vocab, 1 if "stock" in name else args.groups, n)
                began = time.perf_counter()
                score(work, PROMPT)
                if n:
                    rates[name].append(sum(map(len, work)) / (time.perf_counter() - began))
        table = make_table(
            f"P={PROMPT}, R={RESPONSE}, G={GROUP}", "provider", "fed tok/s", "of its own engine", "error"
        )
        own = rates["an engine of one's own"]
        for name, found in rates.items():
            ratio = median_ratio(found, own)
            table.add_row(name, f"{p20_p50_p80(found)[1]:,.0f}", f"{ratio:.2f}", f"{errors[name]:.1e}")
        report.table(table)
        table = make_table("ms of a call: p50 / p95", "provider", *(f"{n} clients" for n in CLIENTS))
        for name, score in providers.items():
            cells = []
            for num_clients in CLIENTS:
                found = latencies(score, num_clients, args.calls, vocab)
                cells.append(f"{np.percentile(found, 50):.1f} / {np.percentile(found, 95):.1f}")
            table.add_row(name, *cells)
        report.table(table)
        table = make_table("bytes for each scored token", "body", "request", "answer")
        for name, (asked, answered) in bytes_per_token(ours, theirs, folder, groups(vocab, 1, 0)).items():
            table.add_row(name, f"{asked:.1f}", f"{answered:.1f}")
        report.table(table)
    report.line(machine_line(f"{args.model} {args.dtype}, {args.rounds} rounds, {args.groups} groups a call"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="96M")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=4, help="of a call")
    parser.add_argument("--calls", type=int, default=128, help="of all clients, for the latency")
    add_markdown_option(parser)
    args = parser.parse_args()
    from vllm_kl.demo.task import make_tokenizer

    with tempfile.TemporaryDirectory() as home:
        model = MODELS[args.model](max_position_embeddings=1024, initializer_range=0.06)
        model.to(getattr(torch, args.dtype)).save_pretrained(f"{home}/model")
        make_tokenizer().save_pretrained(f"{home}/model")
        measure(args, f"{home}/model", model.config.vocab_size, Report(args.markdown, width=100))


if __name__ == "__main__":
    main()
