"""LoRA: one engine scores with the base model and its adapters; each score uses the named weights."""

from __future__ import annotations

import functools
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import StepCounter
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import vLLMWrapper
from transformers import AutoModelForCausalLM

from tests import oracle, tiny
from tests.oracle import LOG_PROB_TOLERANCE, Oracle
from vllm_kl import FromCollector, LoRAWrapper, RetrieveKL, VLLMReference, VLLMScorer
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.errors import FrozenError, OptionError, ReadoutUnavailableError, WeightsError
from vllm_kl.transforms.two_sides import check_two_models
from vllm_kl.weights.push import push_weights, weights_of

PROMPT = [7 * i % 200 for i in range(40)]  # more than a block, so that its KV is kept
GROUP = [[*PROMPT, 9, 4, 100 + k, 3 * k, 17] for k in range(4)]
SEQUENCES = [*GROUP, [5, 6, 7], list(range(3, 90))]


def lora_request(path, name="policy", int_id=1, **kwargs):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, int_id, str(path), **kwargs)


@pytest.fixture(scope="module")
def requests(lora_paths):
    """None is the base model."""
    return [None, *(lora_request(path, f"adapter-{i}", i) for i, path in enumerate(lora_paths, start=1))]


@pytest.fixture(scope="module")
def oracles(policy_oracle, policy_path, lora_paths, tmp_path_factory):
    home = tmp_path_factory.mktemp("merged")
    merged = [Oracle(tiny.merge(home / str(i), policy_path, path)) for i, path in enumerate(lora_paths)]
    return [policy_oracle, *merged]


@pytest.fixture(scope="module")
def scorers(lora_llm, requests):
    return [VLLMScorer(lora_llm, lora_request=request) for request in requests]


def error_of(scorer, truth, sequences=SEQUENCES, start=1):
    scored = scorer.score(sequences, start)
    return max(
        float((row.double() - torch.tensor(truth.log_probs(ids)[start:], dtype=torch.float64)).abs().max())
        for ids, row in zip(sequences, scored, strict=True)
    )


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


@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "first adapter", "second adapter"])
def test_scores_are_those_of_the_weights_that_were_named(scorers, oracles, which):
    assert error_of(scorers[which], oracles[which]) < LOG_PROB_TOLERANCE
    for other in {0, 1, 2} - {which}:
        assert error_of(scorers[which], oracles[other]) > 0.1


def test_base_and_adapters_interleaved_never_mix(lora_llm, scorers, requests, oracles, monkeypatch):
    for share_prefix in (True, False):
        for which in (0, 1, 0, 2, 1, 1, 0, 2):
            # Leaves KV of other weights for the same prompt.
            generated(lora_llm, requests[(which + 1) % 3], n=4)
            monkeypatch.setattr(scorers[which], "share_prefix", share_prefix)
            assert error_of(scorers[which], oracles[which], GROUP, len(PROMPT)) < LOG_PROB_TOLERANCE
            assert (scorers[which].stats.num_cached_tokens > 0) == share_prefix


@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "first adapter", "second adapter"])
def test_all_weights_score_what_one_of_them_generated(lora_llm, scorers, requests, oracles, which):
    ids = generated(lora_llm, requests[which])
    for scorer, truth in zip(scorers, oracles, strict=True):
        assert error_of(scorer, truth, [ids]) < LOG_PROB_TOLERANCE


def test_an_adapter_bound_to_the_engines_generate_does_not_reach_the_base(
    lora_llm, requests, oracles, monkeypatch
):
    """One way to make a policy of an adapter, since TorchRL's wrapper names none."""
    monkeypatch.setattr(lora_llm, "generate", functools.partial(lora_llm.generate, lora_request=requests[1]))
    assert error_of(VLLMScorer(lora_llm), oracles[0]) < LOG_PROB_TOLERANCE
    wrapper = vLLMWrapper(lora_llm, tokenizer=None, input_mode="tokens", generate=False)
    scorer = FromCollector("rescore")._scorer_of(wrapper)
    assert error_of(scorer, oracles[1]) < LOG_PROB_TOLERANCE


def test_a_generate_that_drops_the_adapter_is_noticed(lora_llm, requests, monkeypatch):
    generate = lora_llm.generate
    monkeypatch.setattr(lora_llm, "generate", lambda *a, lora_request, **k: generate(*a, **k))
    with pytest.raises(WeightsError, match=r"scored with adapter None, expected \('adapter-1', 1, "):
        VLLMScorer(lora_llm, lora_request=requests[1])


