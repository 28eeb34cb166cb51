"""Makes Hydra configurations of this package's classes from the signatures of their constructors.

    RetrieveKL.__init__(self, gen_model=..., coeff=1.0, ..., **kwargs)
        -> RetrieveKLConfig: a dataclass with a field for each argument, and ``kwargs`` for the rest
        -> hydra: instantiate(config) calls make(), which calls RetrieveKL(**arguments)

A field has the argument's name and default, and its type if OmegaConf knows it, so a field cannot differ from
its argument. A key in a list, as YAML has it, becomes a tuple: ``[log_probs, full]`` is ``("log_probs",
"full")``.

Source: ``torchrl/trainers/algorithms/configs``, torchrl 0.14.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from importlib import import_module
from types import NoneType
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from torchrl.trainers.algorithms.configs.common import ConfigBase
from torchrl.trainers.algorithms.configs.transforms import TransformConfig

from vllm_kl.transforms.retrieve_kl import RetrieveKL
from vllm_kl.transforms.retrieve_log_prob import RetrieveLogProb
from vllm_kl.transforms.vllm_reference import VLLMReference

_SIMPLE = {bool, int, float, str, NoneType}  # types that OmegaConf checks


def make(of: str, **arguments: Any) -> Any:
    """Call a class of this package with the values of its configuration. Hydra calls this function.

    Args:
        of: ``module:class``.
        arguments: by the names of the configuration's fields.
    """
    module, _, name = of.partition(":")
    made = getattr(import_module(module), name)
    for parameter in _parameters(made):
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, None) or {}
        elif "NestedKey" in str(parameter.annotation) and isinstance(arguments.get(parameter.name), list):
            arguments[parameter.name] = tuple(arguments[parameter.name])
    return made(**arguments)


def _parameters(made: type) -> Iterator[inspect.Parameter]:
    _, *parameters = inspect.signature(made.__init__).parameters.values()  # without self
    yield from parameters


def _config(made: type, base: type) -> type:
    """Return a dataclass with a field for each argument of a class's constructor."""
    types = typing.get_type_hints(made.__init__)
    fields: list[tuple[str, Any, Any]] = []
    for parameter in _parameters(made):
        given, default = types[parameter.name], parameter.default
        if parameter.kind is parameter.VAR_KEYWORD:
            given, default = dict[str, Any], dataclasses.field(default_factory=dict)
        elif default is parameter.empty:
            default = MISSING
        elif not set(typing.get_args(given) or [given]) <= _SIMPLE:  # the parts of a union
            given = Any
        fields.append((parameter.name, given, default))
    of = f"{made.__module__}:{made.__name__}"
    fixed = [("of", of), ("_target_", f"{__name__}.{make.__name__}"), ("_convert_", "all")]
    return dataclasses.make_dataclass(
        f"{made.__name__}Config",
        [*fields, *((name, str, value) for name, value in fixed)],
        bases=(base,),
        namespace={
            "__module__": __name__,
            "__post_init__": lambda self: None,
            "__doc__": f"Hydra configuration of :class:`~vllm_kl.{made.__name__}`: its arguments are the "
            "fields.",
        },
    )


RetrieveKLConfig = _config(RetrieveKL, TransformConfig)
RetrieveLogProbConfig = _config(RetrieveLogProb, TransformConfig)
VLLMReferenceConfig = _config(VLLMReference, ConfigBase)

# Group and name in Hydra's ConfigStore, beside TorchRL's own.
CONFIGS = {
    ("transform", "vllm_kl_retrieve_kl"): RetrieveKLConfig,
    ("transform", "vllm_kl_retrieve_log_prob"): RetrieveLogProbConfig,
    ("model", "vllm_kl_reference"): VLLMReferenceConfig,
}


def register() -> None:
    """Add the configurations to Hydra's ``ConfigStore``. Idempotent."""
    store = ConfigStore.instance()
    for (group, name), config in CONFIGS.items():
        store.store(group=group, name=name, node=config, provider="vllm_kl")
