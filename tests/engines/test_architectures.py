"""The in-engine read-out against float64, on architectures with all kinds of heads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests import tiny
from tests.compat import since
from tests.engines.helpers import EOS, OPTIONS, PAD, VOCAB, random_ids, start_child, start_in_child
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl.engines.base import drive
from vllm_kl.types import ScoreRequest, ScoreResult

# Most heads are a matrix and a factor, which the kernel reads; these are not.
OWN_HEADS = {"gemma2": "soft cap", "phi": "bias"}

PROMPT = random_ids(0, 64)  # two blocks
FIRST, SECOND, THIRD = (random_ids(seed, 50) for seed in (1, 2, 3))
ALIKE = FIRST[:40] + random_ids(4, 10)

# What is scored, from which token on, and how many tokens of it the cache may give: whole blocks before token
# start - 1.
BATCH = {
    "first of the group": (PROMPT + FIRST, 64, 0),
    "second": (PROMPT + SECOND, 64, 32),
    "third": (PROMPT + THIRD, 64, 32),
    "fourth, begins like the first": (PROMPT + ALIKE, 64, 32),
    "the same from where they part": (PROMPT + ALIKE, 100, 96),
    "the second again": (PROMPT + SECOND, 64, 32),
    "one token": ([*PROMPT, EOS], 64, 32),
    "pad and EOS inside": ([5, PAD, EOS, 9, PAD, PAD, 11, EOS], 2, 0),
    "three steps long": (random_ids(5, 300), 1, 0),
}
EXTRA_IDS = np.array([[7, PAD, VOCAB - 1]] * 50, np.int32)
# Everything that a read-out can do.
EXTRA = ScoreRequest(
    token_ids=np.array(PROMPT + FIRST, np.int32), start=64, temperature=0.7, ids=EXTRA_IDS, top_k=4
)
REQUESTS = [ScoreRequest(token_ids=np.array(ids, np.int32), start=start) for ids, start, _ in BATCH.values()]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one engine returned, in the order of the requests."""

    head: str | None  # the class that read the log-probs; None: not read in the engine
    cached: list[ScoreResult]
    uncached: list[ScoreResult]
    extra: ScoreResult | None  # of EXTRA


def run_engine(model: str, readout: str, options: dict, requests: list[ScoreRequest]) -> Run:
    """Start an engine, score with the cache and without. Runs in the child process."""
    driver = start_in_child(model, readout, **{**OPTIONS, **options})
    results = [drive(driver, requests, share_prefix=share_prefix) for share_prefix in (True, False)]
    extra = head = None
    if readout == "pooling":
        (extra,) = drive(driver, [EXTRA], share_prefix=False)
    if readout == "pooling":
        worker = driver._core.engine_core.model_executor.driver_worker.worker
        head = type(worker.get_model().pooler.head).__name__
    return Run(head, *results, extra)


@pytest.fixture(scope="module")
def child():
    """Not that of other files: vLLM makes the group for experts with a process's first engine or never."""
    with start_child() as call:
        yield call


@pytest.fixture(scope="module")
def start_engine(child):
    def run(path, readout="pooling", requests=REQUESTS, **options):
        return child(run_engine, str(path), readout, options, requests)

    return run


def prepare(oracle):
    if getattr(oracle._model.config, "attn_logit_softcapping", None):
        oracle._model.set_attn_implementation("eager")  # the others leave the cap out
    oracle._model.set_experts_implementation("eager")  # the others refuse float64
    return oracle


def log_probs_in_float64(path, requests):
    oracle = prepare(Oracle(path))
    return [torch.tensor(oracle.log_probs(r.token_ids)[r.start :], dtype=torch.float64) for r in requests]


# What vLLM cannot load before this version, and what runs with every vLLM that the package knows.
MARKS = {
    "phi": since("0.32", "phi"),
    **dict.fromkeys(["llama", "gemma2", "mixtral", "qwen2-tied"], pytest.mark.compat),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=MARKS.get(name, ())) for name in tiny.ARCHITECTURES],
)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def path(architecture, tmp_path_factory):
    return tiny.build_architecture(tmp_path_factory.mktemp("architectures") / architecture, architecture)


