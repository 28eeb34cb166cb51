"""Makes a policy's ``vLLMWrapper`` tell which weights generated each row, as the engine itself reports it.

    vLLMWrapper._call_generate -> vLLM's outputs, each with its weight_versions and its adapter
        -> ("generated_by", ...) of each row that the wrapper returns -> EnginePolicyVersion, RetrieveKL

Each row carries its own origin. So the origin is right whichever thread generated the row
(``vLLMWrapper(batching=True)``), and whatever was pushed since. A watched policy also remembers the sampling
parameters of its calls, because a call may have parameters of its own and a policy may change its parameters
later. And it takes turns with pushes, see :mod:`vllm_kl.weights.engine_lock`.

Source: ``torchrl/modules/llm/policies/vllm_wrapper.py``, torchrl 0.14; ``CompletionOutput.weight_versions``,
vLLM 0.32.
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
from vllm_kl.engines.generate import Told, telling_versions
from vllm_kl.types import Origin
from vllm_kl.weights.engine_lock import EngineLock
from vllm_kl.weights.live_weights import lock_of
from vllm_kl.weights.replicas import reachable_weights

# The origins of this thread's completions, in vLLM's order; None: the thread is not generating.
_made: ContextVar[list[Origin] | None] = ContextVar("made", default=None)


class Watch:
    """Remembers a policy's calls. Use :func:`watch`."""

    def __init__(self, policy: vLLMWrapper) -> None:
        self.policy = policy
        self._latest: Any = None
        self._by_thread: dict[int, Any] = {}  # the last parameters of each thread that uses the policy
        self.has_varied = False
        self._asking: set[threading.Thread] = set()  # threads that wait for the policy's rows

    @property
    def last(self) -> Any:
        """The sampling parameters of this thread's last call, else of any thread's; ``None``: no call yet."""
        return self._by_thread.get(threading.get_ident(), self._latest)

    @contextlib.contextmanager
    def generating(self, params: Any) -> Iterator[None]:
        """Give this thread the engine inside the block, and remember the sampling parameters."""
        params = copy.copy(params)
        self.has_varied |= self._latest is not None and params != self._latest
        self._latest = self._by_thread[threading.get_ident()] = params
        with self._lock().generating({*self._asking}):
            yield

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Mark this thread as waiting for rows inside the block.

        With ``batching=True`` this or another thread generates the rows.
        """
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
        """Return the lock of the policy's engine.

        TorchRL's AsyncVLLM, or an actor, takes turns itself: for them the lock is a new one that nobody
        shares.
        """
        llm_engine = engine_of(self.policy)
        return EngineLock() if llm_engine is None else lock_of(llm_engine)


class _Watched(vLLMWrapper):
    """Overrides the methods of a watched policy, so that its rows tell which weights made them."""

    _vllm_kl_watch: Watch

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Give copies and pickles the policy's own class. A transform that finds a copy watches it, too."""
        state = {name: value for name, value in vars(self).items() if name != "_vllm_kl_watch"}
        return _new, (type(self).__bases__[1],), state

    def forward(self, *args: Any, **kwargs: Any) -> TensorDictBase:
        with watch(self).asking() if self.batching else contextlib.nullcontext():
            return super().forward(*args, **kwargs)

    def _call_generate(self, *args: Any, **kwargs: Any) -> Any:
        with watch(self).generating(kwargs.get("sampling_params")):
            if (made := _made.get()) is None:
                return super()._call_generate(*args, **kwargs)
            with telling_versions(reachable_weights(self.model)) as told:
                outputs = super()._call_generate(*args, **kwargs)
            made += _origins_of(outputs, told)
        return outputs

    def _from_vllm_generate_history(self, *args: Any) -> TensorDictBase:
        return _with_origins(super()._from_vllm_generate_history, *args)

    def _from_vllm_generate_text(self, *args: Any) -> TensorDictBase:
        return _with_origins(super()._from_vllm_generate_text, *args)

    def _from_vllm_generate_tokens(self, *args: Any) -> TensorDictBase:
        return _with_origins(super()._from_vllm_generate_tokens, *args)


def _with_origins(generate: Callable[..., TensorDictBase], *args: Any) -> TensorDictBase:
    """Call a generating method of a policy; return its rows with the origin of each."""
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
    """Make a policy's rows tell which weights generated them; return its :class:`Watch`.

    A second call changes nothing. ``None``: the policy is no ``vLLMWrapper``.
    """
    if not isinstance(policy, vLLMWrapper):
        return None
    if not isinstance(policy, _Watched):
        policy.__class__ = _watched(type(policy))
    if "_vllm_kl_watch" not in vars(policy):  # get_new_version() of a watched policy makes one of its class
        policy._vllm_kl_watch = Watch(policy)
        if GENERATED_BY not in policy.out_keys:
            policy.out_keys = [*policy.out_keys, GENERATED_BY]  # a call with inplace copies out_keys only
    return policy._vllm_kl_watch


def unwatched_call(policy: vLLMWrapper) -> Callable[..., Any]:
    """Return the policy's method that asks its engine, for scoring: those calls are not remembered."""
    return super(_Watched, policy)._call_generate if isinstance(policy, _Watched) else policy._call_generate


def _origins_of(outputs: list[Any], told: Told) -> list[Origin]:
    """Return the origin of each completion. One that ran during an update has two versions."""
    origins = []
    for output in outputs:
        adapter = adapter_id(output.lora_request)
        for completion in output.outputs:
            first, last = told(completion)
            known = first == last or None in (first, last)
            origins.append(
                Origin(first if first == last else None, adapter) if known else Origin(first, adapter, last)
            )
    return origins


def engine_of(policy: Any) -> Any:
    """Return the ``LLMEngine`` of a policy's ``vllm.LLM``, or ``None`` if it has none."""
    return getattr(getattr(policy, "model", None), "llm_engine", None)


def adapter_id(lora_request: Any) -> int:
    """Return the id of an adapter; 0: the base model.

    An engine has one adapter for each id (``weights/adapters.py``).
    """
    return getattr(lora_request, "lora_int_id", 0)
