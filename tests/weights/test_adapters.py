"""LoRA: one engine scores with the base model and its adapters; each score uses the named weights."""

from __future__ import annotations

import functools
import json
import re
import shutil

import pytest
import torch
from torchrl.modules.llm import vLLMWrapper
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.compat import since
from tests.lora import GROUP, PROMPT, error_of, lora_request
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import FromCollector, LoRAWrapper, VLLMScorer
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.errors import FrozenError, OptionError, ReadoutUnavailableError, WeightsError
from vllm_kl.weights.push import push_weights, weights_of

# vLLM rounds an adapter's product to float32 before it adds it to the base's. The products of ref_path are
# larger than those of policy_path: 5.02e-6 nats on a CPU with AVX2.
ADAPTED_TOLERANCE = 2 * LOG_PROB_TOLERANCE


@pytest.fixture(scope="module")
def scorers(lora_llm, lora_requests):
    return [VLLMScorer(lora_llm, lora_request=request) for request in lora_requests]


def generated(llm, request, n=40):
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True)
    (output,) = llm.generate(
        [TokensPrompt(prompt_token_ids=PROMPT)], params, use_tqdm=False, lora_request=request
    )
    return PROMPT + list(output.outputs[0].token_ids)


def generation_error(llm, request, truth):
    """How far recorded log-probs are from those of the weights that were named, nats."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(max_tokens=8, temperature=1.0, logprobs=0, seed=0, ignore_eos=True)
    (output,) = llm.generate(
        [TokensPrompt(prompt_token_ids=PROMPT)], params, use_tqdm=False, lora_request=request
    )
    (sample,) = output.outputs
    recorded = [next(iter(entry.values())).logprob for entry in sample.logprobs]
    wanted = truth.log_probs(PROMPT + list(sample.token_ids))[len(PROMPT) :]
    return max(abs(a - b) for a, b in zip(recorded, wanted, strict=True))


# Whose log-probs they are.


@pytest.mark.compat
@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "first adapter", "second adapter"])
def test_scores_are_those_of_the_weights_that_were_named(scorers, lora_oracles, which):
    assert error_of(scorers[which], lora_oracles[which]) < LOG_PROB_TOLERANCE
    for other in {0, 1, 2} - {which}:
        assert error_of(scorers[which], lora_oracles[other]) > 0.1


@pytest.mark.compat
def test_base_and_adapters_interleaved_never_mix(lora_llm, scorers, lora_requests, lora_oracles, monkeypatch):
    for share_prefix in (True, False):
        for which in (0, 1, 0, 2, 1, 1, 0, 2):
            # Leaves KV of other weights for the same prompt.
            generated(lora_llm, lora_requests[(which + 1) % 3], n=4)
            monkeypatch.setattr(scorers[which], "share_prefix", share_prefix)
            assert error_of(scorers[which], lora_oracles[which], GROUP, len(PROMPT)) < LOG_PROB_TOLERANCE
            assert (scorers[which].stats.num_cached_tokens > 0) == share_prefix


@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "first adapter", "second adapter"])
def test_all_weights_score_what_one_of_them_generated(lora_llm, scorers, lora_requests, lora_oracles, which):
    ids = generated(lora_llm, lora_requests[which])
    for scorer, truth in zip(scorers, lora_oracles, strict=True):
        assert error_of(scorer, truth, [ids]) < LOG_PROB_TOLERANCE


def test_an_adapter_bound_to_the_engines_generate_does_not_reach_the_base(
    lora_llm, lora_requests, lora_oracles, monkeypatch
):
    """One way to make a policy of an adapter, since TorchRL's wrapper names none."""
    monkeypatch.setattr(
        lora_llm, "generate", functools.partial(lora_llm.generate, lora_request=lora_requests[1])
    )
    assert error_of(VLLMScorer(lora_llm), lora_oracles[0]) < LOG_PROB_TOLERANCE
    wrapper = vLLMWrapper(lora_llm, tokenizer=None, input_mode="tokens", generate=False)
    scorer = FromCollector("rescore")._scorer_of(wrapper)
    assert error_of(scorer, lora_oracles[1]) < LOG_PROB_TOLERANCE


def test_a_generate_that_drops_the_adapter_is_noticed(lora_llm, lora_requests, monkeypatch):
    generate = lora_llm.generate
    monkeypatch.setattr(lora_llm, "generate", lambda *a, lora_request, **k: generate(*a, **k))
    with pytest.raises(WeightsError, match=r"scored with adapter None, expected \('adapter-1', 1, "):
        VLLMScorer(lora_llm, lora_request=lora_requests[1])