@pytest.mark.parametrize("readout", ["pooling", "flat"])
def test_an_owned_engine_serves_an_adapter_with_the_options_that_it_needs(
    policy_path, requests, oracles, tmp_path, readout
):
    with VLLMScorer(
        str(policy_path), readout=readout, lora_request=requests[2], **tiny.ENGINE_OPTIONS
    ) as scorer:
        assert scorer.readout == readout
        for _ in range(2):
            assert error_of(scorer, oracles[2]) < LOG_PROB_TOLERANCE
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


def test_an_adapter_on_an_engine_that_takes_none_is_refused(policy_llm, requests):
    with pytest.raises(ReadoutUnavailableError, match="'adapter-1' .* made without enable_lora=True"):
        VLLMScorer(policy_llm, lora_request=requests[1])


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
    lora_llm, policy_path, tmp_path, scorers, oracles
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
    for scorer, truth in zip(scorers, oracles, strict=True):
        assert error_of(scorer, truth) < LOG_PROB_TOLERANCE


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


def test_another_adapter_under_an_id_that_is_taken_is_refused(lora_llm, requests, lora_paths, scorers):
    """vLLM serves the first of them for both."""
    scorers[1].score([[1, 2, 3]])
    with pytest.raises(WeightsError, match="is not the adapter that the engine has under id 1"):
        VLLMScorer(lora_llm, lora_request=lora_request(lora_paths[1], "another", requests[1].lora_int_id))


@pytest.mark.parametrize("request_", ["adapter-1", 1])
def test_what_names_no_adapter_is_refused(untouched, request_):
    with pytest.raises(OptionError, match="must be a vllm.lora.request.LoRARequest"):
        VLLMScorer(untouched, lora_request=request_)


def test_an_adapter_that_loads_itself_again_at_every_step_is_refused(untouched, lora_paths):
    with pytest.raises(OptionError, match="load_inplace=True would read the adapter from disk at every step"):
        VLLMScorer(untouched, lora_request=lora_request(lora_paths[0], load_inplace=True))


def test_an_adapter_for_an_engine_object_is_given_to_the_engine(lora_llm, requests):
    with pytest.raises(OptionError, match="lora_request has no effect on a GenerateEngine"):
        VLLMScorer(GenerateEngine(lora_llm), lora_request=requests[1])


def test_an_engine_without_the_plugin_is_refused(untouched, requests, wrapped_llm, monkeypatch):
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_kl.plugin.lora_modules import MODULES

    monkeypatch.delattr(WorkerBase, MODULES)
    for llm, request in ((untouched, requests[1]), (wrapped_llm, None)):
        with pytest.raises(
            ReadoutUnavailableError, match="cannot say whether its LM head is wrapped for LoRA"
        ):
            VLLMScorer(llm, lora_request=request)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"enable_lora": False, "lora_target_modules": None}, "made without enable_lora=True"),
        ({"enable_lora": True, "lora_target_modules": None}, "LM head may be wrapped for LoRA"),
        (
            {"enable_lora": True, "lora_target_modules": ["q_proj", "lm_head"]},
            "LM head may be wrapped for LoRA",
        ),
    ],
)
def test_engines_whose_workers_cannot_be_asked_are_judged_by_their_options(requests, args, message):
    """TorchRL's AsyncVLLM needs GPUs; its options are all that is known of it."""
    engine = SimpleNamespace(
        engine_args=SimpleNamespace(**args), generate=lambda *_: pytest.fail("something was scored")
    )
    with pytest.raises(ReadoutUnavailableError, match=message):
        VLLMScorer(engine, lora_request=requests[1])


# Weights that change under the adapter, and adapters that change.


def test_an_adapter_loaded_in_the_place_of_another_is_noticed_and_scored(
    lora_llm, lora_paths, oracles, tmp_path
):
    path = tmp_path / "adapter"
    shutil.copytree(lora_paths[0], path)
    scorer = VLLMScorer(lora_llm, lora_request=lora_request(path, "moving", 30))
    assert error_of(scorer, oracles[1], GROUP, len(PROMPT)) < LOG_PROB_TOLERANCE
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
    assert error_of(scorer, oracles[2], GROUP, len(PROMPT)) < LOG_PROB_TOLERANCE


def test_two_sides_of_one_engine_are_told_apart_by_their_adapters(lora_llm, requests, tokenizer):
    base, adapted = (VLLMReference(VLLMScorer(lora_llm, lora_request=r), tokenizer) for r in requests[:2])
    options = {
        "tokenizer": tokenizer,
        "input_mode": "tokens",
        "generate": False,
        "pad_output": base.pad_output,
    }
    policy = LoRAWrapper(lora_llm, lora_request=requests[1], **options)
    check_two_models(policy, base)
    # An adapter may be bound to its engine's generate.
    check_two_models(vLLMWrapper(lora_llm, **options), base)
    with pytest.raises(OptionError, match="both sides are adapter 1 on one engine: the KL would be 0"):
        check_two_models(policy, adapted)


