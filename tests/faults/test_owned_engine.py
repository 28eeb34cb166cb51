"""An owned engine that is killed, hangs or has no memory, or whose owner is interrupted, in each phase.

Each fault ends in the right error within its limit and leaves no process; the next scorer of this process
works. The other files with faults: ``tests/test_lifetime.py`` (owners that are killed, an engine that is
killed between calls), ``tests/test_concurrency.py`` (an engine that hangs, Ctrl-C while it scores),
``tests/weights/`` (pushes), ``tests/serving/test_killed.py`` (replicas and servers under load).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl import VLLMScorer, lifetime, push_weights
from vllm_kl.errors import EngineError, FrozenError, MissingLogProbError, OptionError, WeightsError

pytestmark = pytest.mark.timeout(600)

IDS = list(range(5, 60))
LONG = [[5 + n % 90, *list(range(5, 95)) * 3] for n in range(200)]  # many steps of the engine
# What Linux, Python, PyTorch and oneDNN say of a library, an import, a thread, a tensor or a product.
NO_MEMORY = (
    "failed to map segment|MemoryError|temporarily unavailable|new thread|bad_alloc|allocate memory"
    "|could not create a primitive"
)
ENDS_WITHIN_S = 60.0  # an engine whose start was interrupted inside Popen ends when it has imported vLLM


def engines():
    """Return the engines that this process has started, and what they have started."""
    me = psutil.Process()
    found = []
    for child in me.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "vllm_kl.engines._child" in child.cmdline():
                found += [child, *child.children(recursive=True)]
    return found


@pytest.fixture(autouse=True)
def nothing_is_left():
    """See that a test leaves no engine, and nothing in shared memory, of this process."""
    before = {process.pid for process in engines()}
    prefix = f"{lifetime.PREFIX}_{os.getpid()}_*"
    files = set(lifetime.SHARED_MEMORY.glob(prefix))
    yield
    until = time.monotonic() + ENDS_WITHIN_S
    while (left := {process.pid for process in engines()} - before) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == set()
    assert set(lifetime.SHARED_MEMORY.glob(prefix)) == files


def start(path, **options):
    return VLLMScorer(str(path), **{**tiny.ENGINE_OPTIONS, **options})


def check_right(scorer, oracle):
    """The scorer gives the log-probs of the oracle's weights."""
    check_log_probs(scorer.score([IDS])[0].tolist(), oracle.log_probs(IDS)[1:])


def check_log_probs(scored, truth):
    assert max(abs(a - b) for a, b in zip(scored, truth, strict=True)) < LOG_PROB_TOLERANCE


