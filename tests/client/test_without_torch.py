"""The client works where torch, vLLM, Ray and TorchRL are not installed."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from tests.client.faulty_server import log_probs, serving

BLOCKED = "torch vllm ray torchrl tensordict transformers jinja2 platformdirs fastapi orjson"
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run(code, *args):
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sequence_is_scored_without_torch():
    with serving() as server:
        code = """
            from vllm_kl.client import score
            print(score(sys.argv[1], [[5, 6, 7]])[0].tolist())
            assert not {"torch", "vllm", "ray", "pandas"} & set(sys.modules)
        """
        assert run(code, server.address).strip() == str(log_probs([5, 6, 7], 1).tolist())


def test_a_name_that_needs_torch_says_what_to_install():
    out = run("""
        try:
            from vllm_kl import VLLMScorer
        except ImportError as error:
            print(error)
        from vllm_kl import InputError
    """)
    assert "vllm_kl.VLLMScorer needs torch: pip install 'vllm-kl[cpu]' or 'vllm-kl[gpu]'" in out
    assert "vllm_kl.client asks a server without them" in out


def test_the_command_says_what_to_install():
    out = run("""
        from typer.testing import CliRunner
        from vllm_kl.cli import app
        done = CliRunner().invoke(app, ["serve", "my-model"])
        print(done.exit_code, done.stderr, done.exception)
        assert CliRunner().invoke(app, ["--help"]).exit_code == 0
    """)
    assert out.startswith("1 error: vllm-kl serve needs Ray Serve and vLLM"), out
    assert "pip install 'vllm-kl[cpu,ray]'" in out


def test_the_version_and_the_doctor_need_no_extra():
    out = run("""
        from typer.testing import CliRunner
        from vllm_kl.cli import app
        for words in (["--version"], ["doctor"]):
            done = CliRunner().invoke(app, words)
            assert isinstance(done.exception, SystemExit | None), done.exception
            print(done.exit_code, done.stdout)
    """)
    assert out.startswith("0 vllm-kl ")
    assert "\n1 " in out or "\n0 " in out  # what the doctor finds is installed here, and only hidden
