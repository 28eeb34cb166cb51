"""TorchRL's AsyncVLLM as the engine of a scorer: what is asked of its replicas. A real local Ray."""

from __future__ import annotations

import pytest
import torch
from torchrl.modules.llm import vLLMWrapper
from transformers import AutoModelForCausalLM

from tests import local_ray, tiny
from tests.lora import GROUP, PROMPT, error_of, lora_request
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import LoRAWrapper, VLLMReference, VLLMScorer, push_weights
from vllm_kl.engines import generate
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.errors import EngineError, InputError, OptionError, ReadoutUnavailableError, WeightsError
from vllm_kl.transforms.choose_scorer import scorer_for
from vllm_kl.transforms.two_sides import check_two_models
from vllm_kl.weights.push import weights_of

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = local_ray.MARKS

START = len(PROMPT)
MANY = [[*PROMPT, 9, 4, 100 + k, 3 * k, 17] for k in range(24)]


@pytest.fixture(scope="module")
def states(tied_paths):
    return [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in tied_paths[:2]]


@pytest.fixture(scope="module")
def oracles(tied_paths):
    return [Oracle(path) for path in tied_paths[:2]]


@pytest.fixture(scope="module")
def adapters(tied_paths, tmp_path_factory):
    """Two adapters of the replicas' model, and their float64 oracles."""
    home = tmp_path_factory.mktemp("replicas")
    paths = [tiny.build_adapter(home / str(i), tied_paths[0], seed=i) for i in range(2)]
    requests = [lora_request(path, f"replicated-{i}", i) for i, path in enumerate(paths, start=1)]
    return requests, [Oracle(tiny.merge(home / f"merged-{i}", tied_paths[0], p)) for i, p in enumerate(paths)]


@pytest.fixture
def scorer(async_llm, states):
    """A scorer on the replicas, which serve model 0."""
    push_weights(async_llm, states[0])
    return VLLMScorer(async_llm)


def test_both_replicas_score_as_float64_and_share_prompts(scorer, async_llm, oracles):
    assert scorer.score([GROUP[0]], START)[0].shape == (5,)
    assert error_of(scorer, oracles[0], MANY, START) < LOG_PROB_TOLERANCE
    stats = scorer.stats
    assert stats.weight_version == scorer.weight_version == weights_of(async_llm).version
    # Each replica knows where a sequence's scored rows begin: no cache hit reaches past them.
    assert stats.num_cached_tokens > 0
    assert stats.num_rescored == 0
    ends = [(ids, len(PROMPT) + 1) for ids in (PROMPT * 2, [*PROMPT * 2, 5])]
    for ids, start in ends:
        assert error_of(scorer, oracles[0], [ids, [*ids, 7]], start) < LOG_PROB_TOLERANCE
        assert scorer.stats.num_rescored == 0


@pytest.mark.parametrize(
    ("sequences", "start", "message"),
    [
        ([GROUP[0], [5, 6, 4000]], 1, r"sequence 1, token 2: id 4000 is outside the vocabulary \[0, \d+\)"),
        ([GROUP[0], [5] * tiny.MAX_MODEL_LEN], 1, f"sequence 1 has {tiny.MAX_MODEL_LEN} tokens, but the eng"),
        ([GROUP[0], []], 1, "sequence 1 is empty"),
    ],
)
@pytest.mark.parametrize("behind", ["engine", "policy"])
def test_bad_input_is_refused_by_sequence_before_anything_is_sent(
    async_llm, tokenizer, monkeypatch, sequences, start, message, behind
):
    policy = vLLMWrapper(async_llm, tokenizer=tokenizer, generate=False)
    scorer = VLLMScorer(async_llm) if behind == "engine" else scorer_for(policy)
    monkeypatch.setattr(async_llm, "_generate_impl", lambda *_, **__: pytest.fail("something was sent"))
    with pytest.raises(InputError, match=message):
        scorer.score(sequences, start)


def test_what_prompt_log_probs_cannot_do_is_refused(scorer, async_llm):
    with pytest.raises(ReadoutUnavailableError, match="'flat' cannot apply temperature=0.7"):
        scorer.score([GROUP[0]], temperature=0.7)
    with pytest.raises(ReadoutUnavailableError, match="'flat' cannot return log-probs of chosen ids"):
        scorer.score_ids([[5, 6, 7]], [[[6], [7]]])
    with pytest.raises(ReadoutUnavailableError, match="needs vLLM's V2 model runner|since 0.31"):
        VLLMScorer(async_llm, readout="token_ids")
    with pytest.raises(ReadoutUnavailableError, match="has no pooler"):
        VLLMScorer(async_llm, readout="pooling")


