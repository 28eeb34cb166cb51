"""``VLLMSyncScheme`` is TorchRL's weight sync scheme for a vLLM engine, also for TorchRL's AsyncVLLM."""

from __future__ import annotations

from typing import Any

from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from vllm_kl.errors import OptionError
from vllm_kl.transforms.pusher import Pusher
from vllm_kl.weights.push import push_weights


class VLLMSyncScheme(WeightSyncScheme):
    """TorchRL's weight sync scheme for a vLLM engine. Sender and receiver are in one process.

    The replicas of an ``AsyncVLLM`` may be on other machines.

    Args:
        engine, transport: as in :func:`push_weights`.

    >>> sender = VLLMSyncScheme(scorer).create_sender()
    >>> # sender.register_model(trainer); sender.register_collector(collector)
    >>> # At each step: sender.update_weights()
    """

    def __init__(self, engine: Any, *, transport: str = "files") -> None:
        super().__init__(strategy="tensordict")
        self._engine, self._transport = engine, transport

    def create_sender(self) -> VLLMSender:
        """Return the trainer's side of the scheme."""
        return VLLMSender(self._engine, transport=self._transport)

    def create_transport(self, **kwargs: Any) -> _Transport:
        """Return the transport: it pushes the weights."""
        return _Transport(self._engine, self._transport)


class _Transport:
    """Transports weights for TorchRL by a push, which returns when the engine serves them."""

    def __init__(self, engine: Any, transport: str) -> None:
        self._engine, self._transport = engine, transport

    def send_weights(self, weights: Any) -> None:
        push_weights(self._engine, weights, transport=self._transport)


class VLLMSender:
    """The trainer's side of :class:`VLLMSyncScheme`."""

    def __init__(self, engine: Any, *, transport: str = "files") -> None:
        self._pusher = Pusher(engine, transport)
        self._model: Any = None

    def register_model(self, model: Any) -> None:
        """Store the model whose weights are sent."""
        self._model = model

    def register_collector(self, collector: Any) -> None:
        """Set a collector's ``policy_version`` to the engine's version, now and after each push."""
        self._pusher.register(collector)

    def init_all_workers_group(self, metadata: Any, vllm_engine: Any = None) -> None:
        """Do nothing. TorchRL's GRPO scripts call this, so that its own sender sets up NCCL."""

    def update_weights(self, weights: Any = None) -> int:
        """Push ``weights``, or those of the registered model; return the version that serves now.

        Raises:
            OptionError: there are no weights and no registered model.
        """
        if weights is None and self._model is None:
            raise OptionError("no weights: pass them, or register_model() first")
        return self._pusher.push(self._model if weights is None else weights)
