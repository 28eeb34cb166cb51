"""What the in-engine read-out offers beyond the tokens' log-probs, and that it disturbs nobody."""

from __future__ import annotations

import dataclasses
import inspect
import random
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import PoolingParams, SamplingParams

from tests import tiny
from tests.compat import since
from tests.oracle import ENTROPY_TOLERANCE, LOG_PROB_TOLERANCE
from vllm_kl import VLLMScorer, errors, plugin
from vllm_kl.checks import check_ids, check_results
from vllm_kl.engines.base import drive
from vllm_kl.engines.start_engine import _Blocking
from vllm_kl.plugin import allowed, cache_cap, scoring_models, text_only
from vllm_kl.plugin.readout_request import KEY, Readout, pack, unpack
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult

pytestmark = pytest.mark.compat

VOCAB = 259


def random_ids(seed, length):
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


@pytest.fixture(scope="module")
def table(ref_oracle):
    """Log-probs of all tokens at every position of a few sequences, ``[L - 1, V]`` float64."""
    sequences = [random_ids(40 + i, length) for i, length in enumerate((50, 7, 90))]
    logits = [ref_oracle.logits(ids)[:-1] for ids in sequences]
    return sequences, logits


class TestTemperature:
    @pytest.mark.parametrize("temperature", [0.6, 1.3])
    def test_scores_are_those_of_the_sampling_distribution(self, ref_scorer, table, temperature):
        sequences, logits = table
        for got, ids, rows in zip(
            ref_scorer.score(sequences, temperature=temperature), sequences, logits, strict=True
        ):
            want = (rows / temperature).log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            torch.testing.assert_close(got.double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)

    def test_calls_of_different_temperatures_share_a_batch(self, ref_scorer, table):
        sequences, _ = table
        alone = {t: ref_scorer.score(sequences, temperature=t) for t in (0.5, 1.0, 2.0)}
        together = {}
        threads = [
            threading.Thread(
                target=lambda t=t: together.update({t: ref_scorer.score(sequences, temperature=t)})
            )
            for t in alone
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for t, values in alone.items():
            for a, b in zip(values, together[t], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=LOG_PROB_TOLERANCE)

    def test_a_read_out_that_cannot_apply_it_refuses(self, policy_llm):
        with pytest.raises(errors.ReadoutUnavailableError, match="'flat' cannot apply temperature=0.7"):
            VLLMScorer(policy_llm, temperature=0.7)
        with pytest.raises(errors.ReadoutUnavailableError, match="prompt log-probs ignore it"):
            VLLMScorer(policy_llm).score([[1, 2]], temperature=0.7)

    @pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "1"])
    def test_a_temperature_that_is_none_is_refused(self, ref_scorer, temperature):
        with pytest.raises(errors.InputError, match="temperature must be positive and finite"):
            ref_scorer.score([[1, 2]], temperature=temperature)


