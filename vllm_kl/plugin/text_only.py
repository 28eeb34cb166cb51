"""Lets vLLM load the language model of a vision-language checkpoint without torchvision.

vLLM's module of such a model imports the model's image processor, which imports torchvision. An engine with
``language_model_only=True`` uses neither (vLLM 0.32, transformers 5). So this module lets the import of
torchvision find an empty stand-in. transformers still reports that torchvision is missing when somebody makes
an image processor.

The engine's processes need the stand-in, and so does the process in which vLLM inspects a class. An
environment variable tells them.
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
from vllm_kl.plugin.allowed import add_to_vllm_plugins

TEXT_ONLY = "VLLMKL_TEXT_ONLY"
_PACKAGE = "torchvision"


def text_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the engine options that make a vision-language model serve text only.

    They change nothing in a text model.

    Args:
        given: the caller's options. ``language_model_only=False`` asks for the images, too.
    """
    if given.get("language_model_only") is False:
        return {"skip_tokenizer_init": False}  # vLLM's image processor needs the tokenizer
    enable_text_only()
    return {"language_model_only": True, "skip_tokenizer_init": True}


@contextlib.contextmanager
def naming_missing_package(given: dict[str, Any]) -> Iterator[None]:
    """Turn vLLM's error about a model into one that names the missing package: vLLM names it in its log only.

    Raises:
        OptionError: vLLM could not import the model's module, because a package is not installed.
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
                    f"vLLM's {architecture} needs {missing.name or missing}, which is not installed. "
                    "Install it"
                    + (", or pass language_model_only=True to serve its text" if serves_images else "")
                ) from error
        raise


def enable_text_only() -> None:
    """Let this process and its children import vision models without torchvision. Idempotent."""
    os.environ[TEXT_ONLY] = "1"
    add_to_vllm_plugins()
    install()


def install() -> None:
    """Install the stand-in, if :func:`enable_text_only` was called and torchvision is missing. Idempotent."""
    is_installed = any(isinstance(finder, _Finder) for finder in sys.meta_path)
    if os.environ.get(TEXT_ONLY) != "1" or is_installed:
        return
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():  # asked first: transformers keeps the answer
        sys.meta_path.append(_Finder())


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for torchvision and its modules, after all other finders."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname.partition(".")[0] == _PACKAGE:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module has no code."""


class _Name(type):
    """A class whose attributes are such classes again. Annotations and default arguments need no more."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(
            f"{cls.__name__} is a part of torchvision, which is not installed: this engine serves text only"
        )


class _Names(ModuleType):
    __getattr__ = _Name.__getattr__
