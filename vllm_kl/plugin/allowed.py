"""Decides whether a process may use the plugin, by vLLM's version and by environment variables."""

from __future__ import annotations

import os

from packaging.specifiers import SpecifierSet

# The versions of vLLM that the plugin changes.
KNOWN_VLLM = SpecifierSet(">=0.26,<0.34")
# The versions of vLLM that all tests ran with.
RUN_VLLM = SpecifierSet("==0.32.*")
# The versions that a part of the tests ran with, and how.
PARTLY_RUN_VLLM = {
    "0.26.0": "on one H100 and one H200",
    "0.27.1": "make compat",
    "0.30.0": "make compat",
    "0.33.0": "its Python code on the CPU kernels of 0.32.0",
}
# What depends on the version of vLLM, and the first version that can do it.
SINCE = {
    "the read-outs pooling and flat, LoRA, collectors": "0.26",
    "pushes into a vllm.LLM and a vLLM AsyncLLM": "0.26",
    "pushes into TorchRL's AsyncVLLM": "0.26",
    "pushes with transport='nccl', into AsyncVLLM": "0.28",
    "the read-out token_ids, on a GPU": "0.31",
    "models of the architecture phi": "0.32",
    "the version of each generated row told by vLLM, also where a push came in between": "0.32",
}
# The value "0" turns the plugin off.
SWITCH = "VLLMKL_PLUGIN"


def is_on() -> bool:
    """Whether this process and its children may use the plugin."""
    return os.environ.get(SWITCH) != "0"


def is_known(vllm_version: str) -> bool:
    """Whether every process with this version of vLLM has the plugin, not only one that asks for scoring."""
    return KNOWN_VLLM.contains(vllm_version, prereleases=True)


def add_to_vllm_plugins() -> None:
    """Add the plugin to ``VLLM_PLUGINS``, if this is set: vLLM loads only plugins that it names."""
    if "VLLM_PLUGINS" in os.environ:
        names = os.environ["VLLM_PLUGINS"].split(",")
        os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "vllm_kl"]))
