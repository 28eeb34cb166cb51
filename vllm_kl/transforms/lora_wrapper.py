"""``LoRAWrapper``: a TorchRL policy that is a LoRA adapter on a vLLM engine.

TorchRL 0.14's ``vLLMWrapper`` has no way to name an adapter: ``generate_kwargs={"lora_request": ...}`` is dropped without a
word, and the base model generates. Here every request of the wrapper, to generate or to score, names it.

Source: ``vLLMWrapper._call_generate``, ``torchrl/modules/llm/policies/vllm_wrapper.py``, torchrl 0.14.1.
"""

from __future__ import annotations

from typing import Any

from torchrl.modules.llm import vLLMWrapper

from vllm_kl.checks import check_lora_request
from vllm_kl.weights.adapters import check_adapter


class LoRAWrapper(vLLMWrapper):
    """A ``vLLMWrapper`` whose requests are those of an adapter.

    Args:
        model: as ``vLLMWrapper`` takes it; made with ``enable_lora=True``.

    Keyword Args:
        lora_request: a ``vllm.lora.request.LoRARequest``; ``None`` is the base model. May be set later, between two
            calls: ``policy.lora_request = LoRARequest("step-7", 7, "adapters/7")``. A path of its own for each step keeps
            vLLM from reading the KV of the one before.
        **kwargs: ``vLLMWrapper``'s own.

    Raises:
        OptionError: ``lora_request`` is none, or has ``load_inplace=True``.
        ReadoutUnavailableError: a ``vllm.LLM`` takes no adapters, or its LM head is wrapped for them.
        WeightsError: the adapter cannot be loaded, or would not be served as it is written. A request that is the first to
            ask for such an adapter would end the engine.

    >>> # policy = LoRAWrapper(LLM("base", enable_lora=True), lora_request=LoRARequest("policy", 1, "adapters/policy"))
    >>> # RetrieveKL("from_collector", VLLMReference(policy.model, tokenizer)): the base model, on the same engine
    """

    def __init__(self, model: Any, *, lora_request: Any = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.lora_request = lora_request

    @property
    def lora_request(self) -> Any:
        """The adapter that is asked for; ``None``: the base model."""
        return self._lora_request

    @lora_request.setter
    def lora_request(self, lora_request: Any) -> None:
        check_lora_request(lora_request)
        if hasattr(self.model, "llm_engine"):  # the workers of TorchRL's AsyncVLLM cannot be asked from here
            check_adapter(self.model.llm_engine, lora_request)
        self._lora_request = lora_request

    def get_new_version(self, **kwargs: Any) -> LoRAWrapper:
        """Return a twin with other arguments; with the same adapter, unless another is named."""
        lora_request = kwargs.pop("lora_request", self.lora_request)
        twin = super().get_new_version(**kwargs)
        twin.lora_request = lora_request
        return twin

    def _call_generate(self, *args: Any, **kwargs: Any) -> Any:
        return super()._call_generate(*args, **{"lora_request": self._lora_request, **kwargs})
