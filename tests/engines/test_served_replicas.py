"""Replicas on Ray Serve as the engine of a scorer. A real local Ray and Serve, with real engines."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time

import psutil
import pytest
import torch

from tests import local_ray, replica_drivers, service_drivers, tiny
from tests.lora import GROUP, PROMPT, error_of
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl import VLLMReference, VLLMScorer, push_weights
from vllm_kl.engines.replicas.known import RUNNING
from vllm_kl.errors import (
    EngineError,
    FrozenError,
    InputError,
    OptionError,
    ReadoutUnavailableError,
    WeightsError,
)
from vllm_kl.weights.checkpoint import Checkpoint

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = local_ray.MARKS

TWO = {"min": 2, "max": 2, "cpus": 1, "gpus": 0}  # the tests' Ray is told of GPUs that it has not
START = 60


def many(num_groups=60, seed=0):
    """Return sequences of groups of four, in a random order."""
    draw = random.Random(seed)
    ids = lambda most: [draw.randrange(200) for _ in range(most)]  # noqa: E731
    prompts = [ids(START) for _ in range(num_groups)]
    sequences = [[*prompt, *ids(draw.randrange(1, 30))] for prompt in prompts for _ in range(4)]
    draw.shuffle(sequences)
    return sequences


MANY = many()


@pytest.fixture(scope="module")
def served(cluster, ref_path):
    """A scorer of two replicas of the reference."""
    with VLLMScorer(ref_path, replicas=TWO, timeout_s=300, **tiny.ENGINE_OPTIONS) as scorer:
        yield scorer


@pytest.fixture
def scorer(served, ref_path):
    """The same scorer, which serves the reference, by two replicas."""
    wait_for_two(served)
    if newest := max(versions_of(served)):
        served.refresh(ref_path, version=newest + 1)
    return served


def pids_of(scorer):
    return sorted(scorer._engine.pids)


def engine_pid(replica_pid):
    """Return the process id of a replica's engine."""
    return next(
        child.pid
        for child in psutil.Process(replica_pid).children()
        if "vllm_kl" in " ".join(child.cmdline())
    )


def wait_for_two(scorer, other_than=()):
    deadline = time.monotonic() + 300
    while len(pids := pids_of(scorer)) < 2 or set(pids) & set(other_than):
        assert time.monotonic() < deadline, scorer._engine._service.state()
        time.sleep(0.5)
    return pids


def far(some, others):
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


def test_replicas_score_in_order_and_as_one_engine_does(scorer, ref_scorer, ref_oracle):
    assert error_of(scorer, ref_oracle, [*GROUP, [5, 6, 7]], 1) < LOG_PROB_TOLERANCE
    assert far(scorer.score(MANY, START), ref_scorer.score(MANY, START)) < 2e-6
    assert scorer.stats.num_scored_tokens == ref_scorer.stats.num_scored_tokens
    assert scorer.stats.weight_version == scorer.weight_version == 0
    chosen = [[[7, 9]] * (len(ids) - START) for ids in MANY[:8]]
    assert (
        far(scorer.score_ids(MANY[:8], chosen, START), ref_scorer.score_ids(MANY[:8], chosen, START)) < 2e-6
    )
    best, theirs = (s.score_topk(MANY[:8], 3, START) for s in (scorer, ref_scorer))
    assert far([b.log_probs for b in best], [b.log_probs for b in theirs]) < 2e-6
    ours, theirs = (s.score(MANY, START, entropy=True)[1] for s in (scorer, ref_scorer))
    assert far(ours, theirs) < 5e-6


def test_replicas_give_hidden_states_and_one_engine_the_head(scorer, ref_scorer):
    hidden = scorer.hidden_states(MANY, START, head=ref_scorer.lm_head())  # both serve version 0
    assert far(hidden, ref_scorer.hidden_states(MANY, START)) < 1e-4
    with pytest.raises(ReadoutUnavailableError, match="cannot be read: .* without replicas"):
        scorer.lm_head()


