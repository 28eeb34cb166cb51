"""The transforms on batches: sides, layouts, masks, rewards, specs, and traps of TorchRL's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer, Unbounded
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper

from tests import batches, oracle
from tests.oracle import KL_TOLERANCE
from tests.transforms.helpers import EOS, PAD, PROMPTS, SEQUENCES, assert_rows, recorded_batch, rows
from vllm_kl import FromCollector, RetrieveKL, RetrieveLogProb
from vllm_kl.demo.task import make_tokenizer
from vllm_kl.errors import CollectorError, InputError, OptionError


class TestRetrieveKL:
    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    @pytest.mark.parametrize("kind", ["transformers", "vllm"])
    def test_mixed_sides_agree_with_float64_whatever_ids_are_inside(
        self, make_gen, make_reference, truth, kind, pad_output
    ):
        transform = RetrieveKL(make_gen(kind, pad_output=pad_output), make_reference(pad_output=pad_output))
        td = transform(batches.ids_batch(SEQUENCES, PROMPTS))
        kl = td.get("kl_penalty") if pad_output else None
        if pad_output:
            assert kl.shape == (4, 7)
            assert_rows([row[-len(s) :] for row, s in zip(kl, SEQUENCES, strict=True)], truth)
        else:
            assert_rows(rows(td, "kl_penalty"), truth)

    def test_dense_batches_keep_their_columns(self, make_gen, make_reference, truth):
        td = batches.dense_batch(SEQUENCES, PROMPTS, PAD)
        RetrieveKL(make_gen("transformers", pad_output=True), make_reference(pad_output=True))(td)
        mask, attention = td["masks", "all_assistant_mask"], td["masks", "all_attention_mask"]
        assert td["kl_penalty"].shape == td["tokens", "full"].shape
        assert_rows([kl[real] for kl, real in zip(td["kl_penalty"], attention, strict=True)], truth)
        for key in ("kl_penalty", ("log_probs", "full"), ("ref_log_probs", "full")):
            assert (td.get(key)[~mask] == 0).all()
            assert (td.get(key)[mask] != 0).all()

    def test_pad_equal_to_eos_is_ordinary(self, policy_model, ref_scorer, make_reference, truth):
        tokenizer = make_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        gen = TransformersWrapper(policy_model, tokenizer=tokenizer, generate=False, pad_output=True)
        ref = make_reference(pad_output=True)
        ref.tokenizer = tokenizer
        td = RetrieveKL(gen, ref)(batches.dense_batch(SEQUENCES, PROMPTS, EOS))
        real = td["masks", "all_attention_mask"]
        assert_rows([kl[m] for kl, m in zip(td["kl_penalty"], real, strict=True)], truth)

    def test_identical_models_give_zero(self, make_gen, policy_llm, tokenizer):
        ref = vLLMWrapper(policy_llm, tokenizer=tokenizer, generate=False, log_probs_key="ref_log_probs")
        td = RetrieveKL(make_gen("vllm"), ref)(batches.ids_batch(SEQUENCES, PROMPTS))
        assert all((row == 0).all() for row in rows(td, "kl_penalty"))
        sides = [rows(td, (key, "full")) for key in ("log_probs", "ref_log_probs")]
        for sampled, scored, prompt in zip(*sides, PROMPTS, strict=True):
            assert torch.equal(sampled, scored)
            assert (sampled[prompt:] != 0).all()

    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    def test_all_tokens_keeps_every_token_but_the_first(
        self, make_gen, make_reference, policy_oracle, ref_oracle, pad_output
    ):
        transform = RetrieveKL(
            make_gen("transformers", pad_output=pad_output, input_mode="tokens"),
            make_reference(pad_output=pad_output, input_mode="tokens"),
            assistant_only=False,
            padding_side="right",
        )
        td = transform(batches.ids_batch(SEQUENCES))
        want = [oracle.kl(policy_oracle, ref_oracle, s, [t > 0 for t in range(len(s))]) for s in SEQUENCES]
        assert_rows([row[: len(s)] for row, s in zip(rows(td, "kl_penalty"), SEQUENCES, strict=True)], want)

    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    @pytest.mark.parametrize("estimator", ["k1", "k3"])
    def test_two_chats_assistant_only_as_in_torchrls_documentation(
        self, make_gen, make_reference, policy_oracle, ref_oracle, tokenizer, pad_output, estimator
    ):
        transform = RetrieveKL(
            gen_model=make_gen("transformers", pad_output=pad_output, log_probs_key="gen_log_probs"),
            ref_model=make_reference(pad_output=pad_output),
            assistant_only=True,
            tokenizer=tokenizer,
            estimator=estimator,
        )
        data = batches.history_batch(with_next=True)
        result = transform(data)
        kl = result["next"].get("kl_penalty", as_list=True)
        for i, chat in enumerate(batches.CHATS):
            rendered = tokenizer.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            want = oracle.kl(policy_oracle, ref_oracle, rendered["input_ids"], rendered["assistant_masks"])
            if estimator == "k3":
                want = torch.expm1(-want) + want
            # k3 grows like exp: its error grows with it.
            torch.testing.assert_close(kl[i][-len(want) :].double(), want, rtol=1e-4, atol=KL_TOLERANCE)

    def test_reward_minus_kl_is_one_value_per_token(self, make_gen, make_reference, truth):
        td = batches.ids_batch(
            SEQUENCES, PROMPTS, extra={"reward": [torch.full((1, 1), float(i)) for i in range(4)]}
        )
        RetrieveKL(make_gen("transformers"), make_reference(), coeff=0.5)(td)
        for i, (reward, kl) in enumerate(zip(rows(td, "reward"), truth, strict=True)):
            assert reward.shape == (len(kl), 1)
            torch.testing.assert_close(reward[:, 0].double(), i - 0.5 * kl, rtol=0, atol=KL_TOLERANCE)

    def test_add_to_reward_false_leaves_the_reward(self, make_gen, make_reference):
        td = batches.ids_batch(SEQUENCES, PROMPTS, extra={"reward": [torch.ones(1, 1)] * 4})
        RetrieveKL(make_gen("transformers"), make_reference(), add_to_reward=False)(td)
        assert td["reward"].shape == (4, 1, 1)

    def test_detach_leaves_no_graph_and_false_keeps_it(self, make_gen, make_reference, policy_model):
        for detach in (True, False):
            td = RetrieveKL(make_gen("transformers"), make_reference(), detach=detach)(
                batches.ids_batch(SEQUENCES, PROMPTS)
            )
            assert rows(td, "kl_penalty")[0].requires_grad is not detach
        rows(td, "kl_penalty")[0].sum().backward()
        assert policy_model.lm_head.weight.grad.abs().sum() > 0
        policy_model.zero_grad(set_to_none=True)

    def test_factories_make_the_models(self, make_gen, make_reference, truth):
        transform = RetrieveKL(
            gen_model_factory=lambda: make_gen("transformers"), ref_model_factory=make_reference
        )
        assert_rows(rows(transform(batches.ids_batch(SEQUENCES, PROMPTS)), "kl_penalty"), truth)

    @pytest.mark.parametrize("shape", [(), (2, 2)])
    def test_any_number_of_batch_dimensions(self, make_gen, make_reference, shape, truth):
        td = batches.ids_batch(SEQUENCES, PROMPTS)
        td = td[0] if shape == () else td.reshape(2, 2)
        out = RetrieveKL(make_gen("transformers"), make_reference())(td)
        assert out.batch_size == torch.Size(shape)
        first = out["kl_penalty"] if shape == () else out[0, 0]["kl_penalty"]
        assert_rows([first], truth[:1])


class TestWhereTorchRLsRecipesPutIt:
    def test_on_a_replay_buffer_the_gen_side_is_what_was_stored(self, make_reference, policy_oracle, truth):
        buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=4)
        buffer.append_transform(RetrieveKL("from_collector", make_reference()), invert=True)
        buffer.extend(recorded_batch(policy_oracle))
        assert_rows(rows(buffer[:], ("next", "kl_penalty")), truth)

    def test_on_a_plain_batch_the_gen_side_is_what_was_stored(self, make_reference, policy_oracle, truth):
        td = RetrieveKL(FromCollector("reuse"), make_reference())(recorded_batch(policy_oracle))
        assert_rows(rows(td, ("next", "kl_penalty")), truth)
        assert_rows([-r[:, 0] for r in rows(td, ("next", "reward"))], truth)

    def test_without_a_collector_it_says_what_is_missing_and_what_to_pass(self, make_reference):
        td = batches.ids_batch(SEQUENCES, PROMPTS)
        with pytest.raises(
            CollectorError, match=r"(?s)no \('log_probs', 'full'\), and there is no collector.*gen_model="
        ):
            RetrieveKL("from_collector", make_reference())(td)
        with pytest.raises(CollectorError, match="gen_log_probs='reuse', but the batch has no"):
            RetrieveKL("from_collector", make_reference(), gen_log_probs="reuse")(td)
        with pytest.raises(CollectorError, match="from_collector: there is no collector"):
            RetrieveKL("from_collector", make_reference(), gen_log_probs="rescore")(td)

    def test_a_recorded_nan_on_a_kept_token_is_not_reused(self, make_reference, policy_oracle):
        td = recorded_batch(policy_oracle)
        td[2]["log_probs", "full"][5] = float("nan")
        before = td.clone()
        with pytest.raises(
            CollectorError, match=r"sample 2, token 5 of 7 is kept by the mask but its value is nan"
        ):
            RetrieveKL("from_collector", make_reference())(td)
        assert set(td.keys(True, True)) == set(before.keys(True, True))  # as it was

    def test_specs_announce_every_key_that_is_written(self, make_reference):
        transform = RetrieveKL("from_collector", make_reference())
        spec = transform.transform_observation_spec(Composite(shape=(3,)))
        announced = {("log_probs", "full"), ("ref_log_probs", "full"), "kl_penalty", "kl_mask", "ref_version"}
        assert set(spec.keys(True, True)) == announced
        reward = transform.transform_reward_spec(Composite(reward=Unbounded(shape=(3, 1, 1)), shape=(3,)))
        assert reward["reward"].shape == (3, -1, 1)
        spec = RetrieveLogProb(make_reference()).transform_observation_spec(Composite(shape=(3,)))
        assert set(spec.keys(True, True)) == {("ref_log_probs", "full"), "kl_mask", "ref_version"}

    def test_zeros_that_we_wrote_never_pass_for_recorded_log_probs(
        self, make_reference, policy_oracle, ref_oracle
    ):
        values = [torch.tensor(policy_oracle.log_probs(s)) for s in SEQUENCES]
        td = batches.ids_batch(SEQUENCES, PROMPTS, extra={("log_probs", "full"): values})
        RetrieveKL("from_collector", make_reference())(td)
        RetrieveKL("from_collector", make_reference(), assistant_only=False, kl_key="kl_all")(td)
        want = [oracle.kl(policy_oracle, ref_oracle, s, [t > 0 for t in range(len(s))]) for s in SEQUENCES]
        assert_rows(rows(td, "kl_all"), want)

    def test_a_recorded_zero_on_a_prompt_token_is_not_reused(self, make_reference, policy_oracle):
        values = [torch.tensor(policy_oracle.log_probs(s)) for s in SEQUENCES]
        values[2][1] = 0.0
        td = batches.ids_batch(SEQUENCES, PROMPTS, extra={("log_probs", "full"): values})
        with pytest.raises(
            CollectorError, match="of sample 2 is 0.0 at token 1, a prompt token that was not scored"
        ):
            RetrieveKL("from_collector", make_reference(), assistant_only=False)(td)

    def test_a_transform_can_be_copied_but_its_engine_is_not(self, make_reference, policy_oracle, truth):
        transform = copy.deepcopy(RetrieveKL("from_collector", make_reference()))
        assert_rows(rows(transform(recorded_batch(policy_oracle)), ("next", "kl_penalty")), truth)
        with pytest.raises(OptionError, match="cannot be pickled.*ref_model_factory.*service_backend='ray'"):
            pickle.dumps(transform)

    def test_an_entry_that_only_some_samples_have_is_refused(self, make_reference, policy_oracle):
        td = recorded_batch(policy_oracle)
        del td[1]["next"]["reward"]
        with pytest.raises(InputError, match="sample 1 has no reward, but other samples of the batch have"):
            RetrieveKL("from_collector", make_reference())(td)

    def test_a_plain_tensordict_gets_all_results_or_none(self, make_reference, policy_oracle):
        values = torch.tensor(policy_oracle.log_probs([5, 6, 7]))[None]
        td = TensorDict(
            tokens=TensorDict(prompt=torch.tensor([[5, 6]]), full=torch.tensor([[5, 6, 7]]), batch_size=1),
            log_probs=TensorDict(full=values, batch_size=1),
            batch_size=1,
        )
        out = RetrieveKL("from_collector", make_reference())(td)
        assert {"kl_penalty", "ref_log_probs"} <= set(out.keys())
        assert not {"kl_penalty", "ref_log_probs"} & set(td.keys())
