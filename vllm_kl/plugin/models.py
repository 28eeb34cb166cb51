"""Scoring classes: any decoder-only architecture that vLLM can load, with a pooler that returns log-probs.

``LogProb<Arch>`` is a subclass of vLLM's ``<Arch>`` under a name of its own, so a policy of the same architecture in the
same process is loaded as ever. It is built when vLLM asks this module for it.

Source: out-of-tree models, ``model_executor/models/registry.py``; pooling models, ``interfaces_base.py``; vLLM 0.32.
"""

from __future__ import annotations

import functools
from typing import Any

PREFIX = "LogProb"
# Key of the model's config that holds its own architectures, while ``architectures`` names the scoring class.
BASE_ARCHITECTURES = "base_architectures"


def register(base_architecture: str) -> str:
    """Make ``LogProb<base>`` known to vLLM in this process; return the name. Idempotent; imports no model."""
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    name = PREFIX + base_architecture
    if name not in ModelRegistry.get_supported_archs():
        # vLLM keeps a class's properties on disk, by this file's hash and the name: another vLLM must not find them.
        ModelRegistry.register_model(name, f"{__name__}:{name}@{vllm.__version__}")
        if (
            base_architecture in MODELS_CONFIG_MAP
        ):  # adjustments that vLLM makes to an architecture, by its name
            MODELS_CONFIG_MAP[name] = MODELS_CONFIG_MAP[base_architecture]
    return name


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    return _scoring_class(name.removeprefix(PREFIX).partition("@")[0])


@functools.cache
def _scoring_class(base_architecture: str) -> type:
    from vllm import ModelRegistry

    from vllm_kl.plugin.pooler import LogProbPooler

    base = ModelRegistry.models[base_architecture].load_model_cls()

    class Scoring(base):
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:  # vLLM looks for these two names
            # Models look at their architecture's name: the transformers backend renames weights by it.
            config = vllm_config.model_config.hf_config
            ours, config.architectures = (
                config.architectures,
                getattr(config, BASE_ARCHITECTURES, [base_architecture]),
            )
            try:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            finally:
                config.architectures = ours
            self.pooler = LogProbPooler(self)

    Scoring.__name__ = Scoring.__qualname__ = PREFIX + base_architecture
    Scoring.__module__ = __name__
    return Scoring
