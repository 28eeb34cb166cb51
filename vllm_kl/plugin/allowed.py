"""Decides whether a process may use the plugin, by vLLM's version and by environment variables."""

from __future__ import annotations

import os

from packaging.specifiers import SpecifierSet

# The versions of vLLM that the plugin changes. Of 0.33 only the options and the prefix cache's lookup
# (cache_cap.py) were read.
KNOWN_VLLM = SpecifierSet(">=0.26,<0.34")
# The versions of vLLM that all tests ran with.
RUN_VLLM = SpecifierSet("==0.32.*")
# The versions that a part of the tests ran with (make compat).
PARTLY_RUN_VLLM = ("0.26.0", "0.27.1", "0.30.0")
# What an older vLLM cannot do, and the version that can.
SINCE = {
    "the read-out token_ids of a shared vllm.LLM on a GPU": "0.31",
    "each generated row tells the version of its weights, also in AsyncVLLM and during a push": "0.32",
}
# The value "0" turns the plugin off.
SWITCH = "VLLMKL_PLUGIN"


def is_on() -> bool:
    """Whether this process and its children may use the plugin."""
    return os.environ.get(SWITCH) != "0"


def add_to_vllm_plugins() -> None:
    """Add the plugin to ``VLLM_PLUGINS``, if this is set: vLLM loads only plugins that it names."""
    if "VLLM_PLUGINS" in os.environ:
        names = os.environ["VLLM_PLUGINS"].split(",")
        os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "vllm_kl"]))
