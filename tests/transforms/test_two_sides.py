"""The two sides of a KL: models that cannot be a side, or be both, are refused by name."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from torchrl.modules.llm import vLLMWrapper

from tests import batches
from vllm_kl import LoRAWrapper, RetrieveKL, RetrieveLogProb, VLLMReference, VLLMScorer
from vllm_kl.errors import InputError, OptionError
from vllm_kl.transforms.two_sides import check_two_models


def test_assistant_only_without_history(make_gen, make_reference):
    message = "The model must have `input_mode='history'` when `assistant_only=True`"
    with pytest.raises(ValueError, match=message):
        RetrieveKL(make_gen("transformers", input_mode="tokens"), make_reference())
    with pytest.raises(ValueError, match=message):
        RetrieveLogProb(make_reference(input_mode="text"))


def test_a_model_that_generates(policy_llm, tokenizer, make_reference):
    with pytest.raises(ValueError, match=r"must have `generate=False`.*get_new_version"):
        RetrieveKL(vLLMWrapper(policy_llm, tokenizer=tokenizer, generate=True), make_reference())


def test_two_ways_to_give_one_side_or_none(make_reference):
    with pytest.raises(ValueError, match="exactly one of 'ref_model' and 'ref_model_factory'"):
        RetrieveKL("from_collector")
    with pytest.raises(ValueError, match="exactly one of 'ref_model' and 'ref_model_factory'"):
        RetrieveKL("from_collector", make_reference(), ref_model_factory=make_reference)


def test_a_reference_in_a_ray_actor_without_ray_says_what_to_install(make_reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "vllm_kl.transforms.ray_scorer", raising=False)
    with pytest.raises(OptionError, match=r"needs Ray: pip install 'vllm-kl\[ray\]'"):
        RetrieveKL("from_collector", ref_model_factory=make_reference, service_backend="ray")


def test_an_error_names_the_sample_of_the_batch_not_the_sequence_that_was_sent(make_gen, make_reference):
    """Samples 0 and 1 keep no token, and are not sent."""
    td = batches.ids_batch([[5, 6], [5, 6], [5, 6, 100_000]], [2, 2, 2])
    for model in (make_gen("vllm"), make_gen("transformers"), make_reference()):
        with pytest.raises(InputError, match="^sample 2, token 2: id 100000 is outside the vocabulary"):
            RetrieveLogProb(model)(td)


def test_two_temperatures_are_refused(make_gen, half, ref_scorer):
    with pytest.raises(OptionError, match=r"softmax\(logits / 1\), the other's of softmax\(logits / 0.5\)"):
        RetrieveKL(make_gen("vllm"), half)
    ref_scorer.temperature = 1.0
    transform = RetrieveKL(make_gen("vllm"), half)
    ref_scorer.temperature = 0.5  # later
    with pytest.raises(OptionError, match="Give both one temperature"):
        transform(batches.ids_batch([[5, 6, 7]], [2]))


def test_two_sides_of_one_engine_are_told_apart_by_their_adapters(lora_llm, lora_requests, tokenizer):
    base, adapted = (
        VLLMReference(VLLMScorer(lora_llm, lora_request=r), tokenizer) for r in lora_requests[:2]
    )
    options = {
        "tokenizer": tokenizer,
        "input_mode": "tokens",
        "generate": False,
        "pad_output": base.pad_output,
    }
    policy = LoRAWrapper(lora_llm, lora_request=lora_requests[1], **options)
    check_two_models(policy, base)
    # An adapter may be bound to its engine's generate.
    check_two_models(vLLMWrapper(lora_llm, **options), base)
    with pytest.raises(OptionError, match="both sides are adapter 1 on one engine: the KL would be 0"):
        check_two_models(policy, adapted)


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
