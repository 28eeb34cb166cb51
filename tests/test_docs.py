"""Every example in the docstrings and in the README runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from tensordict import TensorDict

import vllm_kl

README = Path(__file__).parents[1] / "README.md"
MODULES = [
    m.name for m in pkgutil.walk_packages(vllm_kl.__path__, "vllm_kl.") if m.name != "vllm_kl.engines._child"
]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        module = importlib.import_module(name)
        yield from (t for t in finder.find(module, name, module=module) if t.examples)


@pytest.mark.parametrize("test", list(examples()), ids=lambda test: test.name)
def test_docstring_examples_run(test, ref_scorer, ref_model, make_reference):
    test.globs.update(torch=torch, TensorDict=TensorDict, scorer=ref_scorer, reference=make_reference())
    test.globs["weights"] = ref_model.state_dict()
    version = ref_scorer.weight_version
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    output = []
    runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)
    if ref_scorer.weight_version != version:  # the example pushed
        ref_scorer.refresh(ref_model.state_dict())


def test_public_names_are_sorted_and_documented():
    assert vllm_kl.__all__ == sorted(vllm_kl.__all__)
    for name in vllm_kl.__all__:
        assert getattr(vllm_kl, name).__doc__
    assert set(vllm_kl.__all__) <= set(dir(vllm_kl))
    with pytest.raises(AttributeError, match="no attribute 'VLLMscorer'"):
        _ = vllm_kl.VLLMscorer


def test_readme_examples_run(policy_path, ref_path, policy_llm, lora_llm, lora_paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my-policy").symlink_to(policy_path)
    Path("my-reference").symlink_to(ref_path)
    Path("my-adapter").symlink_to(lora_paths[0])
    # The README makes its own policy engines; here those of this run stand in for them.
    monkeypatch.setattr(
        "vllm.LLM", lambda *_, **options: lora_llm if options.get("enable_lora") else policy_llm
    )
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.S | re.M)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    for name in ("scorer", "reference"):
        namespace[name].close()


def test_the_lock_holds_everything_that_the_project_asks_for():
    """Installed without resolving, so what it leaves out is missing, or there by accident."""
    extras = ("", "cpu", "ray", "plot", "test")
    asked = [Requirement(line) for line in requires("vllm-kl")]
    asked = [
        r for r in asked if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)
    ]
    locked = dict(
        re.findall(r"^([\w.-]+)==(\S+)", README.with_name("requirements.lock").read_text(), flags=re.M)
    )
    missing = [str(r) for r in asked if r.name != "torch" and locked.get(r.name, "0") not in r.specifier]
    assert not missing


def test_functions_stay_small():
    """A function is a screen: sixty lines below its signature and its docstring."""
    long = []
    for path in README.parent.joinpath("vllm_kl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
                if node.end_lineno - first.lineno > 60:
                    long.append(f"{path.name}: {node.name}")
    assert not long
