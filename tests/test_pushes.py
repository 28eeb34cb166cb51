"""Pushes, architecture by architecture: what serves is what was sent, tensor by tensor; what is refused leaves the old bits.

Engines that keep experts packed, derive matrices at their start, or write tensors themselves are those that a load can leave
behind without a word. All of them start in one child process, as in test_architectures.py.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE
from tests.test_architectures import OPTIONS, random_ids
from vllm_kl.checkpoint import Checkpoint
from vllm_kl.engines.base import drive
from vllm_kl.errors import WeightsError
from vllm_kl.types import ScoreRequest

PROMPT = random_ids(0, 64)
REQUESTS = [ScoreRequest(token_ids=np.array(PROMPT + random_ids(seed, 30), np.int32), start=64) for seed in (1, 2)] + [
    ScoreRequest(token_ids=np.array(random_ids(3, 140), np.int32), start=1)
]

EVERY_TENSOR = ["mixtral", "gpt_oss", "deepseek_v3"]
IN_CI = [*EVERY_TENSOR, "mixtral-padded", "qwen3_moe", "glm4_moe", "granitemoehybrid", "qwen2-tied", "gemma2"]
ALL = list(dict.fromkeys([*IN_CI, *tiny.KERNEL_LAYOUTS, *tiny.ARCHITECTURES]))

ALIVE = []  # the child's engines


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What a child saw of one architecture. Errors are against float64, in nats."""

    start: float
    identity_keeps_bits: bool
    changed: float
    spread: float  # how far apart the two models are
    back_keeps_bits: bool
    refused: str
    refused_keeps_bits: bool
    put_back: str
    put_back_keeps_bits: bool
    one_by_one: dict[str, tuple[float, float]]  # of each tensor: the error after it was pushed alone, how far it moves


class Engine:
    """An engine in the child, and the float64 model that says what it must return."""

    def __init__(self, path: Path) -> None:
        from vllm_kl.engines.local import start

        self.oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
        self.oracle.set_experts_implementation("eager")
        self.driver = start(model=str(path), readout="pooling", options={**OPTIONS, "dtype": "float32"})
        ALIVE.append(self)

    def scores(self, *, share_prefix: bool = True) -> torch.Tensor:
        results = drive(self.driver, REQUESTS, share_prefix=share_prefix)
        return torch.cat([torch.from_numpy(r.values[:, 0].copy()) for r in results])

    @torch.no_grad()
    def truth(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        self.oracle.load_state_dict(state)
        rows = []
        for request in REQUESTS:
            ids = torch.from_numpy(request.token_ids.astype(np.int64))
            log_probs = self.oracle(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            rows.append(log_probs[request.start - 1 :])
        return torch.cat(rows)

    def push(self, state: dict[str, torch.Tensor]) -> None:
        skeleton = self.driver.weights.skeleton
        self.driver.weights.load(skeleton.write(skeleton.checked(state)))

    def error(self, truth: torch.Tensor) -> float:
        return max(float((self.scores(share_prefix=share).double() - truth).abs().max()) for share in (True, False))


def push_and_look(path: Path, other: Path, folder: Path, every_tensor: bool) -> Pushed:
    """Start an engine and push to it in every way. Runs in the child process."""
    from vllm.model_executor.models import registry

    from vllm_kl.plugin import adoption

    registry._run_in_subprocess = lambda inspect: inspect()
    engine = Engine(path)
    states = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).state_dict() for p in (path, other)]
    at_start, start = engine.scores(), engine.error(engine.truth(states[0]))
    engine.push(states[0])
    identity = engine.scores()
    engine.push(states[1])
    at_other, changed = engine.scores(), engine.error(engine.truth(states[1]))
    refused = message_of(lambda: engine.driver.weights.load(without_its_norm(other, folder)))
    after_refusal = engine.scores()

    adopt, failures = adoption.adopt, [RuntimeError("a worker died")]

    def adopt_and_fail(found):
        adopt(found)
        if failures:
            raise failures.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adoption, "adopt", adopt_and_fail)
        put_back = message_of(lambda: engine.push(states[0]))
    after_put_back = engine.scores()
    one_by_one = dict(push_one_by_one(engine, states[0])) if every_tensor else {}
    engine.push(states[0])
    return Pushed(
        start=start,
        identity_keeps_bits=torch.equal(identity, at_start),
        changed=changed,
        spread=float((at_other - at_start).abs().max()),
        back_keeps_bits=torch.equal(engine.scores(), at_start),
        refused=refused,
        refused_keeps_bits=torch.equal(after_refusal, at_other),
        put_back=put_back,
        put_back_keeps_bits=torch.equal(after_put_back, at_other),
        one_by_one=one_by_one,
    )