@pytest.mark.parametrize("readout", ["pooling", pytest.param("flat", marks=pytest.mark.nightly)])
def test_an_owned_engine_serves_an_adapter_with_the_options_that_it_needs(
    policy_path, lora_requests, lora_oracles, tmp_path, readout
):
    with VLLMScorer(
        str(policy_path), readout=readout, lora_request=lora_requests[2], **tiny.ENGINE_OPTIONS
    ) as scorer:
        assert scorer.readout == readout
        for _ in range(2):
            assert error_of(scorer, lora_oracles[2]) < LOG_PROB_TOLERANCE
        assert scorer.check_frozen() == 0.0


# What is refused, before anything is scored.


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory):
    """An architecture whose LM head vLLM wraps for LoRA; Qwen2's is left alone."""
    return tiny.build_architecture(tmp_path_factory.mktemp("llama") / "llama", "llama")


@pytest.fixture(scope="session")
def wrapped_llm(llama_path):
    from vllm import LLM

    options = {**tiny.ENGINE_OPTIONS, "skip_tokenizer_init": True}
    return LLM(str(llama_path), enforce_eager=True, use_tqdm_on_load=False, enable_lora=True, **options)


@pytest.mark.nightly
def test_an_lm_head_wrapped_for_lora_is_refused_with_target_modules_that_work(
    wrapped_llm, llama_path, tmp_path
):
    with pytest.raises(ReadoutUnavailableError, match="LM head is wrapped for LoRA") as refused:
        VLLMScorer(wrapped_llm)
    targets = json.loads(re.search(r"lora_target_modules=(\[.*\])", str(refused.value))[1].replace("'", '"'))
    assert "lm_head" not in targets
    assert {"q_proj", "gate_proj", "down_proj"} <= set(targets)
    options = {"enable_lora": True, "readout": "flat", **tiny.ENGINE_OPTIONS}
    with pytest.raises(ReadoutUnavailableError, match=re.escape(str(targets))):
        VLLMScorer(str(llama_path), **options)
    adapter = tiny.build_adapter(tmp_path / "adapter", llama_path, seed=1, modules=("o_proj", "up_proj"))
    merged = Oracle(tiny.merge(tmp_path / "merged", llama_path, adapter))
    options |= {"lora_target_modules": targets, "lora_request": lora_request(adapter)}
    with VLLMScorer(str(llama_path), **options) as scorer:
        assert error_of(scorer, merged) < LOG_PROB_TOLERANCE


