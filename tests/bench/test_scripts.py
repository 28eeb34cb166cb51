"""The scripts that tell where the time of the read-out and of prefill goes."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests import scripts
from tests.amx import needs_amx
from vllm_kl.bench.limits import Limits
from vllm_kl.bench.models import save_random
from vllm_kl.bench.traffic import from_shape
from vllm_kl.plugin import cpu_loops


@pytest.fixture(scope="module")
def lm_head():
    with scripts.imported("benchmarks", "bench_lm_head") as module:
        yield module


@pytest.fixture(scope="module")
def profile_prefill():
    with scripts.imported("benchmarks", "profile_prefill") as module:
        yield module


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.parametrize(("product", "wrong"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_head_in_16_bits_may_be_as_far_off_as_its_products(lm_head, monkeypatch, product, wrong):
    monkeypatch.setattr(lm_head.kernel, "product_dtype", lambda _: product)
    monkeypatch.setattr(cpu_loops, "_amx_library", lambda: (None, ""))
    arguments = lm_head.matrices(70, 64, 3000, torch.bfloat16, "cpu")
    most = lm_head.tolerance(torch.bfloat16, "cpu", 64)
    assert max(lm_head.largest_errors(*arguments).values()) <= most < wrong


@needs_amx
def test_a_head_that_amx_multiplies_is_as_exact_as_on_a_gpu(lm_head):
    arguments = lm_head.matrices(70, 64, 3000, torch.bfloat16, "cpu")
    assert (
        max(lm_head.largest_errors(*arguments).values())
        <= lm_head.tolerance(torch.bfloat16, "cpu", 64)
        < 1e-3
    )


SMALL = ("--sizes", "70,64", "--vocab", 1000, "--dtype", "float32", "--rounds", 2)


def test_each_way_of_the_head_is_in_the_file(lm_head, monkeypatch, tmp_path):
    for _ in range(2):  # the second run replaces the file
        run(lm_head, monkeypatch, *SMALL, "--markdown", tmp_path / "head.md")
    text = tmp_path.joinpath("head.md").read_text()
    for way in ("product", "log-normalizers", "with entropy", "with the 8 best"):
        assert text.count(f"| {way} ") == 1, text
    assert text.strip().endswith("2 rounds")


def test_a_wrong_head_is_not_timed(lm_head, monkeypatch, capsys):
    right = lm_head.kernel.log_normalizer
    monkeypatch.setattr(lm_head.kernel, "log_normalizer", lambda *a, **k: right(*a, **k) + 1e-3)
    with pytest.raises(SystemExit, match="not timed"):
        run(lm_head, monkeypatch, *SMALL)
    assert "TFLOP" not in capsys.readouterr().out


def test_the_page_names_the_scripts_that_compare_nothing_with_float64():
    folder = scripts.ROOT / "benchmarks"
    others = {path.name for path in folder.glob("*.py") if "float64" not in path.read_text()}
    told = folder.joinpath("README.md").read_text().partition("which compare nothing")[0]
    assert set(re.findall(r"`(\w+\.py)`", told)) == others - {"tables.py"}  # which measures nothing


def event(name, seconds, above=None):
    return SimpleNamespace(name=name, self_cpu_time_total=1e6 * seconds, cpu_parent=above)


def test_an_operation_counts_for_the_innermost_part_that_it_runs_in(profile_prefill):
    model, head = event("model", 0.5), event("LM head", 0.25)
    block = event("aten::linear", 0.125, model)
    events = [
        *(model, head, block, event("_C::onednn_mm", 2, block), event("aten::mm", 4, head)),
        *(event("_C::cpu_attention_with_kv_cache", 8, model), event("aten::copy_", 16)),
    ]
    assert profile_prefill.seconds_by_part(events) == {
        ("model", "Python"): 0.5,
        ("LM head", "Python"): 0.25,
        ("model", "products"): 2.125,
        ("LM head", "products"): 4,
        ("model", "attention"): 8,
        ("the rest", "other"): 16,
    }


def test_the_bound_of_the_layers_is_that_of_the_tokens_that_the_engine_computed(profile_prefill, tmp_path):
    """Siblings compute the end of the prompt again, because whole blocks only are shared."""
    save_random("tiny", tmp_path, max_tokens=80)
    sizes = profile_prefill.sizes_of(tmp_path, torch.float32)
    body = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 128 * 64)  # two layers: q, k and v, o, and the MLP
    assert sizes == (body, 1000, 64, 2, 64, 4)
    bounds = profile_prefill.bounds_of(from_shape("64,16,2", 2), 128, sizes, Limits(1e9, 1e8, None))
    assert bounds["model", "products"] == 2 * body * 128 / 1e9
    assert bounds["model", "attention"] == 4 * 2 * 64 * (64 * 64 / 2 + 2 * (64 * 16 + 16 * 16 / 2)) / 1e9
    assert bounds["LM head", "products"] == 2 * 64 * 1000 * 32 / 1e9
    assert bounds["LM head", "Python"] == 4 * 1000 * 32 / 1e8  # the pass only reads


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_the_parts_of_a_call_are_found_in_vllms_engine(tmp_path):
    file, script = tmp_path / "profile.md", scripts.ROOT / "benchmarks" / "profile_prefill.py"
    arguments = ("--shape", "tiny", "--shapes", "64,16,2", "--markdown", str(file))
    subprocess.run([sys.executable, str(script), *arguments], check=True)
    text = file.read_text()
    for row in (r"model +\| products", r"model +\| attention", "LM head ", "scheduler ", "the rest "):
        assert re.search(rf"^\| {row}", text, flags=re.M), text
    # 16 groups of two: the second computes the prompt's last block of 32 again.
    assert "The engine computed 2,048 tokens; at least 1,552 were needed" in text


@pytest.mark.nightly
def test_each_way_to_a_kl_is_timed(tmp_path):
    file, script = tmp_path / "kl.md", scripts.ROOT / "benchmarks" / "bench_exact_kl.py"
    sizes = ("--model", "tiny", "--dtype", "float32", "--prompt", "40", "--response", "20", "--group", "2")
    subprocess.run(
        [sys.executable, str(script), *sizes, "--rounds", "2", "--markdown", str(file)], check=True
    )
    text = file.read_text()
    for way in ("score", "the 64 best", "hidden states, heads", "exact_kl"):
        assert re.search(rf"^\| float32 \| {way} ", text, flags=re.M), text
    assert "2 rounds, KL " in text


def test_a_method_is_named_while_it_is_watched(profile_prefill):
    owner = SimpleNamespace(work=lambda: torch.zeros(2) + 1)
    before = owner.work
    with (
        profile_prefill.named(owner, "work", "model"),
        profile_prefill.profile(activities=[profile_prefill.ProfilerActivity.CPU]) as found,
    ):
        owner.work()
    assert owner.work is before
    assert "model" in {event.name for event in found.events()}


# These have a page of their own, or need a GPU.
NOT_RESULTS = {"bench_architectures", "bench_lm_head", "soak", "gpu_check", "tables"}


def test_make_results_runs_every_script_with_arguments_that_it_takes():
    command = ["make", "--always-make", "--dry-run", "results", "MACHINE=other"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=scripts.ROOT).stdout
    runs = re.findall(
        r"benchmarks/(\w+)\.py (.*) --markdown benchmarks/results/[\w-]+-other\.md\.part$", told, re.M
    )
    names = {path.stem for path in scripts.ROOT.joinpath("benchmarks").glob("*.py")}
    assert {name for name, _ in runs} == names - NOT_RESULTS
    for name, arguments in runs:
        text = scripts.ROOT.joinpath("benchmarks", f"{name}.py").read_text()
        assert "add_markdown_option(parser)" in text
        assert re.search(r"line\(\s*machine_line\(", text), f"{name} does not tell where it was measured"
        for option in re.findall(r"--[\w-]+", arguments):
            assert f'"{option}"' in text, f"{name} {option}"
