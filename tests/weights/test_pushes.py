"""Pushes into engines of every architecture: each tensor arrives, and a failed push changes no bit.

Engines that keep experts packed, derive matrices at their start, or write tensors themselves are those that a
load can leave behind without a word. All of them start in one child process, as in test_architectures.py; the
truth is computed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.engines.helpers import ALIVE, OPTIONS, random_ids, start_child, start_in_child
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl.engines.base import drive
from vllm_kl.errors import WeightsError
from vllm_kl.types import ScoreRequest
from vllm_kl.weights.checkpoint import Checkpoint, Skeleton

PROMPT = random_ids(0, 64)
REQUESTS = [
    ScoreRequest(token_ids=np.array(PROMPT + random_ids(1, 30), np.int32), start=64),
    ScoreRequest(token_ids=np.array(PROMPT + random_ids(2, 30), np.int32), start=64),
    ScoreRequest(token_ids=np.array(random_ids(3, 140), np.int32), start=1),
]
# Mixtral first: vLLM makes the group for experts with a process's first engine or never.
IN_CI = [*tiny.KERNEL_LAYOUTS, "qwen2-tied", "phi", "gpt_neox", "opt"]
NIGHTLY = [
    pytest.param(name, marks=pytest.mark.nightly)
    for name in dict.fromkeys([*tiny.ARCHITECTURES, *tiny.MORE])
    if name not in IN_CI
]

TABLE = """\
`make nightly` writes this file. Numbers are the largest error of a log-prob against float64, in nats, for
two-layer models with random weights: at the engine's start, with and without shared prefixes, and after a
push of other weights. A push of the same weights, a refused push and a push that failed halfway left the same
bits in every row. Each tensor was also pushed alone, and arrived.

