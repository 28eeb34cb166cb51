"""Makes the two sides of ``RetrieveKL`` from its arguments, and checks that they fit each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tensordict.utils import NestedKey

from vllm_kl.batch.read_tokens import keys_of
from vllm_kl.errors import InputError, OptionError
from vllm_kl.transforms.from_collector import FromCollector, GenLogProbs
from vllm_kl.transforms.remote_reference import remote_reference
from vllm_kl.transforms.sides import ModelSide, Side, check_side, one_of, warn_of_two_lengths


class TwoSides(NamedTuple):
    """The two sides of a KL."""

    gen_model: Any  # the model that generated, "from_collector", or a FromCollector
    gen: Side
    ref_model: Any
    ref: ModelSide
    pad_output: bool

    def in_keys(self, history_key: NestedKey) -> list[NestedKey]:
        """Return the entries that the models read, each once."""
        models = [self.ref_model, *([] if isinstance(self.gen, FromCollector) else [self.gen_model])]
        return list(dict.fromkeys(keys_of(model, history_key=history_key).key for model in models))


def two_sides(
    gen_model: Any,
    collector_side: FromCollector | None,
    ref_model: Any,
    *,
    assistant_only: bool,
    device: torch.device | None,
) -> TwoSides:
    """Return the two sides of a KL, after checking each of them and both together.

    Args:
        gen_model: the model that generated; not used if there is a ``collector_side``.
        collector_side: the side that takes its log-probs from a collector; ``None``: ``gen_model`` scores.
        ref_model: the reference.
        assistant_only: both models must be able to tell the assistant's tokens.
        device: where to move the models; ``None``: leave them.

    Raises:
        InputError: a model cannot be a side, or the models have different ``pad_output``.
        OptionError: the models have different temperatures.
    """
    models = {"ref_model": ref_model, **({"gen_model": gen_model} if collector_side is None else {})}
    for name, model in models.items():
        check_side(model, assistant_only, name)
    pad_output = _shared_pad_output(models)
    if device is not None:
        models = {name: model.to(device) for name, model in models.items()}
    ref_model, gen_model = models["ref_model"], models.get("gen_model", gen_model)
    ref = ModelSide(ref_model)
    if collector_side is None:
        gen = _gen_model_side(gen_model, ref_model, ref.temperature)
    else:
        gen = collector_side.expecting(pad_output=pad_output)
    return TwoSides(gen_model=gen_model, gen=gen, ref_model=ref_model, ref=ref, pad_output=pad_output)


def gen_model_of(gen_model: Any, factory: Callable[[], Any] | None) -> Any:
    """Return the model or ``"from_collector"``, as the caller gave it; call the factory if there is one."""
    if factory is not None and gen_model == "from_collector":
        gen_model = None  # the default gives way to a factory
    return one_of("gen", gen_model, factory)


def ref_model_of(
    ref_model: Any,
    factory: Callable[[], Any] | None,
    use_ray_service: bool,
    device: torch.device | None,
    actor_name: str | None,
    **options: Any,
) -> Any:
    """Return the reference that the caller gave; call the factory, here or in a Ray actor, if there is one.

    Raises:
        OptionError: an option has no effect without a Ray actor.
    """
    if use_ray_service:
        return remote_reference(ref_model, factory, device=device, actor_name=actor_name, **options)
    if given := [*(["actor_name"] if actor_name is not None else []), *options]:
        raise OptionError(
            f"unknown argument, or one without effect unless use_ray_service=True: {', '.join(given)}"
        )
    return one_of("ref", ref_model, factory)


def collector_side_of(
    gen_model: Any, gen_log_probs: GenLogProbs, log_probs_full_key: NestedKey, reuse: dict[str, Any]
) -> FromCollector | None:
    """Return the side that takes its log-probs from a collector; ``None``: ``gen_model`` is a model.

    Args:
        gen_model: a model, ``"from_collector"`` or a :class:`FromCollector`.
        gen_log_probs: see :class:`FromCollector`.
        log_probs_full_key: where recorded log-probs are if no policy tells.
        reuse: options of :class:`FromCollector`; an option that is ``None`` was not given.

    Raises:
        OptionError: an option has no effect with this ``gen_model``.
    """
    reuse = {name: value for name, value in reuse.items() if value is not None}
    if isinstance(gen_model, (str, FromCollector)):
        side = FromCollector.of(gen_model, gen_log_probs, **reuse)
        return side.expecting(log_probs_full_key=log_probs_full_key)
    if gen_log_probs == "reuse":
        raise OptionError(
            "gen_log_probs='reuse' has no effect with a gen_model; pass gen_model='from_collector'"
        )
    if reuse:
        raise OptionError(
            f"{next(iter(reuse))} has no effect with a gen_model, whose log-probs are never reused; "
            "pass gen_model='from_collector'"
        )
    return None


def _shared_pad_output(models: dict[str, Any]) -> bool:
    pads = {name: model.pad_output for name, model in models.items()}
    if len(set(pads.values())) > 1:
        found = ", ".join(f"{name}.pad_output={pad}" for name, pad in pads.items())
        raise InputError(f"pad_output mismatch: {found}. Both sides of a KL share one value.")
    return pads["ref_model"]


def _gen_model_side(gen_model: Any, ref_model: Any, temperature: float) -> ModelSide:
    warn_of_two_lengths(gen_model, ref_model, stacklevel=5)  # the caller of RetrieveKL
    side = ModelSide(gen_model)
    side.check_temperature(temperature)
    return side