class TestChosenAndBestTokens:
    def test_chosen_ids_agree_with_float64(self, ref_scorer, table):
        sequences, logits = table
        starts = [10, 1, 64]
        chosen = [torch.randint(VOCAB, (len(s) - f, 4)) for s, f in zip(sequences, starts, strict=True)]
        got = ref_scorer.score_ids(sequences, chosen, starts, temperature=0.8)
        for values, rows, ids, first in zip(got, logits, chosen, starts, strict=True):
            want = (rows[first - 1 :] / 0.8).log_softmax(-1).gather(1, ids)
            torch.testing.assert_close(values.double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)

    def test_best_tokens_agree_with_float64(self, ref_scorer, table):
        sequences, logits = table
        for best, ids, rows in zip(ref_scorer.score_topk(sequences, 6), sequences, logits, strict=True):
            want = rows.log_softmax(-1)
            assert torch.equal(best.token_ids, want.topk(6).indices)
            torch.testing.assert_close(
                best.log_probs.double(), want.topk(6).values, rtol=0, atol=LOG_PROB_TOLERANCE
            )
            target = want.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            torch.testing.assert_close(
                best.target_log_probs.double(), target, rtol=0, atol=LOG_PROB_TOLERANCE
            )

    def test_nothing_to_score_gives_empty_rows(self, ref_scorer):
        (best,) = ref_scorer.score_topk([[1, 2]], 3, 2)
        assert (best.token_ids.shape, best.log_probs.shape, best.target_log_probs.shape) == (
            (0, 3),
            (0, 3),
            (0,),
        )
        assert ref_scorer.score_ids([[1, 2], [1, 2]], [np.empty((0, 5), int), [[1, 2, 3, 4, 5]]], [2, 1])[
            0
        ].shape == (
            0,
            5,
        )

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([], "ids has 0 entries for 2 sequences"),
            ([[[1]], [[1], [2]]], r"ids of sequence 0 must be ints of shape \[2, 1\].*got shape \[1, 1\]"),
            ([[[1], [2]], [[1, 2]]], r"ids of sequence 1 must be ints of shape \[1, 1\]"),
            ([[[1], [2, 3]], [[1]]], "ids of sequence 0 must be an array of ints"),
            ([[[1.5], [2.0]], [[1]]], "ids of sequence 0 must be ints"),
            ([[[1], [2]], [[VOCAB]]], rf"ids of sequence 1, row 0: id {VOCAB} is outside the vocabulary"),
        ],
    )
    def test_ids_that_do_not_fit_are_refused(self, ref_scorer, ids, message):
        with pytest.raises(errors.InputError, match=message):
            ref_scorer.score_ids([[1, 2, 3], [1, 2]], ids)

    def test_more_ids_than_the_engine_returns_are_refused(self, ref_scorer):
        chosen = check_ids([[[1, 2, 3]]], [np.array([1, 2])], [1], ref_scorer._engine.info)
        assert chosen[0].shape == (1, 3)
        limited = dataclasses.replace(ref_scorer._engine.info, max_ids=2)
        with pytest.raises(
            errors.InputError, match="ids has 3 tokens a row, but this engine returns at most 2"
        ):
            check_ids([[[1, 2, 3]]], [np.array([1, 2])], [1], limited)

    @pytest.mark.parametrize("k", [0, -1, VOCAB + 1, 2.0])
    def test_k_out_of_range_is_refused(self, ref_scorer, k):
        with pytest.raises(errors.InputError, match=rf"k is {k}, expected 1 <= k <= {VOCAB}"):
            ref_scorer.score_topk([[1, 2]], k)

    def test_a_read_out_that_cannot_refuses(self, policy_llm):
        with pytest.raises(
            errors.ReadoutUnavailableError, match="'flat' cannot return the most likely tokens"
        ):
            VLLMScorer(policy_llm).score_topk([[1, 2]], 2)
        with pytest.raises(
            errors.ReadoutUnavailableError, match="'flat' cannot return log-probs of chosen ids"
        ):
            VLLMScorer(policy_llm).score_ids([[1, 2]], [[[1]]])


def assert_entropies(got, oracle, sequences, starts, temperature=1.0):
    for values, ids, first in zip(got, sequences, starts, strict=True):
        want = torch.tensor(oracle.entropies(ids, temperature)[first:], dtype=torch.float64)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), want, rtol=0, atol=ENTROPY_TOLERANCE)