@pytest.mark.nightly
def test_a_shard_has_the_bits_of_an_engine_with_as_many_threads(scorer, ref_path, monkeypatch):
    for name, value in {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
        monkeypatch.setenv(name, value)
    with VLLMScorer(ref_path, **tiny.ENGINE_OPTIONS) as own:
        for seed in range(100, 104):  # both replicas get some: the prompt's hash decides
            group = many(1, seed)
            for row, theirs in zip(scorer.score(group, START), own.score(group, START), strict=True):
                assert torch.equal(row, theirs)


def test_both_replicas_work_and_tell_of_their_progress(scorer):
    done = []
    requests = requests_of(scorer, MANY)
    engines = [psutil.Process(engine_pid(pid)) for pid in pids_of(scorer)]
    before = [engine.cpu_times().user for engine in engines]
    scorer._engine.score(requests, share_prefix=True, on_done=done.append)
    assert sum(done) == len(requests)
    assert len(done) > 4
    seconds = [engine.cpu_times().user - first for engine, first in zip(engines, before, strict=True)]
    assert min(seconds) > 0.2 * sum(seconds) > 0


def test_the_caller_knows_the_replicas_that_its_router_knows(scorer):
    """Ray makes a copy of the router's module, so what the copy writes down must be elsewhere."""
    scorer.score([[1, 2, 3]])
    assert len(RUNNING[scorer._engine._service.name]) == 2


def requests_of(scorer, sequences):
    from vllm_kl.checks import check_requests
    from vllm_kl.plan import plan
    from vllm_kl.types import ScoreRequest

    ids, starts = check_requests(sequences, START, scorer._engine.info, "refuse")
    return plan([ScoreRequest(token_ids=i, start=s) for i, s in zip(ids, starts, strict=True)]).requests


def test_prompts_of_later_calls_are_in_the_cache_of_their_replica(scorer):
    sequences = many(24, seed=3)
    scorer.score(sequences, START)
    first = scorer.stats.num_cached_tokens
    scorer.score([[*ids, 7] for ids in sequences], START)
    # The prompt's first block of 32 tokens is cached, of each group's first sequence, too.
    assert scorer.stats.num_cached_tokens > first + 0.8 * 24 * 32


def test_a_dialog_that_grows_finds_its_last_turn_in_the_cache(scorer):
    dialogs = [[*ids, *ids[:30]] for ids in many(24, seed=5)[::4]]
    scorer.score(dialogs, 70)
    longer = [[*ids, *ids[:90]] for ids in dialogs]
    scorer.score(longer, [len(ids) + 80 for ids in dialogs])  # the prompt has doubled
    assert scorer.stats.num_cached_tokens >= 0.8 * sum(len(ids) // 32 * 32 for ids in dialogs)


def test_threads_share_the_replicas(scorer, ref_scorer):
    parts = [MANY[n::3] for n in range(3)]
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: scorer.score(parts[n], START)}))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(far(found[n], ref_scorer.score(parts[n], START)) < 2e-6 for n in range(3))


def test_bad_input_is_refused_before_anything_is_sent(scorer):
    with pytest.raises(InputError, match="sequence 1, token 2: id 4000 is outside the vocabulary"):
        scorer.score([GROUP[0], [5, 6, 4000]], 1)


def test_a_refresh_reaches_each_replica(scorer, policy_path, policy_oracle):
    before, pids = scorer.weight_version, pids_of(scorer)
    assert scorer.check_frozen() == 0.0
    assert scorer.refresh(policy_path) == before + 1 == scorer.weight_version
    assert scorer.check_frozen() == 0.0
    time.sleep(1)  # Serve would start other replicas by now, if it took a refresh for another deployment
    assert pids_of(scorer) == pids
    assert error_of(scorer, policy_oracle, MANY[:20], START) < LOG_PROB_TOLERANCE
    results = scorer._engine.score_on_each(requests_of(scorer, MANY[:3]))
    assert len(results) == 2
    assert all((a.values == b.values).all() for a, b in zip(*results, strict=True))
    assert {r.weight_version for of_one in results for r in of_one} == {before + 1}


