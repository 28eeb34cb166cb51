"""Lets vLLM load the language model of a vision-language checkpoint where torchvision is not installed.

vLLM's module of such a model imports the model's image processor, and that imports torchvision, although an engine with
``language_model_only=True`` makes neither (vLLM 0.32, transformers 5). Here the import finds names and nothing behind them.
transformers goes on saying that torchvision is missing to whoever makes an image processor.

An engine's processes and the process in which vLLM inspects a class each need it, so they are told by an environment variable.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from vllm_kl.errors import OptionError
from vllm_kl.plugin.allowed import be_named

TEXT_ONLY = "VLLMKL_TEXT_ONLY"
_PACKAGE = "torchvision"


def text_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the engine options that make a vision-language model serve its text; a model of text does not look at them.

    Args:
        given: the caller's own options, which say whether it is to.
    """
    if given.get("language_model_only") is False:
        return {"skip_tokenizer_init": False}  # vLLM makes the processor of images, which wants a tokenizer
    enable()
    return {"language_model_only": True, "skip_tokenizer_init": True}


@contextlib.contextmanager
def naming_what_is_missing(given: dict[str, Any]) -> Iterator[None]:
    """Name the package that a model's module wants and that is not installed: vLLM writes it to its log alone.

    Raises:
        OptionError: vLLM could not import the model's module.
    """
    try:
        yield
    except ValueError as error:
        from vllm import ModelRegistry

        serves_images = given.get("language_model_only") is False
        found = re.search(r"Model architectures \[(.*?)\] failed to be inspected", str(error))
        for architecture in re.findall(r"'(\w+)'", found[1]) if found else ():
            try:
                ModelRegistry.models[architecture].load_model_cls()
            except ImportError as missing:
                raise OptionError(
                    f"vLLM's {architecture} needs {missing.name or missing}, which is not installed. Install it"
                    + (", or pass language_model_only=True to serve its text" if serves_images else "")
                ) from error
        raise


def enable() -> None:
    """Let this process, and those that it starts, import vision models without torchvision. Idempotent."""
    os.environ[TEXT_ONLY] = "1"
    be_named()
    install()


def install() -> None:
    """Do so in this process, if an owner of an engine asked for it and torchvision is missing. Idempotent."""
    is_installed = any(isinstance(finder, _Finder) for finder in sys.meta_path)
    if os.environ.get(TEXT_ONLY) != "1" or is_installed:
        return
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():  # transformers remembers the answer
        sys.meta_path.append(_Finder())


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and its modules when nobody else does."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname.partition(".")[0] == _PACKAGE:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class _Name(type):
    """A class of which every attribute is such a class again: what annotations and defaults of functions need."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(
            f"{cls.__name__} is torchvision's, which is not installed: this engine serves text only"
        )


class _Names(ModuleType):
    __getattr__ = _Name.__getattr__
