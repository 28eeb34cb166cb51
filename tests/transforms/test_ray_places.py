"""Transforms in TorchRL's collectors and replay buffers that are Ray actors. A real local Ray."""

from __future__ import annotations

import functools
import os
import signal
import time

import psutil
import pytest
from tensordict import set_list_to_stack
from torchrl.collectors.llm import RayLLMCollector
from torchrl.data import LazyStackStorage, RayReplayBuffer
from torchrl.envs import Transform
from torchrl.modules.llm import vLLMWrapper
from transformers import AutoModelForCausalLM

from tests import local_ray, tiny
from tests.collectors import GROUP, NUM_ENVS, chat_env, check_kl, transformers_wrapper
from tests.oracle import Oracle
from tests.transforms.helpers import KEEP, assert_rows, recorded_batch
from vllm_kl import (
    EnginePolicyVersion,
    RetrieveKL,
    VLLMReference,
    VLLMSyncScheme,
    VLLMWeightUpdater,
    check_collector,
    push_weights,
)
from vllm_kl.demo.task import make_tokenizer
from vllm_kl.errors import CollectorError, OptionError

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = [pytest.mark.usefixtures("cluster"), *local_ray.MARKS]

SERVICE = {"service_backend": "ray", "actor_name": "places", "num_cpus": 0.1}
ACTOR = {"num_cpus": 0.1}  # of a collector or a buffer


def make_reference_there(path):
    return VLLMReference(str(path), make_tokenizer(), **tiny.ENGINE_OPTIONS)


def kl_to(path, gen_model="from_collector", **kwargs):
    """Make the transform in any process: its reference is the one that all share."""
    return RetrieveKL(
        gen_model, ref_model_factory=functools.partial(make_reference_there, path), **SERVICE, **kwargs
    )


def make_env_there(*make_transforms):
    set_list_to_stack(True).set()
    env = chat_env(make_tokenizer(), NUM_ENVS, repeats=GROUP)
    for make in make_transforms:
        env = env.append_transform(make())
    return env


def make_vllm_policy(path):
    """A policy whose engine is in the collector's process."""
    from vllm import LLM

    llm = LLM(str(path), enforce_eager=True, use_tqdm_on_load=False, **tiny.ENGINE_OPTIONS)
    return vllm_policy(llm)


def vllm_policy(engine):
    return vLLMWrapper(
        engine,
        tokenizer=make_tokenizer(),
        input_mode="history",
        generate_kwargs={"max_new_tokens": 10, "temperature": 1.0},
    )


def make_transformers_policy(path):
    return transformers_wrapper(path, generate=True, generate_kwargs={"max_new_tokens": 10})


@pytest.fixture(scope="module")
def kl(cluster, ref_path):
    """Make the transform, anywhere, by calling this."""
    service = kl_to(ref_path)
    yield functools.partial(kl_to, ref_path)
    service.ref_model.scorer.close()


@pytest.fixture
def collector():
    """Make a collector in an actor."""
    made = []

    def make(env, policy, num_batches=2, **kwargs):
        made.append(
            RayLLMCollector(
                env,
                policy_factory=policy,
                dialog_turns_per_batch=NUM_ENVS,
                total_dialog_turns=NUM_ENVS * num_batches,
                **{"remote_config": dict(ACTOR), **kwargs},
            )
        )
        return made[-1]

    yield make
    for it in made:
        ray.kill(it._collector)


@pytest.fixture
def buffer(cluster):
    """Make a buffer in an actor."""
    made = []

    def make(**kwargs):
        made.append(
            RayReplayBuffer(
                storage=functools.partial(LazyStackStorage, 400),
                batch_size=4,
                remote_config=dict(ACTOR),
                **kwargs,
            )
        )
        return made[-1]

    yield make
    for it in made:
        it.close()


def check_by_version(data, steps, ref_oracle):
    """Compare each sample with the weights that its stamp names."""
    for sample in data.reshape(-1).unbind(0):
        version = int(sample["next", "policy_version"])
        check_kl(sample.unsqueeze(0), Oracle(steps[version]), ref_oracle)


@pytest.mark.nightly
def test_a_collector_with_an_engine_of_its_own_takes_pushes(collector, kl, steps, ref_oracle):
    actor = collector(
        functools.partial(make_env_there, functools.partial(kl, audit=1.0, audit_tolerance=1e-4)),
        functools.partial(make_vllm_policy, steps[0]),
        num_batches=6,
        track_policy_version=EnginePolicyVersion(),
        sync_iter=False,
    )
    actor.weight_updater = VLLMWeightUpdater()
    actor.sync_iter = True
    batches = iter(actor)
    for n in range(2):
        data = next(batches).reshape(-1)
        assert data["next", "policy_version"].tolist() == [n] * NUM_ENVS
        assert data["next", "ref_version"].tolist() == [0] * NUM_ENVS
        check_kl(data, Oracle(steps[n]), ref_oracle)
        actor.update_policy_weights_(AutoModelForCausalLM.from_pretrained(steps[n + 1]))
        assert actor.policy_version == n + 1
    actor.sync_iter = False  # it collects a batch ahead, while this pushes
    versions = []
    for data in iter(actor):
        if data is None:
            break
        check_by_version(data, steps, ref_oracle)
        versions += data.reshape(-1)["next", "policy_version"].tolist()
        if len(versions) == NUM_ENVS:
            actor.update_policy_weights_(AutoModelForCausalLM.from_pretrained(steps[3]))
    assert versions == sorted(versions)
    assert set(versions) <= {2, 3}
    assert versions[-1] == 3


