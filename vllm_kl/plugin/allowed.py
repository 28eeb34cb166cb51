"""Whether an engine's processes may use the plugin: known versions of vLLM, and the variables that decide."""

from __future__ import annotations

import os

from packaging.specifiers import SpecifierSet

# The versions whose sources were read and whose engines were run.
KNOWN_VLLM = SpecifierSet(">=0.32,<0.34")
# "0" turns all of it off.
SWITCH = "VLLMKL_PLUGIN"


def is_on() -> bool:
    """Whether this process and its children may use the plugin."""
    return os.environ.get(SWITCH) != "0"


def be_named() -> None:
    """Let vLLM load this plugin in processes that are started from here, also where its list of plugins names only others."""
    if "VLLM_PLUGINS" in os.environ:
        names = os.environ["VLLM_PLUGINS"].split(",")
        os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, "vllm_kl"]))
