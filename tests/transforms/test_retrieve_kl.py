"""The transforms on batches: sides, layouts, masks, rewards, specs, and traps of TorchRL's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer, Unbounded
from torchrl.modules.llm import TransformersWrapper, vLLMWrapper

from tests import batches, oracle
from tests.oracle import KL_TOLERANCE, LOG_PROB_TOLERANCE
from vllm_kl import FromCollector, KLComputation, RetrieveKL, RetrieveLogProb
from vllm_kl.demo.task import make_tokenizer
from vllm_kl.errors import CollectorError, InputError, MissingLogProbError, OptionError

PAD, EOS = 256, 258
# EOS and pad ids inside prompts and responses; responses of one token and of none; an EOS as first token.
SEQUENCES = [[5, EOS, 9, PAD, 7, EOS], [EOS, 2, 3], [PAD, PAD, 4, 8, EOS, 16, 23], [11, 12]]
PROMPTS = [2, 2, 3, 2]
KEEP = [[t >= p for t in range(len(s))] for s, p in zip(SEQUENCES, PROMPTS, strict=True)]


@pytest.fixture
def truth(policy_oracle, ref_oracle):
    """The KL of every sample, unpadded, float64."""
    return [oracle.kl(policy_oracle, ref_oracle, s, k) for s, k in zip(SEQUENCES, KEEP, strict=True)]


def rows(td, key):
    return td.get(key, as_list=True)


def assert_rows(got, want, tolerance=KL_TOLERANCE):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), w, rtol=0, atol=tolerance)


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
    def recorded(self, policy_oracle):
        """A batch with the policy's recorded log-probs: NaN on prompts, as TorchRL leaves them."""
        values = [policy_oracle.log_probs(s) for s in SEQUENCES]
        full = [
            torch.tensor([v if k else float("nan") for v, k in zip(*vk, strict=True)])
            for vk in zip(values, KEEP, strict=True)
        ]
        td = batches.ids_batch(SEQUENCES, PROMPTS, extra={("log_probs", "full"): full})
        td["next"] = lazy_stack([TensorDict(reward=torch.zeros(1, 1)) for _ in SEQUENCES])
        return td

    def test_on_a_replay_buffer_the_gen_side_is_what_was_stored(self, make_reference, policy_oracle, truth):
        buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=4)
        buffer.append_transform(RetrieveKL("from_collector", make_reference()), invert=True)
        buffer.extend(self.recorded(policy_oracle))
        assert_rows(rows(buffer[:], ("next", "kl_penalty")), truth)

    def test_on_a_plain_batch_the_gen_side_is_what_was_stored(self, make_reference, policy_oracle, truth):
        td = RetrieveKL(FromCollector("reuse"), make_reference())(self.recorded(policy_oracle))
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
        td = self.recorded(policy_oracle)
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
        assert_rows(rows(transform(self.recorded(policy_oracle)), ("next", "kl_penalty")), truth)
        with pytest.raises(OptionError, match="cannot be pickled.*ref_model_factory.*use_ray_service"):
            pickle.dumps(transform)

    def test_an_entry_that_only_some_samples_have_is_refused(self, make_reference, policy_oracle):
        td = self.recorded(policy_oracle)
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


