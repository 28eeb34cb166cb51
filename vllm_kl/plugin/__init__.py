"""What runs inside vLLM. Loaded by the entry point ``vllm.general_plugins`` in every process of an engine.

    register  the entry point: scoring architectures, the cache cap (this module)
    allowed   which versions of vLLM it knows, and what turns it on and off
    request   what a request asks for, as it travels in vLLM's parameters
    models    a pooling subclass of any architecture, built when it is asked for
    pooler    finds the rows to score in a step's hidden states, and returns one tensor per request
    head      rows -> log-probs, through the head's matrix or through the model's own ``compute_logits``
    kernel    the fused sum over the vocabulary
    native    its inner loop on a CPU, compiled where there is a compiler
    cap       prefix-cache hits end before the first scored row
    weights   new weights for a live model, in every worker: a second_model is loaded, and by adoption the first takes it over
    whole     a checkpoint that lacks weights is refused
    taken     what is done in engines that are ours, or were given to us, and in no others
    cpu       what the CPU backend computes wrong, mended
    text_only vision-language models without torchvision
    adapters  which modules a worker wrapped for LoRA

Nothing here changes an engine, or a request, that does not come from this package or was given to it.
"""

from __future__ import annotations

import logging
import os

from vllm_kl.errors import OptionError
from vllm_kl.plugin import allowed

# Base architectures that this process and its children can load for scoring, separated by commas. An environment
# variable, because an engine's workers are processes of their own, which load plugins before they know their model.
ARCHITECTURES = (
    "VLLMKL_ARCHITECTURES"  # not VLLM_: vLLM warns of variables of its own prefix that it does not know
)


def register() -> None:
    """The entry point, in every process of every vLLM engine. Idempotent; cheap: no model class is imported."""
    if not allowed.is_on():
        return
    import vllm

    from vllm_kl.plugin import adapters, cap, cpu, models, taken, text_only, weights, whole

    # Whoever asks for scoring is told of a version that is not known (enable, below). All others are left alone.
    if allowed.KNOWN_VLLM.contains(vllm.__version__, prereleases=True):
        cap.install()
        weights.install()
        adapters.install()
        taken.install()
    text_only.install()
    for base in filter(None, os.environ.get(ARCHITECTURES, "").split(",")):
        models.register(base)
        cpu.install()
        whole.install()


def enable(base_architecture: str) -> str:
    """Make an architecture loadable for scoring, here and in processes started from here; return its name.

    Engines that generate need it too, for what it mends.

    Raises:
        OptionError: the plugin is turned off.
    """
    if not allowed.is_on():
        raise OptionError(
            f"{allowed.SWITCH}=0 turns off what an engine of this package needs in its process: unset it"
        )
    import vllm

    from vllm_kl.plugin import adapters, cap, cpu, models, taken, weights, whole

    if not allowed.KNOWN_VLLM.contains(vllm.__version__, prereleases=True):
        logging.getLogger("vllm.vllm_kl").warning(
            "vllm_kl: the read-out was made for vLLM%s, this is %s. Scores are checked, but it may not work: vllm-kl doctor",
            allowed.KNOWN_VLLM,
            vllm.__version__,
        )
    known = [name for name in os.environ.get(ARCHITECTURES, "").split(",") if name]
    os.environ[ARCHITECTURES] = ",".join(dict.fromkeys([*known, base_architecture]))
    allowed.be_named()
    cap.install()
    weights.install()
    adapters.install()
    taken.install()
    cpu.install()
    whole.install()
    return models.register(base_architecture)
