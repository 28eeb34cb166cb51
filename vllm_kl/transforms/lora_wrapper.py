"""``LoRAWrapper`` is a TorchRL policy that generates and scores with a LoRA adapter on a vLLM engine.

TorchRL 0.14's ``vLLMWrapper`` cannot name an adapter: it drops ``generate_kwargs={"lora_request": ...}``
without a warning, and the base model generates. ``LoRAWrapper`` names the adapter in every request.

Source: ``vLLMWrapper._call_generate``, ``torchrl/modules/llm/policies/vllm_wrapper.py``, torchrl 0.14.1.
"""

from __future__ import annotations

from typing import Any

from torchrl.modules.llm import vLLMWrapper

from vllm_kl.checks import check_lora_request
from vllm_kl.weights.replicas import check_adapter_on


class LoRAWrapper(vLLMWrapper):
    """A ``vLLMWrapper`` that names an adapter in every request.

    Args:
        model: as in ``vLLMWrapper``; it must be made with ``enable_lora=True``.

    Keyword Args:
        lora_request: a ``vllm.lora.request.LoRARequest``; ``None``: the base model. It may be set between two
            calls: ``policy.lora_request = LoRARequest("step-7", 7, "adapters/7")``. Give each step a path of
            its own, else vLLM may read KV of the adapter of an earlier step.
        **kwargs: as in ``vLLMWrapper``.

    Raises:
        OptionError: ``lora_request`` is no ``LoRARequest``, or has ``load_inplace=True``.
        ReadoutUnavailableError: the engine takes no adapters, or wraps its LM head for them.
        WeightsError: the engine cannot load the adapter, or would not serve it as its files say. Without this
            check the first request for such an adapter would end the engine.

    >>> # adapter = LoRARequest("policy", 1, "adapters/policy")
    >>> # policy = LoRAWrapper(LLM("base", enable_lora=True), lora_request=adapter)
    >>> # The reference is the base model on the same engine:
    >>> # RetrieveKL("from_collector", VLLMReference(policy.model, tokenizer))
    """

    def __init__(self, model: Any, *, lora_request: Any = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.lora_request = lora_request

    @property
    def lora_request(self) -> Any:
        """The adapter of all requests; ``None``: the base model."""
        return self._lora_request

    @lora_request.setter
    def lora_request(self, lora_request: Any) -> None:
        check_lora_request(lora_request)
        check_adapter_on(self.model, lora_request)
        self._lora_request = lora_request

    def get_new_version(self, **kwargs: Any) -> LoRAWrapper:
        """Return a copy with other arguments. The copy keeps the adapter unless ``lora_request`` is given."""
        lora_request = kwargs.pop("lora_request", self.lora_request)
        twin = super().get_new_version(**kwargs)
        twin.lora_request = lora_request
        return twin

    def _call_generate(self, *args: Any, **kwargs: Any) -> Any:
        return super()._call_generate(*args, **{"lora_request": self._lora_request, **kwargs})
