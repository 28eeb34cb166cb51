"""The reference in a Ray actor; everything else in the caller. A real local Ray, and drivers beside it."""

from __future__ import annotations

import functools
import gc
import shutil
import threading
import time

import psutil
import pytest
import torch

from tests import batches, local_ray, oracle, service_drivers, tiny
from tests.collectors import check_kl, transformers_wrapper
from tests.oracle import ENTROPY_TOLERANCE, KL_TOLERANCE, LOG_PROB_TOLERANCE, Oracle
from tests.service_drivers import PROMPTS, SEQUENCES, make_reference, service
from vllm_kl import RetrieveKL, RetrieveLogProb, VLLMReference, push_weights
from vllm_kl.errors import EngineError, FrozenError, InputError, OptionError, WeightsError

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = [pytest.mark.usefixtures("cluster"), *local_ray.MARKS]

KEEP = [[t >= p for t in range(len(s))] for s, p in zip(SEQUENCES, PROMPTS, strict=True)]


def services():
    """Return the processes of this cluster's services, each with those of its engine."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::_Service"):
                found[process] = process.children(recursive=True)
        except psutil.NoSuchProcess:
            continue
    return found


def new_service(before):
    ((actor, engine),) = [(actor, engine) for actor, engine in services().items() if actor not in before]
    assert engine
    return actor, engine


def check_gone(actor, engine):
    assert psutil.wait_procs([actor, *engine], timeout=15)[1] == []


def check_log_probs(rows, ref_oracle):
    for row, ids, prompt in zip(rows, SEQUENCES, PROMPTS, strict=True):
        want = torch.tensor(ref_oracle.log_probs(ids)[prompt:], dtype=torch.float64)
        got = torch.as_tensor(row, dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=0, atol=LOG_PROB_TOLERANCE)


def score(transform):
    return transform.ref_model.scorer.score(SEQUENCES, PROMPTS)


@pytest.fixture(scope="module")
def shared(cluster, ref_path, ref_oracle):
    """The service that two drivers started at once, and left behind when they were killed."""
    address = ray.get_runtime_context().gcs_address
    before = services()
    drivers = [service_drivers.run(address, ref_path, "shared") for _ in range(2)]
    try:
        for driver in drivers:
            check_log_probs(service_drivers.printed(driver), ref_oracle)
        return new_service(before)  # one for both
    finally:
        for driver in drivers:
            driver.kill()
            driver.communicate()


@pytest.fixture
def remote(shared, ref_path):
    return service(ref_path, "shared")


@pytest.fixture
def batch(policy_oracle):
    recorded = [torch.tensor(policy_oracle.log_probs(s)) for s in SEQUENCES]
    return batches.ids_batch(SEQUENCES, PROMPTS, extra={("log_probs", "full"): recorded})


def test_drivers_that_start_a_service_at_once_share_it_and_it_is_found_after_they_died(
    shared, remote, batch, policy_oracle, ref_oracle
):
    actor, engine = shared
    assert actor.is_running()
    kl = remote(batch).get("kl_penalty", as_list=True)
    for got, ids, keep in zip(kl, SEQUENCES, KEEP, strict=True):
        want = oracle.kl(policy_oracle, ref_oracle, ids, keep)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=KL_TOLERANCE)
    assert services() == {actor: engine}  # no other was started


def test_a_service_that_exists_needs_no_factory(shared, remote):
    found = RetrieveKL("from_collector", service_backend="ray", actor_name="shared")
    assert all(torch.equal(a, b) for a, b in zip(score(found), score(remote), strict=True))
    connected = VLLMReference.connect("shared").scorer.score(SEQUENCES, PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(connected, score(remote), strict=True))
    assert len(services()) == 1


def test_a_service_returns_entropies(shared, batch, ref_oracle):
    reference = VLLMReference.connect("shared")
    td = RetrieveLogProb(reference, entropy_key=("ref_entropy", "full"))(batch)
    check_log_probs(
        [
            row[prompt:]
            for row, prompt in zip(td.get(("ref_log_probs", "full"), as_list=True), PROMPTS, strict=True)
        ],
        ref_oracle,
    )
    for row, ids, prompt in zip(
        td.get(("ref_entropy", "full"), as_list=True), SEQUENCES, PROMPTS, strict=True
    ):
        want = torch.tensor(ref_oracle.entropies(ids)[prompt:], dtype=torch.float64)
        torch.testing.assert_close(row[prompt:].double(), want, rtol=0, atol=ENTROPY_TOLERANCE)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": 0.7}, r"temperature is 1\.0, not 0\.7"),
        ({"max_model_len": 32}, "max_model_len is 64, not 32"),
        ({"seed": 1}, "seed is None, not 1"),
        ({"pad_output": True}, "pad_output is False, not True"),
        ({"input_mode": "tokens"}, "input_mode is 'history', not 'tokens'; input_key is"),
        ({"chat_template": "{{ messages }}"}, "chat_template is None, not '{{ messages }}'"),
        ({"options": {"num_gpus": 1}}, "num_gpus is 0, not 1"),
        ({"options": {"idle_timeout_s": None}}, "idle_timeout_s is 600.0, not None"),
    ],
)
def test_a_caller_that_wants_another_reference_is_refused_by_what_differs(shared, ref_path, asked, message):
    with pytest.raises(OptionError, match=f"'shared' exists and is another than you ask for: {message}") as e:
        service(ref_path, "shared", **asked)
    assert "VLLMReference.close_service('shared')" in str(e.value)
    assert str(e.value).split("ask for: ")[1].split(".\nGive")[0].count(" not ") == 1 + (
        "input_mode" in asked
    )


def test_another_model_tokenizer_or_kind_of_reference_is_refused(shared, ref_path, policy_path, policy_model):
    with pytest.raises(
        OptionError, match=r"ask for: model is .*reference', not .*policy'; the model's files"
    ):
        service(policy_path, "shared")

    def other_tokenizer():
        reference = make_reference(str(ref_path))
        reference.tokenizer.chat_template += "{# another #}"
        return reference

    for ref, message in (
        (
            {"ref_model_factory": other_tokenizer},
            r"ask for: tokenizer.chat_template is .*, not .*another #}'\.",
        ),
        ({"ref_model": made_of(policy_model)}, "class is 'VLLMReference', not 'Transformers"),
    ):
        with pytest.raises(OptionError, match=message):
            RetrieveKL("from_collector", service_backend="ray", actor_name="shared", **ref)


def test_a_factory_that_fails_says_why(shared, ref_path):
    with pytest.raises(OptionError, match="unknown engine option 'nothing'"):
        service(ref_path, "shared", nothing=1)  # it would not have been what is served
    with pytest.raises(OptionError, match="model '/nowhere' does not exist"):
        service("/nowhere", "fails")
    with pytest.raises(EngineError, match="no reference service 'fails' .*Services that run: shared"):
        VLLMReference.close_service("fails")  # nothing is left of it


@pytest.mark.nightly
def test_a_newcomer_whose_call_fails_does_not_end_the_service_of_others(
    cluster, ref_path, ref_oracle, tmp_path
):
    def fails_for_a_while():
        if (tmp_path / "no disk").exists():
            raise OSError("the disk is gone")
        return made_of(ref_path)

    asked = {"ref_model_factory": fails_for_a_while, "service_backend": "ray", "actor_name": "of others"}
    before = services()
    made = RetrieveKL("from_collector", **asked)
    try:
        (actor,) = services().keys() - before.keys()
        (tmp_path / "no disk").touch()
        actor.kill()
        check_gone(actor, [])
        with pytest.raises(EngineError, match="'of others' died, and could not be started again: the disk"):
            RetrieveKL("from_collector", **asked)
        (tmp_path / "no disk").unlink()
        check_log_probs(score(made), ref_oracle)
    finally:
        VLLMReference.close_service("of others")


def test_the_reference_describes_itself_to_the_caller(remote):
    assert isinstance(remote.ref_model, VLLMReference)
    assert remote.pad_output is False
    assert remote.ref_model.tokenizer.eos_token == "<|im_end|>"
    score(remote)
    assert remote.ref_model.scorer.stats.readout == "pooling"


def test_errors_of_the_actor_arrive_as_they_are(remote):
    with pytest.raises(InputError, match="sequence 0, token 1: id 999 is outside the vocabulary"):
        remote.ref_model.scorer.score([[1, 999]], [1])
    with pytest.raises(InputError, match="sequence 0 has 80 tokens"):
        remote.ref_model.scorer.score([[1] * 80], [1])


def test_a_transform_finds_its_service_in_another_process(remote, ref_oracle):
    @ray.remote(num_cpus=0)
    def elsewhere(transform):
        return score(transform)

    check_log_probs(ray.get(elsewhere.remote(remote)), ref_oracle)


def test_refusals(remote, make_reference):
    with pytest.raises(OptionError, match="holds a running engine and cannot move into a Ray actor"):
        RetrieveKL("from_collector", make_reference(), service_backend="ray")
    with pytest.raises(
        EngineError, match=r"(?s)no reference service 'nobody'.*run: shared.*ref_model_factory"
    ):
        RetrieveKL("from_collector", service_backend="ray", actor_name="nobody")
    with pytest.raises(InputError, match="service_backend='ray' needs ref_model_factory"):
        RetrieveKL("from_collector", service_backend="ray")
    message = r"(?s)weights of the reference service 'shared' cannot be replaced.*close_service\('shared'\)"
    for engine in (remote.ref_model, remote.ref_model.scorer):
        with pytest.raises(WeightsError, match=message):
            push_weights(engine, {})


@pytest.mark.nightly
def test_a_killed_service_is_restarted_while_collectors_score(
    shared, remote, make_collector, ref_oracle, steps, caplog
):
    """The actor is killed in the middle of a call; its engine ends; all KLs are right, before and after."""
    ((actor, engine),) = services().items()
    scored, long = [], [[1 + i % 250 for i in range(64)]] * 4
    scorer = remote.ref_model.scorer

    def other_collectors():
        for n in range(200):
            long[0] = [n + 1, *long[0][1:]]
            scored.append(scorer.score(long, [1] * 4))

    others = [threading.Thread(target=other_collectors) for _ in range(2)]
    policy = Oracle(steps[0])
    for n, data in enumerate(make_collector(remote, num_batches=3)):
        check_kl(data.reshape(-1), policy, ref_oracle)
        if n == 0:
            for thread in others:
                thread.start()
            while len(scored) < 20:
                time.sleep(0.01)
            actor.kill()
    for thread in others:
        thread.join()
    assert n == 2
    assert len(scored) == 400  # none was lost
    check_gone(actor, engine)
    assert "'shared' died and was restarted. It serves the same weights" in caplog.text
    new_service({actor: engine})


def test_an_engine_that_dies_is_an_error_and_the_next_call_starts_another(shared, remote, ref_oracle):
    ((_, engine),) = services().items()
    for process in engine:
        process.kill()
    with pytest.raises(
        EngineError, match=r"the engine of the reference service 'shared' died. The log-probs"
    ):
        score(remote)
    check_log_probs(score(remote), ref_oracle)


def test_a_service_that_was_killed_for_good_is_an_error_of_its_collector(
    shared, remote, make_collector, ref_path
):
    ((actor, engine),) = services().items()
    collector = iter(make_collector(remote, num_batches=3))
    next(collector)
    ray.kill(remote.ref_model.scorer._actor)
    with pytest.raises(
        EngineError, match="the reference service 'shared' is gone: .*killed by `ray.kill`"
    ) as e:
        next(collector)
    assert "The log-probs of this call are lost, and nothing else" in str(e.value)
    assert "make the transform again with its ref_model_factory" in str(e.value)
    check_gone(actor, engine)
    with pytest.raises(EngineError, match="no reference service 'shared' .*Services that run: none"):
        VLLMReference.close_service("shared")


@pytest.mark.nightly
def test_a_service_lives_through_pauses_of_its_users_and_restarts_on_no_other_weights(
    cluster, ref_path, tmp_path, ref_oracle
):
    folder, other = shutil.copytree(ref_path, tmp_path / "model"), tiny.build(tmp_path / "other", seed=2)

    def refreshed_once():
        reference = make_reference(str(folder))
        if not (tmp_path / "refreshed").exists():
            (tmp_path / "refreshed").touch()
            reference.refresh(str(other))
        return reference

    def killed():
        actor, engine = new_service(before)
        actor.kill()
        return actor, engine

    before = services()
    by_name = {"service_backend": "ray", "actor_name": "paused"}
    options = {"idle_timeout_s": 2.0}
    made = RetrieveKL(
        "from_collector", ref_model_factory=refreshed_once, service_backend_options=options, **by_name
    )
    time.sleep(5.0)  # an evaluation, a checkpoint
    check_log_probs(score(made), Oracle(other))
    dead = killed()
    with pytest.raises(
        FrozenError, match="'paused' died and was restarted, but it served version 1 .* 0 now"
    ):
        score(made)
    check_gone(*dead)
    found = RetrieveKL("from_collector", **by_name)
    check_log_probs(score(found), ref_oracle)

    shutil.rmtree(folder)
    tiny.build(folder, seed=2)
    dead = killed()
    for _ in range(2):  # it stays an error
        with pytest.raises(FrozenError, match="but its weights are not those of before: the checkpoint was"):
            score(found)
    check_gone(*dead)

    actor, engine = new_service(before)
    del made, found
    gc.collect()
    check_gone(actor, engine)  # nobody uses it


def made_of(model, **options):
    return transformers_wrapper(model, return_log_probs=True, log_probs_key="ref_log_probs", **options)


@pytest.mark.nightly
def test_a_model_that_was_sent_is_compared_by_its_weights(
    cluster, ref_path, policy_model, ref_model, ref_oracle
):
    """And a call that takes longer than the idle time is answered before the service ends."""
    shared_by = {
        "service_backend": "ray",
        "actor_name": "sent",
        "service_backend_options": {"idle_timeout_s": 1.0},
    }
    made = RetrieveKL("from_collector", made_of(ref_model), **shared_by)
    check_log_probs(score(made), ref_oracle)
    check_log_probs(score(RetrieveKL("from_collector", made_of(ref_model), **shared_by)), ref_oracle)
    with pytest.raises(OptionError, match="; weights is '[0-9a-f]+', not '[0-9a-f]+'.\nGive"):
        RetrieveKL("from_collector", made_of(policy_model), **shared_by)

    def factory():
        raise AssertionError("it would load the model a second time")

    with pytest.warns(UserWarning, match="cannot be compared .* scores with a TransformersScorer") as caught:
        RetrieveKL("from_collector", ref_model_factory=factory, **shared_by)
    assert [w.filename for w in caught if w.category is UserWarning] == [__file__]

    actor = made.ref_model.scorer._actor
    del made
    gc.collect()
    ids = [torch.arange(512).remainder(250).numpy()] * 1500  # five seconds or more
    began = time.monotonic()
    scored = ray.get(actor.score.remote(ids, [1] * 1500))[0]
    assert time.monotonic() - began > 1.5
    assert len(scored) == 1500
    time.sleep(5.0)
    with pytest.raises(ray.exceptions.RayActorError, match="killed by `ray.kill`"):
        ray.get(actor.beat.remote())


@pytest.mark.nightly
def test_an_actor_without_a_name_ends_with_its_user(cluster, policy_model):
    before = services()
    factory = functools.partial(made_of, policy_model)
    transform = RetrieveKL("from_collector", ref_model_factory=factory, service_backend="ray")
    (actor,) = [process for process in services() if process not in before]
    del transform
    gc.collect()
    check_gone(actor, [])