def test_options_of_the_replicas_that_make_log_probs_wrong_are_refused(async_llm, monkeypatch):
    config = weights_of(async_llm).config
    for part, name, value, message in (
        (config.model_config, "logprobs_mode", "processed_logits", "returns logits instead of log-probs"),
        (config.cache_config, "kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill=True: "),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(part, name, value)
            with pytest.raises(ReadoutUnavailableError, match=message):
                GenerateEngine(async_llm)


def test_adapters_are_loaded_by_all_replicas_before_a_request_needs_them(
    async_llm, states, oracles, adapters, tokenizer
):
    requests, merged = adapters
    push_weights(async_llm, states[0])
    for request, truth in zip([None, *requests], [oracles[0], *merged], strict=True):
        assert error_of(VLLMScorer(async_llm, lora_request=request), truth, MANY) < LOG_PROB_TOLERANCE
    for workers in ray.get(async_llm.collective_rpc("list_loras")):
        assert all({1, 2} <= {*adapters} for adapters in workers)
    how = {"tokenizer": tokenizer, "input_mode": "tokens", "generate": False}
    policy = LoRAWrapper(async_llm, lora_request=requests[1], **how)
    assert error_of(scorer_for(policy), merged[1]) < LOG_PROB_TOLERANCE
    reference = VLLMReference(VLLMScorer(async_llm, lora_request=requests[1]), input_mode="tokens")
    with pytest.raises(OptionError, match="both sides are adapter 2 on one engine"):
        check_two_models(policy, reference)


def test_an_adapter_that_a_replica_would_serve_wrongly_is_refused(
    async_llm, adapters, tied_paths, tmp_path, tokenizer
):
    (first, _), _ = adapters
    other = tiny.build_adapter(tmp_path / "other", tied_paths[0], seed=9)
    gate = tiny.build_adapter(tmp_path / "gate", tied_paths[0], seed=9, modules=("gate_proj",))
    VLLMScorer(async_llm, lora_request=first)
    for request, message in (
        (lora_request(tmp_path / "nowhere", "nowhere", 7), "(?s)replica 0 of .*'nowhere' .*cannot be read"),
        (lora_request(other, "other", 1), "(?s)replica 0 of .*is not the adapter that the engine has"),
        (lora_request(gate, "gate", 8), "(?s)replica 0 of .*would leave out without an error.*gate_proj"),
    ):
        with pytest.raises(WeightsError, match=message):
            VLLMScorer(async_llm, lora_request=request)
        with pytest.raises(WeightsError, match=message):
            LoRAWrapper(async_llm, lora_request=request, tokenizer=tokenizer)


def test_replicas_that_disagree_are_refused_until_a_push_makes_them_equal(scorer, async_llm, states, oracles):
    weights = weights_of(async_llm)
    version = weights.version + 1
    checkpoint = weights.skeleton.write(weights.skeleton.checked(states[1]))
    steps = (("begin",), ("prepare", str(checkpoint.folder), version, False), ("commit",), ("end",))
    for step, *args in steps:
        assert weights._run(step, {1: ["another", *args]})[1][0]
    with pytest.raises(WeightsError, match="the replicas serve different versions.*Push again"):
        scorer.score(MANY)
    push_weights(async_llm, states[1])
    assert error_of(scorer, oracles[1], MANY) < LOG_PROB_TOLERANCE
    assert scorer.stats.weight_version == version + 1


def test_a_vllm_that_tells_no_versions_is_asked_before_and_after(
    scorer, async_llm, states, oracles, monkeypatch
):
    monkeypatch.setattr(generate, "tells_versions", lambda: False)
    assert error_of(scorer, oracles[0], MANY) < LOG_PROB_TOLERANCE
    assert scorer.stats.weight_version == weights_of(async_llm).version
    impl = type(async_llm)._generate_impl
    pushed = []

    def push_first(*args, **kwargs):
        if not pushed:
            pushed.append(True)
            pushed.append(push_weights(async_llm, states[1]))
        return impl(async_llm, *args, **kwargs)

    monkeypatch.setattr(async_llm, "_generate_impl", push_first)
    scorer.score([[5, 6, 7]])
    assert scorer.stats.weight_version is None
    scorer.score([[5, 6, 7]])
    assert scorer.stats.weight_version == pushed[1]


def test_what_vllm_refuses_is_one_line_of_ours(scorer, async_llm, monkeypatch):
    monkeypatch.setattr(scorer, "_engine", engine := GenerateEngine(async_llm))
    engine.info = generate.EngineInfo(readout="flat", vocab_size=None, max_sequence_len=None)
    with pytest.raises(EngineError, match="vLLM refused: ") as refused:
        scorer.score([[5] * tiny.MAX_MODEL_LEN])
    assert "Traceback" not in str(refused.value)
    assert torch.isfinite(scorer.score([[5, 6, 7]])[0]).all()
