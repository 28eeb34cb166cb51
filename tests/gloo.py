"""A communicator with the method of vLLM's ``PyNcclCommunicator`` that a transfer uses: gloo, on a CPU."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import BroadcastOptions
from vllm.distributed.utils import stateless_init_torch_distributed_process_group


class Gloo:
    disabled = False

    def __init__(self, host, port, rank, world_size):
        self._group = stateless_init_torch_distributed_process_group(host, port, rank, world_size, "gloo")

    def broadcast(self, tensor, src, stream=None):
        options = BroadcastOptions()
        options.rootRank, options.timeout = src, timedelta(seconds=60)
        self._group.broadcast([tensor], options).wait()

    def destroy(self):
        self._group = None


def open_in_worker(worker, info):
    rank = info["rank_offset"] + worker.vllm_config.parallel_config.rank
    return Gloo(info["master_address"], info["master_port"], rank, info["world_size"])


def open_in_trainer(info):
    return Gloo(info.master_address, info.master_port, 0, info.world_size)
