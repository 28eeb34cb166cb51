"""Measures what the transform costs without the engine: reading, checking, aligning, estimating, writing.

    python benchmarks/bench_transform.py                                  # about three minutes
    python benchmarks/bench_transform.py --shapes 64x512 1024x2048 --rounds 9

The engine returns prepared log-probs at once. A batch has the form that a collector yields: B rows in groups
of eight that share a prompt, and T columns, a quarter of them for the prompt. Prompts and responses have
random lengths from half to all of their columns. Before timing, the benchmark compares the results of
RetrieveKL with plain loops in float64.

    RetrieveKL       reuses the policy's log-probs, with one estimator; "+ 2" adds two estimators
    floor            reads and writes the same entries with TensorDict, and computes nothing
    KLComputation    ours; the batch has both log-probs, so nothing is scored, and no ids or masks are read
    TorchRL's        TorchRL's KLComputation on the same batch
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack, set_list_to_stack
from torch.nn.utils.rnn import pad_sequence
from torchrl.envs.llm.transforms import KLComputation as TorchRLKLComputation
from torchrl.modules.llm.policies import LogProbs, Masks, Tokens

from vllm_kl import KLComputation, RetrieveKL, VLLMReference, VLLMScorer
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table
from vllm_kl.types import EngineInfo, ScoreResult

VOCAB_SIZE = 4096
GROUP = 8
EXTRA = ("k3", "abs")
COEFF = 0.1
# Entries that a reuse reads (root) and writes (next).
READ = [
    ("tokens", "full"),
    ("tokens", "prompt"),
    ("masks", "all_attention_mask"),
    ("masks", "all_assistant_mask"),
    ("log_probs", "full"),
]
WRITTEN = [("log_probs", "full"), ("ref_log_probs", "full"), "kl_penalty", "kl_mask"]


class InstantEngine:
    """An engine with prepared answers: the first id of a response is the number of its sample."""

    info = EngineInfo(readout="pooling", vocab_size=VOCAB_SIZE, max_sequence_len=None)
    weights = None

    def __init__(self, rows: list[torch.Tensor]) -> None:
        self._rows = [row.numpy()[:, None] for row in rows]

    def score(self, requests, *, share_prefix, on_done=None, alone=False):
        return [ScoreResult(values=self._rows[r.token_ids[r.start]], weight_version=0) for r in requests]

    def close(self) -> None:
        pass


class Data:
    """Prompts, responses, and both log-probs of the responses, as lists of B tensors."""

    def __init__(self, num_samples: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def lengths(longest: int, count: int) -> list[int]:
            return torch.randint(longest // 2, longest + 1, (count,), generator=generator).tolist()

        def ids(length: int) -> torch.Tensor:
            return torch.randint(VOCAB_SIZE, (length,), generator=generator)

        prompts = [ids(n) for n in lengths(width // 4, num_samples // GROUP)]
        self.prompts = [prompts[i // GROUP] for i in range(num_samples)]
        self.responses = [ids(n) for n in lengths(width - width // 4, num_samples)]
        for i, response in enumerate(self.responses):
            response[0] = i
        self.log_probs, self.ref = (
            [-torch.rand(len(r), generator=generator) * 5 for r in self.responses] for _ in range(2)
        )

    def batch(self, is_dense: bool, *, with_ref: bool = False) -> TensorDictBase:
        """Return a batch as a collector yields it; ``with_ref`` adds both log-probs under "next"."""
        return (self._dense if is_dense else self._ragged)(with_ref)

    def _dense(self, with_ref: bool) -> TensorDictBase:
        def rows(prompts, responses, value):
            left = pad_sequence(prompts, batch_first=True, padding_value=value, padding_side="left")
            return torch.cat([left, pad_sequence(responses, batch_first=True, padding_value=value)], -1)

        def const(like, value):
            return [torch.full(row.shape, value) for row in like]

        size = (len(self.prompts),)
        ids = rows(self.prompts, self.responses, 0)
        real, empty = const(self.prompts, True), const(self.prompts, False)
        said = const(self.responses, True)
        nan = const(self.prompts, float("nan"))
        width = max(map(len, self.prompts))
        masks = {
            "all_attention_mask": rows(real, said, False),
            "all_assistant_mask": rows(empty, said, False),
        }
        gen, ref = (rows(nan, side, float("nan")) for side in (self.log_probs, self.ref))
        next_td = TensorDict(
            reward=torch.ones(*size, 1, 1), done=torch.ones(*size, 1, dtype=torch.bool), batch_size=size
        )
        if with_ref:
            next_td["log_probs"] = LogProbs(full=gen, batch_size=size)
            next_td["ref_log_probs"] = LogProbs(full=ref, batch_size=size)
        return TensorDict(
            tokens=Tokens(prompt=ids[:, :width], response=ids[:, width:], full=ids, batch_size=size),
            masks=Masks(**masks, batch_size=size),
            log_probs=LogProbs(response=gen[:, width:], full=gen, batch_size=size),
            next=next_td,
            batch_size=size,
        )

    def _ragged(self, with_ref: bool) -> TensorDictBase:
        samples = []
        for prompt, response, gen, ref in zip(
            self.prompts, self.responses, self.log_probs, self.ref, strict=True
        ):
            nan = torch.full(prompt.shape, float("nan"))
            full = torch.cat([prompt, response])
            is_said = torch.arange(len(full)) >= len(prompt)
            log_probs = LogProbs(prompt=nan, response=gen, full=torch.cat([nan, gen]))
            next_td = TensorDict(reward=torch.ones(1, 1), done=torch.ones(1, dtype=torch.bool))
            if with_ref:
                next_td["log_probs"] = LogProbs(full=torch.cat([nan, gen]))
                next_td["ref_log_probs"] = LogProbs(full=torch.cat([nan, ref]))
            samples.append(
                TensorDict(
                    tokens=Tokens(prompt=prompt, response=response, full=full),
                    masks=Masks(all_attention_mask=torch.ones_like(is_said), all_assistant_mask=is_said),
                    log_probs=log_probs,
                    next=next_td,
                )
            )
        return lazy_stack(samples)

    def check(self, td: TensorDictBase, estimators: tuple[str, ...], num_checked: int = 16) -> None:
        """Compare KL, mask and reward of some samples, column by column, with plain loops in float64."""
        next_td = td["next"]
        names = {"k1": "kl_penalty"} | {name: f"kl_{name}" for name in estimators[1:]}
        entries = {name: list(next_td.get(key, as_list=True)) for name, key in names.items()}
        masks, rewards = (list(next_td.get(key, as_list=True)) for key in ("kl_mask", "reward"))
        for i in range(0, len(self.prompts), max(1, len(self.prompts) // num_checked)):
            start = int(masks[i].nonzero()[0])
            values = zip(self.log_probs[i].tolist(), self.ref[i].tolist(), strict=True)
            want = [{"k1": p - q, "k3": np.exp(q - p) - 1 - (q - p), "abs": abs(p - q)} for p, q in values]
            for t, kept in enumerate(masks[i].tolist()):
                j = t - start
                assert kept == (0 <= j < len(want)), (i, t)
                for name, rows in entries.items():
                    expected = want[j][name] if kept else 0.0
                    assert abs(float(rows[i][t]) - expected) < 1e-5 * max(1.0, abs(expected)), (name, i, t)
                assert abs(float(rewards[i][t]) - (1.0 - COEFF * (want[j]["k1"] if kept else 0.0))) < 1e-5, (
                    i,
                    t,
                )


def read_and_write(td: TensorDictBase, entries: list, reward) -> TensorDictBase:
    """Read and write the entries that RetrieveKL reads and writes."""
    for key in READ:
        td.get(key, as_list=True)
    next_td = td["next"]
    next_td.get("reward", as_list=True)
    if isinstance(reward, torch.Tensor):
        for (name, *_), rows in (((key,) if isinstance(key, str) else key, rows) for key, rows in entries):
            value = LogProbs(full=rows, batch_size=td.batch_size) if name.endswith("log_probs") else rows
            next_td.set(name, value)
        return td.set("next", next_td.set("reward", reward))
    for i, sample in enumerate(next_td.unbind(0)):
        for key, rows in entries:
            if isinstance(key, str):
                sample.set(key, rows[i])
            else:
                sample.set(key[0], LogProbs(full=rows[i]))
        sample.set("reward", reward[i])
    return td.set("next", next_td)


def make_floor(data: Data, is_dense: bool) -> Callable[[TensorDictBase], TensorDictBase]:
    td = data.batch(is_dense)
    full = td.get(("log_probs", "full"), as_list=True)
    rows = full if is_dense else list(full)
    mask = td.get(("masks", "all_assistant_mask"), as_list=True)
    reward = rows.unsqueeze(-1) if is_dense else [row.unsqueeze(-1) for row in rows]
    entries = [(key, mask if key == "kl_mask" else rows) for key in WRITTEN]
    return lambda batch: read_and_write(batch, entries, reward)


def make_providers(data: Data, is_dense: bool) -> dict[str, tuple[Callable, Callable]]:
    """Return by name a function that makes a fresh batch, and the function to time on the batch."""
    scorer = VLLMScorer(InstantEngine(data.ref), canary=False)
    reference = VLLMReference(scorer, pad_output=is_dense)
    reuse = {
        extra: RetrieveKL(
            "from_collector", reference, gen_log_probs="reuse", coeff=COEFF, extra_estimators=extra
        )
        for extra in ((), EXTRA)
    }
    # TorchRL 0.14 subtracts a nested KL from the reward, which fails if the reward is dense.
    theirs = TorchRLKLComputation(
        ("log_probs", "full"), ("ref_log_probs", "full"), coeff=COEFF, add_to_reward=not is_dense
    )
    return {
        "RetrieveKL": (lambda: data.batch(is_dense), reuse[()]),
        f"RetrieveKL + {len(EXTRA)}": (lambda: data.batch(is_dense), reuse[EXTRA]),
        "floor": (lambda: data.batch(is_dense), make_floor(data, is_dense)),
        "KLComputation": (lambda: data.batch(is_dense, with_ref=True), KLComputation(coeff=COEFF)),
        "TorchRL's" + ", no reward" * is_dense: (lambda: data.batch(is_dense, with_ref=True), theirs),
    }


@set_list_to_stack(True)
def measure(data: Data, is_dense: bool, rounds: int) -> dict[str, list[list[float]]]:
    """Return microseconds per sequence of each provider and round: wall-clock time and CPU time."""
    providers = make_providers(data, is_dense)
    out: dict[str, list[list[float]]] = {name: [] for name in providers}
    for name, (make, run) in providers.items():  # a warm-up, and the check
        done = run(make())
        if name.startswith("RetrieveKL"):
            data.check(done, ("k1", *EXTRA) if "+" in name else ("k1",))
    for _ in range(rounds):
        for name, (make, run) in providers.items():
            td = make()
            wall, cpu = time.perf_counter(), time.process_time()
            run(td)
            elapsed = time.perf_counter() - wall, time.process_time() - cpu
            out[name].append([seconds / len(data.prompts) * 1e6 for seconds in elapsed])
    return out


def exponents(p50: dict[tuple[int, int], float]) -> str:
    """Fit seconds of a call ~ B^b T^t by least squares of logarithms; an exponent of 1 is proportional."""
    if len({b for b, _ in p50}) < 2 or len({t for _, t in p50}) < 2:
        return ""
    xs = np.array([[1.0, np.log(b), np.log(t)] for b, t in p50])
    ys = np.array([np.log(us * b) for (b, _), us in p50.items()])
    _, b, t = np.linalg.lstsq(xs, ys, rcond=None)[0]
    return f"B^{b:.2f} T^{t:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    shapes = [f"{b}x{t}" for b in (64, 256, 1024) for t in (128, 512, 2048)]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="BxT")
    parser.add_argument("--layouts", nargs="+", default=["dense", "ragged"], choices=["dense", "ragged"])
    add_markdown_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    report = Report(args.markdown, width=160)
    sizes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    for layout in args.layouts:
        results = {(b, t): measure(Data(b, t), layout == "dense", args.rounds) for b, t in sizes}
        columns = ("provider", *(f"B={b} T={t}" for b, t in results), "a call grows as")
        table = make_table(
            f"{layout}: microseconds per sequence: p50 (p20-p80), then p50 of CPU time",
            *columns,
            left=columns[-1:],
        )
        for name in next(iter(results.values())):
            cells, p50 = [], {}
            for size, found in results.items():
                wall, cpu = np.array(found[name]).T
                p20, p50[size], p80 = np.percentile(wall, [20, 50, 80])
                cells.append(f"{p50[size]:.0f} ({p20:.0f}-{p80:.0f}) {np.median(cpu):.0f}")
            table.add_row(name, *cells, exponents(p50))
        report.table(table)
    report.line(machine_line(f"{args.rounds} rounds"))


if __name__ == "__main__":
    main()