class TestRetrieveLogProb:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_model_that_gives_no_number_is_an_error(self, policy_model, tokenizer, value):
        broken = copy.deepcopy(policy_model)
        with torch.no_grad():
            broken.lm_head.weight[9] = value
        gen = TransformersWrapper(broken, tokenizer=tokenizer, generate=False)
        with pytest.raises(
            MissingLogProbError, match="log-probs: sample 0, token 2 of 6 is kept by the mask"
        ):
            RetrieveLogProb(gen)(batches.ids_batch(SEQUENCES, PROMPTS))

    def test_ids_that_a_transformers_model_does_not_have_are_refused(self, make_gen):
        with pytest.raises(
            InputError, match=r"sample 0, token 2: id 400 is outside the vocabulary \[0, 259\)"
        ):
            RetrieveLogProb(make_gen("transformers"))(batches.ids_batch([[1, 2, 400]], [1]))

    @pytest.mark.parametrize("kind", ["transformers", "vllm"])
    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    def test_agrees_with_float64(self, make_gen, policy_oracle, kind, pad_output):
        td = batches.ids_batch(SEQUENCES, PROMPTS)
        assert RetrieveLogProb(make_gen(kind, pad_output=pad_output))(td) is td
        want = [policy_oracle.masked(s, k) for s, k in zip(SEQUENCES, KEEP, strict=True)]
        got = rows(td, ("log_probs", "full"))
        assert_rows([row[-len(s) :] for row, s in zip(got, SEQUENCES, strict=True)], want, LOG_PROB_TOLERANCE)

    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    @pytest.mark.parametrize(
        ("mode", "assistant_only"),
        [("history", True), ("history", False), ("text", False), ("tokens", False)],
    )
    def test_every_input_mode_agrees_with_float64(
        self, make_reference, ref_oracle, tokenizer, mode, assistant_only, pad_output
    ):
        if mode == "history":
            td = batches.history_batch()
            rendered = [
                tokenizer.apply_chat_template(
                    c, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                )
                for c in batches.CHATS
            ]
            ids, masks = [r["input_ids"] for r in rendered], [r["assistant_masks"] for r in rendered]
        else:
            td = batches.text_batch() if mode == "text" else batches.ids_batch(SEQUENCES)
            ids, masks = (tokenizer(batches.TEXTS)["input_ids"] if mode == "text" else SEQUENCES), None
        transform = RetrieveLogProb(
            make_reference(input_mode=mode, pad_output=pad_output), assistant_only=assistant_only
        )
        got = rows(transform(td), ("ref_log_probs", "full"))
        keep = masks if assistant_only else [[t > 0 for t in range(len(s))] for s in ids]
        want = [ref_oracle.masked(s, k) for s, k in zip(ids, keep, strict=True)]
        assert_rows([row[-len(s) :] for row, s in zip(got, ids, strict=True)], want, LOG_PROB_TOLERANCE)

    def test_text_is_tokenized_once_for_both_sides(self, make_gen, make_reference, tokenizer, monkeypatch):
        calls = []
        render = type(tokenizer).apply_chat_template
        monkeypatch.setattr(
            type(tokenizer),
            "apply_chat_template",
            lambda *a, **k: calls.append(k["tokenize"]) or render(*a, **k),
        )
        RetrieveKL(make_gen("transformers"), make_reference())(batches.history_batch())
        # One call more than chats: a dialog of plain words, which shows what ends a turn.
        assert calls.count(True) == len(batches.CHATS) + 1

    def test_writes_where_it_is_told(self, make_gen):
        td = RetrieveLogProb(make_gen("transformers"), log_probs_full_key=("mine", "full"))(
            batches.ids_batch(SEQUENCES, PROMPTS)
        )
        assert ("mine", "full") in td.keys(True)
        with pytest.warns(UserWarning, match="not a tuple that ends with 'full'"):
            RetrieveLogProb(make_gen("transformers"), log_probs_full_key="mine")

    def test_a_stored_assistant_mask_is_used_as_it_is(self, make_gen, policy_oracle):
        keep = [[False, True, False, False, True, True], [False, False, True], [False] * 7, [False, True]]
        td = RetrieveLogProb(make_gen("transformers"))(batches.ids_batch(SEQUENCES, assistant=keep))
        want = [policy_oracle.masked(s, k) for s, k in zip(SEQUENCES, keep, strict=True)]
        assert_rows(rows(td, ("log_probs", "full")), want, LOG_PROB_TOLERANCE)


class TestKLComputation:
    def data(self, gen, ref, **extra):
        full = {"gen": TensorDict(full=gen, batch_size=2), "ref": TensorDict(full=ref, batch_size=2)}
        return TensorDict(next=TensorDict(**full, **extra, batch_size=2), batch_size=2)

    def transform(self, **kwargs):
        return KLComputation(("gen", "full"), ("ref", "full"), **kwargs)

    def test_dense(self):
        gen, ref = -torch.rand(2, 3), -torch.rand(2, 3)
        td = self.transform(coeff=2.0)(self.data(gen, ref, reward=torch.ones(2, 1)))
        torch.testing.assert_close(td["next", "kl_penalty"], gen - ref)
        torch.testing.assert_close(td["next", "reward"], 1 - 2 * (gen - ref)[..., None])

    def test_missing_on_one_side_only_is_an_error(self):
        gen, ref = -torch.ones(2, 3), -torch.ones(2, 3) * 2
        gen[:, 0] = float("nan")
        ref[0, 0], ref[1, 0] = float("nan"), 0.0  # 0.0: what RetrieveLogProb writes outside its mask
        assert self.transform()(self.data(gen, ref))["next", "kl_penalty"].tolist() == [[0, 1, 1]] * 2
        ref[1, 2] = float("nan")
        with pytest.raises(MissingLogProbError, match="ref_log_probs: sample 1, token 2 of 3"):
            self.transform()(self.data(gen, ref))

    def test_it_follows_a_retrieve_log_prob(self, make_reference, policy_oracle, truth):
        td = TestWhereTorchRLsRecipesPutIt().recorded(policy_oracle).exclude("next")
        td = KLComputation()(RetrieveLogProb(make_reference())(td))
        assert_rows(rows(td, "kl_penalty"), truth)

    def test_missing_entries_are_named(self):
        td = TensorDict(next=TensorDict(x=torch.zeros(2), batch_size=2), batch_size=2)
        with pytest.raises(
            InputError, match=r"Log-probs not found: expected \('gen', 'full'\) and \('ref', 'full'\)"
        ):
            self.transform()(td)

    def test_sides_of_different_lengths_are_refused_by_sample(self):
        with pytest.raises(InputError, match="Sample 0 has different shapes"):
            self.transform()(self.data(torch.zeros(2, 3), torch.zeros(2, 4)))
