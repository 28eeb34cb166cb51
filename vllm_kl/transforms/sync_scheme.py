"""``VLLMSyncScheme``: TorchRL's weight sync scheme for a vLLM engine of this machine."""

from __future__ import annotations

from typing import Any

from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

from vllm_kl.errors import OptionError
from vllm_kl.transforms.pusher import Pusher
from vllm_kl.weights.push import push_weights


class VLLMSyncScheme(WeightSyncScheme):
    """TorchRL's weight sync scheme for a vLLM engine of this machine: sender and receiver are one process.

    Args:
        engine: as :func:`push_weights` takes it.

    >>> sender = VLLMSyncScheme(scorer).create_sender()
    >>> # sender.register_model(trainer); sender.register_collector(collector); each step: sender.update_weights()
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(strategy="tensordict")
        self._engine = engine

    def create_sender(self) -> VLLMSender:
        """Return the trainer's side."""
        return VLLMSender(self._engine)

    def create_transport(self, **kwargs: Any) -> _Transport:
        """Return what carries weights: a push."""
        return _Transport(self._engine)


class _Transport:
    """TorchRL's seam for carrying weights; blocks until they serve."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def send_weights(self, weights: Any) -> None:
        push_weights(self._engine, weights)


class VLLMSender:
    """The trainer's side of :class:`VLLMSyncScheme`."""

    def __init__(self, engine: Any) -> None:
        self._pusher = Pusher(engine)
        self._model: Any = None

    def register_model(self, model: Any) -> None:
        """Take the model whose weights are sent."""
        self._model = model

    def register_collector(self, collector: Any) -> None:
        """Keep a collector's ``policy_version`` in step with the engine."""
        self._pusher.register(collector)

    def update_weights(self, weights: Any = None) -> int:
        """Push ``weights``, or the registered model's; return the version that serves now."""
        if weights is None and self._model is None:
            raise OptionError("no weights: pass them, or register_model() first")
        return self._pusher.push(self._model if weights is None else weights)