@pytest.mark.parametrize("tracker", ["engine", pytest.param("counter", marks=pytest.mark.nightly)])
def test_a_collector_on_async_vllm_is_pushed_to_from_the_trainer(
    collector, kl, async_llm, steps, ref_oracle, tracker
):
    first = push_weights(async_llm, AutoModelForCausalLM.from_pretrained(steps[0]))
    actor = collector(
        functools.partial(make_env_there, kl),
        functools.partial(vllm_policy, async_llm),
        track_policy_version=EnginePolicyVersion(async_llm) if tracker == "engine" else True,
    )
    sender = VLLMSyncScheme(async_llm).create_sender()
    sender.register_collector(actor)
    for n, data in zip(range(2), actor, strict=False):
        data = data.reshape(-1)
        assert data["next", "policy_version"].tolist() == [first + n] * NUM_ENVS
        check_kl(data, Oracle(steps[n]), ref_oracle)
        assert sender.update_weights(AutoModelForCausalLM.from_pretrained(steps[n + 1])) == first + n + 1
        assert actor.policy_version == first + n + 1


def test_what_stays_in_this_process_is_refused(policy_engine):
    for there in (VLLMWeightUpdater(policy_engine), EnginePolicyVersion(policy_engine)):
        with pytest.raises(
            OptionError, match=r"cannot go to another process: .*takes the engine of the coll"
        ):
            ray.cloudpickle.dumps(there)


@pytest.mark.nightly
def test_as_postproc_of_a_collector_in_an_actor(collector, kl, policy_path, policy_oracle, ref_oracle):
    actor = collector(
        make_env_there,
        functools.partial(make_transformers_policy, policy_path),
        num_batches=1,
        postproc=kl(transformers_wrapper(policy_path)),
    )
    check_kl(actor.next().reshape(-1), policy_oracle, ref_oracle)


class FailFrom(Transform):
    """Raises as soon as a file exists."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def _step(self, tensordict, next_tensordict):
        if self._path.exists():
            raise RuntimeError("the judge is gone")
        return next_tensordict


@pytest.mark.nightly
def test_two_collectors_fill_one_buffer_and_what_ends_one_of_them_is_told(
    collector, kl, buffer, policy_path, policy_oracle, ref_oracle, tmp_path
):
    shared = buffer()
    modes = {"gen_log_probs": "rescore"}, {"deferred": True}
    killed, failing = actors = [
        collector(
            functools.partial(
                make_env_there,
                functools.partial(kl, **mode),
                functools.partial(FailFrom, tmp_path / "fail"),
            ),
            functools.partial(make_transformers_policy, policy_path),
            num_batches=1000,
            replay_buffer=shared.client(),
        )
        for mode in modes
    ]
    for actor in actors:
        actor.start()
    wait_for(shared, 2 * NUM_ENVS, actors)
    process = psutil.Process(pid_of(killed))
    children = process.children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert not psutil.wait_procs([process, *children], timeout=20)[1]
    wait_for(shared, len(shared) + 4 * NUM_ENVS, [failing])  # the other goes on
    with pytest.raises(CollectorError, match="the process of a RayLLMCollector died"):
        check_collector(killed)
    check_kl(shared.sample(16), policy_oracle, ref_oracle)
    (tmp_path / "fail").touch()
    with pytest.raises(CollectorError, match="gets no more samples: RuntimeError: the judge is gone"):
        wait_for(shared, 1000, [failing])


def pid_of(collector):
    """Return the process of a collector's actor."""
    return ray.get(collector._collector.__ray_call__.remote(lambda _: os.getpid()))


def wait_for(buffer, num_samples, collectors, within_s=120):
    """Wait for samples, as a trainer does."""
    deadline = time.monotonic() + within_s
    while len(buffer) < num_samples:
        assert time.monotonic() < deadline, f"{len(buffer)} samples after {within_s} s"
        for it in collectors:
            check_collector(it)
        time.sleep(0.1)


class TestABufferInAnActor:
    def check(self, sampled, truth):
        for sample in sampled.unbind(0):
            (i,) = [i for i, row in enumerate(truth) if len(row) == len(sample["tokens", "full"])]
            assert sample["next", "kl_mask"].tolist() == KEEP[i]
            assert_rows([sample["next", "kl_penalty"]], [truth[i]])
            assert_rows([-sample["next", "reward"][:, 0]], [truth[i]])

    def test_a_transform_of_it_writes_when_samples_come_in(self, buffer, kl, policy_oracle, truth):
        inside = buffer()
        inside.append_transform(kl(), invert=True)
        ray.get(extend.remote(inside.client(), recorded_batch(policy_oracle)))  # another process
        self.check(inside[:4], truth)

    @pytest.mark.nightly
    def test_a_transform_that_its_factory_makes_writes_when_they_are_sampled(
        self, buffer, kl, policy_oracle, truth
    ):
        inside = buffer(transform_factory=kl)
        inside.extend(recorded_batch(policy_oracle))
        for _ in range(2):
            self.check(ray.get(sample.remote(inside.client())), truth)

    def test_an_engine_cannot_go_there(self, buffer, make_reference):
        with pytest.raises(TypeError, match="make it in the other process"):  # Ray quotes the OptionError
            buffer().append_transform(RetrieveKL("from_collector", make_reference()), invert=True)


@ray.remote(num_cpus=0)
def extend(client, batch):
    set_list_to_stack(True).set()
    client.extend(batch)


@ray.remote(num_cpus=0)
def sample(client):
    return client.sample(4)
