"""A policy's rows tell which weights generated them."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm import vLLMWrapper
from torchrl.modules.llm.policies import Text, Tokens
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.batches import history_batch
from vllm_kl import EnginePolicyVersion
from vllm_kl.batch.origins import GENERATED_BY, generated_by
from vllm_kl.transforms.watched_policy import watch
from vllm_kl.types import Origin
from vllm_kl.weights import engine_lock as lock_module
from vllm_kl.weights.live_weights import lock_of

PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
WITHIN_S = 60


def prompts(input_mode):
    if input_mode == "history":
        td = history_batch()
        td["history"].prompt = td["history"].full
        return td
    if input_mode == "text":
        return TensorDict(text=Text(prompt=["one", "and two"]), batch_size=2).to_lazystack(0)
    return lazy_stack([TensorDict(tokens=Tokens(prompt=torch.tensor(ids))) for ids in PROMPTS])


@pytest.fixture
def llm(policy_llm):
    """An engine whose weights are called version 3."""
    before = policy_llm.get_weight_version()
    lock_of(policy_llm.llm_engine).close_step()  # what other tests generated in this thread waits for nobody
    policy_llm.update_weight_version("3")
    yield policy_llm
    policy_llm.update_weight_version(before)


@pytest.fixture
def make_policy(tokenizer):
    def make(llm, input_mode="tokens", policy_type=vLLMWrapper, **kwargs):
        kwargs = {"generate_kwargs": {"max_new_tokens": 4, "ignore_eos": True}, **kwargs}
        policy = policy_type(
            llm, tokenizer=tokenizer, input_mode=input_mode, generate=True, pad_output=False, **kwargs
        )
        watch(policy)
        return policy

    return make


@pytest.mark.parametrize("input_mode", ["tokens", "text", "history"])
@pytest.mark.parametrize("inplace", [False, True, None])
def test_every_row_tells_the_version_that_generated_it(llm, make_policy, input_mode, inplace):
    policy = make_policy(llm, input_mode, inplace=inplace)
    assert watch(policy) is watch(policy)
    assert generated_by(policy(prompts(input_mode))) == [Origin(3), Origin(3)]
    llm.update_weight_version("4")
    assert generated_by(policy(prompts(input_mode))) == [Origin(4), Origin(4)]


def test_several_samples_of_a_prompt_tell_it_each(llm, make_policy):
    td = make_policy(llm, num_samples=3)(prompts("tokens"))
    assert td[GENERATED_BY, "version"].tolist() == [[3] * 3] * 2


def test_a_generation_that_straddles_an_update_is_of_two_versions(llm, make_policy, monkeypatch):
    engine = llm.llm_engine

    def generate(prompts, sampling_params, **_):
        """As ``LLM.generate`` does; others replace the weights when the second prompt is half done."""
        for i, prompt in enumerate(prompts):
            engine.add_request(
                str(i), prompt, sampling_params if i else SamplingParams(max_tokens=2, ignore_eos=True)
            )
        outputs = {}
        for step in range(20):
            outputs.update({output.request_id: output for output in engine.step() if output.finished})
            if step == 2:
                engine.set_weight_version("4")
        return [outputs[str(i)] for i in range(len(prompts))]

    monkeypatch.setattr(llm, "generate", generate)
    td = make_policy(llm, generate_kwargs={"max_new_tokens": 8, "ignore_eos": True})(prompts("tokens"))
    assert generated_by(td) == [Origin(3), Origin(3, 0, 4)]
    assert str(generated_by(td)[1]) == "versions 3 and 4"


def test_rows_that_another_thread_generated_tell_their_own_version(llm, make_policy):
    """``batching=True``: one thread generates for several; a thread that only waited knows older weights."""
    policy = make_policy(llm, batching=True, min_batch_size=2)
    rows = prompts("tokens").unbind(0)
    with ThreadPoolExecutor(2) as pool:
        for version in (3, 4, 5):
            llm.update_weight_version(str(version))
            waiting = [pool.submit(policy, row) for row in rows]
            told = [future.result(WITHIN_S)[GENERATED_BY, "version"].item() for future in waiting]
            assert told == [version] * 2


def test_weights_stay_until_each_thread_has_scored_what_one_generated_for_all(llm, make_policy):
    policy, lock = make_policy(llm, batching=True, min_batch_size=2), lock_of(llm.llm_engine)
    found, ended = [], threading.Event()

    def collect(row):
        lock.score_here()
        for _ in range(6):
            told = policy(row)[GENERATED_BY, "version"].item()
            time.sleep(random.uniform(0, 0.1))  # what an env does before it scores
            with lock:
                found.append((told, int(llm.get_weight_version())))
            lock.close_step()

    def push():
        pushes = 0
        while not ended.is_set():
            with lock.replacing():
                pushes += 1
                llm.update_weight_version(str(3 + pushes))
            time.sleep(0.02)
        return pushes

    began = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        pushing = pool.submit(push)
        collecting = [pool.submit(collect, row) for row in prompts("tokens").unbind(0)]
        try:
            for thread in collecting:
                thread.result(WITHIN_S)
        finally:
            ended.set()
        assert pushing.result(WITHIN_S) > 3
    assert time.monotonic() - began < lock_module.AT_MOST_S  # nobody waited for the time limit
    assert [told for told, _ in found] == [serves for _, serves in found]
    assert len({told for told, _ in found}) > 3


@pytest.mark.parametrize("batching", [False, True])
def test_a_copy_of_a_policy_is_watched_as_itself(llm, make_policy, batching):
    class Other:
        """An engine elsewhere, whose weights nobody counts."""

        def generate(self, *args, **kwargs):
            return llm.generate(*args, **kwargs)

    policy = make_policy(llm, batching=batching)
    twin = copy.copy(policy)
    twin.model = Other()
    llm.update_weight_version("default")
    assert type(twin) is vLLMWrapper
    # No transform has seen it, and its engine is its own.
    assert generated_by(twin(prompts("tokens"))) is None
    assert watch(twin) is not watch(policy)
    assert generated_by(twin(prompts("tokens"))) == [Origin(None), Origin(None)]
    assert generated_by(policy(prompts("tokens"))) == [Origin(0), Origin(0)]
    assert watch(twin) is watch(twin)


def test_a_new_version_of_a_watched_policy_is_watched_as_itself(llm, make_policy):
    policy = make_policy(llm)
    new = policy.get_new_version(num_samples=None, generate_kwargs={"max_new_tokens": 2})
    assert generated_by(new(prompts("tokens"))) == [Origin(3), Origin(3)]
    assert watch(new) is not watch(policy)


@pytest.mark.parametrize("library", [pickle, cloudpickle])
def test_a_watched_policy_travels_as_what_it_is(llm, make_policy, library):
    policy = make_policy(llm)
    policy.model, policy.tokenizer = "an actor's handle", None
    twin = pickle.loads(library.dumps(policy))
    assert type(twin) is vLLMWrapper
    assert twin.model == "an actor's handle"
    assert watch(twin) is not watch(policy)


def test_rows_tell_the_adapter_of_their_own_request(lora_llm, lora_paths, make_policy, monkeypatch):
    adapters = [LoRARequest(f"of-rows-{i}", 60 + i, str(path)) for i, path in enumerate(lora_paths)]

    class PerRow(vLLMWrapper):
        def _call_generate(self, *args, **kwargs):
            return super()._call_generate(*args, lora_request=adapters, **kwargs)

    td = make_policy(lora_llm, policy_type=PerRow)(prompts("tokens"))
    assert [origin.adapter for origin in generated_by(td)] == [60, 61]
    bound = functools.partial(lora_llm.generate, lora_request=adapters[1])
    monkeypatch.setattr(lora_llm, "generate", bound)
    td = make_policy(lora_llm)(prompts("tokens"))
    assert [origin.adapter for origin in generated_by(td)] == [61, 61]


def test_threads_that_share_a_policy_have_sampled_with_their_own_parameters(llm, make_policy):
    policy = make_policy(llm)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(policy, prompts("tokens"), temperature=1.0, max_tokens=2).result(WITHIN_S)
        policy(prompts("tokens"), temperature=0.5, max_tokens=2)
        assert pool.submit(lambda: watch(policy).last.temperature).result(WITHIN_S) == 1.0
    assert watch(policy).last.temperature == 0.5
    assert watch(policy).has_varied


def test_a_policy_that_calls_its_engine_in_parts_tells_the_origin_of_each_row(llm, make_policy):
    class OneByOne(vLLMWrapper):
        def _from_vllm_generate_tokens(self, td, sampling_params, out):
            call, first = self._call_generate, []

            def in_parts(prompt_token_ids, **kwargs):
                llm.update_weight_version(str(5 + len(first)))
                first.append(call(prompt_token_ids=prompt_token_ids[:1], **kwargs))
                llm.update_weight_version(str(5 + len(first)))
                return first[0] + call(prompt_token_ids=prompt_token_ids[1:], **kwargs)

            self._call_generate = in_parts
            try:
                return super()._from_vllm_generate_tokens(td, sampling_params, out)
            finally:
                self._call_generate = call

    assert generated_by(make_policy(llm, policy_type=OneByOne)(prompts("tokens"))) == [Origin(5), Origin(6)]


def test_an_engine_whose_weights_nobody_counts_is_of_no_version(llm, make_policy):
    class Elsewhere:
        """As TorchRL's ``AsyncVLLM``: it generates, and its engine is out of reach."""

        def generate(self, *args, **kwargs):
            return llm.generate(*args, **kwargs)

    policy = make_policy(llm)
    policy.model = Elsewhere()
    llm.update_weight_version("default")
    assert generated_by(policy(prompts("tokens"))) == [Origin(None), Origin(None)]
    llm.update_weight_version("6")
    assert generated_by(policy(prompts("tokens"))) == [Origin(6), Origin(6)]


def test_a_version_is_read_while_the_engine_generates(llm):
    tracker = EnginePolicyVersion(llm)
    with lock_of(llm.llm_engine), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: tracker.version).result(timeout=5) == 3
