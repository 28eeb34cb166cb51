"""Which weights generated what, by the engine's own answer: a policy's ``vLLMWrapper`` whose outputs say it.

    vLLMWrapper._call_generate -> vLLM's outputs, each with its weight_versions and its adapter
        -> ("generated_by", ...) of each row that the wrapper returns -> EnginePolicyVersion, RetrieveKL

The rows carry it, so it is theirs whichever thread generated them (``vLLMWrapper(batching=True)``), and whatever was pushed
since. The call also remembers its sampling parameters: a caller may give it parameters of its own, and a policy may change its
own after a call. And it takes turns with pushes, see :mod:`vllm_kl.weights.lock`.

Source: ``torchrl/modules/llm/policies/vllm_wrapper.py``, torchrl 0.14; ``CompletionOutput.weight_versions``, vLLM 0.32.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from tensordict import TensorDictBase
from torchrl.modules.llm import vLLMWrapper

from vllm_kl.batch.origins import GENERATED_BY, set_generated_by
from vllm_kl.engines.generate import versions_told
from vllm_kl.types import Origin
from vllm_kl.weights.live import LiveWeights, lock_of
from vllm_kl.weights.loading import INITIAL
from vllm_kl.weights.lock import EngineLock

# Where the generation that this thread is in notes the origins of its completions, in vLLM's order; None: it is in none.
_made: ContextVar[list[Origin] | None] = ContextVar("made", default=None)


class Watch:
    """What is remembered of a policy's calls. Use :func:`watch`."""

    def __init__(self, policy: vLLMWrapper) -> None:
        self.policy = policy
        self._latest: Any = None
        self._by_thread: dict[int, Any] = {}  # of threads that share the policy, each has its own
        self.has_varied = False
        self._asking: set[threading.Thread] = set()

    @property
    def last(self) -> Any:
        """The sampling parameters of this thread's last call, or else of any thread's; ``None``: nothing yet."""
        return self._by_thread.get(threading.get_ident(), self._latest)

    @contextlib.contextmanager
    def generating(self, params: Any) -> Iterator[Any]:
        """In the block, this thread has the engine; remember what it samples with."""
        params = copy.copy(params)
        self.has_varied |= self._latest is not None and params != self._latest
        self._latest = self._by_thread[threading.get_ident()] = params
        with self._lock().generating({*self._asking}):
            yield

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """In the block, this thread waits for what it, or another thread for it, generates (``batching=True``)."""
        thread, lock = threading.current_thread(), self._lock()
        lock.close_step()
        self._asking.add(thread)
        try:
            yield
        except BaseException:
            lock.close_step()
            raise
        finally:
            self._asking.discard(thread)

    def _lock(self) -> EngineLock:
        """Return the lock of the policy's engine; one of nobody's where TorchRL's AsyncVLLM, or an actor, takes turns itself."""
        llm_engine = engine_of(self.policy)
        return EngineLock() if llm_engine is None else lock_of(llm_engine)


class _Watched(vLLMWrapper):
    """What a watched policy does otherwise than its class: its rows tell which weights made them."""

    _vllm_kl_watch: Watch

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies, and policies that travel to another process, are of the policy's own class: watched where they are used."""
        state = {name: value for name, value in vars(self).items() if name != "_vllm_kl_watch"}
        return _new, (type(self).__bases__[1],), state

    def forward(self, *args: Any, **kwargs: Any) -> TensorDictBase:
        with watch(self).asking() if self.batching else contextlib.nullcontext():
            return super().forward(*args, **kwargs)

    def _call_generate(self, *args: Any, **kwargs: Any) -> Any:
        with watch(self).generating(kwargs.get("sampling_params")):
            outputs = super()._call_generate(*args, **kwargs)
            if (made := _made.get()) is not None:
                llm_engine = engine_of(self)
                uncounted = INITIAL if llm_engine is None else LiveWeights(llm_engine).uncounted
                made += [
                    _origin_of(output, completion, uncounted)
                    for output in outputs
                    for completion in output.outputs
                ]
        return outputs

    def _from_vllm_generate_history(self, *args: Any) -> TensorDictBase:
        return _telling(super()._from_vllm_generate_history, *args)

    def _from_vllm_generate_text(self, *args: Any) -> TensorDictBase:
        return _telling(super()._from_vllm_generate_text, *args)

    def _from_vllm_generate_tokens(self, *args: Any) -> TensorDictBase:
        return _telling(super()._from_vllm_generate_tokens, *args)


def _telling(generate: Callable[..., TensorDictBase], *args: Any) -> TensorDictBase:
    """Return the rows that one of a policy's methods generates, with which weights made each."""
    origins: list[Origin] = []
    before = _made.set(origins)
    try:
        out = generate(*args)
    finally:
        _made.reset(before)
    if origins:
        set_generated_by(out, origins)
    return out


def _new(policy_type: type[vLLMWrapper]) -> vLLMWrapper:
    return policy_type.__new__(policy_type)


@functools.cache
def _watched(policy_type: type[vLLMWrapper]) -> type[vLLMWrapper]:
    return type(policy_type.__name__, (_Watched, policy_type), {"__doc__": policy_type.__doc__})


def watch(policy: Any) -> Watch | None:
    """Make a policy's rows tell what generated them, once; ``None`` for what is no ``vLLMWrapper``."""
    if not isinstance(policy, vLLMWrapper):
        return None
    if not isinstance(policy, _Watched):
        policy.__class__ = _watched(type(policy))
        policy._vllm_kl_watch = Watch(policy)
        if GENERATED_BY not in policy.out_keys:
            policy.out_keys = [*policy.out_keys, GENERATED_BY]  # what a call that writes in place copies
    return policy._vllm_kl_watch


def unwatched_call(policy: vLLMWrapper) -> Callable[..., Any]:
    """Return the method by which a policy asks its engine, for calls that sample nothing: they are not remembered."""
    return super(_Watched, policy)._call_generate if isinstance(policy, _Watched) else policy._call_generate


def _origin_of(output: Any, completion: Any, uncounted: str | None) -> Origin:
    """Return what vLLM says of one completion. One that straddles an update is of two versions."""
    first, last = versions_told(completion, uncounted=uncounted)
    adapter = adapter_id(output.lora_request)
    if first == last or None in (first, last):
        return Origin(first if first == last else None, adapter)
    return Origin(first, adapter, last)


def engine_of(policy: Any) -> Any:
    """Return the ``LLMEngine`` of a policy's ``vllm.LLM``; ``None`` of what has none."""
    return getattr(getattr(policy, "model", None), "llm_engine", None)


def adapter_id(lora_request: Any) -> int:
    """Return the id of an adapter; 0 for the base model. An engine has one adapter under an id (weights/adapters.py)."""
    return getattr(lora_request, "lora_int_id", 0)
