"""Measures the memory that one shared engine saves if the policy is a LoRA adapter of the reference model.

    python benchmarks/bench_lora.py          # under four minutes, 5 GiB

The base model is a float32 Qwen2 (hidden 1024, 12 layers, vocabulary 32,000, tied: 168 M parameters) with
random weights. The adapter has rank 16 on all seven projections. The policy generates with the adapter, and
the base model scores the 16 sequences: 2 prompts of 256 tokens with 8 responses of 32 tokens each. Each setup
runs in its own process, and each engine has a KV cache of 256 MiB:

    one engine               VLLMScorer(llm) and the policy's requests share one vllm.LLM
    two engines              the reference has a second vllm.LLM in the same process
    engine and scorer        VLLMScorer(path), whose engine has its own process
    one engine, no adapters  shows the cost of enable_lora

Memory is the proportional set size (PSS) of all processes of the setup after a step, and their peak resident
size. Before the tables, the benchmark compares both log-probs with float64: of the base weights, and of base
weights + alpha / r * B @ A.

Expected sizes in MiB: weights 641, KV cache 256, an interpreter with torch and vLLM about 700, the adapter 40
(once as loaded, once in its slot).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_kl.environment import on_a_gpu

# Read by vLLM and torch at import, in the children.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
if not on_a_gpu():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM's rank count: 20 s

import numpy as np
import psutil
import torch

from vllm_kl.bench import models
from vllm_kl.bench.report import Report, add_markdown_option, machine_line, make_table

VOCAB = 32_000
PROMPT, RESPONSE, GROUP, NUM_PROMPTS = 256, 32, 8, 2
RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENGINE = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 256 << 20, "block_size": 32}
LORA = {"enable_lora": True, "max_lora_rank": RANK, "lora_target_modules": TARGETS}
SETUPS = ("one engine", "two engines", "engine and scorer", "one engine, no adapters")


def build(home: Path) -> tuple[Path, Path]:
    from safetensors.torch import save_file

    model = models.size_168m(eos_token_id=0, max_position_embeddings=1024, initializer_range=0.04)
    model.save_pretrained(home / "base")
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = 0.02 * torch.randn(RANK, module.in_features)
            tensors[f"{key}.lora_B.weight"] = 0.02 * torch.randn(module.out_features, RANK)
    (home / "adapter").mkdir()
    save_file(tensors, home / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    (home / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return home / "base", home / "adapter"


def start(setup: str, base: str, adapter: str) -> tuple[Any, Any, Any]:
    """Return the engine that generates, the adapter it generates with, and the reference's scorer."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from vllm_kl import VLLMScorer

    common = {**ENGINE, "enforce_eager": True, "skip_tokenizer_init": True, "max_num_batched_tokens": 4096}
    if setup == "one engine, no adapters":
        llm = LLM(base, **common)
        return llm, None, VLLMScorer(llm)
    llm, request = LLM(base, **common, **LORA), LoRARequest("policy", 1, adapter)
    if setup == "one engine":
        return llm, request, VLLMScorer(llm)
    return (
        llm,
        request,
        VLLMScorer(
            LLM(base, **common) if setup == "two engines" else base,
            **({} if setup == "two engines" else ENGINE),
        ),
    )