def push_one_by_one(engine, state):
    """Yield each tensor's name, the error after a push in which only it differs, and how far that moves a log-prob."""
    before = engine.truth(state)
    generator = torch.Generator().manual_seed(7)
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        changed = {**state, name: tensor + 0.3 * tensor.abs().mean().clamp_min(0.3) * noise}
        engine.push(changed)
        truth = engine.truth(changed)
        error = float((engine.scores().double() - truth).abs().max())
        yield name, (error, float((truth - before).abs().max()))


def without_its_norm(path, folder):
    """Save a checkpoint that lacks its last norm."""
    tensors = load_file(path / "model.safetensors")
    folder.mkdir()
    dropped = {name: t for name, t in tensors.items() if "layers." in name or "norm" not in name}
    assert len(dropped) == len(tensors) - 1
    save_file(dropped, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def message_of(load):
    try:
        load()
    except WeightsError as error:
        return str(error)
    return "it was not refused"


@pytest.fixture(scope="module")
def child():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent)
        patch.setenv("OMP_NUM_THREADS", "1")  # products are tiny here: threads would wait for each other
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        yield pool


@pytest.fixture(scope="module")
def look(child, tmp_path_factory):
    """Push to one architecture's engine, once for all tests."""
    seen = {}

    def look(name):
        if name not in seen:
            home = tmp_path_factory.mktemp("pushes")
            paths = [tiny.build_architecture(home / str(seed), name, seed=seed) for seed in (0, 1)]
            every_tensor = name in EVERY_TENSOR
            seen[name] = child.apply_async(push_and_look, (*paths, home / "broken", every_tensor)).get(timeout=240)
        return seen[name]

    return look


def nightly(name):
    return pytest.param(name, marks=[] if name in IN_CI else pytest.mark.nightly)


@pytest.fixture(params=[nightly(name) for name in ALL])
def pushed(request, look):
    return look(request.param)


def test_pushing_the_weights_that_serve_changes_no_bit(pushed):
    assert pushed.start < LOG_PROB_TOLERANCE
    assert pushed.identity_keeps_bits


def test_after_a_push_log_probs_are_those_of_the_weights_that_were_sent(pushed):
    assert pushed.spread > 0.5
    assert pushed.changed < LOG_PROB_TOLERANCE
    assert pushed.back_keeps_bits


def test_a_refused_push_leaves_the_old_bits(pushed):
    assert "norm" in pushed.refused
    assert "Nothing was touched: version 2 goes on serving" in pushed.refused
    assert pushed.refused_keeps_bits


def test_what_fails_halfway_is_put_back_bit_for_bit(pushed):
    assert "Version 2 was put back and goes on serving" in pushed.put_back
    assert pushed.put_back_keeps_bits


@pytest.mark.parametrize("name", EVERY_TENSOR)
def test_every_tensor_arrives(look, name):
    seen = look(name).one_by_one
    assert {tensor: error for tensor, (error, _) in seen.items() if error > 2 * LOG_PROB_TOLERANCE} == {}
    still = [tensor for tensor, (_, moved) in seen.items() if moved < 0.01]
    assert len(still) < len(seen) / 10, still  # a change that moves nothing proves nothing
