"""Envs with our transforms inside TorchRL's pools of envs: in this process, in threads, in processes."""

from __future__ import annotations

import functools
import pickle

import pytest
from tensordict import set_list_to_stack
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import AsyncEnvPool, EnvBase, ParallelEnv, SerialEnv
from transformers import AutoModelForCausalLM

from tests.collectors import chat_env, check_kl, transformers_wrapper
from tests.oracle import Oracle
from vllm_kl import EnginePolicyVersion, RetrieveKL, VLLMWeightUpdater
from vllm_kl.demo.task import make_tokenizer
from vllm_kl.transforms.pools import tell_envs_inside

NUM_DIALOGS = 4

MODES = {
    "reuse": {"gen_log_probs": "reuse"},
    "rescore": {"gen_log_probs": "rescore"},
    "audit": {"audit": 1.0, "audit_tolerance": 1e-4},
    "deferred": {"deferred": True},
}


def env_with(*make, size=1):
    """Make an env with transforms. It also runs in a worker of a pool."""
    set_list_to_stack(True).set()
    env = chat_env(make_tokenizer(), size)
    for make_transform in make:
        env = env.append_transform(make_transform())
    return env


def serial(*make):
    return SerialEnv(2, [functools.partial(env_with, *make, size=2)] * 2)


def around(make):
    """The transform is the pool's own."""
    return SerialEnv(2, [functools.partial(env_with, size=2)] * 2).append_transform(make())


def threads(*make):
    return AsyncEnvPool([functools.partial(env_with, *make)] * 2, stack="lazy", backend="threading")


def processes(*make):
    return AsyncEnvPool(
        [functools.partial(env_with, *make)], stack="lazy", backend="multiprocessing", exchange="queue"
    )


def batches_of(pool, policy_factory, num_batches=2, **kwargs):
    """Collect batches: of four turns, or of a whole dialog from a pool that is asynchronous."""
    is_async = isinstance(pool, AsyncEnvPool)
    collector = LLMCollector(
        pool,
        policy_factory=policy_factory,
        dialog_turns_per_batch=2 if is_async else NUM_DIALOGS,
        total_dialog_turns=num_batches * NUM_DIALOGS,
        yield_completed_trajectories=is_async,
        **kwargs,
    )
    try:
        for data in collector:
            yield data.reshape(-1)
    finally:
        collector.shutdown()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pool", [serial, around, threads], ids=["SerialEnv", "around it", "AsyncEnvPool"])
def test_envs_in_this_process_find_the_policy(
    make_policy, make_reference, policy_oracle, ref_oracle, pool, mode
):
    made = []

    def kl():
        made.append(RetrieveKL("from_collector", make_reference(), **MODES[mode]))
        return made[-1]

    seen = list(batches_of(pool(kl), make_policy()))
    assert sum(map(len, seen)) == 2 * NUM_DIALOGS
    for data in seen:
        check_kl(data, policy_oracle, ref_oracle)
    if mode == "audit":
        checked = [kl.metrics["audit_num_tokens"] for kl in made if "audit_num_tokens" in kl.metrics]
        assert len(checked) == (1 if pool is around else 2)  # the two envs of the pool
        assert min(checked) > 0


@pytest.mark.parametrize(
    ("pool", "mode"), [(serial, "rescore"), (threads, "reuse")], ids=["SerialEnv", "AsyncEnvPool"]
)
def test_samples_of_envs_in_a_pool_carry_the_version_that_sampled_them(
    make_policy, make_reference, policy_engine, steps, ref_oracle, pool, mode
):
    updater = VLLMWeightUpdater(policy_engine)
    kl = lambda: RetrieveKL("from_collector", make_reference(), gen_log_probs=mode)  # noqa: E731
    kwargs = {"weight_updater": updater}
    if pool is threads:  # which the collector must not wrap
        pool = pool(kl, EnginePolicyVersion)
    else:
        pool, kwargs["track_policy_version"] = pool(kl), EnginePolicyVersion()
    make = make_policy()
    make = functools.partial(make.func, policy_engine, **make.keywords)
    seen = []
    for n, data in enumerate(batches_of(pool, make, **kwargs)):
        seen += data["next", "policy_version"].tolist()
        for version, sample in zip(data["next", "policy_version"].tolist(), data.unbind(0), strict=True):
            check_kl(sample.unsqueeze(0), Oracle(steps[version]), ref_oracle)
        if n < len(steps) - 1:
            updater(AutoModelForCausalLM.from_pretrained(steps[n + 1]))
    assert len(set(seen)) > 1


def test_a_transform_that_came_from_another_process_tells_them_too(ref_path, monkeypatch):
    sent = pickle.dumps(RetrieveKL("from_collector", transformers_wrapper(ref_path)))
    monkeypatch.setattr(EnvBase, "register_collector", EnvBase.register_collector.__wrapped__)
    tell_envs_inside.cache_clear()  # as if nothing had been made here
    pickle.loads(sent)
    assert hasattr(EnvBase.register_collector, "__wrapped__")


def kl_in_a_worker(path, mode):
    return RetrieveKL(
        "from_collector", ref_model_factory=functools.partial(transformers_wrapper, path), **MODES[mode]
    )


@pytest.mark.nightly
def test_workers_reuse_what_was_recorded_and_the_pool_itself_can_ask_the_policy(
    make_policy, make_reference, ref_path, policy_oracle, ref_oracle
):
    inside = functools.partial(env_with, functools.partial(kl_in_a_worker, ref_path, "reuse"), size=2)
    # torchrl 0.14 cannot consolidate ragged batches
    pool = ParallelEnv(2, [inside] * 2, mp_start_method="spawn", consolidate=False)
    names = {"kl_key": "kl_again", "mask_key": "mask_again", "add_to_reward": False}
    asks = RetrieveKL(
        "from_collector",
        make_reference(log_probs_key="again"),
        gen_log_probs="rescore",
        gen_log_probs_full_key=("gen_again", "full"),
        ref_log_probs_full_key=("again", "full"),
        **names,
    )
    for data in batches_of(pool.append_transform(asks), make_policy(), num_batches=1):
        check_kl(data, policy_oracle, ref_oracle)
        for old, new in (("kl_penalty", "kl_again"), (("log_probs", "full"), ("gen_again", "full"))):
            for sample in data["next"].unbind(0):
                sample[old].copy_(sample[new])
        check_kl(data, policy_oracle, ref_oracle, coeff=None)


def test_a_worker_that_has_no_policy_says_where_to_stand(make_policy, ref_path):
    pool = processes(functools.partial(kl_in_a_worker, ref_path, "rescore"))
    with pytest.raises(
        RuntimeError,
        match=r"(?s)runs in a process of its own, which has no policy: append the .* pool itself",
    ):
        list(batches_of(pool, make_policy(), num_batches=1))