@pytest.mark.parametrize("is_known", [True, False], ids=["loaded here", "loaded by others"])
def test_what_the_error_advises_gives_a_policy_that_generates_with_the_adapter(
    lora_llm, lora_paths, oracles, tmp_path, is_known
):
    path = tmp_path / "adapter"
    shutil.copytree(lora_paths[0], path)
    request = lora_request(path, "rewritten", 31 + is_known)
    if is_known:
        VLLMScorer(lora_llm, lora_request=request)
    assert generation_error(lora_llm, request, oracles[1]) < LOG_PROB_TOLERANCE
    shutil.copytree(lora_paths[1], path, dirs_exist_ok=True)
    advice = rf"remove_lora\({31 + is_known}\); assert llm\.reset_prefix_cache\(\)"
    with pytest.raises(
        WeightsError,
        match=("is not the adapter" if is_known else "was not loaded here first") + f"(?s:.*){advice}",
    ):
        VLLMScorer(lora_llm, lora_request=request)
    lora_llm.llm_engine.remove_lora(request.lora_int_id)
    # KV of the old adapter: what the second half is for.
    assert generation_error(lora_llm, request, oracles[2]) > 0.1
    lora_llm.llm_engine.remove_lora(request.lora_int_id)
    assert lora_llm.reset_prefix_cache()
    assert error_of(VLLMScorer(lora_llm, lora_request=request), oracles[2]) < LOG_PROB_TOLERANCE
    assert generation_error(lora_llm, request, oracles[2]) < LOG_PROB_TOLERANCE


def test_a_push_changes_the_base_and_adapters_apply_on_top(
    lora_llm, scorers, policy_path, ref_path, lora_paths, ref_oracle, oracles, tmp_path
):
    truths = [
        ref_oracle,
        *(Oracle(tiny.merge(tmp_path / str(i), ref_path, path)) for i, path in enumerate(lora_paths)),
    ]
    before = AutoModelForCausalLM.from_pretrained(policy_path).state_dict()
    version = push_weights(lora_llm, AutoModelForCausalLM.from_pretrained(ref_path).state_dict())
    try:
        for scorer, truth in zip(scorers, truths, strict=True):
            assert error_of(scorer, truth) < LOG_PROB_TOLERANCE
            assert scorer.stats.weight_version == scorer.weight_version == version
            with pytest.raises(
                FrozenError, match=f"the engine serves version {version} of the weights, which no refresh"
            ):
                scorer.check_frozen()
    finally:
        push_weights(lora_llm, before)
    for scorer, truth in zip(scorers, oracles, strict=True):
        assert error_of(scorer, truth) < LOG_PROB_TOLERANCE
    assert weights_of(lora_llm).version == version + 1


# A policy that is an adapter, its reference the base model on the same engine.


@pytest.fixture
def collect(lora_llm, tokenizer):
    def run(reference, mode, policy_type=LoRAWrapper, **policy_options):
        queries = DataLoader(
            [{"query": "What is one and one?"}, {"query": "Why?"}],
            collate_fn=lambda items: lazy_stack([TensorDict(i) for i in items]),
        )
        env = ChatEnv.from_dataloader(
            queries, batch_size=(2,), repeats=2, input_mode="history", tokenizer=tokenizer
        )
        env = env.append_transform(StepCounter(max_steps=1))
        env = env.append_transform(RetrieveKL("from_collector", reference, gen_log_probs=mode))
        policy = functools.partial(
            policy_type,
            lora_llm,
            tokenizer=tokenizer,
            generate_kwargs={"max_new_tokens": 10, "temperature": 1.0, "ignore_eos": True},
            **policy_options,
        )
        collector = LLMCollector(env, policy_factory=policy, dialog_turns_per_batch=2, total_dialog_turns=4)
        try:
            return [data.reshape(-1) for data in collector]
        finally:
            collector.shutdown()

    return run


def check_kl(batches, policy_oracle, ref_oracle):
    keys = {
        "ids": ("tokens", "full"),
        "real": ("masks", "all_attention_mask"),
        "prompt": ("tokens", "prompt"),
        "kl": ("next", "kl_penalty"),
        "gen": ("next", "log_probs", "full"),
        "ref": ("next", "ref_log_probs", "full"),
    }
    assert batches
    for data in batches:
        columns = {name: data.get(key, as_list=True) for name, key in keys.items()}
        for i in range(len(data)):
            row = {name: column[i] for name, column in columns.items()}
            real = row["real"]
            keep = (torch.arange(len(row["ids"])) >= len(row["prompt"]))[real].tolist()
            ids = row["ids"][real]
            want = oracle.kl(policy_oracle, ref_oracle, ids, keep)
            assert want.abs().max() > 0.1
            torch.testing.assert_close(row["kl"][real].double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)
            ref = ref_oracle.masked(ids, keep)
            torch.testing.assert_close(row["ref"][real].double(), ref, rtol=0, atol=LOG_PROB_TOLERANCE)


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
@pytest.mark.parametrize("mode", ["reuse", "rescore"])
def test_kl_of_an_adapter_against_its_base_on_one_engine_agrees_with_float64(
    lora_llm, collect, tokenizer, requests, oracles, mode, pad_output
):
    reference = VLLMReference(VLLMScorer(lora_llm), tokenizer, pad_output=pad_output)
    batches = collect(reference, mode, lora_request=requests[1], pad_output=pad_output)
    check_kl(batches, oracles[1], oracles[0])


