"""``remote_reference`` makes a ``VLLMReference`` whose weights are in a Ray actor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_kl.errors import InputError, OptionError
from vllm_kl.transforms.choose_scorer import scorer_for
from vllm_kl.transforms.vllm_reference import DESCRIPTION, VLLMReference
from vllm_kl.types import Scorer


def _build_there(
    ref_model: Any, factory: Callable[[], Any] | None, device: Any
) -> tuple[Scorer, dict[str, Any]]:
    """Return a scorer of the model and the wrapper's attributes. Runs in the Ray actor."""
    model = ref_model if factory is None else factory()
    if device is not None:
        model = model.to(device)
    if model.generate:
        raise InputError("The ref_model must have `generate=False`; the factory made one that generates.")
    return scorer_for(model), {name: getattr(model, name) for name in DESCRIPTION if hasattr(model, name)}


def remote_reference(
    ref_model: Any,
    ref_model_factory: Callable[[], Any] | None,
    *,
    actor_name: str | None,
    device: torch.device | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> VLLMReference:
    """Return a reference whose weights are in a Ray actor.

    Args:
        ref_model: a wrapper that can be pickled (a ``TransformersWrapper``), or ``None``.
        ref_model_factory: makes the wrapper in the actor. Without both, the actor ``actor_name`` must exist.
        actor_name: see :class:`~vllm_kl.transforms.ray_scorer.RayScorer`.
        device: where the actor moves a transformers model.
        num_cpus, num_gpus: the actor's resources.

    Raises:
        InputError: ``ref_model`` and ``ref_model_factory`` are both given, or nothing is.
        OptionError: ``ref_model`` holds a running engine, or Ray is not installed.
    """
    try:
        from vllm_kl.transforms.ray_scorer import RayScorer
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise OptionError("a reference in a Ray actor needs Ray: pip install 'vllm-kl[ray]'") from error
    if ref_model is not None and ref_model_factory is not None:
        raise InputError("Cannot provide both 'ref_model' and 'ref_model_factory'. Choose one.")
    if isinstance(ref_model, VLLMReference):
        raise OptionError(
            "a VLLMReference holds a running engine and cannot move into a Ray actor: pass "
            "ref_model_factory, which makes the reference there"
        )
    build = None
    if ref_model is not None or ref_model_factory is not None:
        build = functools.partial(_build_there, ref_model, ref_model_factory, device)
    elif actor_name is None:
        raise InputError(
            "use_ray_service=True needs ref_model_factory, or the actor_name of an actor that exists"
        )
    scorer = RayScorer(build, actor_name=actor_name, num_cpus=num_cpus, num_gpus=num_gpus)
    return VLLMReference(scorer, **scorer.attributes)