class TestEntropy:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_entropies_agree_with_float64(self, ref_scorer, ref_oracle, table, temperature):
        sequences, starts = table[0], [10, 1, 64]
        log_probs, entropies = ref_scorer.score(sequences, starts, temperature=temperature, entropy=True)
        assert_entropies(entropies, ref_oracle, sequences, starts, temperature)
        for a, b in zip(log_probs, ref_scorer.score(sequences, starts, temperature=temperature), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=LOG_PROB_TOLERANCE)

    def test_shared_prompts_and_chunks_change_nothing(self, ref_scorer, ref_oracle):
        """The engine takes fewer tokens in a step than a sequence has, and its prompt from the cache."""
        prompt = random_ids(960, 200)
        group = [[*prompt, *random_ids(970 + i, 20 + 30 * i)] for i in range(3)]
        for share_prefix in (True, False):
            ref_scorer.share_prefix = share_prefix
            try:
                _, entropies = ref_scorer.score(group, 200, entropy=True)
            finally:
                ref_scorer.share_prefix = True
            assert_entropies(entropies, ref_oracle, group, [200] * 3)

    def test_beside_the_best_tokens(self, ref_scorer, ref_oracle, table):
        sequences = table[0]
        both = ref_scorer.score_topk(sequences, 4, entropy=True)
        assert_entropies([best.entropy for best in both], ref_oracle, sequences, [1] * 3)
        for a, b in zip(both, ref_scorer.score_topk(sequences, 4), strict=True):
            assert b.entropy is None
            assert torch.equal(a.token_ids, b.token_ids)
            torch.testing.assert_close(a.log_probs, b.log_probs, rtol=0, atol=LOG_PROB_TOLERANCE)

    def test_nothing_to_score_gives_empty_rows(self, ref_scorer):
        log_probs, entropies = ref_scorer.score([[1, 2], [1, 2]], [2, 1], entropy=True)
        assert [len(row) for row in log_probs] == [len(row) for row in entropies] == [0, 1]
        assert ref_scorer.score([], entropy=True) == ([], [])

    def test_a_read_out_that_cannot_refuses(self, policy_llm):
        scorer = VLLMScorer(policy_llm)
        for call in (scorer.score, lambda ids, entropy: scorer.score_topk(ids, 2, entropy=entropy)):
            with pytest.raises(errors.ReadoutUnavailableError, match="'flat' cannot return"):
                call([[1, 2]], entropy=True)
        with pytest.raises(errors.ReadoutUnavailableError, match="cannot return the entropy"):
            scorer.score([[1, 2]], entropy=True)

    @pytest.mark.parametrize("value", [-1e-3, np.inf, np.nan])
    def test_an_entropy_that_cannot_be_is_refused(self, value):
        request = ScoreRequest(token_ids=np.array([1, 2, 3], np.int32), start=1, entropy=True)
        values = np.array([[-1.0, 0.5], [-1.0, value]], np.float32)
        with pytest.raises(errors.MissingLogProbError, match="sequence 4, token 2: .* instead of an entropy"):
            check_results({4: request}, [ScoreResult(values=values)])
        values[1, 1] = 0.0
        assert check_results({4: request}, [ScoreResult(values=values)])[0].shape == (2, 2)


class TestSharing:
    def test_a_hit_ends_at_the_last_block_before_the_first_scored_row(self, ref_scorer):
        for start in (64, 65, 96, 97):
            prompt = random_ids(500 + start, start)
            ref_scorer.score([[*prompt, 1, 2], [*prompt, 3, 4]], start)
            assert ref_scorer.stats.num_cached_tokens == (start - 1) // 32 * 32

    def test_prompts_of_an_earlier_call_are_read_again(self, ref_scorer):
        prompt = random_ids(600, 70)
        first = ref_scorer.score([[*prompt, 5, 6]], 70)
        assert ref_scorer.stats.num_cached_tokens == 0
        second = ref_scorer.score([[*prompt, 5, 6]], 70)
        assert ref_scorer.stats.num_cached_tokens == 64
        torch.testing.assert_close(first[0], second[0], rtol=0, atol=LOG_PROB_TOLERANCE)

    def test_the_callers_order_does_not_matter(self, ref_scorer, ref_oracle):
        prompts = [random_ids(700 + i, 64) for i in range(3)]
        ids = [[*prompts[i % 3], *random_ids(800 + i, 5 + i)] for i in range(9)]  # groups interleaved
        for got, sequence in zip(ref_scorer.score(ids, 64), ids, strict=True):
            want = torch.tensor(ref_oracle.log_probs(sequence)[64:], dtype=torch.float64)
            torch.testing.assert_close(got.double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)
        assert ref_scorer.stats.num_cached_tokens == 6 * 32


