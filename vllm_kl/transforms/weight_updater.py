"""``VLLMWeightUpdater``: lets ``collector.update_policy_weights_()`` push weights into a vLLM engine.

The engine is that of the collector's policy.
"""

from __future__ import annotations

import warnings
from typing import Any

from torchrl.collectors.weight_update import WeightUpdaterBase

from vllm_kl.errors import OptionError
from vllm_kl.transforms.from_collector import policy_of
from vllm_kl.transforms.pusher import Pusher
from vllm_kl.weights.ray_collectors import actor_of

with warnings.catch_warnings():
    # TorchRL 0.14 deprecates WeightUpdaterBase, but its LLMCollector takes nothing else.
    warnings.simplefilter("ignore", DeprecationWarning)

    class VLLMWeightUpdater(WeightUpdaterBase):
        """TorchRL's ``weight_updater`` of an ``LLMCollector`` whose policy is a vLLM engine.

        The replicas of an ``AsyncVLLM`` may be on other machines.

        ``collector.update_policy_weights_(model)`` pushes a model, a state dict or a tensordict. With
        :class:`EnginePolicyVersion` the collector's ``policy_version`` is always the engine's version. With
        ``track_policy_version=True`` it is the engine's version after that call, if no other collector shares
        the updater.

        Args:
            engine: as in :func:`push_weights`. ``None`` takes the engine of the collector's policy, for a
                collector that makes its policy in another process (``RayLLMCollector``).
            model: pushed if ``update_policy_weights_()`` gets no weights.
            transport: as in :func:`push_weights`.

        >>> updater = VLLMWeightUpdater(scorer)
        >>> # tracker = EnginePolicyVersion(llm)
        >>> # LLMCollector(env, policy=policy, weight_updater=updater, track_policy_version=tracker)
        >>> # RayLLMCollector(make_env, policy_factory=policy, weight_updater=VLLMWeightUpdater())
        """

        def __init__(self, engine: Any = None, model: Any = None, *, transport: str = "files") -> None:
            self._pusher = None if engine is None else Pusher(engine, transport)
            self._transport = transport
            self._model = model

        def register_collector(self, collector: Any) -> None:
            super().register_collector(collector)
            if actor_of(collector) is not None:
                return  # the updater's copy in the collector's process is registered there
            if self._pusher is None:
                self._pusher = Pusher(policy_of(collector), self._transport)
            self._pusher.register(collector)

        def __call__(self, policy_or_weights: Any = None, worker_ids: Any = None) -> None:
            # TorchRL 0.14: update_policy_weights_() calls this, and then adds 1 to the collector's version.
            weights = self._get_server_weights() if policy_or_weights is None else policy_or_weights
            self._push(weights, collector_counts=True)
            self._call_post_hooks()

        def _sync_weights_with_worker(self, *, worker_id: Any = None, server_weights: Any) -> None:
            self._push(server_weights)

        def _push(self, weights: Any, *, collector_counts: bool = False) -> None:
            if self._pusher is None:
                raise OptionError(
                    "no engine: pass it to VLLMWeightUpdater, or pass the updater to a collector "
                    "(weight_updater=), whose policy has an engine"
                )
            self._pusher.push(weights, collector_counts=collector_counts)

        def _get_server_weights(self) -> Any:
            if self._model is None:
                raise OptionError(
                    "no weights: pass them to update_policy_weights_, or a model to VLLMWeightUpdater"
                )
            return self._model

        def _maybe_map_weights(self, policy_or_weights: Any) -> Any:
            return policy_or_weights  # push_weights reads modules, tensordicts and state dicts
