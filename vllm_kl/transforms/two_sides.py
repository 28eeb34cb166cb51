"""Makes the two sides of ``RetrieveKL`` from its arguments, and checks that they fit each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tensordict.utils import NestedKey
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper

from vllm_kl.batch.read_tokens import keys_of
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.engines.length_dependence import Lengths, LengthSide, side_in, why_two_lengths
from vllm_kl.errors import InputError, OptionError
from vllm_kl.scorer import VLLMScorer
from vllm_kl.transforms.audit import OnDrift
from vllm_kl.transforms.from_collector import FromCollector, GenLogProbs
from vllm_kl.transforms.model_side import ModelSide, Side, check_side
from vllm_kl.transforms.recorded_zeros import OnZero
from vllm_kl.transforms.remote_reference import remote_reference
from vllm_kl.transforms.service_options import ServiceOptions
from vllm_kl.transforms.watched_policy import adapter_id


class GenModel(NamedTuple):
    """The model that generated, as the caller gave it."""

    given: Any  # a model, "from_collector", or a FromCollector
    collector_side: FromCollector | None  # takes the log-probs from a collector; None: the model scores


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
    gen_model: GenModel,
    ref_model: Any,
    assistant_only: bool,
    device: torch.device | None,
    log_probs_full_key: NestedKey,
    ref_entropy: bool,
) -> TwoSides:
    """Return the two sides of a KL, after checking each of them and both together.

    Args:
        gen_model: the model that generated.
        ref_model: the reference.
        assistant_only: both models must be able to tell the assistant's tokens.
        device: where to move the models; ``None``: leave them.
        log_probs_full_key: where recorded log-probs are if no policy tells.
        ref_entropy: the reference's scores have entropies, too.

    Raises:
        InputError: a model cannot be a side, or the models have different ``pad_output``.
        OptionError: the models have different temperatures, or the reference cannot return entropies.
    """
    given, collector_side = gen_model
    models = {"ref_model": ref_model, **({"gen_model": given} if collector_side is None else {})}
    for name, model in models.items():
        check_side(model, assistant_only, name)
    pad_output = _shared_pad_output(models)
    if device is not None:
        models = {name: model.to(device) for name, model in models.items()}
    ref_model, given = models["ref_model"], models.get("gen_model", given)
    ref = ModelSide(ref_model, entropy=ref_entropy)
    gen: Side
    if collector_side is None:
        gen = _gen_model_side(given, ref_model, ref.temperature)
    else:
        gen = collector_side.expecting(log_probs_full_key=log_probs_full_key, pad_output=pad_output)
    return TwoSides(gen_model=given, gen=gen, ref_model=ref_model, ref=ref, pad_output=pad_output)


def gen_model_of(
    gen_model: Any,
    factory: Callable[[], Any] | None,
    gen_log_probs: GenLogProbs,
    audit: float | None,
    audit_tolerance: float | None,
    on_drift: OnDrift | None,
    on_zero: OnZero | None,
) -> GenModel:
    """Return the model that generated; call the factory if there is one.

    Args:
        gen_model: a model, ``"from_collector"`` or a :class:`FromCollector`.
        factory: makes the model.
        gen_log_probs: see :class:`FromCollector`.
        audit, audit_tolerance, on_drift, on_zero: see :class:`FromCollector`; ``None``: not given.

    Raises:
        OptionError: an option has no effect with this ``gen_model``.
    """
    if factory is not None and gen_model == "from_collector":
        gen_model = None  # the default gives way to a factory
    gen_model = one_of("gen", gen_model, factory)
    reuse = {"audit": audit, "audit_tolerance": audit_tolerance, "on_drift": on_drift, "on_zero": on_zero}
    reuse = {name: value for name, value in reuse.items() if value is not None}
    if isinstance(gen_model, (str, FromCollector)):
        return GenModel(gen_model, FromCollector.of(gen_model, gen_log_probs, **reuse))
    if gen_log_probs == "reuse":
        raise OptionError(
            "gen_log_probs='reuse' has no effect with a gen_model; pass gen_model='from_collector'"
        )
    if reuse:
        raise OptionError(
            f"{next(iter(reuse))} has no effect with a gen_model, whose log-probs are never reused; "
            "pass gen_model='from_collector'"
        )
    return GenModel(gen_model, None)


def ref_model_of(
    ref_model: Any,
    factory: Callable[[], Any] | None,
    service: ServiceOptions | None,
    device: torch.device | None,
) -> Any:
    """Return the reference that the caller gave, or that the factory makes, here or in a Ray actor."""
    if service is not None:
        return remote_reference(ref_model, factory, service, device=device)
    return one_of("ref", ref_model, factory)


def one_of(side: str, model: Any, factory: Callable[[], Any] | None) -> Any:
    """Return the model of a side, or the model that its factory makes."""
    if (model is None) == (factory is None):
        raise InputError(
            f"Cannot build the {side} side: pass exactly one of '{side}_model' and '{side}_model_factory'."
        )
    return model if factory is None else factory()


def check_two_models(gen_model: Any, ref_model: Any) -> None:
    """Refuse a reference that is the policy itself: their KL would stay 0 whatever the policy learns.

    Raises:
        OptionError: both sides use one engine or one model, with the same adapter or with none.
    """
    one, other = _weights_behind(gen_model), _weights_behind(ref_model)
    if one is not None and other is not None and one[0] is other[0] and one[1] == other[1]:
        engine, adapter = one
        what = f"adapter {adapter} on one engine" if adapter else f"one {type(engine).__name__}"
        raise OptionError(
            f"both sides are {what}: the KL would be 0 at every update. Give the reference an engine of its "
            "own (VLLMReference(path)). If the policy is an adapter, give lora_request to the policy only"
        )


def warn_of_two_lengths(gen_model: Any, ref_model: Any, stacklevel: int = 3) -> None:
    """Warn if the sides compute differently because of their lengths (``length_dependence``)."""
    if why := why_two_lengths(_length_side(gen_model), _length_side(ref_model)):
        warnings.warn(why, stacklevel=stacklevel)


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


def _length_side(model: Any) -> LengthSide | None:
    if isinstance(scorer := getattr(model, "scorer", None), VLLMScorer):
        return scorer._engine.info.length_side
    if isinstance(model, vLLMWrapper):
        engine = getattr(model.model, "llm_engine", None)  # TorchRL's AsyncVLLM does not tell
        return None if engine is None else side_in(engine)
    return Lengths(getattr(model, "model", None)).side


def _weights_behind(model: Any) -> tuple[Any, int] | None:
    """Return the engine or model that holds a wrapper's weights, and its adapter's id.

    ``None``: not known, because an adapter may be loaded in another way, or later.
    """
    engine: Any = getattr(model, "model", None)
    adapter = adapter_id(getattr(model, "lora_request", None))
    if isinstance(scorer := getattr(model, "scorer", None), VLLMScorer):
        if not isinstance(scorer._engine, GenerateEngine):
            return scorer._engine, 0
        return scorer._engine.shared, adapter_id(scorer._engine._lora_request)
    if isinstance(model, TransformersWrapper):
        return (engine, 0) if type(model) is TransformersWrapper else None
    if not isinstance(model, vLLMWrapper):
        return None
    if hasattr(engine, "llm_engine"):
        takes_adapters = engine.llm_engine.vllm_config.lora_config is not None
        engine = engine.llm_engine
    elif hasattr(engine, "engine_args"):  # TorchRL's AsyncVLLM
        takes_adapters = bool(engine.engine_args.enable_lora)
    else:
        return None
    return (engine, adapter) if adapter or not takes_adapters else None
