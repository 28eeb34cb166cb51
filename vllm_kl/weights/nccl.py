"""Sends a trainer's weights from its GPU to the GPUs of an engine's workers, by vLLM's own NCCL sender.

    join    the trainer and the workers of all replicas open one NCCL group; once, and after a failure
    send    the workers prepare the weights (plugin/load_weights.py), and get the tensors from the trainer
            instead of from files (plugin/receive_weights.py)

All other steps of a push are those of a push by files. vLLM's ``NCCLTrainerWeightTransferEngine`` opens the
trainer's side and broadcasts the tensors; vLLM's receiving side is not used, because it loads into the
serving model.

Source: ``distributed/weight_transfer/nccl_engine.py`` and ``base.py``, vLLM 0.28 to 0.33. This code was never
run on GPUs. The tests run it on a CPU with gloo in the place of NCCL.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_kl.errors import VLLMKLError, WeightsError
from vllm_kl.plugin import receive_weights

# Which function opens a worker's communicator.
OPENER = "vllm_kl.plugin.receive_weights:open_nccl"
_LOOK_EVERY_S = 0.0002

StateDict = Mapping[str, torch.Tensor]
# Runs a method of the workers: its name, and the arguments for each replica; gives each worker's answer.
OnWorkers = Callable[[str, list[list[Any]]], list[list[Any]]]


class SentWeights:
    """Weights that a trainer sent by NCCL: no file has them.

    Args:
        described: the names, dtypes and shapes, as :func:`.receive_weights.receive` takes them.
    """

    def __init__(self, described: dict[str, Any]) -> None:
        self.for_workers = described

    @property
    def folder(self) -> Path:
        """There is none.

        Raises:
            WeightsError: always.
        """
        raise WeightsError(
            "the engine's weights came by NCCL, so there are no files of them. Pass the weights themselves "
            "(finish_update(source=...)), or push without transport='nccl'"
        )

    def delete(self) -> None:
        """Do nothing: there are no files."""


class Transfer:
    """The way from one trainer's GPU to the workers of an engine's replicas.

    Args:
        on_workers: runs a method of the workers.
        num_replicas: the number of replicas.
        host: the address of this machine, for the replicas' machines.
    """

    def __init__(self, on_workers: OnWorkers, num_replicas: int, host: str) -> None:
        self._on_workers, self._num_replicas, self._host = on_workers, num_replicas, host
        self._sender: Any = None  # vLLM's
        self._client = _Client()
        self._group = ""

    def send(self, state: StateDict, prepare: Callable[[dict[str, Any]], None]) -> SentWeights:
        """Send tensors; the workers hold them beside the serving weights afterwards.

        Args:
            state: the tensors, with the names of a checkpoint.
            prepare: lets all workers prepare the tensors that its argument describes.

        Raises:
            WeightsError: NCCL cannot be used here; or ``prepare`` raised it.
        """
        gpus = self._all(receive_weights.GPU)
        device = check(state, [gpu for answers in gpus for gpu in answers])
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            joined = {group for answers in self._all(receive_weights.JOINED) for group in answers}
            if self._sender is None or joined != {self._group}:
                self._join([len(answers) for answers in gpus])
            tensors = _Tensors(state, device, self._client)
            self._client.begin(prepare)
            self._sender.source = _source(tensors)
            try:
                self._sender.send_weights()
            except BaseException as error:
                self.close()
                if isinstance(error, VLLMKLError) or not isinstance(error, Exception):
                    raise
                raise WeightsError(
                    f"the weights could not be sent by NCCL ({error}). The engine keeps the old weights"
                ) from error
            self._sender.source = None  # it would keep the trainer's tensors alive
        return SentWeights(self._client.described)

    def close(self) -> None:
        """Leave the group. An unfinished broadcast is aborted."""
        sender, self._sender = self._sender, None
        communicator = getattr(sender, "model_update_group", None)
        if communicator is not None:  # vLLM 0.30's shutdown() only forgets it
            communicator.destroy()

    def _join(self, numbers: list[int]) -> None:
        """Open a new group of the trainer and all workers; each replica has a number of workers."""
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )
        from vllm.utils.network_utils import get_open_port

        self.close()
        self._group = uuid.uuid4().hex
        before = [sum(numbers[:i]) for i in range(len(numbers))]

        def join(info: dict[str, Any]) -> None:
            infos = [{**info, "rank_offset": info["rank_offset"] + offset} for offset in before]
            self._on_workers(receive_weights.JOIN, [[self._group, each, OPENER] for each in infos])

        self._client = _Client(join)
        info = NCCLTrainerInitInfo(
            master_address=self._host,
            master_port=get_open_port(),
            world_size=1 + sum(numbers),
            packed=False,
            rank=0,
        )
        try:
            self._sender = NCCLTrainerWeightTransferEngine.trainer_init(
                info, client=self._client, source=_source(_Tensors({}, torch.device("cpu"), self._client))
            )
            receive_weights.refuse_disabled(self._sender.model_update_group)
        except Exception as error:
            self.close()
            raise WeightsError(
                f"the trainer and the workers could not open an NCCL group ({error}); nothing was touched. "
                "Push without transport='nccl'"
            ) from error

    def _all(self, method: str) -> list[list[Any]]:
        return self._on_workers(method, [[]] * self._num_replicas)


class _Client:
    """What vLLM's sender tells the workers: a ``VLLMWeightSyncClient``."""

    def __init__(self, join: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._join = join
        self._prepare: Callable[[dict[str, Any]], None] | None = None
        self.described: dict[str, Any] = {}
        self.error: BaseException | None = None  # of the workers

    def begin(self, prepare: Callable[[dict[str, Any]], None]) -> None:
        self._prepare, self.error = prepare, None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        assert self._join is not None
        self._join(init_info)

    def start_weight_update(self) -> None:
        """Do nothing: the workers begin in :meth:`update_weights`."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let the workers receive. vLLM's sender runs this in a thread, and broadcasts meanwhile."""
        if update_info["names"]:  # vLLM 0.33 leaves out what it has told already
            self.described = {name: update_info[name] for name in ("names", "dtype_names", "shapes")}
        assert self._prepare is not None
        try:
            self._prepare(self.described)
        except BaseException as error:
            self.error = error
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Do nothing: the replicas commit when all of them have prepared."""


class _Tensors:
    """The tensors of one push, with the method that vLLM's ``ModuleSource`` reads.

    It gives out a tensor when the broadcast of the one before is done, and raises the workers' error if they
    failed: else a broadcast to a dead worker would wait for ever.
    """

    def __init__(self, state: StateDict, device: torch.device, client: _Client) -> None:
        self._state, self._device, self._client = state, device, client

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._state.items():
            yield name, tensor
            done = receive_weights.is_done(self._device)
            while not done():
                self._raise_error()
                time.sleep(_LOOK_EVERY_S)
            self._raise_error()

    def _raise_error(self) -> None:
        if self._client.error is not None:
            raise self._client.error


def _source(tensors: _Tensors) -> Any:
    from vllm.distributed.weight_transfer.base import ModuleSource

    return ModuleSource(tensors)


def check_installed() -> None:
    """Refuse a vLLM without the sender.

    Raises:
        WeightsError: this vLLM is too old.
    """
    import vllm

    try:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine  # noqa: F401
    except ImportError as error:
        raise WeightsError(
            f"transport='nccl' needs vLLM 0.28 or later, and this is {vllm.__version__}. Leave transport= "
            "out: files work with every version"
        ) from error


def check(state: StateDict, gpus: list[str | None]) -> torch.device:
    """Return the trainer's device; refuse weights and workers between which NCCL cannot send.

    Args:
        state: the trainer's tensors.
        gpus: the UUID of each worker's GPU; ``None``: it has none.

    Raises:
        WeightsError: a worker or the weights are not on a GPU, or two of them share one.
    """
    devices = {tensor.device for tensor in state.values()}
    problem = ""
    if None in gpus:
        problem = "the engine's workers have no GPU that NCCL can reach"
    elif len(devices) > 1 or next(iter(devices)).type != "cuda":
        where = ", ".join(sorted(map(str, devices)))
        problem = f"the trainer's weights must be on one GPU, and are on {where}"
        if devices == {torch.device("cpu")}:
            problem += " (sharded weights are gathered there)"
    elif receive_weights.uuid_of(next(iter(devices))) in gpus:
        problem = f"the trainer and a worker share a GPU ({next(iter(devices))}), and NCCL takes one each"
    elif shared := [gpu for gpu, number in Counter(gpus).items() if number > 1]:
        problem = f"two workers share the GPU {shared[0]}, and NCCL takes one each"
    if problem:
        raise WeightsError(
            f"transport='nccl': {problem}; nothing was touched.\nLeave transport= out: files work everywhere"
        )
    return next(iter(devices))
