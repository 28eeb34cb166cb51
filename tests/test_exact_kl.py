"""The exact KL over the vocabulary, of formulas and of real engines, against float64."""

from __future__ import annotations

import itertools
import math
import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.lora import lora_request
from tests.oracle import KL_TOLERANCE, exact_kl_of
from vllm_kl import LMHead, VLLMScorer, errors, kl_estimate
from vllm_kl.checks import check_can, check_kl, check_results
from vllm_kl.exact_kl import Side, check_device, common_vocab_size, exact_kl, groups
from vllm_kl.lifetime import SHARED_MEMORY
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult


def random_ids(seed, length, vocab=259):
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length)]


def made_head(seed, vocab_size, hidden_size, scale=1.0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    weight = spread * torch.randn(vocab_size, hidden_size, generator=generator)
    return LMHead(weight=weight, scale=scale, weight_version=0)


def made_rows(seed, num_rows, hidden_size):
    return torch.randn(num_rows, hidden_size, generator=torch.Generator().manual_seed(seed))


def in_float64(side, vocab_size):
    """Return the logits of a side, ``[N, V]`` float64."""
    weight = side.head.weight[:vocab_size].double()
    return side.head.scale * (side.hidden.double() @ weight.T) / side.temperature


class TestFormula:
    @pytest.mark.parametrize(
        ("num_rows", "vocab_size"), [(1, 1), (3, 50), (2, 4096), (2, 4097), (513, 300), (520, 9000)]
    )
    def test_it_agrees_with_float64_in_parts_of_rows_and_columns(self, num_rows, vocab_size):
        p = Side(made_head(0, vocab_size, 16), made_rows(1, num_rows, 16), 1.0)
        q = Side(made_head(2, vocab_size, 24, scale=0.5), made_rows(3, num_rows, 24), 0.8)
        found = exact_kl(p, q, vocab_size)
        assert found.shape == (num_rows,)
        assert found.dtype == torch.float32
        for n in {0, num_rows // 2, num_rows - 1}:
            a, b = (in_float64(side, vocab_size)[n].tolist() for side in (p, q))
            assert float(found[n]) == pytest.approx(exact_kl_of(a, b), abs=1e-5, rel=1e-6)

    @pytest.mark.parametrize("spread", [1e-3, 1.0, 8.0])
    def test_flat_and_peaked_distributions_keep_their_digits(self, spread):
        """With 8.0 the logits reach 100, and one token has nearly all the probability."""
        p = Side(made_head(0, 5000, 16, spread=spread), made_rows(1, 40, 16), 1.0)
        moved = p.hidden + 1e-2 * made_rows(4, 40, 16)
        for q in (Side(p.head, moved, 1.0), Side(made_head(5, 5000, 16, spread=spread), moved, 1.0)):
            a, b = in_float64(p, 5000).log_softmax(-1), in_float64(q, 5000).log_softmax(-1)
            want = (a.exp() * (a - b)).sum(-1)
            largest = max(float(in_float64(side, 5000).abs().max()) for side in (p, q))
            allowed = max(1e-6, 2e-6 * largest)  # float32 rounds the logits
            torch.testing.assert_close(exact_kl(p, q, 5000).double(), want, rtol=1e-6, atol=allowed)

    def test_a_constant_in_all_logits_changes_nothing(self):
        """Both models' logits are shifted, by different amounts: one feature is the same for all tokens."""
        p, q = (Side(made_head(s, 700, 8), made_rows(s + 10, 5, 8), 1.0) for s in range(2))
        for side, shift in ((p, 30.0), (q, -50.0)):
            side.head.weight[:, 0] = 1.0
            side.hidden[:, 0] = 0.0
            want = exact_kl(p, q, 700)
            side.hidden[:, 0] = shift
            torch.testing.assert_close(exact_kl(p, q, 700), want, rtol=1e-5, atol=3e-5)

    def test_a_model_is_at_0_from_itself_and_nothing_is_below(self):
        p = Side(made_head(0, 9000, 16), made_rows(1, 600, 16), 1.0)
        assert exact_kl(p, p, 9000).abs().max() == 0
        near = p._replace(hidden=p.hidden * (1 + 1e-7))
        assert exact_kl(p, near, 9000).min() >= 0

    def test_the_mean_of_k1_over_samples_comes_near(self):
        p = Side(made_head(0, 100, 8), made_rows(1, 1, 8), 1.0)
        q = Side(made_head(2, 100, 8), made_rows(3, 1, 8), 1.0)
        a, b = in_float64(p, 100)[0].log_softmax(-1), in_float64(q, 100)[0].log_softmax(-1)
        drawn = torch.multinomial(a.exp(), 200_000, True, generator=torch.Generator().manual_seed(0))
        k1 = (a - b)[drawn]
        assert abs(float(exact_kl(p, q, 100)) - float(k1.mean())) < 5 * float(k1.std()) / math.sqrt(len(k1))

    def test_only_the_first_tokens_are_compared(self):
        p = Side(made_head(0, 320, 16), made_rows(1, 4, 16), 1.0)
        q = Side(made_head(2, 300, 16), made_rows(3, 4, 16), 1.0)
        cut = [side._replace(head=made_head(s, n, 16)) for side, s, n in ((p, 0, 320), (q, 2, 300))]
        for side in cut:
            side.head.weight[290:] = -1e3 * side.head.weight[290:].sign()
        a, b = (in_float64(side, 290).log_softmax(-1) for side in (p, q))
        torch.testing.assert_close(
            exact_kl(*cut, 290).double(), (a.exp() * (a - b)).sum(-1), rtol=1e-6, atol=1e-5
        )

    def test_different_vocabularies_are_refused(self):
        sizes = [320, 300]
        with pytest.raises(errors.InputError, match=r"heads of 320 and 300 tokens.*pass vocab_size=300"):
            common_vocab_size(sizes)
        assert common_vocab_size(sizes, 300) == 300
        assert common_vocab_size([320, 320]) == 320
        for wrong in (0, -1, 301, True, 30.0, "30"):
            with pytest.raises(errors.InputError, match=f"vocab_size is {wrong!r}, expected 1 to 300"):
                common_vocab_size(sizes, wrong)

    def test_logits_of_an_lm_head_have_gradients(self):
        head, hidden = made_head(0, 300, 16, scale=0.5), made_rows(1, 4, 16).bfloat16().requires_grad_()
        logits = head.logits(hidden, slice(10, 20))
        torch.testing.assert_close(logits, 0.5 * hidden.float() @ head.weight[10:20].T)
        logits.sum().backward()
        assert hidden.grad.abs().sum() > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_a_trainer_has_set_for_its_own_products_changes_nothing(self, dtype):
        """Autocast to bfloat16 is off by 1e-3 nats, products that PyTorch may shorten by 4e-4."""
        p = Side(made_head(0, 3000, 512), made_rows(1, 8, 512), 5.0)
        q = p._replace(hidden=p.hidden + 0.05 * made_rows(2, 8, 512))
        p, q = (s._replace(head=replace(s.head, weight=s.head.weight.to(dtype))) for s in (p, q))
        want, logits = exact_kl(p, q, 3000), p.head.logits(p.hidden)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(exact_kl(p, q, 3000), want)
                again = p.head.logits(p.hidden)
            assert torch.get_float32_matmul_precision() == "medium"
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        finally:
            torch.set_float32_matmul_precision(before)
        assert again.dtype == torch.float32
        assert torch.equal(again, logits)

    def test_threads_put_the_settings_of_a_trainer_back(self):
        head, hidden = made_head(0, 500, 64), made_rows(1, 64, 64)
        want, wrong = head.logits(hidden), []

        def multiply():
            for _ in range(100):
                wrong.append(not torch.equal(head.logits(hidden), want))

        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            threads = [threading.Thread(target=multiply) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found = [b.matmul.fp32_precision for b in (torch.backends.cuda, torch.backends.mkldnn)]
        finally:
            torch.set_float32_matmul_precision(before)
        assert found == ["tf32", "bf16"]
        assert len(wrong) == 400
        assert not any(wrong)

    def test_a_setting_goes_on_following_the_general_one(self):
        head, hidden = made_head(0, 500, 64), made_rows(1, 64, 64)
        before, of_matmul = torch.backends.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        try:
            torch.backends.mkldnn.matmul.fp32_precision = "none"
            for general in ("tf32", "ieee"):
                torch.backends.fp32_precision = general
                head.logits(hidden)
                assert torch.backends.mkldnn.matmul.fp32_precision == general
        finally:
            torch.backends.fp32_precision = before
            torch.backends.mkldnn.matmul.fp32_precision = of_matmul

    def test_groups_have_all_sequences_once_and_fit_the_memory(self):
        rng = random.Random(0)
        for hidden_size in (64, 1024, 8192):
            rows = [rng.choice([0, 1, 500, 3000, 40_000]) for _ in range(200)]
            cut = list(groups(rows, hidden_size))
            assert [i for group in cut for i in range(200)[group]] == list(range(200))
            for group in cut:
                mine = rows[group]
                assert sum(mine) * hidden_size <= 1 << 25 or len([n for n in mine if n]) == 1
            for one, two in itertools.pairwise(cut):  # none is smaller than it must be
                assert (sum(rows[one]) + rows[two.start]) * hidden_size > 1 << 25
        assert list(groups([], 64)) == []

    @pytest.mark.parametrize("device", ["cuda:99", "nothing", 99, "meta", 1.5])
    def test_a_device_that_is_not_there_is_refused(self, device):
        with pytest.raises(errors.OptionError, match="cannot be used here"):
            check_device(device)
        assert check_device(None) == check_device("cpu") == torch.device("cpu")


class TestChecks:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_kl_that_is_no_number_is_refused_by_its_token(self, value):
        kl = [torch.tensor([0.1]), torch.tensor([0.2, value, 0.3])]
        message = r"sequence 6, token 8: the KL is (nan|inf) \(1 such tokens"
        with pytest.raises(errors.MissingLogProbError, match=message):
            check_kl(kl, [4, 7], first=5)
        check_kl(kl[:1], [4])

    def test_an_engine_that_does_not_tell_its_size_is_not_asked_for_hidden_states(self):
        info = EngineInfo(readout="pooling", vocab_size=9, max_sequence_len=None)
        with pytest.raises(errors.ReadoutUnavailableError, match="cannot return hidden states"):
            check_can(info, 1.0, hidden_states=True)
        check_can(replace(info, hidden_size=8), 1.0, hidden_states=True)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_hidden_states_are_finite(self, value):
        request = ScoreRequest(token_ids=np.array([1, 2, 3], np.int32), start=1, hidden_size=2)
        values = np.array([[-1.0, 7.0, -7.0], [-1.0, value, 0.0]], np.float32)
        with pytest.raises(
            errors.MissingLogProbError, match="sequence 4, token 2: .* instead of a hidden state"
        ):
            check_results({4: request}, [ScoreResult(values=values)])
        values[1, 1] = 7.0
        assert check_results({4: request}, [ScoreResult(values=values)])[0].shape == (2, 3)


@pytest.fixture(scope="module")
def policy_scorer(policy_path):
    """The policy's scorer. Its engine runs in its own process, and takes 32 tokens in a step."""
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 4}
    with VLLMScorer(str(policy_path), **options, **tiny.ENGINE_OPTIONS) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def group():
    """Sequences with a common prompt, longer than a step of the policy's engine, and their starts."""
    prompt = random_ids(1, 90)
    return [[*prompt, *random_ids(2 + i, 15 + 20 * i)] for i in range(3)] + [random_ids(9, 33)], [
        90,
        90,
        90,
        1,
    ]


def assert_kl(found, policy, reference, sequences, starts, temperature=1.0, atol=KL_TOLERANCE):
    for kl, ids, first in zip(found, sequences, starts, strict=True):
        a, b = ((oracle.logits(ids)[first - 1 : -1] / temperature).tolist() for oracle in (policy, reference))
        assert kl.dtype == torch.float32
        want = torch.tensor([exact_kl_of(*rows) for rows in zip(a, b, strict=True)], dtype=torch.float64)
        torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=atol)


class TestEngines:
    @pytest.mark.parametrize("temperature", [None, 0.6])
    def test_two_engines_agree_with_float64(
        self, policy_scorer, ref_scorer, policy_oracle, ref_oracle, group, temperature
    ):
        found = policy_scorer.exact_kl(ref_scorer, *group, temperature=temperature)
        assert_kl(found, policy_oracle, ref_oracle, *group, temperature=temperature or 1.0)
        back = ref_scorer.exact_kl(policy_scorer, *group, temperature=temperature)
        assert_kl(back, ref_oracle, policy_oracle, *group, temperature=temperature or 1.0)
        assert (torch.cat(found) - torch.cat(back)).abs().max() > 0.01

    def test_each_scorer_has_its_temperature(
        self, policy_scorer, ref_scorer, policy_oracle, ref_oracle, group
    ):
        policy_scorer.temperature = 0.5
        try:
            (found,) = policy_scorer.exact_kl(ref_scorer, group[0][:1], group[1][:1])
        finally:
            policy_scorer.temperature = 1.0
        rows = slice(group[1][0] - 1, -1)
        a, b = (oracle.logits(group[0][0])[rows] for oracle in (policy_oracle, ref_oracle))
        want = [exact_kl_of((x / 0.5).tolist(), y.tolist()) for x, y in zip(a, b, strict=True)]
        torch.testing.assert_close(found.tolist(), want, rtol=1e-5, atol=KL_TOLERANCE)

    def test_topk_is_below_and_reaches_it_with_all_tokens(self, policy_scorer, ref_scorer, group):
        sequences, starts = group
        found = torch.cat(policy_scorer.exact_kl(ref_scorer, sequences, starts)).double()
        everything = torch.ones(1, len(found), dtype=torch.bool)
        below = []
        for k in (4, 64, policy_scorer.info.vocab_size):
            best = policy_scorer.score_topk(sequences, k, starts)
            theirs = ref_scorer.score_ids(sequences, [b.token_ids for b in best], starts)
            p, q = (torch.cat(rows)[None] for rows in ([b.log_probs for b in best], theirs))
            below.append(kl_estimate(p, q, everything, estimator="topk")[0].double())
            assert (below[-1] <= found + KL_TOLERANCE).all()
        torch.testing.assert_close(below[-1], found, rtol=1e-4, atol=KL_TOLERANCE)
        assert (found - below[0]).max() > 0.1

    def test_shared_prompts_chunks_and_groups_change_nothing(
        self, policy_scorer, ref_scorer, policy_oracle, ref_oracle, group, monkeypatch
    ):
        """The first two sequences are one group, and errors count through the groups."""
        monkeypatch.setattr("vllm_kl.exact_kl._MAX_HIDDEN", 50 * 64)
        num_rows = [len(ids) - first for ids, first in zip(*group, strict=True)]
        assert len(list(groups(num_rows, 64))) == 3
        policy_scorer.share_prefix = False
        try:
            alone = policy_scorer.exact_kl(ref_scorer, *group)
        finally:
            policy_scorer.share_prefix = True
        for found in (alone, policy_scorer.exact_kl(ref_scorer, *group, progress=True)):
            assert_kl(found, policy_oracle, ref_oracle, *group)
        score = ref_scorer._engine.score

        def score_the_last_wrong(requests, **options):
            results = score(requests, **options)
            return [
                replace(result, values=np.full_like(result.values, np.nan)) if request.start == 1 else result
                for request, result in zip(requests, results, strict=True)
            ]

        monkeypatch.setattr(ref_scorer._engine, "score", score_the_last_wrong)
        with pytest.raises(errors.MissingLogProbError, match="sequence 3, token 1: "):
            policy_scorer.exact_kl(ref_scorer, *group)

    @pytest.mark.nightly
    def test_an_adapter_against_its_base(
        self, policy_scorer, policy_path, policy_oracle, lora_paths, lora_oracles, group
    ):
        adapter = lora_request(lora_paths[0], "adapter", 1)
        with VLLMScorer(str(policy_path), lora_request=adapter, **tiny.ENGINE_OPTIONS) as adapted:
            found = adapted.exact_kl(policy_scorer, *group)
        assert_kl(found, lora_oracles[1], policy_oracle, *group)

    def test_new_weights_have_a_new_head(self, policy_scorer, policy_path, ref_scorer, ref_path, group):
        try:
            version = policy_scorer.refresh(str(ref_path))
            assert policy_scorer.lm_head().weight_version == version
            assert torch.cat(policy_scorer.exact_kl(ref_scorer, *group)).abs().max() < KL_TOLERANCE
        finally:
            policy_scorer.refresh(str(policy_path))
        assert torch.cat(policy_scorer.exact_kl(ref_scorer, *group)).max() > 0.1

    def test_weights_that_change_in_between_are_told(
        self, policy_scorer, ref_scorer, policy_path, group, monkeypatch
    ):
        read = policy_scorer.lm_head

        def read_and_refresh():
            head = read()
            policy_scorer.refresh(str(policy_path))
            return head

        monkeypatch.setattr(policy_scorer, "lm_head", read_and_refresh)
        with pytest.raises(
            errors.WeightsError, match=r"weights changed after the LM head was read, from version \d+ to"
        ):
            policy_scorer.exact_kl(ref_scorer, *group)

    def test_hidden_states_and_head_give_the_models_distribution(self, ref_scorer, ref_oracle, group):
        head = ref_scorer.lm_head()
        assert head.weight.shape == (ref_scorer.info.vocab_size, ref_scorer.info.hidden_size)
        assert head.weight_version == ref_scorer.weight_version
        for hidden, ids, first in zip(ref_scorer.hidden_states(*group), *group, strict=True):
            want = ref_oracle.logits(ids)[first - 1 : -1]
            torch.testing.assert_close(head.logits(hidden).double(), want, rtol=0, atol=1e-4)

    def test_sequences_that_come_twice_or_have_nothing(self, policy_scorer, ref_scorer):
        twice = policy_scorer.exact_kl(ref_scorer, [[5, 6, 7], [5, 6], [5, 6, 7]], [1, 2, 1])
        assert [len(kl) for kl in twice] == [2, 0, 2]
        assert torch.equal(twice[0], twice[2])
        assert policy_scorer.exact_kl(ref_scorer, []) == []
        assert ref_scorer.hidden_states([[5, 6]], 2)[0].shape == (0, ref_scorer.info.hidden_size)

    def test_a_head_of_other_weights_is_refused_with_hidden_states(self, policy_scorer):
        head = policy_scorer.lm_head()
        assert len(policy_scorer.hidden_states([[5, 6, 7]], head=head)) == 1
        old = replace(head, weight_version=head.weight_version + 1)
        with pytest.raises(errors.WeightsError, match="weights changed after the LM head was read"):
            policy_scorer.hidden_states([[5, 6, 7]], head=old)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"token_ids": [[5, 6], []]}, errors.InputError, "sequence 1 is empty"),
            ({"token_ids": [[5, 999]]}, errors.InputError, "id 999 is outside the vocabulary"),
            ({"start": 3}, errors.InputError, "start is 3"),
            ({"temperature": 0}, errors.InputError, "temperature must be positive"),
            ({"temperature": math.nan}, errors.InputError, "temperature must be positive"),
            ({"vocab_size": 260}, errors.InputError, "vocab_size is 260, expected 1 to 259"),
            ({"device": "cuda:99"}, errors.OptionError, "device='cuda:99' cannot be used here"),
            ({"reference": "my-model"}, errors.OptionError, "reference is a str: make it a VLLMScorer"),
        ],
    )
    def test_bad_input_is_refused_before_anything_is_sent(
        self, policy_scorer, ref_scorer, monkeypatch, arguments, error, message
    ):
        def fail(*_, **__):
            raise AssertionError("the engine was asked")

        for scorer in (policy_scorer, ref_scorer):
            monkeypatch.setattr(scorer._engine, "read_head", fail)
            monkeypatch.setattr(scorer._engine, "score", fail)
        with pytest.raises(error, match=message):
            policy_scorer.exact_kl(**{"reference": ref_scorer, "token_ids": [[5, 6]], **arguments})

    def test_a_head_that_cannot_be_written_is_told_and_the_engine_goes_on(self, policy_scorer, monkeypatch):
        monkeypatch.setattr("vllm_kl.engines.process.new_folder", lambda size: Path("/proc/none"))
        with pytest.raises(errors.EngineError, match="the LM head could not be written to /proc/none: .*"):
            policy_scorer.lm_head()
        assert len(policy_scorer.score([[5, 6, 7]])) == 1

    def test_nothing_is_left_in_shared_memory(self, policy_scorer):
        before = set(SHARED_MEMORY.iterdir())
        head = policy_scorer.lm_head()
        assert set(SHARED_MEMORY.iterdir()) <= before
        assert torch.equal(head.weight, policy_scorer.lm_head().weight)  # mapped: its file has no name

    def test_a_shared_engine_is_refused(self, policy_llm, ref_scorer):
        shared = VLLMScorer(policy_llm)
        for p, q in ((shared, ref_scorer), (ref_scorer, shared)):
            with pytest.raises(errors.ReadoutUnavailableError, match="cannot return hidden states"):
                p.exact_kl(q, [[5, 6]])
        with pytest.raises(
            errors.ReadoutUnavailableError, match="LM head of a GenerateEngine cannot be read"
        ):
            shared.lm_head()
        with pytest.raises(errors.ReadoutUnavailableError, match="cannot return hidden states"):
            shared.hidden_states([[5, 6]])

    @pytest.mark.nightly
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_two_engines_in_16_bits(self, policy_path, ref_path, group, dtype):
        """Against float64 of the same hidden states, which have the roundings of activations."""
        options = {**tiny.ENGINE_OPTIONS, "dtype": dtype}
        with (
            VLLMScorer(str(policy_path), **options) as policy,
            VLLMScorer(str(ref_path), **options) as reference,
        ):
            found = policy.exact_kl(reference, *group)
            sides = [(scorer.lm_head(), scorer.hidden_states(*group)) for scorer in (policy, reference)]
        assert sides[0][0].weight.dtype == getattr(torch, dtype)
        for n, kl in enumerate(found):
            a, b = ((hidden[n].double() @ head.weight.double().T).log_softmax(-1) for head, hidden in sides)
            torch.testing.assert_close(kl.double(), (a.exp() * (a - b)).sum(-1), rtol=1e-5, atol=1e-5)

    @pytest.mark.nightly
    def test_a_head_with_a_soft_cap_is_refused(self, tmp_path, ref_scorer):
        path = tiny.build_architecture(tmp_path, "gemma2")
        with VLLMScorer(str(path), **tiny.ENGINE_OPTIONS) as scorer:
            with pytest.raises(errors.ReadoutUnavailableError, match="times a matrix: it has a soft cap"):
                scorer.lm_head()
            assert scorer.hidden_states([[5, 6, 7]])[0].shape == (2, 64)

    @pytest.mark.nightly
    def test_a_model_that_projects_its_hidden_states(self, tmp_path):
        """OPT's config tells another size than the one that its head gets."""
        path = tiny.build_architecture(tmp_path, "opt", word_embed_proj_dim=32)
        with VLLMScorer(str(path), **tiny.ENGINE_OPTIONS) as scorer:
            assert scorer.info.hidden_size == 32
            (hidden,) = scorer.hidden_states([[5, 6, 7]])
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
            with torch.no_grad():
                want = model(torch.tensor([[5, 6, 7]])).logits[0, :-1]
            torch.testing.assert_close(scorer.lm_head().logits(hidden).double(), want, rtol=0, atol=1e-4)

    @pytest.mark.nightly
    def test_tensor_parallel_ranks_give_their_shards(self, ref_path, policy_scorer, ref_scorer, group):
        options = {"max_model_len": tiny.MAX_MODEL_LEN, "kv_cache_memory_bytes": 64 << 20, "dtype": "float32"}
        with VLLMScorer(str(ref_path), tensor_parallel_size=2, **options) as sharded:
            assert torch.equal(sharded.lm_head().weight, ref_scorer.lm_head().weight)
            for a, b in zip(
                policy_scorer.exact_kl(sharded, *group),
                policy_scorer.exact_kl(ref_scorer, *group),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=KL_TOLERANCE)
