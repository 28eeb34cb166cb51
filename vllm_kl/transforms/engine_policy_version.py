"""``EnginePolicyVersion`` stamps each sample with the version of the weights that sampled it.

The policy's engine tells the version.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Composite
from torchrl.envs.llm.transforms import PolicyVersion

from vllm_kl.batch.origins import POLICY_ADAPTER, POLICY_VERSION, UNKNOWN, generated_by
from vllm_kl.batch.write_entries import declare
from vllm_kl.errors import CollectorError, OptionError, WeightsError
from vllm_kl.transforms.from_collector import policy_of
from vllm_kl.transforms.next_transform import collector_of
from vllm_kl.transforms.pools import tell_envs_inside, where_to_stand
from vllm_kl.transforms.watched_policy import watch
from vllm_kl.types import Origin
from vllm_kl.weights.collector_errors import follow
from vllm_kl.weights.live_weights import LiveWeights, Weights
from vllm_kl.weights.push import followed, weights_of
from vllm_kl.weights.replicas import ReplicaWeights


class EnginePolicyVersion(PolicyVersion):
    """TorchRL's ``PolicyVersion``, with the version that the policy's engine serves instead of a counter.

    Samples get the version of the weights that made them and the id of their adapter (``"policy_adapter"``,
    0: the base model). So the stamps are right whoever pushes weights, however often, and even before the
    collector exists. TorchRL's own tracker (``track_policy_version=True``) begins at 0 and counts only the
    updates of its collector.

    Args:
        engine: the policy's engine: a ``vllm.LLM``, TorchRL's ``AsyncVLLM``, or a ``vLLMWrapper`` of one of
            these. ``None`` takes the engine of the collector's policy, for a collector that makes its policy
            in another process (``RayLLMCollector``). If the collector's policy is a ``vLLMWrapper``, vLLM's
            output tells the version of each sample. Else a sample gets the version that the engine serves
            when its step ends.

    Raises:
        WeightsError: the engine's weights, or the version that serves, are not known.
        CollectorError: when a version is asked for: there is no ``engine`` and no collector.

    >>> # LLMCollector(env, policy_factory=policy, track_policy_version=EnginePolicyVersion(llm))
    >>> # RayLLMCollector(make_env, policy_factory=policy, track_policy_version=EnginePolicyVersion())
    """

    def __init__(self, engine: Any = None) -> None:
        self._given = None if engine is None else (weights_of(engine), followed(engine))
        tell_envs_inside()
        super().__init__(int)

    @property
    def _weights(self) -> Weights:
        return self._found()[0]

    @property
    def _engine(self) -> Any:
        return self._found()[1]

    def _found(self) -> tuple[Weights, Any]:
        """Return the engine's weights, and the engine."""
        if self._given is not None:
            return self._given
        policy = policy_of(collector_of(self))
        if policy is None:
            raise CollectorError(
                "EnginePolicyVersion() takes the engine of the collector's policy, but there is no "
                f"collector.\n{where_to_stand()}; or pass the engine: EnginePolicyVersion(llm)"
            )
        return weights_of(policy), followed(policy)

    @property
    def version(self) -> int:
        """The version that the engine serves now.

        A resumed run sets it, because its new engine begins at 0.

        Raises:
            WeightsError: others loaded weights into the engine and gave them no version. When set: the
                value is less than the engine's version, or the engine serves neither its first weights nor
                those of the last push.
        """
        version = self._weights.version
        if version is None:
            raise WeightsError(
                "others loaded weights into this engine and gave them no version, so the version that serves "
                "is not known.\nCall finish_update(engine) after each such load: it loads the weights again "
                "and counts them"
            )
        return version

    @version.setter
    def version(self, version: int) -> None:
        if version == self.version:
            return
        if not isinstance(self._weights, (LiveWeights, ReplicaWeights)):
            raise WeightsError(
                "the engine of a scorer counts its versions itself: push the resumed weights with their "
                "version"
            )
        self._weights.take_over(version=version)

    def __deepcopy__(self, memo: dict[int, Any]) -> EnginePolicyVersion:
        return self  # a copied env uses the same engine

    def __reduce__(self) -> Any:
        if self._given is None:
            return EnginePolicyVersion, ()
        if isinstance(self._weights, ReplicaWeights):  # its engine goes to other processes, too
            return EnginePolicyVersion, (self._engine,)
        raise OptionError(
            "an EnginePolicyVersion of an engine of this process cannot go to another process: pass "
            "EnginePolicyVersion(), which takes the engine of the collector's policy there"
        )

    def _increment_version(self, init: bool = False) -> int | None:
        return None if init and self._given is None else self.version

    def _reset_env_preprocess(self, tensordict: TensorDictBase | None) -> TensorDictBase | None:
        collector = collector_of(self)
        watch(policy_of(collector))
        follow(collector, self._engine)
        return super()._reset_env_preprocess(tensordict)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return self._stamp(next_tensordict, generated_by(tensordict.reshape(-1)))

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._stamp(tensordict_reset, None)

    def _stamp(self, td: TensorDictBase, sampled: list[Origin] | None) -> TensorDictBase:
        sampled = sampled or [Origin(self.version)] * td.numel()
        for key, values in zip((POLICY_VERSION, POLICY_ADAPTER), zip(*sampled, strict=True), strict=False):
            known = torch.tensor([UNKNOWN if value is None else value for value in values], device=td.device)
            td.set(key, known.reshape(td.shape))
        return td

    def transform_observation_spec(self, spec: Composite) -> Composite:
        declare(spec, POLICY_ADAPTER, trailing=(), dtype=torch.int64)
        return super().transform_observation_spec(spec)
