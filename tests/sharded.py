"""One rank of a training run in FSDP: what it and its state dicts come out as. Prints one line of JSON.

python -m tests.sharded RANK RANKS FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from vllm_kl.errors import WeightsError
from vllm_kl.weights.state_dict import as_state_dict

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class WithValueHead(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model
        self.v_head = torch.nn.Linear(64, 1)


def main(rank: int, ranks: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=ranks)
    truth = load(folder).state_dict()

    def came_out(source):
        try:
            state = as_state_dict(source, truth.keys())
        except WeightsError as error:
            return str(error)
        same = state.keys() == truth.keys() and all(torch.equal(state[name], truth[name]) for name in truth)
        return "the same" if same else "others"

    second = load(folder)
    for layer in second.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
    fully_shard(second, mesh=init_device_mesh("cpu", (ranks,)))
    first = fsdp1(load(folder), use_orig_params=False)
    results = {
        "FSDP2": second,
        "FSDP2, its sharded state dict": second.state_dict(),
        "FSDP2, torch's whole state dict": get_model_state_dict(second, options=WHOLE),
        "FSDP1": first,
        "FSDP1, original parameters": fsdp1(load(folder), use_orig_params=True),
        "FSDP1, a value head inside": fsdp1(WithValueHead(load(folder)), use_orig_params=True),
        "FSDP1, its sharded state dict": get_model_state_dict(first, options=StateDictOptions()),
    }
    print(json.dumps({name: came_out(source) for name, source in results.items()}), flush=True)
    dist.destroy_process_group()


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def fsdp1(model: torch.nn.Module, *, use_orig_params: bool) -> FullyShardedDataParallel:
    warnings.simplefilter("ignore")
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Qwen2DecoderLayer}),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