@pytest.fixture(scope="module")
def truth(path):
    return log_probs_in_float64(path, REQUESTS)


@pytest.fixture(scope="module")
def run(path, start_engine):
    return start_engine(path, dtype="float32")


def assert_close(results, truth):
    for result, want in zip(results, truth, strict=True):
        got = torch.from_numpy(result.values[:, 0]).double()
        torch.testing.assert_close(got, want, rtol=0, atol=LOG_PROB_TOLERANCE)


def test_the_model_is_far_from_uniform(truth):
    assert torch.cat(truth).std() > 0.5


def test_uncached_log_probs_agree(run, truth):
    assert_close(run.uncached, truth)


def test_cached_log_probs_agree(run, truth):
    assert_close(run.cached, truth)


def test_cached_equals_uncached(run):
    assert_close(run.cached, [torch.from_numpy(r.values[:, 0]).double() for r in run.uncached])


def test_the_cache_gives_all_that_it_may_and_nothing_is_sent_twice(run):
    assert [r.num_cached_tokens for r in run.cached] == [num_cached for _, _, num_cached in BATCH.values()]
    assert not any(r.num_cached_tokens for r in run.uncached)
    assert not any(r.rescored for r in [*run.cached, *run.uncached])


def test_temperature_chosen_ids_and_best_tokens_agree(path, run):
    rows = prepare(Oracle(path)).logits(EXTRA.token_ids)[EXTRA.start - 1 : -1]
    want = (rows / EXTRA.temperature).log_softmax(-1)
    got = torch.from_numpy(run.extra.values)
    own = torch.from_numpy(EXTRA.token_ids[EXTRA.start :].astype(np.int64))[:, None]
    wanted = torch.cat([own, torch.from_numpy(EXTRA_IDS.astype(np.int64))], 1)
    torch.testing.assert_close(got[:, :4].double(), want.gather(1, wanted), rtol=0, atol=LOG_PROB_TOLERANCE)
    best = want.topk(EXTRA.top_k)
    assert torch.equal(got[:, 4:8].long(), best.indices)
    torch.testing.assert_close(got[:, 8:].double(), best.values, rtol=0, atol=LOG_PROB_TOLERANCE)


def test_the_kernel_reads_every_head_that_is_a_matrix_and_a_factor(architecture, run):
    assert run.head == ("ModelHead" if architecture in OWN_HEADS else "MatrixHead")


@pytest.mark.parametrize(("name", "head"), [("llama", "MatrixHead"), ("gemma2", "ModelHead")])
def test_engines_that_take_lora_adapters_score_their_base_model(start_engine, tmp_path, name, head):
    """vLLM wraps such an engine's LogitsProcessor, for rows that are sampled: one a request."""
    path = tiny.build_architecture(tmp_path, name)
    run = start_engine(path, dtype="float32", enable_lora=True)
    assert run.head == head
    assert_close(run.cached, log_probs_in_float64(path, REQUESTS))


def test_bfloat16_log_probs_are_no_worse_than_vllms_own(start_engine, tmp_path):
    path = tiny.build_architecture(tmp_path, "qwen2", dtype=torch.bfloat16, vocab_size=5000)
    requests = [
        ScoreRequest(token_ids=np.array(random_ids(seed, 120, 5000), np.int32), start=1) for seed in range(6)
    ]
    truth = torch.cat(log_probs_in_float64(path, requests))
    rms, largest = {}, {}
    for readout in ("pooling", "flat"):
        results = start_engine(path, readout, requests, dtype="bfloat16").uncached
        error = torch.from_numpy(np.concatenate([r.values[:, 0] for r in results])).double() - truth
        rms[readout], largest[readout] = float(error.square().mean().sqrt()), float(error.abs().max())
    assert rms["pooling"] <= rms["flat"]
    # One token's, and made by the layers: that vLLM rounds logits, too, helps it as often as not.
    assert largest["pooling"] <= 1.02 * largest["flat"]
