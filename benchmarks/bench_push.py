"""Measures how long each way takes to push weights into an engine, and whether the engine then serves them.

    python benchmarks/bench_push.py               # the tables of benchmarks/README.md, twelve minutes, 12 GiB
    python benchmarks/bench_push.py --sizes 5M    # a minute and a half

The trainer is a transformers model in this process, whose weights change before every push. The engine is a
vllm.LLM whose core runs in the same process, or in its own process (vLLM's default). The clock starts with
the trainer's state dict, and stops when the engine has the new weights and an empty prefix cache:

    push_weights           ours: check, write to shared memory, load, pack, stamp a version;
                           an error restores the old weights
    shared memory, reload  save_pretrained to shared memory, vLLM's reload_weights(weights_path)
    disk, reload           the same from a folder on disk, written through (fsync)
    RPC, reload            the tensors as arguments of collective_rpc: references in one process, else pickled
    backend                vLLM's weight transfer (start, update, finish) with a backend that reads shared
                           memory; only in the same process, because this script registers it
    new engine             save_pretrained to shared memory, and another vllm.LLM (timed once)
    floor                  one copy of the bytes (torch.Tensor.copy_) into allocated memory

After every push, the benchmark compares the log-probs of a prompt with the trainer's model in float64. It
fails if push_weights does not agree. If another way does not agree, the table shows the error.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_kl.environment import on_a_gpu

# vLLM and torch read these variables at import, in the children. "RPC, reload" needs pickle.
os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_ALLOW_INSECURE_SERIALIZATION="1")
if not on_a_gpu():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM's rank count: 20 s

import torch
from rich.table import Table

from vllm_kl.bench import models
from vllm_kl.bench.report import (
    Report,
    add_markdown_option,
    machine_line,
    make_table,
    median_ratio,
    p20_p50_p80,
)

# All with tied embeddings.
SIZES = {"5M": models.size_5m, "168M": models.size_168m, "494M": models.qwen25_05b}
PLACES = {"same process": "0", "own process": "1"}
WAYS = ("push_weights", "shared memory, reload", "disk, reload", "RPC, reload", "backend")
PROMPT = [1 + 37 * i % 8_000 for i in range(48)]
# In nats. Four times the error of transformers in float32 is allowed too, because trained weights become
# ill-conditioned.
TOLERANCE = 5e-5


def build(size: str) -> Any:
    return SIZES[size](eos_token_id=0, max_position_embeddings=1024, initializer_range=0.04)


def register_backend() -> None:
    """Register the weight-transfer backend "files", whose update names a folder."""
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    @dataclass
    class Init(WeightTransferInitInfo):
        pass

    @dataclass
    class Update(WeightTransferUpdateInfo):
        folder: str

    class Files(WeightTransferEngine[Init, Update]):
        init_info_cls = Init
        update_info_cls = Update

        def init_transfer_engine(self, init_info: Init) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # Overridden, because the base class waits for an accelerator.
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Update) -> None:
            with torch.device(self.device):
                files = sorted(map(str, Path(update_info.folder).glob("*.safetensors")))
                self.model.load_weights(safetensors_weights_iterator(files, use_tqdm_on_load=False))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    WeightTransferEngineFactory.register_engine("files", Files)


class Pickled:
    """An iterable that vLLM's serializer passes to pickle: it does not restore lists of tensors itself."""

    def __init__(self, items: list[tuple[str, torch.Tensor]]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._items)


def vllms_own_reload(worker: Any, folder: str) -> None:
    # Not the worker's method, because on a CPU the plugin replaces that method.
    worker.model_runner.reload_weights(weights_path=folder)


class Pushes:
    """The ways to push the weights of one trainer into one engine."""

    def __init__(self, model: Any, llm: Any, *, has_backend: bool) -> None:
        self.model = model
        self.llm = llm
        self.ways: dict[str, Callable[[], None]] = {
            "push_weights": self.ours,
            "shared memory, reload": lambda: self.reload_folder(Path("/dev/shm"), sync=False),
            "disk, reload": lambda: self.reload_folder(Path(tempfile.gettempdir()), sync=True),
            "RPC, reload": self.reload_tensors,
        }
        if has_backend:
            llm.llm_engine.collective_rpc("init_weight_transfer_engine", args=({},))
            self.ways["backend"] = self.transfer

    def ours(self) -> None:
        from vllm_kl import push_weights

        push_weights(self.llm, self.model)

    def reload_folder(self, parent: Path, *, sync: bool) -> None:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            self.model.save_pretrained(folder)
            for path in Path(folder).iterdir() if sync else ():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            self.llm.collective_rpc(vllms_own_reload, args=(folder,))
            assert self.llm.reset_prefix_cache()

    def reload_tensors(self) -> None:
        state = Pickled(
            [(name, t) for name, t in self.model.state_dict().items() if name != "lm_head.weight"]
        )
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": state})
        assert self.llm.reset_prefix_cache()

    def transfer(self) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            self.model.save_pretrained(folder)
            self.llm.collective_rpc("start_weight_update")
            self.llm.collective_rpc("update_weights", args=({"folder": folder},))
            self.llm.collective_rpc("finish_weight_update")
            assert self.llm.reset_prefix_cache()


def log_probs(llm: Any) -> torch.Tensor:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=PROMPT)], params, use_tqdm=False)
    entries = zip(output.prompt_logprobs[1:], PROMPT[1:], strict=True)
    return torch.tensor([entry[token].logprob for entry, token in entries], dtype=torch.float64)


