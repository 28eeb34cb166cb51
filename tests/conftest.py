"""Provides fixtures: tiny models, their float64 oracles, engines that start once per run, and collectors."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_kl.environment import on_a_gpu

# vLLM, torch and torchrl read these variables at import.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    RL_LOGGING_LEVEL="ERROR",
    TOKENIZERS_PARALLELISM="false",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_USAGE_STATS_ENABLED="0",
)
if not on_a_gpu():
    # Without this, vLLM compiles its rank count for prompt log-probs in 20 s. On a GPU, the kernel needs
    # compilation.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
else:
    # Also for engines that a test makes itself: Triton's default for products of float32 is TF32.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import set_list_to_stack
from torchrl.collectors.llm import LLMCollector
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.collectors import GROUP, NUM_ENVS, chat_env
from tests.lora import lora_request
from tests.oracle import Oracle
from vllm_kl import EnginePolicyVersion, VLLMReference, VLLMScorer, VLLMWeightUpdater, mkl, push_weights
from vllm_kl.demo.task import make_tokenizer

set_list_to_stack(True).set()
mkl.choose_code()  # the oracle's rotary embeddings are by MKL, too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--table", metavar="FILE", help="where tests/weights/test_pushes.py writes its table of architectures"
    )


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("models") / "policy", seed=0)


@pytest.fixture(scope="session")
def ref_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("models") / "reference", seed=1)


@pytest.fixture(scope="session")
def policy_oracle(policy_path: Path) -> Oracle:
    return Oracle(policy_path)


@pytest.fixture(scope="session")
def ref_oracle(ref_path: Path) -> Oracle:
    return Oracle(ref_path)


@pytest.fixture(scope="session")
def policy_model(policy_path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(policy_path).eval()


@pytest.fixture(scope="session")
def ref_model(ref_path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(ref_path).eval()


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def policy_llm(policy_path: Path) -> Any:
    """The policy's engine: a ``vllm.LLM`` in this process."""
    from vllm import LLM

    return LLM(str(policy_path), enforce_eager=True, use_tqdm_on_load=False, **tiny.ENGINE_OPTIONS)


@pytest.fixture(scope="session")
def processed_llm(policy_path: Path) -> Any:
    """A ``vllm.LLM`` of the policy's model that records processed log-probs."""
    from vllm import LLM

    options = {"enforce_eager": True, "use_tqdm_on_load": False, "logprobs_mode": "processed_logprobs"}
    return LLM(str(policy_path), **options, **tiny.ENGINE_OPTIONS)


@pytest.fixture(scope="session")
def tied_paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of a trained model with tied embeddings, as most small models have."""
    home = tmp_path_factory.mktemp("tied")
    return [tiny.build(home / str(seed), seed=10 + seed, tie_word_embeddings=True) for seed in range(4)]


@pytest.fixture(scope="session")
def tied_llm(tied_paths: list[Path]) -> Any:
    """A ``vllm.LLM`` whose weights tests replace.

    It lives for the whole run, because an engine that ends destroys vLLM's process groups.
    """
    from vllm import LLM

    return LLM(str(tied_paths[0]), enforce_eager=True, use_tqdm_on_load=False, **tiny.ENGINE_OPTIONS)


# The policy's engine applies these modules of an adapter, and ignores the others silently.
LORA_OPTIONS = {
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
    "lora_target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
}


@pytest.fixture(scope="session")
def lora_llm(policy_path: Path) -> Any:
    """A ``vllm.LLM`` of the policy's model that takes LoRA adapters."""
    from vllm import LLM

    return LLM(
        str(policy_path), enforce_eager=True, use_tqdm_on_load=False, **LORA_OPTIONS, **tiny.ENGINE_OPTIONS
    )


