"""Tells the envs of a pool which collector runs the pool, if they are in its process.

    LLMCollector -> TransformedEnv -> SerialEnv, or AsyncEnvPool(backend="threading") -> the envs

TorchRL 0.14 tells the outermost env only. A transform of an env inside would not find the policy. An env of a
``ParallelEnv``, or of an ``AsyncEnvPool(backend="multiprocessing")``, runs in a process of its own, where
there is no policy.
"""

from __future__ import annotations

import functools
import multiprocessing
from typing import Any

from torchrl.envs import EnvBase, SerialEnv, TransformedEnv
from torchrl.envs.async_envs import ThreadingAsyncEnvPool


@functools.cache
def tell_envs_inside() -> None:
    """Let ``register_collector`` of every env tell the envs inside. A second call changes nothing."""
    register = EnvBase.register_collector

    @functools.wraps(register)
    def register_inside(env: EnvBase, collector: Any) -> None:
        register(env, collector)
        for inside in _envs_inside(env):
            inside.register_collector(collector)

    EnvBase.register_collector = register_inside


def _envs_inside(env: EnvBase) -> list[EnvBase]:
    """Return the envs that an env of this process holds."""
    if isinstance(env, TransformedEnv):
        return [env.base_env]
    if isinstance(env, SerialEnv):
        if env.is_closed:
            env.start()  # makes the envs
        return env._envs
    return env.envs if isinstance(env, ThreadingAsyncEnvPool) else []


def where_to_stand() -> str:
    """Return where a transform finds the policy of a collector, for a transform that does not find it.

    A process that another one started may run a trainer, or an env of a pool: the message names both.
    """
    if multiprocessing.parent_process() is None:
        return "Append the transform to the env of an LLMCollector"
    return (
        "Append the transform to the env of an LLMCollector of this process. An env of a ParallelEnv, or of "
        "an AsyncEnvPool(backend='multiprocessing'), runs in a process of its own, which has no policy: "
        "append the transform to the pool itself (ParallelEnv(...).append_transform(...)), or make the pool "
        "a SerialEnv or an AsyncEnvPool(backend='threading')"
    )