def meet_the_new_engine(act, after_s, known):
    """Do something to the next engine that this process starts, some time after its start."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        new = [process for process in engines() if process.pid not in known]
        if new:
            time.sleep(after_s)
            act(new[0])
            return
        time.sleep(0.01)


@pytest.mark.nightly
@pytest.mark.parametrize("after_s", [0.0, 1.0, 4.0])
def test_an_engine_that_is_killed_while_it_starts_is_an_error(ref_path, after_s):
    known = {process.pid for process in engines()}
    killer = threading.Thread(target=meet_the_new_engine, args=(psutil.Process.kill, after_s, known))
    killer.start()
    began = time.monotonic()
    with pytest.raises(EngineError, match="the engine process died"):
        start(ref_path)
    assert time.monotonic() - began < 60
    killer.join()


def test_an_engine_that_is_killed_while_threads_score_fails_each_call_and_the_next_one_works(
    ref_path, ref_oracle
):
    with start(ref_path) as scorer, ThreadPoolExecutor(4) as pool:
        os.kill(scorer._engine.pid, signal.SIGSTOP)  # no call ends before the engine is killed
        calls = [pool.submit(scorer.score, LONG) for _ in range(3)]
        calls.append(pool.submit(scorer.check_frozen))
        time.sleep(0.2)
        os.kill(scorer._engine.pid, signal.SIGKILL)
        for call in calls:
            error = call.exception(timeout=ENDS_WITHIN_S)
            assert isinstance(error, EngineError), error
    with start(ref_path) as scorer:
        check_right(scorer, ref_oracle)


@pytest.mark.nightly
@pytest.mark.parametrize("change", [push_weights, VLLMScorer.refresh])
def test_an_engine_that_is_killed_while_weights_change_is_an_error_and_the_next_one_works(
    ref_path, ref_oracle, change
):
    state = AutoModelForCausalLM.from_pretrained(ref_path).state_dict()
    with start(ref_path) as scorer, ThreadPoolExecutor(1) as pool:
        changed = threading.Event()

        def change_again_and_again():
            while True:
                change(scorer, state)
                changed.set()

        changing = pool.submit(change_again_and_again)
        assert changed.wait(ENDS_WITHIN_S)
        time.sleep(0.02)
        os.kill(scorer._engine.pid, signal.SIGKILL)
        assert isinstance(changing.exception(timeout=ENDS_WITHIN_S), EngineError)
        with pytest.raises(EngineError, match="closed|died"):
            scorer.score([IDS])
    with start(ref_path) as scorer:
        check_right(scorer, ref_oracle)


def sleep(scorer, _):
    with warnings.catch_warnings(action="ignore"), scorer.asleep():  # it does nothing on a CPU, and says so
        pass


CALLS = {
    "score": lambda scorer, _: scorer.score(LONG, entropy=True),
    "score_topk": lambda scorer, _: scorer.score_topk(LONG, 2),
    "score_ids": lambda scorer, _: scorer.score_ids(LONG[:2], [[[1]] * (len(ids) - 1) for ids in LONG[:2]]),
    "hidden_states": lambda scorer, _: scorer.hidden_states(LONG),
    "lm_head": lambda scorer, _: scorer.lm_head(),
    "exact_kl": lambda scorer, _: scorer.exact_kl(scorer, LONG),
    "check_frozen": lambda scorer, _: scorer.check_frozen(),
    "refresh": lambda scorer, state: scorer.refresh(state),
    "push_weights": push_weights,
    "asleep": sleep,
}


@pytest.mark.nightly
@pytest.mark.parametrize("call", CALLS)
def test_an_engine_that_hangs_in_any_call_is_ended(ref_path, call):
    state = AutoModelForCausalLM.from_pretrained(ref_path).state_dict()
    with start(ref_path) as scorer:
        scorer._engine._child._calls._timeout_s = 2  # the start took longer
        os.kill(scorer._engine.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"no sign of life for 2 s \(timeout_s\), and was ended"):
            CALLS[call](scorer, state)
        assert time.monotonic() - began < 20


@pytest.mark.nightly
def test_an_engine_that_hangs_while_it_starts_is_ended(ref_path):
    known = {process.pid for process in engines()}
    stopper = threading.Thread(target=meet_the_new_engine, args=(psutil.Process.suspend, 1.0, known))
    stopper.start()
    with pytest.raises(EngineError, match=r"no sign of life for 5 s \(timeout_s\), and was ended"):
        start(ref_path, timeout_s=5)
    stopper.join()


@pytest.mark.nightly
@pytest.mark.parametrize("call", CALLS)
def test_a_call_after_close_says_so(ref_path, call):
    state = AutoModelForCausalLM.from_pretrained(ref_path).state_dict()
    scorer = start(ref_path)
    scorer.close()
    with pytest.raises(EngineError, match="the engine is closed: make a new VLLMScorer"):
        CALLS[call](scorer, state)


@pytest.mark.nightly
@pytest.mark.parametrize("gib", [0.3, 1.0, 1.5])
def test_an_engine_that_has_no_memory_to_start_is_an_error_and_the_next_one_works(ref_path, ref_oracle, gib):
    def limit(engine):
        engine.rlimit(psutil.RLIMIT_AS, (int(gib * 2**30),) * 2)

    known = {process.pid for process in engines()}
    limiter = threading.Thread(target=meet_the_new_engine, args=(limit, 0.0, known))
    limiter.start()
    began = time.monotonic()
    with pytest.raises(EngineError, match=NO_MEMORY):
        start(ref_path)
    assert time.monotonic() - began < 120
    limiter.join()
    with start(ref_path) as scorer:
        check_right(scorer, ref_oracle)


@pytest.mark.nightly
def test_finite_weights_that_overflow_are_an_error_and_the_engine_takes_the_next_ones(ref_path, ref_oracle):
    state = AutoModelForCausalLM.from_pretrained(ref_path).state_dict()
    broken = {name: tensor * 1e37 if "mlp" in name else tensor for name, tensor in state.items()}
    with start(ref_path) as scorer:
        with pytest.raises(FrozenError, match="NaN"):
            scorer.refresh(broken)
        push_weights(scorer, broken)
        with pytest.raises(MissingLogProbError):
            scorer.score([IDS])
        push_weights(scorer, state)
        check_right(scorer, ref_oracle)


@pytest.mark.nightly
def test_an_engine_without_memory_is_an_error_and_the_next_one_works(ref_path, ref_oracle):
    with start(ref_path) as scorer:
        engine = psutil.Process(scorer._engine.pid)

        def score_with_less_and_less():
            for n in range(40):  # what an allocator has already mapped it may still give
                most = engine.memory_info().vms - (n << 24)
                engine.rlimit(psutil.RLIMIT_AS, (most, most))
                scorer.score(LONG)

        began = time.monotonic()
        with pytest.raises(EngineError, match=NO_MEMORY):
            score_with_less_and_less()
        assert time.monotonic() - began < 300
    with start(ref_path) as scorer:
        check_right(scorer, ref_oracle)


def take_memory(process):
    most = process.memory_info().vms
    process.rlimit(psutil.RLIMIT_AS, (most, most))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (psutil.Process.kill, "vLLM failed|the engine process died"),
        (psutil.Process.suspend, r"no sign of life for 10 s \(timeout_s\), and was ended"),
        (take_memory, NO_MEMORY),
    ],
)
def test_a_fault_of_one_worker_ends_the_call_and_all_processes(ref_path, ref_oracle, fault, told):
    """vLLM hears nothing of an error of the second worker: the first waits until the engine is ended."""

    def score_for_a_minute():
        while time.monotonic() - began < 60:
            scorer.score(LONG)

    with start(ref_path, tensor_parallel_size=2) as scorer:
        check_right(scorer, ref_oracle)
        scorer._engine._child._calls._timeout_s = 10  # the start took longer
        workers = [process for process in engines() if "Worker" in process.name()]
        assert len(workers) == 2
        timer = threading.Timer(0.3, fault, [workers[1]])
        timer.start()
        began = time.monotonic()
        with pytest.raises(EngineError, match=told):
            score_for_a_minute()
        assert time.monotonic() - began < 60
        timer.join()
    with start(ref_path) as scorer:
        check_right(scorer, ref_oracle)


@contextlib.contextmanager
def interrupted(after_s):
    """Raise KeyboardInterrupt in the main thread, as Ctrl-C does, some time after the block begins."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_struck(call, after_s):
    """Interrupt a call some time after it began; return whether it had not ended before."""
    try:
        with interrupted(after_s):
            call()
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.nightly
@pytest.mark.parametrize("after_s", [0.02, 0.5, 3.0])
def test_a_start_that_is_interrupted_leaves_no_engine(ref_path, after_s):
    with interrupted(after_s), pytest.raises(KeyboardInterrupt):
        start(ref_path)


