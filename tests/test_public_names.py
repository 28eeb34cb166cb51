"""The public names: type checkers and Python find the same ones, and each is where the package says."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import vllm_kl
from vllm_kl import errors


def test_type_checkers_see_the_names_that_python_finds():
    tree = ast.parse(Path(vllm_kl.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "without 'as', type checkers take an import for a private one"
            seen[alias.name] = node.module.removeprefix("vllm_kl.")
    assert seen == vllm_kl._MODULE_OF


def test_every_error_is_public():
    assert set(errors.__all__) <= set(vllm_kl.__all__)
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert classes == set(errors.__all__)


def test_what_docstrings_of_public_names_raise_or_return_is_public():
    """Every error of a ``Raises:`` section, and every class of this package that a docstring links."""
    docs = []
    for name in vllm_kl.__all__:
        value = getattr(vllm_kl, name)
        members = [value, *vars(value).values()] if inspect.isclass(value) else [value]
        docs += [text for member in members if isinstance(text := getattr(member, "__doc__", None), str)]
    text = "\n".join(docs)
    named = re.findall(r"^ +(\w+Error):", text, re.MULTILINE)
    named += re.findall(r":class:`~?vllm_kl\.(?:\w+\.)*(\w+)`", text)
    assert set(named) - {"OSError", "ValueError"} <= set(vllm_kl.__all__)
