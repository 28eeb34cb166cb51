"""How the ways to score are set up, so that none is handicapped. No engine is started."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import EngineArgs

from vllm_kl.bench.providers import (
    ask_sglang,
    fused_reader,
    ours,
    peer_options,
    sglang_options,
    slices,
    with_kv_cache,
)
from vllm_kl.bench.types import Setup
from vllm_kl.engines.memory import kv_cache_bytes
from vllm_kl.engines.start_engine import _defaults
from vllm_kl.errors import OptionError, ReadoutUnavailableError


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vllms_own_ways_have_the_mode_and_the_steps_of_our_engine(device):
    model = SimpleNamespace(is_hybrid=False, is_attention_free=False)
    own = _defaults(model, {}, is_cpu=device == "cpu")
    peers = peer_options(Setup(model="m", dtype="float32", device=device, max_tokens=3000))
    for name in ("enforce_eager", "compilation_config", "max_num_batched_tokens"):
        assert peers.get(name) == own.get(name), name
    assert peers["max_model_len"] == 3001  # one token is sampled
    assert peers["long_prefill_token_threshold"] == 2048
    short = peer_options(Setup(model="m", dtype="float32", device=device, max_tokens=300))
    assert "long_prefill_token_threshold" not in short  # vLLM refuses more than the longest sequence


@pytest.mark.parametrize("readout", ["auto", "flat"])
def test_ours_scores_sequences_of_the_models_own_length(readout, monkeypatch):
    """An engine that generates makes room for its token itself; vLLM refuses more than the model has."""
    given = []

    class Scorer:
        def __init__(self, model, **options):
            given.append(options)
            raise OptionError("not in this test")

    monkeypatch.setattr("vllm_kl.VLLMScorer", Scorer)
    with pytest.raises(OptionError, match="not in this test"):
        next(ours(Setup(model="m", dtype="float32", device="cpu", max_tokens=8192, readout=readout)))
    assert given[0]["max_model_len"] == 8192


def test_vllms_own_ways_have_as_large_a_kv_cache_as_the_longest_sequence_needs(ref_path):
    """A fixed size made them fail where one sequence does not fit, and ours not."""
    setup = Setup(model=str(ref_path), dtype="float32", device="cpu", max_tokens=120)
    options = with_kv_cache(setup, peer_options(setup))
    config = EngineArgs(model=setup.model, **peer_options(setup)).create_model_config()
    assert options["kv_cache_memory_bytes"] == kv_cache_bytes(
        setup.model, config, peer_options(setup), is_cuda=False
    )
    given = replace(setup, engine={"kv_cache_memory_bytes": 1 << 20})
    assert with_kv_cache(given, peer_options(given))["kv_cache_memory_bytes"] == 1 << 20


def test_slices_of_mixed_lengths_hold_no_more_logits_than_they_may():
    rng = np.random.default_rng(0)
    starts = rng.integers(1, 900, 64).tolist()
    lengths = [start + int(more) for start, more in zip(starts, rng.integers(1, 300, 64), strict=True)]
    found = list(slices(lengths, starts, most_rows=2000))
    assert sorted(i for part in found for i in part) == list(range(64))
    assert len(found) < 64
    for part in found:
        kept = max(lengths[i] for i in part) - min(starts[i] for i in part) + 1
        assert len(part) * kept <= 2000 or len(part) == 1


def test_sglang_takes_the_longest_sequence_and_shares_prompts_inside_a_batch():
    engine = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "revision": "main", "block_size": 16}
    options = sglang_options(Setup(model="m", dtype="bfloat16", device="cuda", engine=engine, max_tokens=100))
    max_req_input_len = (options["context_length"] - 1) - 5  # of SGLang, which refuses as many tokens
    assert max_req_input_len > 100
    assert (options["schedule_policy"], options["tp_size"], options["pp_size"]) == ("lpm", 2, 3)
    assert options["revision"] == "main"
    assert "block_size" not in options  # vLLM's


def test_sglangs_log_probs_are_those_of_the_tokens_from_the_start_on():
    """SGLang gives an entry for each token from logprob_start_len on; that of the first is empty."""

    class Engine:
        def generate(self, input_ids, logprob_start_len, return_logprob, sampling_params):
            assert (return_logprob, sampling_params["max_new_tokens"]) == (True, 0)
            for ids, first in zip(input_ids, logprob_start_len, strict=True):
                entries = [(-float(token), token, None) for token in ids[first:]]
                yield {"meta_info": {"input_token_logprobs": [(None, ids[first], None), *entries[1:]]}}

    sequences = [np.arange(10, 20, dtype=np.int32), np.arange(50, 53, dtype=np.int32)]
    found = ask_sglang(Engine(), sequences, [7, 1])
    assert [row.tolist() for row in found] == [[-17.0, -18.0, -19.0], [-51.0, -52.0]]


class OfTrl116:
    """TRL's function in plain operations; the arguments are those of TRL 1.16."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=(),
    ): ...

    @classmethod
    def apply(cls, hidden, weight, bias, targets, *more):
        names = list(inspect.signature(cls.forward).parameters)[5:]
        given = dict(zip(names, more, strict=True))
        logits = hidden @ weight.T * given["logit_scale"] / given["temperature"]
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], None


class OfLaterTrl(OfTrl116):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, final_logit_softcapping=None, logit_scale=1.0
    ): ...


@pytest.mark.parametrize("function", [OfTrl116, OfLaterTrl])
def test_trls_head_reads_the_tokens_from_the_start_on(function, ref_path):
    model = AutoModelForCausalLM.from_pretrained(ref_path, dtype=torch.float64)
    ids = torch.randint(4, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(fused_reader(function)(model, ids, 12), want[:, 11:])


def test_an_argument_of_trl_that_is_not_known_is_named():
    class Newer(OfTrl116):
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, temperature, sampling_mask): ...

    with pytest.raises(ReadoutUnavailableError, match="'sampling_mask'"):
        fused_reader(Newer)