class TestPlugin:
    def test_registering_twice_changes_nothing(self):
        from vllm import ModelRegistry
        from vllm.v1.core.kv_cache_manager import KVCacheManager

        plugin.register()
        before = (KVCacheManager.get_computed_blocks, len(ModelRegistry.get_supported_archs()))
        plugin.register()
        assert (KVCacheManager.get_computed_blocks, len(ModelRegistry.get_supported_archs())) == before
        assert cache_cap.is_installed()

    def test_a_policy_of_the_same_architecture_in_the_same_process_is_not_affected(self, policy_llm):
        from vllm import ModelRegistry
        from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        prompt = {"prompt_token_ids": random_ids(900, 40)}
        before = policy_llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
        name = plugin.enable("Qwen2ForCausalLM")
        scoring = ModelRegistry.models[name].load_model_cls()
        assert issubclass(scoring, Qwen2ForCausalLM)
        assert scoring.is_pooling_model
        assert not getattr(Qwen2ForCausalLM, "is_pooling_model", False)
        assert ModelRegistry.models["Qwen2ForCausalLM"].load_model_cls() is Qwen2ForCausalLM
        assert policy_llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids == before

    def test_requests_of_others_keep_vllms_own_bound(self, policy_llm):
        prompt = {"prompt_token_ids": random_ids(901, 70)}
        for cached in (0, 64):
            (output,) = policy_llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
            assert output.num_cached_tokens == cached

    def test_what_a_request_asks_survives_the_way_through_vllm(self):
        readout = Readout(start=3, temperature=0.7, num_ids=2, ids=np.arange(4, dtype=np.int32).tobytes())
        assert unpack(pack(readout)) == readout
        assert readout.chosen_ids().tolist() == [[0, 1], [2, 3]]
        assert unpack(None) is unpack({}) is unpack({"other": 1}) is None
        assert list(pack(readout)) == [KEY]

    def test_a_bound_that_the_caller_passes_is_lowered_too(self):
        """vLLM 0.33 passes it; 0.32 does not."""

        def get_computed_blocks(self, request, max_cache_hit_length=None):
            return request.num_tokens - 1 if max_cache_hit_length is None else max_cache_hit_length

        lookup = cache_cap.capped(get_computed_blocks)
        ours = SimpleNamespace(
            num_tokens=100,
            sampling_params=None,
            pooling_params=PoolingParams(extra_kwargs=pack(Readout(start=40))),
        )
        theirs = SimpleNamespace(num_tokens=100, sampling_params=SamplingParams(), pooling_params=None)
        assert [lookup(None, r, max_cache_hit_length=99) for r in (ours, theirs)] == [39, 99]
        assert [lookup(None, ours), lookup(None, ours, 99), lookup(None, ours, 20)] == [39, 39, 20]
        assert [lookup(None, theirs), lookup(None, theirs, 20)] == [99, 20]

    def test_a_hybrid_model_beside_a_connector_takes_the_capped_lookup(self):
        """vLLM's own uses the hits of attention alone, because a connector would bring the rest."""
        manager = SimpleNamespace(get_computed_blocks=lambda request: (["capped"], request.num_tokens, 0))
        lookup = cache_cap.reconciled(lambda self, request: (["further"], 99, 0, True))
        ours = SimpleNamespace(
            num_tokens=40,
            sampling_params=None,
            pooling_params=PoolingParams(extra_kwargs=pack(Readout(start=40))),
        )
        theirs = SimpleNamespace(num_tokens=100, sampling_params=SamplingParams(), pooling_params=None)
        assert lookup(manager, ours) == (["capped"], 40, 0, False)
        assert lookup(manager, theirs) == (["further"], 99, 0, True)

    @since("0.30", "a hook of the router")
    @pytest.mark.parametrize("is_known", [False, True])
    def test_an_unknown_vllm_is_left_alone(self, monkeypatch, is_known):
        """Restores vLLM's own methods, then loads the plugin: a known vLLM gets hooks, an unknown none."""
        from vllm import ModelRegistry
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
        from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.worker.worker_base import WorkerBase

        hooked = [
            (KVCacheManager, "get_computed_blocks"),
            (KVCacheManager, "get_computed_blocks_for_connector"),
            (KVConnectorFactory, "create_connector"),
            (WorkerBase, "__init__"),
            (DefaultModelLoader, "load_weights"),
            (RotaryEmbedding, "forward_cpu"),
            (CPURouter, "_compute_routing"),
        ]
        for owner, name in hooked:
            monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
        for name in [name for name in vars(WorkerBase) if name.startswith("vllm_kl")]:
            monkeypatch.delattr(WorkerBase, name)
        for variable in (plugin.ARCHITECTURES, text_only.TEXT_ONLY):  # no owner of an engine asks for more
            monkeypatch.delenv(variable, raising=False)
        if not is_known:
            monkeypatch.setattr(allowed, "KNOWN_VLLM", allowed.SpecifierSet("<0.1"))

        def state():
            return (
                [dict(vars(owner)) for owner, _ in hooked],
                ModelRegistry.get_supported_archs(),
                sys.meta_path[:],
            )

        before = state()
        plugin.register()
        assert (state() != before) == is_known
        assert cache_cap.is_installed() == is_known

    def test_an_unknown_name_is_no_scoring_class(self):
        with pytest.raises(AttributeError):
            scoring_models.Qwen2ForCausalLM  # noqa: B018
        assert not hasattr(scoring_models, "__path__")