def measure(setup: str, base: str, adapter: str, rounds: int, connection: Any) -> None:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    llm, request, scorer = start(setup, base, adapter)
    params = SamplingParams(
        n=GROUP, max_tokens=RESPONSE, temperature=1.0, logprobs=0, detokenize=False, ignore_eos=True, seed=0
    )
    seconds = []
    for round_number in range(rounds + 1):
        rng = np.random.default_rng(round_number)
        prompts = rng.integers(1, VOCAB, (NUM_PROMPTS, PROMPT)).tolist()
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompts],
            params,
            use_tqdm=False,
            lora_request=request,
        )
        samples = [sample for output in outputs for sample in output.outputs]
        sequences = [
            ids + list(s.token_ids) for ids, o in zip(prompts, outputs, strict=True) for s in o.outputs
        ]
        began = time.perf_counter()
        ref_log_probs = scorer.score(sequences, PROMPT)
        seconds.append(time.perf_counter() - began)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    connection.send(
        {
            "pss": sum(p.memory_full_info().pss for p in processes) / 2**20,
            "peak": sum(_peak_mib(p.pid) for p in processes),
            "seconds": statistics.median(seconds[1:]),
            "readout": scorer.readout,
            "sequences": sequences,
            "log_probs": [[next(iter(e.values())).logprob for e in s.logprobs] for s in samples],
            "ref_log_probs": [row.tolist() for row in ref_log_probs],
        }
    )
    scorer.close()
    connection.close()
    os._exit(0)  # two engines in one process share vLLM's process groups, and would destroy them twice


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def check(results: dict[str, Any], base: Path, adapter: Path, num_checked: int) -> dict[str, float]:
    """Return the largest error of either side against float64, in nats."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()

    @torch.no_grad()
    def truth(ids: list[int]) -> torch.Tensor:
        rows = model(torch.tensor([ids])).logits[0, PROMPT - 1 : -1].log_softmax(-1)
        return rows.gather(1, torch.tensor(ids[PROMPT:])[:, None])[:, 0]

    def worst(setup: str, key: str) -> float:
        rows = list(zip(results[setup]["sequences"], results[setup][key], strict=True))
        picked = rows[:: max(1, len(rows) // num_checked)]
        return max(float((torch.tensor(row) - truth(ids)).abs().max()) for ids, row in picked)

    errors = {setup: worst(setup, "ref_log_probs") for setup in results}
    tensors = load_file(adapter / "adapter_model.safetensors")
    if "one engine, no adapters" in results:
        plain = "one engine, no adapters"
        errors[plain] = max(errors[plain], worst(plain, "log_probs"))
    with torch.no_grad():
        for name, module in model.named_modules():
            if (a := tensors.get(f"base_model.model.{name}.lora_A.weight")) is not None:
                b = tensors[f"base_model.model.{name}.lora_B.weight"]
                module.weight += ALPHA / RANK * (b.double() @ a.double())
    for setup in results:
        if setup != "one engine, no adapters":
            errors[setup] = max(errors[setup], worst(setup, "log_probs"))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument(
        "--checked", type=int, default=4, help="sequences of each setup to compare with float64"
    )
    add_markdown_option(parser)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as home:
        base, adapter = build(Path(home))
        results: dict[str, Any] = {}
        for setup in args.setups:
            ours, theirs = spawn.Pipe()
            child = spawn.Process(target=measure, args=(setup, str(base), str(adapter), args.rounds, theirs))
            child.start()
            theirs.close()
            results[setup] = ours.recv()  # EOFError: the child has failed and printed its error
            child.join()
        errors = check(results, base, adapter, args.checked)
        weights = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 2**20
    if (worst := max(errors.values())) > 5e-5:
        raise SystemExit(f"not measured: log-probs are {worst:.1e} nats from float64, expected below 5e-5")
    columns = (
        "setup",
        "PSS, MiB",
        "peak, MiB",
        "times one engine",
        "read-out",
        "scoring, s p50",
        "largest error",
    )
    table = make_table(f"adapter and base model, {weights:,.0f} MiB of weights", *columns, left=("read-out",))
    one = results[args.setups[0]]
    for setup, result in results.items():
        table.add_row(
            setup,
            f"{result['pss']:,.0f}",
            f"{result['peak']:,.0f}",
            f"{result['pss'] / one['pss']:.2f}",
            result["readout"],
            f"{result['seconds']:.2f}",
            f"{errors[setup]:.1e}",
        )
    report = Report(args.markdown, width=120)
    report.table(table)
    sizes = f"rank {RANK}, {NUM_PROMPTS} prompts of {PROMPT} tokens, {GROUP} responses of {RESPONSE}"
    report.line(machine_line(f"{args.rounds} rounds; {sizes}"))


if __name__ == "__main__":
    main()
