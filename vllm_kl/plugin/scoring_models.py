"""Makes scoring classes: subclasses of vLLM's decoder-only models with a pooler that returns log-probs.

``LogProb<Arch>`` is a subclass of vLLM's ``<Arch>``. It has its own name, so vLLM still loads a policy of the
same architecture in the same process as ``<Arch>``. The class is made when vLLM asks this module for it.

Source: out-of-tree models, ``model_executor/models/registry.py``; pooling models, ``interfaces_base.py``;
vLLM 0.32.
"""

from __future__ import annotations

import functools
from typing import Any

PREFIX = "LogProb"
# The config's key for the model's own architectures. Its ``architectures`` names the scoring class instead.
BASE_ARCHITECTURES = "base_architectures"


def register_scoring_class(base_architecture: str) -> str:
    """Register ``LogProb<base>`` with vLLM in this process; return the name. Idempotent; imports no model."""
    import vllm
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    name = PREFIX + base_architecture
    if name not in ModelRegistry.get_supported_archs():
        # vLLM caches a class's properties on disk, by this file's hash and this name. Another vLLM must not
        # read them.
        ModelRegistry.register_model(name, f"{__name__}:{name}@{vllm.__version__}")
        if base_architecture in MODELS_CONFIG_MAP:  # vLLM's adjustments of the config, by architecture
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
            # Models read their architecture's name: vLLM's transformers backend renames weights by it.
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
