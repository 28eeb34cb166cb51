"""``remote_reference`` makes a ``VLLMReference`` whose weights are in a Ray actor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_kl.engines.borrowed import lending
from vllm_kl.errors import InputError, OptionError
from vllm_kl.transforms.reference_settings import Served, served
from vllm_kl.transforms.service_options import ServiceOptions
from vllm_kl.transforms.vllm_reference import DESCRIPTION, VLLMReference


@dataclass(frozen=True)
class BuildReference:
    """Makes the reference of a service, in the service's process."""

    ref_model: Any  # a wrapper that can be pickled; None: factory makes it
    factory: Callable[[], Any] | None
    device: torch.device | None

    def __call__(self) -> Served:
        model = self.ref_model if self.factory is None else self.factory()
        if self.device is not None:
            model = model.to(self.device)
        if model.generate:
            raise InputError("The ref_model must have `generate=False`; the factory made one that generates.")
        return served(model, DESCRIPTION)

    def settings_beside(self, running: Served) -> dict[str, Any] | None:
        """Return the settings of the reference that this would make; ``None``: they cannot be known.

        The factory is called, and a ``VLLMReference`` that it makes borrows the running engine. Other
        wrappers would load their model a second time, so a factory is not called if the service has one.
        """
        engine: Any = getattr(running.scorer, "_engine", None)
        if hasattr(engine, "settings"):  # the service's own engine, or its replicas
            with lending(engine):
                return self().settings
        return self().settings if self.factory is None else None


def remote_reference(
    ref_model: Any,
    ref_model_factory: Callable[[], Any] | None,
    service: ServiceOptions,
    *,
    device: torch.device | None = None,
) -> VLLMReference:
    """Return a reference whose weights are in a Ray actor.

    Args:
        ref_model: a wrapper that can be pickled (a ``TransformersWrapper``), or ``None``.
        ref_model_factory: makes the wrapper in the actor. Without both, the service must exist.
        service: see :class:`~vllm_kl.transforms.ray_scorer.RayScorer`.
        device: where the actor moves a transformers model.

    Raises:
        InputError: ``ref_model`` and ``ref_model_factory`` are both given, or nothing is.
        OptionError: ``ref_model`` holds a running engine; the service has other settings; or Ray is not
            installed.
        EngineError: there is no such service, or it died.
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
        build = BuildReference(ref_model, ref_model_factory, device)
    elif service.actor_name is None:
        raise InputError(
            "service_backend='ray' needs ref_model_factory, or the actor_name of a service that exists"
        )
    scorer = RayScorer(build, service)
    return VLLMReference(scorer, **scorer.attributes)
