"""Tells whether two references are the same: their settings, and the proof of their weights.

A service is shared by name. The settings of what it serves are compared with those that a caller asks for.
The proof of its weights is compared after the service was restarted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from vllm_kl.scorer import VLLMScorer
from vllm_kl.transforms.choose_scorer import scorer_for
from vllm_kl.transforms.transformers_scorer import TransformersScorer
from vllm_kl.types import Scorer


class Proof(NamedTuple):
    """What two loads of the same weights have in common."""

    version: int | None  # of the weights; None: not known
    of_weights: (
        tuple[float, ...] | str | None
    )  # log-probs of the canary, or a digest; None: nothing proves it


class Served(NamedTuple):
    """A reference that a service serves."""

    scorer: Scorer
    attributes: dict[str, Any]  # of the wrapper, for the copies of it that its users make
    settings: dict[str, Any] | None  # None: they cannot be told apart from those of another
    proof: Proof


def served(model: Any, names: Iterable[str]) -> Served:
    """Return what a service needs of a wrapper: its scorer, and its attributes of these names."""
    scorer = scorer_for(model)
    attributes = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return Served(scorer, attributes, _settings(model, scorer, attributes), _proof(scorer))


def differences(is_served: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each setting that differs.

    >>> differences({"temperature": 1.0, "dtype": "float32"}, {"temperature": 0.7, "dtype": "float32"})
    ['temperature is 1.0, not 0.7']
    """
    return [
        "{} is {}, not {}".format(name, *_told(is_served.get(name), asked.get(name)))
        for name in dict.fromkeys([*is_served, *asked])
        if is_served.get(name) != asked.get(name)
    ]


def _told(*values: Any) -> list[str]:
    """Return short texts of two values that differ, with the place where long texts differ."""
    if all(isinstance(value, str) for value in values):
        pairs = zip(*values, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, values)))
        if same > 20:
            values = tuple("..." + value[same - 10 :] for value in values)
    return [text if len(text) <= 80 else f"{text[:77]}..." for text in map(repr, values)]


def _settings(model: Any, scorer: Scorer, attributes: Mapping[str, Any]) -> dict[str, Any] | None:
    weights = _weights(scorer)
    if weights is None:
        return None
    of_wrapper = {name: value for name, value in attributes.items() if name != "tokenizer"}
    return {"class": type(model).__name__, **weights, **of_wrapper, **_tokenizer(attributes.get("tokenizer"))}


def _weights(scorer: Scorer) -> dict[str, Any] | None:
    if isinstance(scorer, TransformersScorer):
        config: Any = scorer.model.config
        return {f"config.{name}": value for name, value in config.to_dict().items()} | {
            "weights": _digest(scorer.model)
        }
    if not isinstance(scorer, VLLMScorer) or not hasattr(scorer._engine, "settings"):
        return None  # a vllm.LLM, or another's wrapper
    return {
        **scorer._engine.settings,
        "temperature": scorer.temperature,
        "placeholders": scorer._placeholders,
    }


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    if not hasattr(tokenizer, "get_vocab"):
        return {"tokenizer": None if tokenizer is None else type(tokenizer).__name__}
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:12]
    return {
        "tokenizer": f"a {type(tokenizer).__name__} of {len(vocabulary)} tokens, {digest}",
        "tokenizer.special_tokens_map": {
            name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()
        },
        "tokenizer.chat_template": getattr(tokenizer, "chat_template", None),
    }


def _proof(scorer: Scorer) -> Proof:
    if isinstance(scorer, TransformersScorer):
        return Proof(None, _digest(scorer.model))
    if not isinstance(scorer, VLLMScorer):
        return Proof(None, None)
    version = scorer.weight_version
    canary = scorer._canary.remembered(version)
    return Proof(version, None if canary is None else tuple(canary.tolist()))


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
