"""Holds the vLLM plugin, which every process of a vLLM engine loads through ``vllm.general_plugins``.

    register          the entry point: installs the hooks below (this module)
    allowed           the known versions of vLLM, and the variable that turns the plugin off
    readout_request   packs what a request asks for into vLLM's parameters
    scoring_models    makes a pooling subclass of any architecture
    pooler            finds the rows to score in a step's hidden states, and returns one tensor per request
    head_files        writes the LM head to files, for who computes with hidden states
    lm_head           computes log-probs, by the LM head's matrix or by the model's own ``compute_logits``
    kernel            sums over the vocabulary without ever making all logits
    cpu_products      the kernel's products on a CPU, and the sums over each slice of the vocabulary
    cpu_loops         their inner loops, compiled if there is a compiler
    triton_kernel     the kernel on a GPU
    best_tokens       keeps the best tokens of each row
    cache_cap         limits prefix-cache hits of scoring requests
    load_weights      loads new weights into a live model, in every worker
    second_model      loads a second model beside the one that serves
    receive_weights   receives a trainer's weights by NCCL instead of from files
    adopt_weights     copies the second model's tensors into the one that serves
    missing_weights   refuses a checkpoint that lacks weights
    taken_engines     what the plugin does only in engines that this package made or was given
    cpu_corrections   corrects what vLLM's CPU backend computes wrong
    cpu_norms         offers vLLM's C++ kernels for RMS norms to engines on a CPU
    older_vllm        gives vLLM 0.26 what the package needs of later versions
    text_only         loads vision-language models without torchvision
    lora_modules      tells which modules a worker wrapped for LoRA

The plugin changes no engine that this package neither made nor was given, and no request of others. There is
one exception, :func:`.taken_engines.is_taken`: it corrects ``reload_weights`` on a CPU in every engine that
runs in a process which imported ``vllm_kl.scorer`` or ``vllm_kl.weights.push``.
"""

from __future__ import annotations

import logging
import os

from vllm_kl.errors import OptionError
from vllm_kl.plugin import allowed

# The base architectures that this process and its children can load for scoring, separated by commas. This is
# an environment variable because an engine's workers are other processes, which load plugins before they know
# their model. Its prefix is not VLLM_: vLLM warns of unknown variables with this prefix.
ARCHITECTURES = "VLLMKL_ARCHITECTURES"


def register() -> None:
    """Install the hooks in a process of a vLLM engine. Idempotent, and cheap: it imports no model class."""
    if not allowed.is_on():
        return
    import vllm

    from vllm_kl.plugin import text_only

    # An unknown vLLM gets no hook, unless somebody asks for scoring: then enable(), below, warns of its
    # version.
    if allowed.is_known(vllm.__version__):
        _install_hooks()
    text_only.install()
    for base in filter(None, os.environ.get(ARCHITECTURES, "").split(",")):
        _enable_scoring(base)


def enable(base_architecture: str) -> str:
    """Make an architecture loadable for scoring, here and in child processes; return the new name.

    Engines that generate need the hooks, too.

    Raises:
        OptionError: the plugin is turned off.
    """
    if not allowed.is_on():
        raise OptionError(
            f"{allowed.SWITCH}=0 turns off the plugin, which an engine of this package needs: unset it"
        )
    import vllm

    if not allowed.is_known(vllm.__version__):
        logging.getLogger("vllm.vllm_kl").warning(
            "vllm_kl: the read-out was made for vLLM%s, this is vLLM %s. It may not work: run vllm-kl doctor",
            allowed.KNOWN_VLLM,
            vllm.__version__,
        )
    known = [name for name in os.environ.get(ARCHITECTURES, "").split(",") if name]
    os.environ[ARCHITECTURES] = ",".join(dict.fromkeys([*known, base_architecture]))
    allowed.add_to_vllm_plugins()
    _install_hooks()
    return _enable_scoring(base_architecture)


def _install_hooks() -> None:
    """Install what acts on requests and calls of this package only; keep MKL exact. Idempotent."""
    from vllm_kl import mkl
    from vllm_kl.plugin import (
        cache_cap,
        head_files,
        load_weights,
        lora_modules,
        older_vllm,
        receive_weights,
        taken_engines,
    )

    hooks = (older_vllm, cache_cap, load_weights, receive_weights, head_files, lora_modules, taken_engines)
    for hook in hooks:
        hook.install()
    mkl.choose_code()


def _enable_scoring(base_architecture: str) -> str:
    """Let this process load an architecture for scoring; return the new name. Idempotent."""
    import vllm

    from vllm_kl.plugin import cpu_corrections, cpu_norms, missing_weights, scoring_models

    cpu_corrections.install()
    if allowed.is_known(vllm.__version__):  # else engines are not told of these kernels either
        cpu_norms.install()
    missing_weights.install()
    return scoring_models.register_scoring_class(base_architecture)
