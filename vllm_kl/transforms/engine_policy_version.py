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
from vllm_kl.errors import OptionError, WeightsError
from vllm_kl.transforms.from_collector import policy_of
from vllm_kl.transforms.next_transform import collector_of
from vllm_kl.transforms.pools import tell_envs_inside
from vllm_kl.transforms.watched_policy import watch
from vllm_kl.types import Origin
from vllm_kl.weights.collector_errors import follow
from vllm_kl.weights.live_weights import LiveWeights
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
            these. If the collector's policy is a ``vLLMWrapper``, vLLM's output tells the version of each
            sample. Else a sample gets the version that the engine serves when its step ends.

    Raises:
        WeightsError: the engine's weights, or the version that serves, are not known.

    >>> # LLMCollector(env, policy_factory=policy, track_policy_version=EnginePolicyVersion(llm))
    """

    def __init__(self, engine: Any) -> None:
        self._weights = weights_of(engine)
        self._engine = followed(engine)
        tell_envs_inside()
        super().__init__(int)

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
        if isinstance(self._weights, ReplicaWeights):  # its engine goes to other processes, too
            return EnginePolicyVersion, (self._engine,)
        raise OptionError(
            "an EnginePolicyVersion uses an engine of this process and cannot go to another process: use "
            "track_policy_version=True there"
        )

    def _increment_version(self, init: bool = False) -> int:
        return self.version

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