def test_vllm_still_cannot_score_with_a_wrapped_lm_head(wrapped_llm):
    """When this fails, vLLM has mended it: the refusal can go."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU numbers come back, of whichever adapter's slot: only a CPU fails aloud")
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    # With one alone it goes well.
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in (PROMPT, PROMPT[1:])]
    with pytest.raises(RuntimeError, match="einsum"):
        wrapped_llm.generate(prompts, params, use_tqdm=False)
    engine = wrapped_llm.llm_engine
    engine.abort_request(list(engine.output_processor.request_states), internal=True)


@pytest.fixture
def untouched(lora_llm, monkeypatch):
    """The engine, which must not be asked for anything."""
    monkeypatch.setattr(lora_llm, "generate", lambda *_, **__: pytest.fail("something was scored"))
    return lora_llm


def test_an_adapter_on_an_engine_that_takes_none_is_refused(policy_llm, lora_requests):
    with pytest.raises(ReadoutUnavailableError, match="'adapter-1' .* made without enable_lora=True"):
        VLLMScorer(policy_llm, lora_request=lora_requests[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "cannot be read: FileNotFoundError"),
        ({"rank": 16}, "rank 16 .*greater than max_lora_rank 8"),
        ({"modules": ("q_proj", "up_proj")}, r"leave out without an error: model\.layers\.0\.mlp\.up_proj"),
        ({"modules": ("q_proj", "lm_head")}, r"weights for the LM head \(lm_head\)"),
        ({"modules": ("nothing",)}, "has no weights"),
    ],
    ids=["no such path", "rank", "modules that are left out", "lm_head", "empty"],
)
def test_an_adapter_that_would_not_serve_as_written_is_refused(
    untouched, policy_path, tmp_path, change, message
):
    path = tmp_path / "adapter"
    if change:
        tiny.build_adapter(path, policy_path, seed=3, **change)
    for make in (VLLMScorer, functools.partial(LoRAWrapper, tokenizer=None, input_mode="tokens")):
        with pytest.raises(WeightsError, match=f"(?s)adapter 'mine' .*{message}"):
            make(untouched, lora_request=lora_request(path, "mine", 9))
    assert not untouched.llm_engine.has_unfinished_requests()
    assert 9 not in untouched.llm_engine.list_loras()


def test_an_adapter_that_cannot_be_loaded_does_not_end_the_engine(
    lora_llm, policy_path, tmp_path, scorers, lora_oracles
):
    """It would, if a request were the first to ask for it."""
    other = {
        name: tiny.build_architecture(tmp_path / f"model-{name}", "qwen2", **change)
        for name, change in (("wide", {"hidden_size": 128}), ("deep", {"num_hidden_layers": 3}))
    }
    paths = {
        name: tiny.build_adapter(tmp_path / name, other.get(name, policy_path), seed=3)
        for name in ("wide", "deep", "dora", "cut")
    }
    config = paths["dora"] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    weights = paths["cut"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    messages = {
        "wide": "cannot be loaded: .*size of tensor",
        "deep": r"leave out without an error: model\.layers\.2\.mlp\.down_proj",
        "dora": "cannot be loaded: .*DoRA",
        "cut": "cannot be read: SafetensorError",
    }
    for name, message in messages.items():
        with pytest.raises(WeightsError, match=f"adapter 'mine' .*{message}"):
            VLLMScorer(lora_llm, lora_request=lora_request(paths[name], "mine", 10))
    assert 10 not in lora_llm.llm_engine.list_loras()
    for scorer, truth in zip(scorers, lora_oracles, strict=True):
        assert error_of(scorer, truth) < LOG_PROB_TOLERANCE


@pytest.mark.nightly
def test_an_owned_engine_refuses_an_adapter_of_the_lm_head(llama_path, tmp_path):
    adapter = tiny.build_adapter(tmp_path / "adapter", llama_path, seed=1, modules=("q_proj", "lm_head"))
    with pytest.raises(WeightsError, match=r"weights for the LM head \(lm_head\).*merge_and_unload"):
        VLLMScorer(str(llama_path), lora_request=lora_request(adapter), **tiny.ENGINE_OPTIONS)
    with pytest.raises(WeightsError, match="adapter 'policy' .*cannot be read"):
        VLLMScorer(str(llama_path), lora_request=lora_request(tmp_path), **tiny.ENGINE_OPTIONS)
    with pytest.raises(OptionError, match="no effect with enable_lora=False"):
        VLLMScorer(
            str(llama_path), lora_request=lora_request(adapter), enable_lora=False, **tiny.ENGINE_OPTIONS
        )


def test_another_adapter_under_an_id_that_is_taken_is_refused(lora_llm, lora_requests, lora_paths, scorers):
    """vLLM serves the first of them for both."""
    scorers[1].score([[1, 2, 3]])
    with pytest.raises(WeightsError, match="is not the adapter that the engine has under id 1"):
        VLLMScorer(
            lora_llm, lora_request=lora_request(lora_paths[1], "another", lora_requests[1].lora_int_id)
        )


@pytest.mark.parametrize("request_", ["adapter-1", 1])
def test_what_names_no_adapter_is_refused(untouched, request_):
    with pytest.raises(OptionError, match="must be a vllm.lora.request.LoRARequest"):
        VLLMScorer(untouched, lora_request=request_)


def test_an_adapter_that_loads_itself_again_at_every_step_is_refused(untouched, lora_paths):
    with pytest.raises(OptionError, match="load_inplace=True would read the adapter from disk at every step"):
        VLLMScorer(untouched, lora_request=lora_request(lora_paths[0], load_inplace=True))


def test_an_adapter_for_an_engine_object_is_given_to_the_engine(lora_llm, lora_requests):
    with pytest.raises(OptionError, match="lora_request has no effect on a GenerateEngine"):
        VLLMScorer(GenerateEngine(lora_llm), lora_request=lora_requests[1])


def test_an_engine_without_the_plugin_is_refused(untouched, lora_requests, wrapped_llm, monkeypatch):
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_kl.plugin.lora_modules import MODULES

    monkeypatch.delattr(WorkerBase, MODULES)
    for llm, request in ((untouched, lora_requests[1]), (wrapped_llm, None)):
        with pytest.raises(
            ReadoutUnavailableError, match="cannot say whether its LM head is wrapped for LoRA"
        ):
            VLLMScorer(llm, lora_request=request)


# Weights that change under the adapter, and adapters that change.


def test_an_adapter_loaded_in_the_place_of_another_is_noticed_and_scored(
    lora_llm, lora_paths, lora_oracles, tmp_path
):
    path = tmp_path / "adapter"
    shutil.copytree(lora_paths[0], path)
    scorer = VLLMScorer(lora_llm, lora_request=lora_request(path, "moving", 30))
    assert error_of(scorer, lora_oracles[1], GROUP, len(PROMPT)) < LOG_PROB_TOLERANCE
    assert scorer.check_frozen() == 0.0
    shutil.copytree(lora_paths[1], path, dirs_exist_ok=True)
    assert scorer.check_frozen() == 0.0  # vLLM serves what it loaded
    with pytest.raises(
        WeightsError, match=r"is not the adapter that the engine has under id 30(?s:.*)remove_lora\(30\)"
    ):
        VLLMScorer(lora_llm, lora_request=lora_request(path, "moving", 30))
    lora_llm.llm_engine.add_lora(lora_request(path, "moving", 30, load_inplace=True))
    with pytest.raises(FrozenError, match="moved"):
        scorer.check_frozen()
    # Name and path are what vLLM hashes: without a salt per call this would read KV of the old adapter.
    assert error_of(scorer, lora_oracles[2], GROUP, len(PROMPT)) < LOG_PROB_TOLERANCE


@since("0.32", "KV that vLLM keeps apart by an adapter's path")
@pytest.mark.parametrize("is_known", [True, False], ids=["loaded here", "loaded by others"])
def test_what_the_error_advises_gives_a_policy_that_generates_with_the_adapter(
    lora_llm, lora_paths, lora_oracles, tmp_path, is_known
):
    path = tmp_path / "adapter"
    shutil.copytree(lora_paths[0], path)
    request = lora_request(path, "rewritten", 31 + is_known)
    if is_known:
        VLLMScorer(lora_llm, lora_request=request)
    assert generation_error(lora_llm, request, lora_oracles[1]) < LOG_PROB_TOLERANCE
    shutil.copytree(lora_paths[1], path, dirs_exist_ok=True)
    advice = rf"remove_lora\({31 + is_known}\); assert llm\.reset_prefix_cache\(\)"
    with pytest.raises(
        WeightsError,
        match=("is not the adapter" if is_known else "was not loaded here first") + f"(?s:.*){advice}",
    ):
        VLLMScorer(lora_llm, lora_request=request)
    lora_llm.llm_engine.remove_lora(request.lora_int_id)
    # KV of the old adapter: what the second half is for.
    assert generation_error(lora_llm, request, lora_oracles[2]) > 0.1
    lora_llm.llm_engine.remove_lora(request.lora_int_id)
    assert lora_llm.reset_prefix_cache()
    assert error_of(VLLMScorer(lora_llm, lora_request=request), lora_oracles[2]) < LOG_PROB_TOLERANCE
    assert generation_error(lora_llm, request, lora_oracles[2]) < LOG_PROB_TOLERANCE


def test_a_push_changes_the_base_and_adapters_apply_on_top(
    lora_llm, scorers, policy_path, ref_path, lora_paths, ref_oracle, lora_oracles, tmp_path
):
    truths = [
        ref_oracle,
        *(Oracle(tiny.merge(tmp_path / str(i), ref_path, path)) for i, path in enumerate(lora_paths)),
    ]
    before = AutoModelForCausalLM.from_pretrained(policy_path).state_dict()
    version = push_weights(lora_llm, AutoModelForCausalLM.from_pretrained(ref_path).state_dict())
    try:
        for scorer, truth in zip(scorers, truths, strict=True):
            assert error_of(scorer, truth) < ADAPTED_TOLERANCE
            assert scorer.stats.weight_version == scorer.weight_version == version
            with pytest.raises(
                FrozenError, match=f"the engine serves version {version} of the weights, which no refresh"
            ):
                scorer.check_frozen()
    finally:
        push_weights(lora_llm, before)
    for scorer, truth in zip(scorers, lora_oracles, strict=True):
        assert error_of(scorer, truth) < LOG_PROB_TOLERANCE
    assert weights_of(lora_llm).version == version + 1
