"""Threads share one owned engine: each call ends, with log-probs of one version of the weights."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import RetrieveLogProb, VLLMReference, VLLMScorer, push_weights
from vllm_kl.engines import process
from vllm_kl.errors import EngineError, FrozenError, OptionError, WeightsError
from vllm_kl.transforms import score_batch
from vllm_kl.types import ScoreRequest

PROMPT = list(range(5, 80))  # more than two blocks: the prefix cache has something to keep
SEQUENCES = [[*PROMPT, 100 + n, 7, 9] for n in range(4)]
LONG = [[5 + n % 90] + list(range(5, 95)) * 2 for n in range(60)]  # many steps of the engine
WITHIN_S = 180.0  # a start on a machine that has other things to do


@pytest.fixture(scope="module")
def states(tied_paths):
    return [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in tied_paths]


@pytest.fixture(scope="module")
def truths(tied_paths):
    """Per state, what the sequences score: ``[4, L - 1]`` float64."""
    oracles = [Oracle(path) for path in tied_paths]
    return [torch.tensor([oracle.log_probs(ids)[1:] for ids in SEQUENCES]) for oracle in oracles]


@pytest.fixture(scope="module")
def kept_scorer(tied_paths):
    with VLLMScorer(str(tied_paths[0]), timeout_s=WITHIN_S, **tiny.ENGINE_OPTIONS) as scorer:
        yield scorer


@pytest.fixture
def scorer(kept_scorer, states):
    """All tests have one engine; at the start of each the weights of the first state serve."""
    kept_scorer.refresh(states[0])
    return kept_scorer


def state_of(scored, truths):
    """Return whose log-probs these are: the number of a state; all of them of one."""
    errors = [float((torch.stack(scored).double() - truth).abs().max()) for truth in truths]
    assert min(errors) < LOG_PROB_TOLERANCE, f"of no version, or of two: {errors}"
    return errors.index(min(errors))


def test_who_waits_for_a_call_that_scores_is_served_when_it_ends(scorer, states):
    """An exclusive call waits while others score; when they end, nothing else wakes the child."""
    with ThreadPoolExecutor(1) as pool:
        for ask in (
            scorer.check_frozen,
            lambda: scorer.refresh(states[1]),
            lambda: push_weights(scorer, states[0]),
        ):
            scoring = pool.submit(scorer.score, LONG)
            time.sleep(0.05)
            ask()
            assert len(scoring.result(timeout=WITHIN_S)) == len(LONG)


def test_old_kv_is_not_read_after_a_refresh_though_it_is_in_the_cache(
    tied_paths, states, truths, tmp_path, monkeypatch
):
    """An engine that says that its cache is empty, and it is not."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'vllm_kl.engines._child' in ' '.join(sys.orig_argv):\n"
        "    from vllm.v1.core.block_pool import BlockPool\n"
        "    BlockPool.reset_prefix_cache = lambda self: True\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with VLLMScorer(str(tied_paths[0]), **tiny.ENGINE_OPTIONS) as scorer:
        starts = [len(ids) - 2 for ids in SEQUENCES]
        scorer.score(SEQUENCES, starts)
        scorer.score(SEQUENCES, starts)
        assert scorer.stats.num_cached_tokens > 0
        scorer.refresh(states[1])
        scored = scorer.score([SEQUENCES[0]], starts[0])[0]
        assert scorer.stats.num_cached_tokens == 0
        assert (scored.double() - truths[1][0, -2:]).abs().max() < LOG_PROB_TOLERANCE


