"""Registers this package's classes with Hydra, beside TorchRL's. The import alone does it.

    import vllm_kl.configs  # noqa: F401

Hydra's ``ConfigStore`` has ``transform/vllm_kl_retrieve_kl``, ``transform/vllm_kl_retrieve_log_prob`` and
``model/vllm_kl_reference`` then. It needs hydra-core: ``pip install 'vllm-kl[hydra]'``.
"""

from __future__ import annotations

try:
    import hydra  # noqa: F401
except ImportError as error:
    raise ImportError("vllm_kl.configs needs hydra-core: pip install 'vllm-kl[hydra]'") from error

from vllm_kl.transforms.configs import (
    CONFIGS,
    RetrieveKLConfig,
    RetrieveLogProbConfig,
    VLLMReferenceConfig,
    register,
)

__all__ = ["CONFIGS", "RetrieveKLConfig", "RetrieveLogProbConfig", "VLLMReferenceConfig"]

register()
