"""Lets vLLM load the language model of a vision-language checkpoint where torchvision is not installed.

vLLM's module of such a model imports the model's image processor, and that imports torchvision, although an engine with
``language_model_only=True`` makes neither (vLLM 0.32, transformers 5). Here the import finds names and nothing behind them.
transformers goes on saying that torchvision is missing to whoever makes an image processor.

An engine's processes and the process in which vLLM inspects a class each need it, so they are told by an environment variable.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

TEXT_ONLY = "VLLMKL_TEXT_ONLY"
_PACKAGE = "torchvision"


def enable() -> None:
    """Let this process, and those that it starts, import vision models without torchvision. Idempotent."""
    os.environ[TEXT_ONLY] = "1"
    install()


def install() -> None:
    """Do so in this process, if an owner of an engine asked for it and torchvision is missing. Idempotent."""
    if os.environ.get(TEXT_ONLY) != "1" or _PACKAGE in sys.modules:
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
        raise ImportError(f"{cls.__name__} is torchvision's, which is not installed: this engine serves text only")


class _Names(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})