@pytest.mark.nightly
def test_an_engine_that_hangs_ends_in_an_error_with_its_log_and_the_next_one_works(tied_paths, truths):
    with (
        VLLMScorer(str(tied_paths[0]), timeout_s=WITHIN_S, **tiny.ENGINE_OPTIONS) as hung,
        ThreadPoolExecutor(2) as pool,
    ):
        hung._engine._child._calls._timeout_s = 2  # the start took longer
        os.kill(hung._engine.pid, signal.SIGSTOP)
        began = time.monotonic()
        calls = [pool.submit(hung.score, [PROMPT]), pool.submit(hung.check_frozen)]
        for call in calls:
            with pytest.raises(EngineError, match=r"no sign of life for 2 s \(timeout_s\), and was ended"):
                call.result(timeout=WITHIN_S)
        assert time.monotonic() - began < 20
        with pytest.raises(EngineError, match="the engine is closed"):
            hung.score([PROMPT])
    with VLLMScorer(str(tied_paths[0]), **tiny.ENGINE_OPTIONS) as scorer:
        assert state_of(scorer.score(SEQUENCES), truths) == 0


def test_a_message_that_nobody_reads_is_not_waited_for_for_ever():
    ours, theirs = socket.socketpair()
    with theirs:
        calls = process._Calls(Connection(os.dup(ours.fileno())), 0.5)
        with pytest.raises(process._SilentError, match=r"0\.5"):
            next(calls.answers(calls.begin("score", bytes(10_000_000))))
        ours.shutdown(socket.SHUT_RDWR)
    ours.close()


@pytest.mark.parametrize("timeout_s", [0, -1, "soon"])
def test_a_time_that_is_none_is_refused(timeout_s):
    with pytest.raises(OptionError, match="timeout_s must be a positive number of seconds"):
        VLLMScorer("model", timeout_s=timeout_s)


def test_what_a_callers_progress_raises_is_not_taken_for_the_engines_death(scorer, truths):
    def full(done):
        raise OSError("no space left on device")

    requests = [ScoreRequest(token_ids=np.array(ids, np.int32), start=1) for ids in SEQUENCES]
    with pytest.raises(OSError, match="no space left"):
        scorer._engine.score(requests, share_prefix=True, on_done=full)
    assert state_of(scorer.score(SEQUENCES), truths) == 0


def batch_of(some):
    return TensorDict(
        tokens=TensorDict(full=torch.tensor([SEQUENCES[n] for n in some]), batch_size=2), batch_size=2
    )


def test_a_score_carries_the_version_that_made_it_whatever_another_thread_did_since(
    scorer, states, truths, tokenizer, monkeypatch
):
    transform = RetrieveLogProb(VLLMReference(scorer, tokenizer, input_mode="tokens"), assistant_only=False)
    spread, came_between, first = score_batch.spread, [], scorer.weight_version

    def spread_later(*args, **kwargs):
        if not came_between:
            came_between.append(scorer.refresh(states[1]))
            scorer.score(SEQUENCES)
        return spread(*args, **kwargs)

    monkeypatch.setattr(score_batch, "spread", spread_later)
    for state in (0, 1):
        td = transform(batch_of([0, 1]))
        assert td["ref_version"].tolist() == [first + state, first + state]
        assert (
            td["ref_log_probs", "full"][:, 1:].double() - truths[state][:2]
        ).abs().max() < LOG_PROB_TOLERANCE


def test_what_threads_score_while_another_refreshes_carries_the_version_that_made_it(
    scorer, states, truths, tokenizer
):
    """All threads share one transform: no thread reads data of another thread's call."""
    transform = RetrieveLogProb(VLLMReference(scorer, tokenizer, input_mode="tokens"), assistant_only=False)
    served, stop, wrong = {scorer.weight_version: 0}, threading.Event(), []  # version -> state

    def score(seed):
        choose = random.Random(seed)
        while not stop.is_set():
            some = choose.sample(range(len(SEQUENCES)), 2)
            td = TensorDict(
                tokens=TensorDict(full=torch.tensor([SEQUENCES[n] for n in some]), batch_size=2), batch_size=2
            )
            td = transform(td)
            (version,) = set(td["ref_version"].tolist())
            scored = td["ref_log_probs", "full"][:, 1:].double()
            found.append((version, some, scored))

    found = []
    with ThreadPoolExecutor(3) as pool:
        scoring = [pool.submit(score, seed) for seed in range(3)]
        for which in (1, 2, 0, 3, 1, 2):
            served[scorer.refresh(states[which])] = which
        stop.set()
        for future in scoring:
            future.result(timeout=WITHIN_S)
    for version, some, scored in found:
        error = float((scored - truths[served[version]][some]).abs().max())
        wrong += [] if error < LOG_PROB_TOLERANCE else [(version, error)]
    assert wrong == []
    assert len({version for version, _, _ in found}) > 2


