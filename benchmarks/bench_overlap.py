"""Measures how much of the reference's scoring hides behind the next generation.

    python benchmarks/bench_overlap.py            # the tables of benchmarks/README.md, about six minutes

A policy (a vllm.LLM) generates in an LLMCollector, and a larger reference scores every step with its own
engine. With --cores own, each engine has its own core, as each engine would have its own GPU; with --cores
shared, both use all cores. Every way collects the same batches of K steps, and the clock stops when all
results are there:

    immediate        RetrieveKL(...)                     K (G + S)
    deferred         RetrieveKL(..., deferred=True)      at best K max(G, S) + min(G, S), since nothing hides
                                                         the scoring of a batch's last step
    one batch later  RetrieveKL(..., deferred="buffer"),
                     fill_deferred(previous batch)       at best K max(G, S)
    ideal            the longer of generating alone and scoring alone

G and S are the seconds that a step takes to generate and to score. Before timing, the benchmark compares the
results of the three ways bit for bit, and the reference with float64. Prompts differ and the prefix caches
are off, so no way profits from the computation of another.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

# vLLM, torch and torchrl read these variables at import. The reference's process inherits them.
os.environ.update(
    OMP_NUM_THREADS=str(os.cpu_count()) if "shared" in sys.argv else "1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    TORCH_COMPILE_DISABLE="1",
    RL_LOGGING_LEVEL="ERROR",
)

import torch
import vllm
from rich.table import Table
from tensordict import TensorDict, lazy_stack, set_list_to_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Unbounded
from torchrl.envs import Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import vLLMWrapper
from transformers import AutoModelForCausalLM

from vllm_kl import RetrieveKL, VLLMReference, fill_deferred
from vllm_kl.bench import models
from vllm_kl.bench.report import (
    Report,
    add_markdown_option,
    machine_line,
    make_table,
    median_ratio,
    p20_p50_p80,
)
from vllm_kl.demo.task import make_tokenizer

CORES = sorted(os.sched_getaffinity(0))
NUM_ENVS = 8
STEPS_PER_MEASUREMENT = 8
BATCH_STEPS = (1, 4)
RESULTS = ("kl_penalty", "kl_mask", "reward", ("ref_log_probs", "full"), ("log_probs", "full"))


class Reward(Transform):
    """A reward of 1 per sequence."""

    def __init__(self):
        super().__init__(out_keys=["reward"])

    def _step(self, tensordict, next_tensordict):
        return next_tensordict.set("reward", torch.ones(*tensordict.batch_size, 1, 1))

    def transform_reward_spec(self, reward_spec):
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1, 1))
        return reward_spec


def build(path: Path, tokenizer, *, hidden: int, layers: int) -> str:
    sizes = {"hidden": hidden, "layers": layers, "max_position_embeddings": 1024, "initializer_range": 0.06}
    models.talker(tokenizer, **sizes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


class Bench:
    """Two engines and the collectors that use them."""

    def __init__(self, folder: Path, tokenizer, args) -> None:
        self.args = args
        self.tokenizer = tokenizer
        options = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20}
        self.ref_path = build(folder / "reference", tokenizer, hidden=768, layers=args.layers)
        policy_path = build(folder / "policy", tokenizer, hidden=256, layers=4)
        if args.cores == "own":
            os.sched_setaffinity(0, {CORES[1]})  # the reference's process inherits the affinity
        self.reference = VLLMReference(self.ref_path, tokenizer, share_prefix=False, **options)
        if args.cores == "own":
            os.sched_setaffinity(0, {CORES[0]})
        self.llm = vllm.LLM(
            policy_path, enforce_eager=True, enable_prefix_caching=False, use_tqdm_on_load=False, **options
        )
        generate = self.llm.generate
        self.llm.generate = lambda *a, **k: generate(*a, **{**k, "use_tqdm": False})

    def batches(self, steps: int, deferred=None):
        """Yield batches of ``steps`` steps without end; with ``deferred=None`` nothing is scored."""
        queries = [{"query": f"{i}: what is {i} and {7 * i}? " + "Think. " * 8} for i in range(64)]
        loader = DataLoader(
            queries, batch_size=1, collate_fn=lambda items: lazy_stack([TensorDict(i) for i in items])
        )
        env = ChatEnv.from_dataloader(
            loader, batch_size=(NUM_ENVS,), input_mode="history", tokenizer=self.tokenizer
        )
        env.append_transform(Reward())
        if deferred is not None:
            env.append_transform(RetrieveKL("from_collector", self.reference, coeff=0.1, deferred=deferred))
        sampling = {"max_new_tokens": self.args.tokens, "temperature": 0.0, "ignore_eos": True}
        policy = functools.partial(vLLMWrapper, self.llm, tokenizer=self.tokenizer, generate_kwargs=sampling)
        turns = NUM_ENVS * steps
        collector = LLMCollector(
            env,
            policy_factory=policy,
            dialog_turns_per_batch=turns,
            total_dialog_turns=10_000,
            reset_at_each_iter=True,
        )
        yield from collector

    def score(self, batch) -> None:
        """Score a batch step by step, as the transforms do."""
        for t in range(batch.shape[1]):
            ids = batch[:, t].get(("tokens", "full"), as_list=True)
            self.reference.scorer.score(
                ids, [len(p) for p in batch[:, t].get(("tokens", "prompt"), as_list=True)]
            )


def rows(batch):
    return [[sample["next"].get(key) for key in RESULTS] for sample in batch.reshape(-1).unbind(0)]


def check(bench: Bench, ways: dict) -> None:
    """Check that all ways give the same results, and that these agree with float64."""
    found = {name: rows(fill_deferred(next(batches))) for name, batches in ways.items()}
    for name, got in found.items():
        for mine, theirs in zip(got, found["immediate"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), (
                f"the results of {name} differ from those of immediate"
            )
    oracle = AutoModelForCausalLM.from_pretrained(bench.ref_path, dtype=torch.float64)
    sample = next(ways["immediate"])[0, 0]
    ids, mask = sample["tokens", "full"], sample["next", "kl_mask"][1:]
    with torch.no_grad():
        want = oracle(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    error = (sample["next", "ref_log_probs", "full"][1:] - want)[mask].abs().max().item()
    assert error < 1e-3, f"the reference is {error:.1e} nats from float64, expected below 1e-3"
    print(f"results equal bit for bit in all ways; largest error {error:.1e}")


def measure(bench: Bench, steps: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds per step, round by round."""
    ways = {
        name: bench.batches(steps, d)
        for name, d in (("immediate", False), ("deferred", True), ("later", "buffer"))
    }
    check(bench, ways)
    alone = bench.batches(steps)
    seconds: dict[str, list[float]] = {}
    num_batches = STEPS_PER_MEASUREMENT // steps

    def timed(name, work):
        began = time.perf_counter()
        result = work()
        seconds.setdefault(name, []).append((time.perf_counter() - began) / STEPS_PER_MEASUREMENT)
        return result

    def later():
        before = None
        for _ in range(num_batches):
            batch = next(ways["later"])
            if before is not None:
                fill_deferred(before)
            before = batch
        fill_deferred(before)

    for _ in range(rounds):
        collected = timed("generating alone", lambda: [next(alone) for _ in range(num_batches)])
        timed("scoring alone", lambda collected=collected: [bench.score(batch) for batch in collected])
        timed("immediate", lambda: [next(ways["immediate"]) for _ in range(num_batches)])
        timed("deferred", lambda: [next(ways["deferred"]) for _ in range(num_batches)])
        timed("one batch later", later)
    pairs = zip(seconds["generating alone"], seconds["scoring alone"], strict=True)
    seconds["ideal"] = [max(pair) for pair in pairs]
    return seconds


