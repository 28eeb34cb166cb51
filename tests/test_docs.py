"""Examples in docstrings and pages run; links lead somewhere; the names and files that pages name exist."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from tensordict import TensorDict

import vllm_kl
from tests import local_ray
from vllm_kl import errors
from vllm_kl.engines.process import ProcessEngine
from vllm_kl.plugin.allowed import PARTLY_RUN_VLLM, SINCE

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.joinpath("docs").glob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
# A program, and a module that needs Triton, which a CPU has not.
NOT_IMPORTED = {"vllm_kl.engines._child", "vllm_kl.plugin.triton_kernel"}
if importlib.util.find_spec("hydra") is None:
    NOT_IMPORTED |= {"vllm_kl.configs", "vllm_kl.transforms.configs"}
MODULES = [m.name for m in pkgutil.walk_packages(vllm_kl.__path__, "vllm_kl.") if m.name not in NOT_IMPORTED]
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


BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.S | re.M)
# A block that begins so is compiled, and not run; the rest of the line says why.
NOT_RUN = "# Not run here: "
# A page with this comment goes on with the names that another page's blocks have made.
CONTINUES = re.compile(r"^<!-- continues (\S+) -->$", flags=re.M)
# Pages that push into the policy's engine: they get an engine whose weights tests replace.
PUSHING = {"weights.md"}
# Pages whose blocks use a Ray cluster that is there.
ON_RAY = {"datasets.md", "dpo.md"}


class Runner:
    """Runs the blocks of pages, each page once. Pages share engines, also those that they start."""

    def __init__(self, home, models, llm_of):
        self.home, self._models, self._llm_of = home, models, llm_of
        self._names = {}
        self._started = {}

    def run(self, page):
        """Return the names that the blocks of a page have made."""
        if page not in self._names:
            text = page.read_text()
            continued = CONTINUES.search(text)
            names = dict(self.run(ROOT / continued[1])) if continued else {}
            folder = self.home / page.stem
            folder.mkdir()
            for name, path in self._models(page.name).items():
                folder.joinpath(name).symlink_to(path)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                # Pages make their own engines: those of this run stand in for the policy's.
                patch.setattr("vllm.LLM", lambda *_, **options: self._llm_of(page.name, options))
                patch.setattr("vllm_kl.engines.make_engine.ProcessEngine", self._own_engine)
                for block in BLOCK.finditer(text):
                    num_before = text.count("\n", 0, block.start(1))  # so errors name the page's line
                    code = compile("\n" * num_before + block[1], str(page), "exec")
                    if not block[1].startswith(NOT_RUN):
                        exec(code, names)
            self._names[page] = names
        return self._names[page]

    def close(self):
        for _, close in self._started.values():
            close()

    def _own_engine(self, model, **asked):
        key = repr((Path(model).resolve(), sorted(asked.items())))
        if key not in self._started:
            engine = ProcessEngine(model, **asked)
            self._started[key] = engine, engine.close
            engine.close = lambda: None  # a page that closes it is not the last to use it
        return self._started[key][0]


@pytest.fixture(scope="module")
def runner(tmp_path_factory, policy_path, ref_path, tied_paths, policy_llm, tied_llm, lora_llm, lora_paths):
    def models(page):
        folders = {"my-policy": policy_path, "my-reference": ref_path, "my-adapter": lora_paths[0]}
        if page in PUSHING:
            folders |= {"my-policy": tied_paths[0], "step-7": tied_paths[1]}
        return folders

    def llm_of(page, options):
        if options.get("enable_lora"):
            return lora_llm
        return tied_llm if page in PUSHING else policy_llm

    runner = Runner(tmp_path_factory.mktemp("pages"), models, llm_of)
    yield runner
    runner.close()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=local_ray.MARKS if page.name in ON_RAY else (), id=page.name)
        for page in PAGES
        if BLOCK.search(page.read_text())
    ],
)
def test_the_examples_of_a_page_run(page, runner, request):
    if page.name in ON_RAY:
        request.getfixturevalue("cluster")
    runner.run(page)


def test_the_readme_is_short_and_says_first_what_ran_on_a_gpu():
    text = README.read_text()
    assert len(text.splitlines()) <= 160
    assert "On GPUs it was run" in "\n".join(text.splitlines()[:10])
    num_lines = re.search(r"^## An example of (\d+) lines$", text, flags=re.M)[1]
    assert len(BLOCK.search(text)[1].splitlines()) == int(num_lines)


def test_the_readme_names_everything_that_is_public():
    """Errors and warnings are on the page of troubleshooting, which has a test of its own."""
    named = re.findall(r"`(\w+)`", README.read_text())
    public = {name: getattr(vllm_kl, name) for name in vllm_kl.__all__}
    errors = {name for name, it in public.items() if isinstance(it, type) and issubclass(it, Exception)}
    assert public.keys() - errors <= set(named)


def anchors_of(page):
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    broken = []
    for link in (one or other for one, other in links):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_files_and_folders_that_a_page_names_exist(page):
    named = re.findall(r"`((?:vllm_kl|tests|benchmarks|docs|examples)/[\w/.-]*)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_page_of_the_architecture_has_every_room_and_that_of_troubles_every_error():
    rooms = {path.name for path in ROOT.joinpath("vllm_kl").iterdir() if not path.name.startswith("_")}
    rooms = {f"{name}/" if not Path(name).suffix else name for name in rooms} - {"py.typed"}
    text = ROOT.joinpath("docs/architecture.md").read_text()
    assert not {name for name in rooms if f"`{name}`" not in text}
    titles = anchors_of(ROOT / "docs/troubleshooting.md")
    assert not {name for name in errors.__all__ if name != "VLLMKLError" and name.lower() not in titles}


@pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="needs mkdocs-material, the extra docs"
)
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    assert tmp_path.joinpath("index.html").exists()


def test_the_lock_holds_everything_that_the_project_asks_for():
    """Installed without resolving, so what it leaves out is missing, or there by accident."""
    extras = ("", "torchrl", "cpu", "ray", "plot", "docs", "test")
    asked = [Requirement(line) for line in requires("vllm-kl")]
    asked = [
        r for r in asked if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)
    ]
    locked = dict(
        re.findall(r"^([\w.-]+)==(\S+)", README.with_name("requirements.lock").read_text(), flags=re.M)
    )
    known = {"torch", "vllm-kl"}  # its extras name each other
    missing = [str(r) for r in asked if r.name not in known and locked.get(r.name, "0") not in r.specifier]
    assert not missing


def test_the_page_of_engines_tells_the_versions_that_doctor_tells():
    text = ROOT.joinpath("docs/engines.md").read_text()
    section = text.partition("## Versions of vLLM\n")[2].partition("\n## ")[0].replace("`", "")
    rows = [tuple(row) for row in re.findall(r"^\| (.+) \| (.+) \|$", section, flags=re.M)]
    assert rows == [
        ("what", "needs vLLM"), *SINCE.items(), ("vLLM", "how"), *PARTLY_RUN_VLLM.items(),
    ]  # fmt: skip


def test_the_readme_names_the_versions_that_were_run():
    row = re.search(r"^\| run, with a part of the tests \| (.*) \|$", README.read_text(), flags=re.M)[1]
    assert set(re.findall(r"\b0\.\d+\.\d+", row)) - {"0.32.0"} == {*PARTLY_RUN_VLLM}