| model | at the start | uncached | after a push | tensors |
|---|---|---|---|---|
"""
State = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Pushed:
    """The log-probs that one engine returned at each stage of the test, one tensor for all requests."""

    at_start: torch.Tensor
    uncached: torch.Tensor
    after_identity: torch.Tensor
    after_change: torch.Tensor
    after_refusal: torch.Tensor
    after_failure: torch.Tensor
    one_by_one: dict[str, torch.Tensor]  # after a push in which only this tensor was another
    after_reload: torch.Tensor  # vLLM's own, of a folder
    back: torch.Tensor
    refusal: str  # messages
    failure: str


def push_and_look(path: Path, other: Path, broken: Path) -> Pushed:
    """Start an engine and push to it in every way. Runs in the child process."""
    from vllm_kl.plugin import adopt_weights

    # Before the engine: vLLM's transformers backend changes transformers' classes.
    skeleton, states = Skeleton(str(path)), [state_of(path), state_of(other)]
    driver = start_in_child(str(path), "pooling", dtype="float32", **OPTIONS)

    def scores(*, share_prefix: bool = True) -> torch.Tensor:
        results = drive(driver, REQUESTS, share_prefix=share_prefix)
        return torch.cat([torch.from_numpy(r.values[:, 0].copy()) for r in results])

    def push(state: State) -> None:
        driver.weights.load(skeleton.write(skeleton.checked(state)))

    def scores_after(state: State) -> torch.Tensor:
        push(state)
        return scores()

    adopt, failures = adopt_weights.adopt, [RuntimeError("a worker died")]

    def adopt_and_fail(found):
        adopt(found)
        if failures:
            raise failures.pop()

    at_start, uncached = scores(), scores(share_prefix=False)
    after_identity = scores_after(states[0])
    after_change = scores_after(states[1])
    refusal = message_of(lambda: driver.weights.load(Checkpoint(broken)))
    after_refusal = scores()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adopt_weights, "adopt", adopt_and_fail)
        failure = message_of(lambda: push(states[0]))
    after_failure = scores()
    one_by_one = {name: scores_after(changed) for name, changed in changed_states(states[0], skeleton._tied)}
    driver.weights._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    after_reload = scores(share_prefix=False)  # it leaves KV of the old weights in the cache
    back = scores_after(states[0])
    return Pushed(
        at_start,
        uncached,
        after_identity,
        after_change,
        after_refusal,
        after_failure,
        one_by_one,
        after_reload,
        back,
        refusal,
        failure,
    )


def score_before_and_after_it_is_given(path: Path) -> dict[str, torch.Tensor]:
    """Make a ``vllm.LLM`` as without this package, and give it to a scorer. Runs in the child process."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT, RotaryEmbedding

    from vllm_kl import VLLMScorer

    ids = REQUESTS[2].token_ids.tolist()
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)

    def prompt_log_probs() -> torch.Tensor:
        (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        return torch.tensor(
            [entry[t].logprob for entry, t in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        )

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((RotaryEmbedding, "forward_cpu"), (CPURouter, "_compute_routing")):
            patch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
        _ROPE_DICT.clear()  # engines of a process share these modules, and earlier ones were mended
        options = {**OPTIONS, "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
        options["attention_backend"] = "CPU_MLA"  # AMX_MLA, where there is AMX, takes bfloat16 only
        llm = LLM(str(path), **options, use_tqdm_on_load=False)
        ALIVE.append(llm)
        before = prompt_log_probs()
        (scored,) = VLLMScorer(llm).score([ids])
        return {"before": before, "scored": scored, "after": prompt_log_probs()}


def state_of(path: Path) -> State:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def changed_states(state: State, tied: dict[str, str]) -> Iterator[tuple[str, State]]:
    """Yield each tensor's name, and a state in which only this tensor and those tied to it are changed."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in state.items():
        if name not in tied:
            noise = torch.randn(tensor.shape, generator=generator)
            changed = {**state, name: tensor + 0.3 * tensor.abs().mean().clamp_min(0.3) * noise}
            yield name, changed | {one: changed[other] for one, other in tied.items()}


def message_of(load) -> str:
    try:
        load()
    except WeightsError as error:
        return str(error)
    return "it was not refused"


def save_without_one_tensor(path: Path, folder: Path) -> Path:
    """Save a checkpoint that lacks the weights of a norm or, of a model without, of some other layer."""
    tensors = load_file(path / "model.safetensors")
    folder.mkdir()
    shutil.copy(path / "config.json", folder)
    norms = [name for name, tensor in tensors.items() if tensor.dim() == 1 and name.endswith("weight")]
    lost = max(norms or tensors)
    save_file(
        {k: t for k, t in tensors.items() if k != lost},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


class Truth:
    """The float64 model of an architecture."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager"
        )
        self._model.set_experts_implementation("eager")
        self.tied = dict(self._model.all_tied_weights_keys)

    @torch.no_grad()
    def of(self, state: State) -> torch.Tensor:
        self._model.load_state_dict(state)
        rows = []
        for request in REQUESTS:
            ids = torch.from_numpy(request.token_ids.astype(np.int64))
            log_probs = self._model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            rows.append(log_probs[request.start - 1 :])
        return torch.cat(rows)


@dataclasses.dataclass(frozen=True)
class Case:
    """What an engine scored, and what is right."""

    pushed: Pushed
    truth: Truth
    states: list[State]


@pytest.fixture(scope="module")
def child():
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")  # products are tiny here: threads would wait for each other
            call = stack.enter_context(start_child())
        yield call


@pytest.fixture(scope="module")
def table(request):
    """Rows for ``--table FILE``, which is written when every architecture was seen."""
    rows = []
    yield rows
    if path := request.config.getoption("--table"):
        Path(path).write_text(TABLE + "".join(f"| {' | '.join(row)} |\n" for row in sorted(rows)))


@pytest.fixture(scope="module", params=[*IN_CI, *NIGHTLY])
def case(request, child, table, tmp_path_factory):
    home = tmp_path_factory.mktemp("pushes")
    paths = [tiny.build_architecture(home / str(seed), request.param, seed=seed) for seed in (0, 1)]
    broken = save_without_one_tensor(paths[1], home / "broken")
    pushed = child(push_and_look, *paths, broken)
    case = Case(pushed, Truth(paths[0]), [state_of(path) for path in paths])
    errors = [
        error(pushed.at_start, case.truth.of(case.states[0])),
        error(pushed.after_change, case.truth.of(case.states[1])),
    ]
    errors.insert(1, error(pushed.uncached, case.truth.of(case.states[0])))
    table.append([request.param, *(f"{e:.1e}" for e in errors), str(len(pushed.one_by_one))])
    return case


def error(scores: torch.Tensor, truth: torch.Tensor) -> float:
    return float((scores.double() - truth).abs().max())


def test_pushing_the_weights_that_serve_changes_no_bit(case):
    truth = case.truth.of(case.states[0])
    assert error(case.pushed.at_start, truth) < LOG_PROB_TOLERANCE
    assert error(case.pushed.uncached, truth) < LOG_PROB_TOLERANCE
    assert torch.equal(case.pushed.after_identity, case.pushed.at_start)


def test_after_a_push_log_probs_are_those_of_the_weights_that_were_sent(case):
    truth = case.truth.of(case.states[1])
    assert error(case.pushed.at_start, truth) > 0.5  # the two models are far apart
    assert error(case.pushed.after_change, truth) < LOG_PROB_TOLERANCE
    assert torch.equal(case.pushed.back, case.pushed.at_start)


def test_vllms_own_reload_of_a_folder_leaves_nothing_behind_on_a_cpu(case):
    assert error(case.pushed.after_reload, case.truth.of(case.states[1])) < LOG_PROB_TOLERANCE


def test_every_tensor_arrives(case):
    before = case.truth.of(case.states[0])
    wrong, still = {}, []
    for name, changed in changed_states(case.states[0], case.truth.tied):
        truth = case.truth.of(changed)
        if error(case.pushed.one_by_one[name], truth) > 2 * LOG_PROB_TOLERANCE:
            wrong[name] = error(case.pushed.one_by_one[name], truth)
        if error(before, truth) < 0.01:
            still.append(name)
    assert wrong == {}
    assert len(still) < len(case.pushed.one_by_one) / 10, still  # a change that moves nothing proves nothing


def test_a_refused_push_leaves_the_old_bits(case):
    assert re.search("no weights for|not initialized", case.pushed.refusal)
    assert "Nothing was touched: the engine keeps version 2" in case.pushed.refusal
    assert torch.equal(case.pushed.after_refusal, case.pushed.after_change)


def test_what_fails_halfway_is_put_back_bit_for_bit(case):
    assert "Version 2 was put back" in case.pushed.failure
    assert torch.equal(case.pushed.after_failure, case.pushed.after_change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what the CPU backend computes wrong")
@pytest.mark.parametrize("name", ["deepseek_v3", pytest.param("ernie4_5_moe", marks=pytest.mark.nightly)])
def test_an_engine_that_is_given_to_a_scorer_is_mended(child, name, tmp_path):
    path = tiny.build_architecture(tmp_path / "model", name)
    found = child(score_before_and_after_it_is_given, path)
    oracle = Truth(path)
    truth = oracle.of(state_of(path))[-(len(REQUESTS[2].token_ids) - 1) :]
    assert error(found["before"], truth) > 0.1  # when this fails, vLLM is right: see cpu_corrections.py
    assert error(found["scored"], truth) < LOG_PROB_TOLERANCE
    assert error(found["after"], truth) < LOG_PROB_TOLERANCE