def as_table(steps: int, seconds: dict[str, list[float]]) -> Table:
    title = f"batches of {steps} step{'s' * (steps > 1)}; seconds per step"
    table = make_table(title, "way", "s p20", "s p50", "s p80", "ratio to immediate, p50")
    for name, runs in seconds.items():
        quantiles = (f"{q:.3f}" for q in p20_p50_p80(runs))
        table.add_row(name, *quantiles, f"{median_ratio(seconds['immediate'], runs):.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", choices=("own", "shared"), default="own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=3, help="layers of the reference")
    parser.add_argument("--tokens", type=int, default=96, help="tokens that the policy generates per turn")
    add_markdown_option(parser)
    args = parser.parse_args()
    set_list_to_stack(True).set()
    # Deprecations of other packages, and bytes of a random model that are no text.
    warnings.simplefilter("ignore")
    report = Report(args.markdown, width=120)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), make_tokenizer(), args)
        for steps in BATCH_STEPS:
            report.table(as_table(steps, measure(bench, steps, args.rounds)))
        bench.reference.close()
    report.line(
        machine_line(
            f"cores {args.cores} of {len(CORES)}; float32, policy hidden 256, 4 layers, reference hidden "
            f"768, {args.layers} layers; {NUM_ENVS} envs, {args.tokens} tokens a turn, {args.rounds} "
            f"rounds of {STEPS_PER_MEASUREMENT} steps"
        )
    )


if __name__ == "__main__":
    main()