def test_a_policy_that_is_given_follows_its_adapter(lora_llm, tokenizer, requests, oracles):
    policy = LoRAWrapper(
        lora_llm, lora_request=requests[1], tokenizer=tokenizer, input_mode="tokens", generate=False
    )
    reference = VLLMReference(VLLMScorer(lora_llm), tokenizer, input_mode="tokens")
    transform = RetrieveKL(policy, reference, assistant_only=False, add_to_reward=False, on_stale="allow")
    ids = list(range(5, 45))
    for which in (1, 2, 1):
        policy.lora_request = requests[which]
        td = transform(TensorDict(tokens=TensorDict(full=torch.tensor([ids]), batch_size=1), batch_size=1))
        want = oracle.kl(oracles[which], oracles[0], ids, [False] + [True] * (len(ids) - 1))
        got = td.get("kl_penalty", as_list=True)[0].double()
        torch.testing.assert_close(got, want, rtol=0, atol=2 * LOG_PROB_TOLERANCE)


def test_one_async_engine_on_both_sides_is_refused(tokenizer):
    """A fake: TorchRL's AsyncVLLM lives in Ray actors, and is told by its options."""
    engine = SimpleNamespace(engine_args=SimpleNamespace(enable_lora=False), generate=lambda *args: [])
    sides = [vLLMWrapper.__new__(vLLMWrapper) for _ in range(2)]
    for side in sides:
        side.__dict__.update(model=engine, lora_request=None)
    with pytest.raises(OptionError, match="both sides are one SimpleNamespace: the KL would be 0"):
        check_two_models(*sides)
    engine.engine_args.enable_lora = True  # an adapter may come in otherwise
    check_two_models(*sides)


def test_the_reference_may_be_an_adapter_too(lora_llm, collect, tokenizer, requests, oracles):
    reference = VLLMReference(lora_llm, tokenizer, lora_request=requests[2])
    check_kl(collect(reference, "rescore", lora_request=requests[1]), oracles[1], oracles[2])
    check_kl(collect(reference, "reuse", lora_request=None), oracles[0], oracles[2])


def test_a_policy_class_of_the_users_own_is_scored_with_the_adapter_that_it_names(
    lora_llm, collect, tokenizer, requests, oracles
):
    class Mine(vLLMWrapper):
        def _call_generate(self, *args, **kwargs):
            return super()._call_generate(*args, lora_request=requests[2], **kwargs)

    reference = VLLMReference(lora_llm, tokenizer)
    check_kl(collect(reference, "rescore", policy_type=Mine), oracles[2], oracles[0])


def test_an_adapter_that_is_replaced_is_followed(lora_llm, tokenizer, requests, oracles):
    policy = LoRAWrapper(
        lora_llm, tokenizer=tokenizer, input_mode="tokens", generate=False, lora_request=requests[1]
    )
    side = FromCollector("rescore")
    assert error_of(side._scorer_of(policy), oracles[1]) < LOG_PROB_TOLERANCE
    assert side._scorer_of(policy) is side._scorer_of(policy)
    policy.lora_request = requests[2]
    assert error_of(side._scorer_of(policy), oracles[2]) < LOG_PROB_TOLERANCE
    twin = policy.get_new_version(pad_output=True)
    assert twin.lora_request is requests[2]
    assert policy.get_new_version(lora_request=None).lora_request is None


def test_torchrls_wrapper_still_drops_the_adapter(lora_llm, tokenizer, requests, monkeypatch):
    """When this fails, TorchRL names adapters itself: read how, then sides.scorer_for."""
    asked = []
    monkeypatch.setattr(
        lora_llm, "generate", lambda *_, **kwargs: asked.append(kwargs) or pytest.skip.Exception
    )
    kwargs = {"max_new_tokens": 4, "lora_request": requests[1]}
    policy = vLLMWrapper(lora_llm, tokenizer=tokenizer, input_mode="tokens", generate_kwargs=kwargs)
    policy._call_generate(sampling_params=policy.sampling_params)
    assert asked == [{"sampling_params": policy.sampling_params}]
    assert "lora_request" not in vars(policy)