@torch.no_grad()
def error_of(llm: Any, model: Any, exact: Any) -> float:
    """Return the largest error of the engine's log-probs against the trainer's model in float64, nats."""
    exact.load_state_dict(model.state_dict())
    rows = exact(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    truth = rows.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    return float((log_probs(llm) - truth).abs().max())


@torch.no_grad()
def float32_error(model: Any, exact: Any) -> float:
    """Return the largest error of transformers in float32, after :func:`error_of` set the weights, nats."""
    rows, truth = (m(torch.tensor([PROMPT])).logits[0, :-1].double().log_softmax(-1) for m in (model, exact))
    targets = torch.tensor(PROMPT[1:])[:, None]
    return float((rows - truth).gather(1, targets).abs().max())


@torch.no_grad()
def train(model: Any, shift: int) -> None:
    """Change every matrix by a tenth of its norm, and keep its norm."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(0.99**0.5).add_(parameter.roll(shift, dims=1), alpha=0.1)


def measure(size: str, place: str, rounds: int, connection: Any) -> None:
    """Send seconds and errors of every way on one engine, and the seconds of the parts of push_weights."""
    from transformers.utils import logging
    from vllm import LLM

    from vllm_kl.weights.live_weights import LiveWeights

    logging.disable_progress_bar()
    model = build(size)
    options: dict[str, Any] = {}
    if has_backend := place == "same process":
        from vllm.config import WeightTransferConfig

        register_backend()
        options["weight_transfer_config"] = WeightTransferConfig(backend="files")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        began = time.perf_counter()
        model.save_pretrained(folder)
        llm = LLM(
            folder,
            dtype="float32",
            max_model_len=512,
            kv_cache_memory_bytes=256 << 20,
            enforce_eager=True,
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            **options,
        )
        start_s = time.perf_counter() - began
        _ = LiveWeights(llm.llm_engine).skeleton  # reads the folder while it exists
    try:
        connection.send(take_turns(model, llm, start_s, rounds, has_backend=has_backend))
    finally:
        llm.llm_engine.engine_core.shutdown()  # else this process waits at exit for the engine's process


def take_turns(model: Any, llm: Any, start_s: float, rounds: int, *, has_backend: bool) -> dict[str, Any]:
    from vllm_kl.weights.checkpoint import Skeleton
    from vllm_kl.weights.live_weights import LiveWeights

    seconds: dict[str, list[float]] = {"new engine": [start_s], "floor": []}
    exact = copy.deepcopy(model).double()
    errors = {"new engine": error_of(llm, model, exact)}
    parts: dict[str, list[float]] = {}
    for cls, name in ((Skeleton, "checked"), (Skeleton, "write"), (LiveWeights, "load")):
        setattr(cls, name, timed(getattr(cls, name), parts.setdefault(name, [])))
    ways = list(Pushes(model, llm, has_backend=has_backend).ways.items())
    source = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}  # tied
    target = torch.empty(max(t.numel() for t in source.values()))
    for round_number in range(rounds + 1):  # the first warms up
        for number, (way, push) in enumerate(ways[::-1] if round_number % 2 else ways):
            train(model, 1 + len(ways) * round_number + number)
            log_probs(llm)  # fills the prefix cache
            began = time.perf_counter()
            push()
            seconds.setdefault(way, []).append(time.perf_counter() - began)
            error = error_of(llm, model, exact)
            if way == "push_weights" and error > (bound := max(TOLERANCE, 4 * float32_error(model, exact))):
                raise SystemExit(f"push_weights is {error:.1e} nats from float64, expected below {bound:.1e}")
            errors[way] = max(errors.get(way, 0.0), error)
        began = time.perf_counter()
        for tensor in source.values():
            target[: tensor.numel()].view_as(tensor).copy_(tensor)
        seconds["floor"].append(time.perf_counter() - began)
    return {
        "seconds": {way: values[1:] or values for way, values in seconds.items()},
        "errors": errors,
        "parts": {part: values[1:] for part, values in parts.items()},
        "size_bytes": sum(t.numel() * t.element_size() for t in source.values()),
    }


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def table(size: str, place: str, result: dict[str, Any]) -> Table:
    seconds, ours = result["seconds"], result["seconds"]["push_weights"]
    columns = ("way", "s p20", "s p50", "s p80", "ratio to push_weights, p50", "largest error")
    shown = make_table(
        f"{size}, {result['size_bytes'] / 2**20:,.0f} MiB of float32, engine in {place}", *columns
    )
    for way in (*WAYS, "new engine", "floor"):
        if way not in seconds:
            continue
        values = seconds[way]
        ratio = median_ratio(values, ours if len(values) > 1 else [statistics.median(ours)])
        error = f"{result['errors'][way]:.1e}" if way in result["errors"] else ""
        shown.add_row(way, *(f"{q:.3f}" for q in p20_p50_p80(values)), f"{ratio:.2f}", error)
        if way == "push_weights":
            for part, values in result["parts"].items():
                shown.add_row(f"  {part}", *(f"{q:.3f}" for q in p20_p50_p80(values)), "", "")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--rounds", type=int, default=5)
    add_markdown_option(parser)
    args = parser.parse_args()
    report = Report(args.markdown, width=120)
    spawn = multiprocessing.get_context("spawn")
    for size in args.sizes:
        for place in args.places:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = PLACES[place]
            ours, theirs = spawn.Pipe()
            child = spawn.Process(target=measure, args=(size, place, args.rounds, theirs))
            child.start()
            theirs.close()
            try:
                result = ours.recv()
            except EOFError:
                raise SystemExit(f"{size}, {place}: not measured, see the error above") from None
            child.join()
            report.table(table(size, place, result))
    report.line(machine_line(f"{args.rounds} rounds"))


if __name__ == "__main__":
    main()