@pytest.fixture(scope="session")
def lora_paths(policy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the policy's model."""
    home = tmp_path_factory.mktemp("adapters")
    return [tiny.build_adapter(home / str(seed), policy_path, seed=seed) for seed in range(2)]


@pytest.fixture(scope="session")
def lora_requests(lora_paths: list[Path]) -> list[Any]:
    """Requests for the base model, which is None, and for the two adapters."""
    return [None, *(lora_request(path, f"adapter-{i}", i) for i, path in enumerate(lora_paths, start=1))]


@pytest.fixture(scope="session")
def lora_oracles(
    policy_oracle: Oracle, policy_path: Path, lora_paths: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Oracle]:
    """The oracles of ``lora_requests``."""
    home = tmp_path_factory.mktemp("merged")
    merged = [Oracle(tiny.merge(home / str(i), policy_path, path)) for i, path in enumerate(lora_paths)]
    return [policy_oracle, *merged]


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray. It is told of GPUs that it has not: AsyncVLLM wants them, and uses none on a CPU."""
    ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
    ray.init(num_cpus=6, num_gpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def async_llm(cluster: None, tied_paths: list[Path]) -> Iterator[Any]:
    """TorchRL's ``AsyncVLLM`` of two replicas that take adapters. Tests replace their weights."""
    from torchrl.modules.llm import AsyncVLLM
    from vllm import AsyncEngineArgs

    args = AsyncEngineArgs(
        model=str(tied_paths[0]),
        enforce_eager=True,
        enable_prefix_caching=True,
        worker_extension_cls="torchrl.modules.llm.backends.vllm.vllm_async._AsyncvLLMWorker",
        **LORA_OPTIONS,
        **tiny.ENGINE_OPTIONS,
    )
    engine = AsyncVLLM.launch(args, num_replicas=2)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def ref_scorer(ref_path: Path) -> Iterator[VLLMScorer]:
    """The reference's scorer, whose engine runs in its own process."""
    with VLLMScorer(str(ref_path), **tiny.ENGINE_OPTIONS) as scorer:
        yield scorer


@pytest.fixture
def make_reference(ref_scorer: VLLMScorer, tokenizer: Any):
    """Make a ``VLLMReference`` on the shared scorer."""

    def make(**kwargs: Any) -> VLLMReference:
        return VLLMReference(ref_scorer, tokenizer, **kwargs)

    return make


@pytest.fixture
def make_gen(policy_model, policy_llm, tokenizer):
    """Make the policy as one of the three wrappers."""

    def make(kind, **kwargs):
        if kind == "transformers":
            return TransformersWrapper(policy_model, tokenizer=tokenizer, generate=False, **kwargs)
        return vLLMWrapper(policy_llm, tokenizer=tokenizer, generate=False, **kwargs)

    return make


@pytest.fixture
def make_env(tokenizer):
    """Make an env of chats, with a reward of 1 per sequence."""

    def make(max_steps=1):
        return chat_env(tokenizer, NUM_ENVS, repeats=GROUP, max_steps=max_steps)

    return make


@pytest.fixture
def make_policy(policy_llm, tokenizer):
    """Make a factory of the policy that generates on its engine."""

    def make(**kwargs):
        return functools.partial(
            vLLMWrapper,
            policy_llm,
            tokenizer=tokenizer,
            input_mode="history",
            **{"generate": True, "generate_kwargs": {"max_new_tokens": 10, "temperature": 1.0}, **kwargs},
        )

    return make


@pytest.fixture
def steps(tied_paths):
    """The policy's checkpoints: one for each update."""
    return tied_paths


@pytest.fixture
def policy_engine(tied_llm, steps):
    """The policy's engine, at version 0 again: as if it had just been started."""
    push_weights(tied_llm, AutoModelForCausalLM.from_pretrained(steps[0]))
    tied_llm.update_weight_version("0")
    return tied_llm


@pytest.fixture
def make_collector(make_env, policy_engine, tokenizer):
    """Make a collector whose samples carry the version of the policy's engine."""
    made = []

    def make(*transforms, num_batches=4, max_steps=1, policy=None, **kwargs):
        env = make_env(max_steps)
        for transform in transforms:
            env = env.append_transform(transform)
        collector = LLMCollector(
            env,
            policy_factory=functools.partial(
                vLLMWrapper,
                policy_engine,
                tokenizer=tokenizer,
                input_mode="history",
                generate=True,
                generate_kwargs={"max_new_tokens": 10, "temperature": 1.0},
                **(policy or {}),
            ),
            **{
                "dialog_turns_per_batch": NUM_ENVS,
                "total_dialog_turns": NUM_ENVS * num_batches,
                "track_policy_version": EnginePolicyVersion(policy_engine),
                "weight_updater": VLLMWeightUpdater(policy_engine),
                **kwargs,
            },
        )
        made.append(collector)
        return collector

    yield make
    for collector in made:
        collector.shutdown()
