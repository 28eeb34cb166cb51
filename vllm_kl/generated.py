"""Which weights generated last: a ``vllm.LLM`` whose ``generate`` takes turns with pushes, and remembers what it served.

    policy -> LLM.generate, under the engine's lock -> the version that served it, by thread -> stamped at the env's step

Without the lock a push in another thread (``LLMCollector.start()`` beside a trainer) meets unfinished requests, or, where vLLM's
engine runs in a process of its own, breaks the socket that both threads use. Without the memory a push between a generation
and its stamp would name the weights of the next one.

    policy -> vLLMWrapper._call_generate -> the sampling parameters of its calls

A caller may give a call parameters of its own, and a policy may change its own after a call: what was used is remembered.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

from torchrl.modules.llm import vLLMWrapper

from vllm_kl.engines.loading import as_version
from vllm_kl.engines.weights import lock_of
from vllm_kl.types import Origin

# Where samples are stamped: the first by TorchRL's PolicyVersion transform, both by EnginePolicyVersion.
POLICY_VERSION, POLICY_ADAPTER = "policy_version", "policy_adapter"


class Guard:
    """The ``generate`` of a ``vllm.LLM``, one call at a time. Use :func:`guard`."""

    def __init__(self, llm: Any) -> None:
        self._generate = llm.generate
        self._engine = llm.llm_engine
        self._lock = lock_of(llm.llm_engine)
        self._last = threading.local()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scores = self._lock._is_owned()  # a scorer holds it already: its requests generate nothing
        with self._lock:
            if scores:
                return self._generate(*args, **kwargs)
            version = self._engine.get_weight_version()
            outputs = self._generate(*args, **kwargs)
        self._last.origin = version, adapter_id(kwargs.get("lora_request"))
        return outputs

    @property
    def last(self) -> Origin | None:
        """What this thread generated with last; ``None``: nothing yet.

        Raises:
            WeightsError: the version is no number.
        """
        origin = getattr(self._last, "origin", None)
        return None if origin is None else Origin(as_version(origin[0]), origin[1])


def guard(engine: Any) -> Guard | None:
    """Make an engine's ``generate`` take turns with pushes, once; ``None`` for what is no ``vllm.LLM``."""
    if not hasattr(engine, "llm_engine"):
        return None
    if not isinstance(engine.generate, Guard):
        engine.generate = Guard(engine)
    return engine.generate


def generated_by(policy: Any) -> Origin | None:
    """Return what a policy generated with last, in this thread; ``None``: not known."""
    generate = getattr(getattr(policy, "model", None), "generate", None)
    return generate.last if isinstance(generate, Guard) else None


class Watch:
    """The ``_call_generate`` of a ``vLLMWrapper`` (torchrl 0.14), which remembers with what it sampled. Use :func:`watch`."""

    def __init__(self, generate: Any) -> None:
        self.unwatched = generate
        self.last: Any = None  # sampling parameters; None: nothing yet
        self.has_varied = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        params = copy.copy(kwargs.get("sampling_params"))
        self.has_varied |= self.last is not None and params != self.last
        self.last = params
        return self.unwatched(*args, **kwargs)


def watch(policy: Any) -> Watch | None:
    """Make a policy remember the sampling parameters of its calls, once; ``None`` for what is no ``vLLMWrapper``."""
    if not isinstance(policy, vLLMWrapper):
        return None
    if not isinstance(policy._call_generate, Watch):
        policy._call_generate = Watch(policy._call_generate)
    return policy._call_generate


def adapter_id(lora_request: Any) -> int:
    """Return the id of an adapter; 0 for the base model. An engine has one adapter under an id (engines/adapters.py)."""
    return getattr(lora_request, "lora_int_id", 0)