class TestEngine:
    @pytest.mark.nightly
    def test_tensor_parallel_ranks_share_the_vocabulary(self, ref_path, ref_scorer, table):
        sequences, _ = table
        options = {
            "max_model_len": tiny.MAX_MODEL_LEN,
            "kv_cache_memory_bytes": 64 << 20,
            "max_num_batched_tokens": 64,
        }
        with VLLMScorer(str(ref_path), dtype="float32", tensor_parallel_size=2, **options) as scorer:
            assert scorer.readout == "pooling"
            chosen = [[[5, VOCAB - 1]] * (len(s) - 1) for s in sequences]
            for a, b in zip(
                scorer.score_ids(sequences, chosen), ref_scorer.score_ids(sequences, chosen), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=0, atol=LOG_PROB_TOLERANCE)
            for a, b in zip(
                scorer.score(sequences, entropy=True)[1],
                ref_scorer.score(sequences, entropy=True)[1],
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=0, atol=ENTROPY_TOLERANCE)
            for k in (5, VOCAB):  # more than a rank's share, too
                for a, b in zip(
                    scorer.score_topk(sequences, k), ref_scorer.score_topk(sequences, k), strict=True
                ):
                    assert torch.equal(a.token_ids[:, :5], b.token_ids[:, :5])
                    torch.testing.assert_close(a.log_probs, b.log_probs, rtol=0, atol=LOG_PROB_TOLERANCE)

    def test_pooling_with_speculation_says_why_not(self, ref_path):
        ngram = {"method": "ngram", "num_speculative_tokens": 2}
        with pytest.raises(errors.OptionError, match="speculative_config=.* is refused: .* do not speculate"):
            VLLMScorer(str(ref_path), readout="pooling", speculative_config=ngram)

    @pytest.mark.nightly
    def test_flat_can_be_asked_for_on_an_owned_engine(self, ref_path, ref_oracle):
        options = {"max_model_len": tiny.MAX_MODEL_LEN, "kv_cache_memory_bytes": 64 << 20}
        with VLLMScorer(str(ref_path), readout="flat", dtype="float32", **options) as scorer:
            assert scorer.readout == "flat"
            ids = random_ids(950, tiny.MAX_MODEL_LEN)
            want = torch.tensor(ref_oracle.log_probs(ids)[300:], dtype=torch.float64)
            torch.testing.assert_close(
                scorer.score([ids], 300)[0].double(), want, rtol=0, atol=LOG_PROB_TOLERANCE
            )

    def test_why_it_is_not_pooling_is_said(self, caplog):
        class Slow:
            info = EngineInfo(
                readout="flat", vocab_size=9, max_sequence_len=9, notes=("no pooling read-out: reason",)
            )

        VLLMScorer(Slow())
        assert "read-out flat; no pooling read-out: reason" in caplog.text

    def test_one_callers_failure_is_not_the_others(self):
        class Refusing:
            info = EngineInfo(readout="flat", vocab_size=9, max_sequence_len=9)
            weights = None

            def score(self, requests, *, share_prefix):
                if not share_prefix:
                    raise errors.EngineError("vLLM refused: too many")
                return [ScoreResult(values=np.zeros((1, 1), np.float32)) for _ in requests]

        class Particular(Refusing):
            def score(self, requests, *, share_prefix):
                if any(len(r.token_ids) > 2 for r in requests):
                    raise errors.MissingLogProbError("NaN")
                return super().score(requests, share_prefix=True)

        driver = _Blocking(Particular())
        request = ScoreRequest(token_ids=np.array([1, 2], np.int32), start=1)
        driver.submit("a", request, share_prefix=True)
        driver.submit(
            "b", dataclasses.replace(request, token_ids=np.array([1, 2, 3], np.int32)), share_prefix=True
        )
        results = dict(driver.step())
        assert isinstance(results["a"], ScoreResult)
        assert isinstance(results["b"], errors.MissingLogProbError)

        driver = _Blocking(Refusing())
        driver.submit("a", request, share_prefix=True)
        driver.submit("b", request, share_prefix=False)
        results = dict(driver.step())
        assert isinstance(results["a"], ScoreResult)
        assert isinstance(results["b"], errors.EngineError)
        with pytest.raises(errors.EngineError, match="vLLM refused: too many"):
            drive(driver, [request], share_prefix=False)

    @since("0.31", "the read-out")
    def test_token_ids_on_a_cpu_says_why_not(self, policy_llm):
        with pytest.raises(
            errors.ReadoutUnavailableError, match="V2 model runner, which needs a GPU. Use 'flat'"
        ):
            VLLMScorer(policy_llm, readout="token_ids")

    def test_a_bar_on_standard_error_if_asked_for(self, ref_scorer, capfd):
        ref_scorer.score([random_ids(i, 10) for i in range(3)])
        assert "scoring" not in capfd.readouterr().err
        ref_scorer.score([random_ids(i, 10) for i in range(3)], progress=True)
        captured = capfd.readouterr()
        assert "3/3" in captured.err
        assert not captured.out

    def test_an_interrupted_call_is_cancelled(self, ref_scorer, monkeypatch):
        def interrupt(num_done):
            raise KeyboardInterrupt

        sent = []
        send = ref_scorer._engine._child._calls._send
        monkeypatch.setattr(
            ref_scorer._engine._child._calls, "_send", lambda *call: (sent.append(call[:2]), send(*call))
        )
        requests = [
            ScoreRequest(token_ids=np.array(random_ids(i, 300), np.int32), start=1) for i in range(200)
        ]
        with pytest.raises(KeyboardInterrupt):
            ref_scorer._engine.score(requests, share_prefix=False, on_done=interrupt)
        (call_id, _), cancelled = sent
        assert cancelled == (call_id, "cancel")
        assert len(ref_scorer.score([random_ids(2, 10)])[0]) == 9