class Crowd:
    """Threads that do random things with one scorer, and note what should not happen.

    One thread replaces weights, so what may serve during a call is known: the versions from the one before it
    to the one after. The main thread is interrupted at random, as by Ctrl-C.
    """

    def __init__(self, scorer, states, truths, num_steps, seed):
        self.scorer, self.states, self.truths = scorer, states, truths
        self.left = num_steps
        self.random = random.Random(seed)
        self.served = [0]  # the states, in the order in which they may have come to serve
        self.wrong = []
        self.counts = {}
        self.lock = threading.Lock()

    def run(self):
        threads = [
            threading.Thread(target=self.work, args=(does,))
            for does in (self.score, self.score, self.prove, self.replace)
        ]
        for thread in threads:
            thread.start()
        while self.left > 0 and not self.wrong:
            self.score_interrupted()
        for thread in threads:
            thread.join(WITHIN_S)
            assert not thread.is_alive(), "a call never returned"
        assert self.wrong == []

    def work(self, does):
        while self.left > 0 and not self.wrong:
            try:
                does()
            except BaseException as error:
                self.wrong.append(f"{does.__name__}: {type(error).__name__}: {error}")
            self.count(does.__name__)

    def count(self, name):
        with self.lock:
            self.left -= 1
            self.counts[name] = self.counts.get(name, 0) + 1

    def score(self):
        first = len(self.served) - 1
        some = self.random.sample(range(len(SEQUENCES)), self.random.randint(1, len(SEQUENCES)))
        scored = self.scorer.score([SEQUENCES[n] for n in some])
        may = set(self.served[max(first - 1, 0) :])
        state = state_of(scored, [truth[some] for truth in self.truths])
        if state not in may:
            self.wrong.append(f"state {state} scored, of {may}")

    def prove(self):
        try:
            self.scorer.check_frozen()
        except FrozenError as error:
            if "which no refresh() made" not in str(error):  # a push between two refreshes
                raise

    def replace(self):
        which = self.random.randrange(len(self.states))
        how = self.random.choice(["refresh", "push", "refuse"])
        if how == "refuse":
            with pytest.raises(WeightsError):
                push_weights(self.scorer, dict(list(self.states[which].items())[1:]))
            return
        self.served.append(which)
        if how == "push":
            push_weights(self.scorer, self.states[which])
        else:
            self.scorer.refresh(self.states[which])
        time.sleep(self.random.uniform(0, 0.05))

    def score_interrupted(self):
        is_scoring = True

        def interrupt(*_):
            if is_scoring:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, self.random.uniform(0.001, 0.05))
            self.score()
            is_scoring = False  # inside: a signal that comes before this line is caught below
        except KeyboardInterrupt:
            self.count("interrupted")
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        self.count("score_interrupted")


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("num_steps", [300, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_threads_that_score_prove_push_and_refresh_at_random_get_what_served(
    scorer, states, truths, num_steps
):
    crowd = Crowd(scorer, states, truths, num_steps, seed=0)
    crowd.run()
    assert min(crowd.counts.values()) > 0
    assert {"score", "prove", "replace", "interrupted"} <= set(crowd.counts)


def test_close_ends_what_waits(kept_scorer):
    """The last test here: it closes the engine of the others."""
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(kept_scorer.score, LONG)
        time.sleep(0.05)
        kept_scorer.close()
        error = scoring.exception(timeout=WITHIN_S)
        assert error is None or "closed" in str(error)
