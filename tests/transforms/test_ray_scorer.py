"""The reference in a Ray actor; everything else in the caller. A real local Ray."""

from __future__ import annotations

import functools

import psutil
import pytest
import torch

from tests import batches, local_ray, oracle
from tests.oracle import KL_TOLERANCE
from vllm_kl import RetrieveKL, VLLMReference
from vllm_kl.demo.task import make_tokenizer
from vllm_kl.errors import EngineError, InputError, OptionError

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = [pytest.mark.usefixtures("cluster"), *local_ray.MARKS]

SEQUENCES, PROMPTS = [[5, 258, 9, 256, 7], [1, 2, 3]], [2, 1]
KEEP = [[t >= p for t in range(len(s))] for s, p in zip(SEQUENCES, PROMPTS, strict=True)]


def make_engine_reference(path):
    return VLLMReference(
        str(path), make_tokenizer(), dtype="float32", max_model_len=64, kv_cache_memory_bytes=16 << 20
    )


@pytest.fixture(scope="module")
def remote(cluster, ref_path):
    """The transform that made the actor."""
    return RetrieveKL(
        "from_collector",
        ref_model_factory=functools.partial(make_engine_reference, ref_path),
        use_ray_service=True,
        actor_name="reference",
    )


@pytest.fixture
def batch(policy_oracle):
    recorded = [torch.tensor(policy_oracle.log_probs(s)) for s in SEQUENCES]
    return batches.ids_batch(SEQUENCES, PROMPTS, extra={("log_probs", "full"): recorded})


def test_the_kl_agrees_with_float64(remote, batch, policy_oracle, ref_oracle):
    kl = remote(batch).get("kl_penalty", as_list=True)
    for got, ids, keep in zip(kl, SEQUENCES, KEEP, strict=True):
        want = oracle.kl(policy_oracle, ref_oracle, ids, keep)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=KL_TOLERANCE)


def test_an_actor_that_exists_is_found_again(remote, batch):
    def never():
        raise AssertionError("the actor exists: nothing is to be made")

    again = RetrieveKL(
        "from_collector", ref_model_factory=never, use_ray_service=True, actor_name="reference"
    )
    found = RetrieveKL("from_collector", use_ray_service=True, actor_name="reference")
    results = [
        transform(batch.clone()).get("kl_penalty", as_list=True) for transform in (remote, again, found)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_reference_describes_itself_to_the_caller(remote):
    assert isinstance(remote.ref_model, VLLMReference)
    assert remote.pad_output is False
    assert remote.ref_model.tokenizer.eos_token == "<|im_end|>"
    assert remote.ref_model.scorer.stats.readout == "pooling"


def test_errors_of_the_actor_arrive_as_they_are(remote):
    with pytest.raises(InputError, match="sequence 0, token 1: id 999 is outside the vocabulary"):
        remote.ref_model.scorer.score([[1, 999]], [1])
    with pytest.raises(InputError, match="sequence 0 has 80 tokens"):
        remote.ref_model.scorer.score([[1] * 80], [1])


def test_refusals(remote, make_reference):
    with pytest.raises(OptionError, match="holds a running engine and cannot move into a Ray actor"):
        RetrieveKL("from_collector", make_reference(), use_ray_service=True)
    with pytest.raises(EngineError, match="no Ray actor named 'nobody', and no ref_model_factory"):
        RetrieveKL("from_collector", use_ray_service=True, actor_name="nobody")
    with pytest.raises(InputError, match="use_ray_service=True needs ref_model_factory"):
        RetrieveKL("from_collector", use_ray_service=True)


def test_closing_ends_the_actor_and_its_engine(remote):
    engines = [
        p
        for p in psutil.process_iter(["cmdline"])
        if "vllm_kl.engines._child" in (p.info["cmdline"] or []) and "ray::" in "".join(p.parent().cmdline())
    ]
    assert len(engines) == 1
    scorer = remote.ref_model.scorer
    scorer.close()
    with pytest.raises(EngineError, match="the reference's Ray actor is gone"):
        scorer.score([[1, 2]], [1])
    assert psutil.wait_procs(engines, timeout=10)[1] == []
