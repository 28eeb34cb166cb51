"""New weights for a live model, in each of an engine's workers: a method that the plugin gives to vLLM's ``WorkerBase``.

``collective_rpc`` calls it by name, in whichever process a worker is, on the CPU and on a GPU. It does what vLLM's own
``reload_weights`` does, and three things that it leaves out (0.32):

- A tensor that the checkpoint lacks is only logged there. Here it is an error: the layer would keep its old weights.
- A load that fails halfway leaves layers waiting for the rest. Here they are put back, so that the next load starts clean.
- On a CPU the products of a layer go through a copy that is packed for them. A head that is tied to the embedding gets no
  weights of its own, so its copy is not packed again, and logits stay those of the old weights.

Source: ``v1/worker/gpu_worker.py``, ``model_executor/model_loader/reload``, ``layers/vocab_parallel_embedding.py``, vLLM 0.32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

# Names of the methods, for ``collective_rpc``.
LOAD = "vllm_kl_load_weights"
READY = "vllm_kl_can_load_weights"
REPACK = "vllm_kl_repack_heads"


def install() -> None:
    """Give every worker of this process the methods. Idempotent; imports no model."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, LOAD, load_weights)
    setattr(WorkerBase, READY, lambda worker: True)
    setattr(WorkerBase, REPACK, lambda worker: _repack_heads(worker.model_runner.get_model()))


def load_weights(worker: Any, folder: str | None) -> None:
    """Load a folder of safetensors files, named as in transformers' checkpoints; ``None`` is the model's own checkpoint."""
    runner = worker.model_runner
    model = runner.get_model()
    iterator = None if folder is None else _read(Path(folder))
    with _noting_what_is_loaded(model) as answers:
        try:
            worker.reload_weights(weights_iterator=iterator)
        except BaseException:
            _put_back(model, worker.vllm_config)
            raise
    _repack_heads(model)
    if worker.model_config.quantization is None and answers:
        lora = worker.lora_config is not None
        wanted = {name.replace(".base_layer.", ".") if lora else name for name, _ in model.named_parameters()}
        if missing := sorted(wanted.difference(*answers)):
            raise ValueError(f"no weights for {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}")


def _read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


@contextlib.contextmanager
def _noting_what_is_loaded(model: torch.nn.Module) -> Iterator[list[set[str]]]:
    """Give the names that ``model.load_weights`` returned, of each call; models may return nothing."""
    answers: list[set[str]] = []
    load = model.load_weights

    def note(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        result = load(weights, *args, **kwargs)
        if result is not None:
            answers.append(set(result))
        return result

    model.load_weights = note  # type: ignore[assignment]
    try:
        yield answers
    finally:
        del model.load_weights


def _put_back(model: torch.nn.Module, config: Any) -> None:
    """End a load that failed: what was not loaded keeps the tensors it had."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

    with set_current_vllm_config(config):
        finalize_layerwise_reload(model, config.model_config)


def _repack_heads(model: torch.nn.Module) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)  # nothing, but on a CPU
