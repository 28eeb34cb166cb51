"""The two sides of a KL: a model that cannot be one is refused, and an error names the batch's sample."""

from __future__ import annotations

import pytest
from torchrl.modules.llm import vLLMWrapper

from tests import batches
from vllm_kl import RetrieveKL, RetrieveLogProb
from vllm_kl.errors import InputError, OptionError


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
