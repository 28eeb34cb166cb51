"""Nobody waits for ever in a transfer by NCCL. No GPU: a broadcast that is never done is what is simulated.

tests/weights/test_async_nccl.py has whole transfers.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from vllm.utils.network_utils import get_open_port

from tests.gloo import Gloo
from vllm_kl.errors import WeightsError
from vllm_kl.plugin import load_weights, receive_weights
from vllm_kl.weights import nccl

CPU = torch.device("cpu")
SENT = {"names": ["a", "b"], "dtype_names": ["float32", "bfloat16"], "shapes": [[2], [3, 1]]}


@pytest.fixture
def pair():
    """A trainer's and a worker's communicator."""
    port = get_open_port()
    with ThreadPoolExecutor(2) as pool:
        yield [*pool.map(lambda rank: Gloo("127.0.0.1", port, rank, 2), (0, 1))]


def worker_in(communicator):
    worker = SimpleNamespace(device=CPU)
    setattr(worker, receive_weights._GROUP, ("group", communicator))
    return worker


def test_tensors_come_in_order_and_in_their_dtype(pair):
    trainer, worker = pair[0], worker_in(pair[1])
    tensors = [torch.tensor([1.5, -2.0]), torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.bfloat16)]
    sender = threading.Thread(target=lambda: [trainer.broadcast(tensor, src=0) for tensor in tensors])
    sender.start()
    got = dict(receive_weights.receive(worker, SENT))
    sender.join()
    assert list(got) == ["a", "b"]
    for tensor, wanted in zip(got.values(), tensors, strict=True):
        assert torch.equal(tensor, wanted)
        assert tensor.dtype == wanted.dtype


def test_a_worker_that_waits_too_long_leaves_the_group(pair, monkeypatch):
    trainer, worker = pair[0], worker_in(pair[1])
    monkeypatch.setattr(receive_weights, "is_done", lambda device: lambda: False)
    monkeypatch.setattr(receive_weights, "_SILENT_AT_MOST_S", 0.05)
    sender = threading.Thread(target=trainer.broadcast, args=(torch.zeros(2), 0))
    sender.start()
    with pytest.raises(RuntimeError, match=r"a did not come for 0\.05 s"):
        list(receive_weights.receive(worker, SENT))
    sender.join()
    assert getattr(worker, receive_weights._GROUP) == (None, None)
    with pytest.raises(RuntimeError, match="has not joined"):
        list(receive_weights.receive(worker, SENT))


def test_a_worker_whose_load_fails_takes_the_rest(pair, monkeypatch):
    """Else the trainer and the other workers would wait for it."""
    trainer, worker, taken = pair[0], worker_in(pair[1]), []
    broadcast = pair[1].broadcast
    monkeypatch.setattr(pair[1], "broadcast", lambda *args, **kw: taken.append(broadcast(*args, **kw)))

    def fail(worker, folder, sent):
        next(sent)
        raise MemoryError("no room")

    monkeypatch.setattr(load_weights, "load_second_model", fail)
    sender = threading.Thread(
        target=lambda: [
            trainer.broadcast(tensor, src=0) for tensor in (torch.zeros(2), torch.zeros(3, 1).bfloat16())
        ]
    )
    sender.start()
    with pytest.raises(MemoryError, match="no room"):
        load_weights.prepare(worker, SENT)
    sender.join()
    assert len(taken) == 2


def test_a_trainer_whose_broadcast_hangs_raises_the_workers_error(monkeypatch):
    monkeypatch.setattr(receive_weights, "is_done", lambda device: lambda: False)
    client = nccl._Client()
    tensors = nccl._Tensors({"a": torch.zeros(2), "b": torch.zeros(2)}, CPU, client).named_parameters()
    assert next(tensors)[0] == "a"

    def fail(described):
        time.sleep(0.05)
        raise WeightsError("a worker died")

    client.begin(fail)
    with ThreadPoolExecutor(1) as pool:
        workers = pool.submit(client.update_weights, SENT)
        with pytest.raises(WeightsError, match="a worker died"):
            next(tensors)
        assert isinstance(workers.exception(), WeightsError)


def test_a_communicator_that_sends_nothing_is_refused():
    with pytest.raises(RuntimeError, match="VLLM_DISABLE_PYNCCL"):
        receive_weights.refuse_disabled(SimpleNamespace(disabled=True))


def test_nccl_takes_one_rank_a_gpu(monkeypatch):
    cuda = torch.device("cuda", 1)
    on_a_gpu = {"a": SimpleNamespace(device=cuda)}
    monkeypatch.setattr(receive_weights, "uuid_of", lambda device: "GPU-1")
    assert nccl.check(on_a_gpu, ["GPU-0", "GPU-2"]) == cuda
    for state, gpus, problem in (
        (on_a_gpu, ["GPU-0", "GPU-1"], "the trainer and a worker share a GPU .cuda:1"),
        (on_a_gpu, ["GPU-0", "GPU-0"], "two workers share the GPU GPU-0"),
        (on_a_gpu, ["GPU-0", None], "workers have no GPU"),
        ({"a": torch.zeros(1)}, ["GPU-0"], "on one GPU, and are on cpu"),
        ({**on_a_gpu, "b": torch.zeros(1)}, ["GPU-0"], "on one GPU, and are on cpu, cuda:1"),
    ):
        with pytest.raises(WeightsError, match=problem):
            nccl.check(state, gpus)