@pytest.mark.nightly
def test_a_close_that_is_interrupted_can_be_repeated(ref_path):
    struck = []
    for after_s in (0.001, 0.01, 0.05):
        scorer = start(ref_path)
        struck.append(is_struck(scorer.close, after_s))
        scorer.close()
        scorer.close()
        with pytest.raises(EngineError, match="the engine is closed: make a new VLLMScorer"):
            scorer.score([IDS])
    assert any(struck)


@pytest.mark.nightly
def test_a_close_of_an_engine_that_hangs_ends_it_although_it_is_interrupted(ref_path):
    scorer = start(ref_path)
    engine = psutil.Process(scorer._engine.pid)
    os.killpg(engine.pid, signal.SIGSTOP)
    with pytest.raises(KeyboardInterrupt), interrupted(0.3):
        scorer.close()
    engine.wait(10)


@pytest.mark.nightly
def test_a_close_ends_when_the_engine_is_killed_meanwhile(ref_path):
    scorer = start(ref_path)
    engine = psutil.Process(scorer._engine.pid)
    os.killpg(engine.pid, signal.SIGSTOP)  # it hears of no close
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(scorer.close)
        time.sleep(0.3)
        assert not closing.done()
        os.killpg(engine.pid, signal.SIGKILL)
        closing.result(timeout=10)
    assert not engine.is_running()
    with pytest.raises(EngineError, match="the engine is closed"):
        scorer.score([IDS])


@pytest.mark.nightly
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_is_interrupted_leaves_an_engine_that_is_right(ref_path, ref_oracle, call):
    """A push and a refresh bring the weights that serve, so that these are right whenever they are struck.

    A call is struck after a share of the time that it took at first. One that is struck late may have ended.
    """
    state = AutoModelForCausalLM.from_pretrained(ref_path).state_dict()
    with start(ref_path) as scorer:
        began = time.monotonic()
        CALLS[call](scorer, state)
        takes_s = time.monotonic() - began
        struck = []
        for share in (0.01, 0.1, 0.3, 0.6, 0.9):
            struck.append(is_struck(lambda: CALLS[call](scorer, state), share * takes_s))
            check_right(scorer, ref_oracle)
        assert struck[0]
        assert sum(struck) >= 2