def test_two_versions_never_meet_in_a_call(scorer, policy_path, policy_oracle, ref_path, ref_oracle):
    truth = {}
    stop = threading.Event()
    seen = []

    def score():
        while not stop.is_set():
            seen.append(scorer.score_and_tell(MANY, START))

    threads = [threading.Thread(target=score) for _ in range(2)]
    for thread in threads:
        thread.start()
    for path, oracle in ((policy_path, policy_oracle), (ref_path, ref_oracle)) * 2:
        truth[scorer.refresh(path)] = oracle
        time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    assert {stats.weight_version for _, stats in seen} & truth.keys()
    for rows, stats in seen:
        if stats.weight_version in truth:
            of = truth[stats.weight_version]
            for ids, row in list(zip(MANY, rows, strict=True))[::60]:
                assert far([row], [torch.tensor(of.log_probs(ids)[START:])]) < LOG_PROB_TOLERANCE


def test_a_push_is_no_refresh(scorer, policy_model, policy_oracle, ref_path):
    version = push_weights(scorer, policy_model)
    assert error_of(scorer, policy_oracle, MANY[:8], START) < LOG_PROB_TOLERANCE
    with pytest.raises(FrozenError, match=f"version {version} of the weights, which no refresh"):
        scorer.check_frozen()
    scorer.refresh(ref_path)


def versions_of(scorer):
    """Return the version that each replica serves."""
    results = scorer._engine.score_on_each(requests_of(scorer, MANY[:2]))
    assert all(of_one[0].weight_version == of_one[1].weight_version for of_one in results)
    return sorted(of_one[0].weight_version for of_one in results)


def written(scorer, path):
    """Return a checkpoint in the engine's names."""
    return scorer.weights.skeleton.write(scorer.weights.skeleton.read(str(path)))


def test_if_one_replica_refuses_the_weights_none_serves_them(scorer, policy_path, ref_path, policy_oracle):
    before, checkpoint = scorer.weight_version, written(scorer, policy_path)
    ahead = {"version": before + 1, "folder": str(checkpoint.folder)}
    scorer._engine._service.handle.reconfigure.remote(ahead).result()  # of one replica
    assert versions_of(scorer) == [before, before + 1]
    with pytest.raises(
        WeightsError, match=f"(?s)replica . refused .*above {before + 1}.*All replicas keep the old weights"
    ):
        scorer.refresh(ref_path)
    assert scorer.weight_version == before
    assert versions_of(scorer) == [before, before + 1]
    assert scorer.refresh(policy_path, version=before + 2) == before + 2
    assert versions_of(scorer) == [before + 2] * 2
    assert error_of(scorer, policy_oracle, MANY[:20], START) < LOG_PROB_TOLERANCE


def test_what_was_committed_can_be_put_back(scorer, policy_path, ref_oracle, policy_oracle):
    """What happens on the other replicas when one fails in its commit."""
    before, checkpoint = scorer.weight_version, written(scorer, policy_path)
    on_each = scorer._engine.on_each
    on_each("prepare", str(checkpoint.folder), before + 1)
    assert versions_of(scorer) == [before] * 2
    assert on_each("commit") == [(True, True)] * 2
    assert versions_of(scorer) == [before + 1] * 2
    with pytest.raises(FrozenError, match="which no refresh"):
        scorer.check_frozen()
    on_each("put_back", "another failed")
    on_each("end_push")
    assert versions_of(scorer) == [before] * 2
    assert scorer.check_frozen() == 0.0
    assert error_of(scorer, ref_oracle, MANY[:8], START) < LOG_PROB_TOLERANCE
    assert scorer.refresh(policy_path) == before + 1
    assert error_of(scorer, policy_oracle, MANY[:8], START) < LOG_PROB_TOLERANCE


def test_shards_of_a_replica_that_is_behind_are_asked_again(scorer, policy_path, policy_oracle):
    before, checkpoint = scorer.weight_version, written(scorer, policy_path)
    on_each = scorer._engine.on_each
    on_each("prepare", str(checkpoint.folder), before + 1)
    on_each("commit")
    scorer._engine._service.handle.put_back.remote("one of them is behind").result()
    on_each("end_push")
    assert versions_of(scorer) == [before, before + 1]
    scorer.weights.version, scorer.weights._served = before + 1, checkpoint
    told = {"version": before + 1, "folder": str(checkpoint.folder)}
    later = threading.Timer(1.0, scorer._engine._service.keep, [told])
    later.start()
    began = time.monotonic()
    rows, stats = scorer.score_and_tell(MANY, START)
    assert time.monotonic() - began > 0.9
    later.join()
    assert stats.weight_version == before + 1
    for ids, row in list(zip(MANY, rows, strict=True))[::20]:
        assert far([row], [torch.tensor(policy_oracle.log_probs(ids)[START:])]) < LOG_PROB_TOLERANCE
    until(lambda: versions_of(scorer) == [before + 1] * 2, 30)  # Serve may still be telling the other


def test_a_folder_that_no_replica_sees_is_refused(scorer, tmp_path):
    with pytest.raises(WeightsError, match="no folder.*where the new weights are"):
        scorer.weights.load(Checkpoint(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("replicas", "message"),
    [
        (0, "replicas=0: expected how many"),
        (True, "replicas=True: expected how many"),
        ({"min": 3, "max": 2}, "max is below min"),
        ({"most": 3}, "'most' is none of min, max"),
        ({"min": 1, "gpus": -1}, "gpus=-1, expected a number of at least 0"),
        ({"min": 1, "weights_folder": "/no/such"}, "'/no/such' does not exist"),
    ],
)
def test_replicas_that_cannot_be_are_refused(ref_path, replicas, message):
    with pytest.raises(OptionError, match=message):
        VLLMScorer(ref_path, replicas=replicas)


def test_replicas_of_an_engine_that_runs_are_refused(ref_scorer, ref_path):
    with pytest.raises(OptionError, match="no effect on an engine that already runs"):
        VLLMScorer(ref_scorer._engine, replicas=2)
    with pytest.raises(OptionError, match="Ray gives each replica its GPUs"):
        VLLMScorer(ref_path, replicas=2, devices=0)


def test_a_replica_killed_while_it_scores_costs_nothing(scorer, ref_scorer):
    """The last test that runs by default: the replica comes back after it."""
    victim = pids_of(scorer)[0]
    kill = threading.Timer(0.05, os.kill, (victim, signal.SIGKILL))
    kill.start()
    found = [scorer.score(MANY, 1) for _ in range(4)]
    kill.join()
    theirs = ref_scorer.score(MANY, 1)
    assert all(far(rows, theirs) < 2e-6 for rows in found)


def process_named(name):
    return next(p for p in psutil.process_iter() if name in "".join(p.cmdline()[:1]))


def until(is_so, seconds=300, what=""):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def left_of(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


@pytest.mark.nightly
class TestWhatDies:
    def test_a_replica_comes_back_with_the_weights_that_serve(self, scorer, policy_path, policy_oracle):
        version = scorer.refresh(policy_path)
        before = pids_of(scorer)
        for victim in before:  # one after the other, so both have started anew
            os.kill(victim, signal.SIGKILL)
            wait_for_two(scorer, other_than=[victim])
        assert versions_of(scorer) == [version] * 2
        assert error_of(scorer, policy_oracle, MANY[:20], START) < LOG_PROB_TOLERANCE
        assert scorer.check_frozen() == 0.0

    def test_a_replica_whose_engine_dies_is_replaced(self, scorer, ref_scorer):
        victim = pids_of(scorer)[0]
        os.kill(engine_pid(victim), signal.SIGKILL)
        assert all(far(scorer.score(MANY, 1), ref_scorer.score(MANY, 1)) < 2e-6 for _ in range(3))
        wait_for_two(scorer, other_than=[victim])

    @pytest.mark.parametrize("after_s", [0.0, 0.1, 0.3])
    def test_a_replica_killed_during_a_refresh_comes_back_with_the_new_weights(
        self, scorer, policy_path, policy_oracle, after_s
    ):
        victim = pids_of(scorer)[0]
        state = scorer.weights.skeleton.read(str(policy_path))
        kill = threading.Timer(after_s, os.kill, (victim, signal.SIGKILL))
        kill.start()
        version = scorer.refresh(state)
        kill.join()
        assert error_of(scorer, policy_oracle, MANY[:20], START) < LOG_PROB_TOLERANCE
        assert scorer.stats.weight_version == version
        wait_for_two(scorer, other_than=[victim])
        assert versions_of(scorer) == [version] * 2

    def test_serves_controller_may_die(self, scorer, ref_scorer, policy_path, policy_oracle):
        process_named("ray::ServeController").kill()
        assert far(scorer.score(MANY, START), ref_scorer.score(MANY, START)) < 2e-6
        scorer.refresh(policy_path)
        victim = pids_of(scorer)[0]
        os.kill(victim, signal.SIGKILL)
        assert error_of(scorer, policy_oracle, MANY[:20], START) < LOG_PROB_TOLERANCE
        wait_for_two(scorer, other_than=[victim])
        assert scorer.check_frozen() == 0.0

    def test_all_replicas_die_and_come_back(self, scorer, ref_scorer):
        before = pids_of(scorer)
        for victim in before:
            os.kill(victim, signal.SIGKILL)
        assert far(scorer.score(MANY, START), ref_scorer.score(MANY, START)) < 2e-6
        wait_for_two(scorer, other_than=before)

    def test_no_replica_within_the_time_is_an_error_that_says_what_serve_knows(self, scorer, monkeypatch):
        before = pids_of(scorer)
        for victim in before:
            os.kill(victim, signal.SIGKILL)
        monkeypatch.setattr(scorer._engine._service, "timeout_s", 1.0)
        with pytest.raises(EngineError, match=r"(?s)no replica runs for 1 s \(timeout_s\): .*free are"):
            scorer.score(MANY, START)
        monkeypatch.undo()
        wait_for_two(scorer, other_than=before)


@pytest.mark.nightly
class TestStartsAndEnds:
    def test_replicas_whose_files_changed_do_not_come_back(self, cluster, tmp_path):
        path = tiny.build(tmp_path / "model", seed=5)
        one = {"min": 1, "max": 1, "cpus": 1, "gpus": 0}
        with VLLMScorer(path, replicas=one, timeout_s=500, **tiny.ENGINE_OPTIONS) as scorer:
            tiny.build(path, seed=6)
            assert scorer.check_frozen() == 0.0
            os.kill(pids_of(scorer)[0], signal.SIGKILL)
            with pytest.raises(
                EngineError, match="weight files in .* have changed since the scorer was made"
            ):
                scorer.score([[5, 6, 7]])

    @pytest.mark.parametrize("kind", ["damaged", "no room"])
    def test_a_model_that_does_not_start_is_an_error_with_its_log(self, cluster, tmp_path, kind):
        path = tiny.build(tmp_path / "model", seed=5)
        options = dict(tiny.ENGINE_OPTIONS)
        if kind == "damaged":
            path.joinpath("model.safetensors").write_bytes(b"no weights")
            error, message = (
                EngineError,
                "(?s)a replica did not start: .*damaged or incomplete.*end of its log",
            )
        else:
            options["kv_cache_memory_bytes"] = 1 << 10
            error, message = EngineError, "a replica did not start: .*the KV of one sequence does not fit"
        before = set(serve_apps())
        with pytest.raises(error, match=message):
            VLLMScorer(path, replicas={"min": 1, "max": 1, "cpus": 1, "gpus": 0}, **options)
        until(lambda: set(serve_apps()) == before)

    def test_a_replica_killed_while_it_starts_is_started_again(self, cluster, ref_path, ref_oracle):
        killed = []

        def kill():
            before = {p.pid for p in replicas_of_ray()}
            until(lambda: {p.pid for p in replicas_of_ray()} - before)
            time.sleep(1)
            victim = next(p for p in replicas_of_ray() if p.pid not in before)
            victim.kill()
            killed.append(victim.pid)

        thread = threading.Thread(target=kill)
        thread.start()
        one = {"min": 1, "max": 1, "cpus": 1, "gpus": 0}
        with VLLMScorer(ref_path, replicas=one, timeout_s=500, **tiny.ENGINE_OPTIONS) as scorer:
            thread.join()
            assert killed
            assert killed[0] not in pids_of(scorer)
            assert error_of(scorer, ref_oracle, MANY[:4], START) < LOG_PROB_TOLERANCE

    def test_more_replicas_start_when_there_is_more_to_do(self, cluster, ref_path, ref_scorer):
        some = {"min": 1, "max": 2, "cpus": 1, "gpus": 0}
        with VLLMScorer(ref_path, replicas=some, timeout_s=500, **tiny.ENGINE_OPTIONS) as scorer:
            assert len(pids_of(scorer)) == 1
            theirs = ref_scorer.score(MANY, 1)
            deadline = time.monotonic() + 300
            while len(pids_of(scorer)) < 2:
                assert time.monotonic() < deadline
                assert far(scorer.score(MANY, 1), theirs) < 2e-6
            assert far(scorer.score(MANY, 1), theirs) < 2e-6

    @pytest.mark.parametrize("joins", [True, False], ids=["a cluster", "a local Ray"])
    @pytest.mark.parametrize("how", ["close", "SIGKILL"])
    def test_nothing_is_left(self, cluster, ref_path, ref_oracle, joins, how):
        address = ray.get_runtime_context().gcs_address if joins else None
        driver = replica_drivers.run(ref_path, address=address)
        try:
            began = replica_drivers.told(driver)
            assert (
                far([torch.tensor(began["log_probs"])], [torch.tensor(ref_oracle.log_probs([5, 6, 7])[1:])])
                < 5e-6
            )
            assert len(left_of(began["replica"])) == len(began["replica"]) > 1
            if how == "close":
                driver.stdin.write("\n")
                driver.stdin.flush()
                left = replica_drivers.told(driver)["left"]
                until(lambda: not left_of(began["replica"]), 30, "the replica lives")
                until(lambda: not left_of(left), 30, "Ray lives")
                assert driver.wait(60) == 0
            else:
                driver.kill()
                until(lambda: not left_of(began["replica"]), 60, "the replica lives")
                until(lambda: not left_of(began["ours"]), 120, "Ray lives")
            if joins:
                until(lambda: began["app"] not in serve_apps(), 60, "the deployment lives")
        finally:
            driver.kill()
            driver.wait()


@pytest.mark.nightly
def test_a_named_service_may_have_replicas(cluster, ref_path, ref_oracle):
    before = set(serve_apps())
    one = {"min": 1, "max": 1, "cpus": 1, "gpus": 0}
    for _ in range(2):  # the second user finds the same settings
        transform = service_drivers.service(ref_path, "of replicas", replicas=one)
    try:
        found = VLLMReference.connect("of replicas")
        for scorer in (transform.ref_model.scorer, found.scorer):
            rows = scorer.score([torch.tensor(ids) for ids in GROUP], [len(PROMPT)] * len(GROUP))
            truth = [torch.tensor(ref_oracle.log_probs(ids)[len(PROMPT) :]) for ids in GROUP]
            assert far(rows, truth) < LOG_PROB_TOLERANCE
        assert len(set(serve_apps()) - before) == 1
        with pytest.raises(OptionError, match="max_model_len is 64, not 32"):
            service_drivers.service(ref_path, "of replicas", replicas=one, max_model_len=32)
    finally:
        VLLMReference.close_service("of replicas")
    until(lambda: set(serve_apps()) == before, 60)


def replicas_of_ray():
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "ray::ServeReplica" in "".join(process.cmdline()[:1]):
                found.append(process)
    return found


def serve_apps():
    from ray import serve

    return list(serve.status().applications)