@pytest.mark.nightly
def test_weights_that_cannot_be_written_leave_the_old_ones(ref_path, ref_oracle):
    """A limit on the size of a file makes a write fail; ``test_full_memory.py`` fills a real ``/dev/shm``."""
    state = AutoModelForCausalLM.from_pretrained(ref_path).state_dict()
    with start(ref_path) as scorer:
        version = scorer.weight_version
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for call in (lambda: push_weights(scorer, state), lambda: scorer.refresh(state)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
            try:
                with pytest.raises(WeightsError, match="(?i)written|write|too large|space"):
                    call()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
        assert scorer.weight_version == version
        check_right(scorer, ref_oracle)
        assert scorer.check_frozen() == 0.0


def _score_elsewhere(scorer, ids):
    return scorer.score(ids)


def _score_with_its_own(path):
    with start(path) as scorer:
        return scorer.score([IDS])[0].tolist(), scorer._engine.pid


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_scorer_that_a_child_process_makes_works_and_ends_with_it(ref_path, ref_oracle, method):
    """The oracle computes here: PyTorch's own threads hang in a fork of a process that has used them."""
    with multiprocessing.get_context(method).Pool(1) as pool:
        scored, pid = pool.apply_async(_score_with_its_own, (ref_path,)).get(timeout=120)
    check_log_probs(scored, ref_oracle.log_probs(IDS)[1:])
    assert not psutil.pid_exists(pid)


@pytest.mark.nightly
def test_two_scorers_share_a_process_and_neither_goes_to_another(
    ref_path, policy_path, ref_oracle, policy_oracle
):
    with start(ref_path) as one, start(policy_path) as other:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(5):
                first, second = (
                    pool.submit(check_right, one, ref_oracle),
                    pool.submit(check_right, other, policy_oracle),
                )
                first.result()
                second.result()
        with pytest.raises(OptionError, match="cannot be pickled"):
            pickle.dumps(one)
        with (
            multiprocessing.get_context("spawn").Pool(1) as pool,
            pytest.raises(OptionError, match="cannot be pickled"),
        ):
            pool.apply(_score_elsewhere, (one, [IDS]))
        fork = multiprocessing.get_context("fork").Process(target=_refused_in_a_fork, args=(one,))
        fork.start()
        fork.join(30)
        assert fork.exitcode == 0
        one.close()
        one.close()
        check_right(other, policy_oracle)


@pytest.mark.nightly
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray leaves its log files open
def test_a_scorer_is_not_pickled_into_ray_and_one_that_a_task_makes_works(ref_path, ref_oracle):
    import ray

    path, options, ids = str(ref_path), tiny.ENGINE_OPTIONS, IDS

    def score(scorer):
        return scorer.score([ids])[0].tolist()

    def score_with_its_own():
        with VLLMScorer(path, **options) as scorer:
            return score(scorer)

    with start(ref_path) as scorer:
        for send in (
            lambda: ray.remote(score).remote(scorer),
            lambda: ray.remote(lambda: score(scorer)).remote(),
            lambda: ray.put(scorer),
        ):
            # Ray makes a TypeError of an OptionError, which is one, and adds its own advice.
            with pytest.raises(TypeError, match=r"(?s)cannot be pickled.*keep it in a Ray actor"):
                send()
        check_right(scorer, ref_oracle)
        scored = ray.get(ray.remote(score_with_its_own).remote(), timeout=120)
        check_log_probs(scored, ref_oracle.log_probs(IDS)[1:])


def _refused_in_a_fork(scorer):
    with pytest.raises(EngineError, match="not to a fork"):
        scorer.score([IDS])
    scorer.close()


@pytest.mark.nightly
def test_threads_that_score_while_another_closes_get_a_right_result_or_an_error(ref_path, ref_oracle):
    truth = ref_oracle.log_probs(IDS)[1:]
    scorer = start(ref_path)

    def score():
        for _ in range(10_000):
            check_log_probs(scorer.score([IDS])[0].tolist(), truth)

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(score) for _ in range(4)]
        time.sleep(1)
        scorer.close()
        for call in calls:
            error = call.exception(timeout=ENDS_WITHIN_S)
            assert isinstance(error, EngineError), error
            assert "closed" in str(error)
