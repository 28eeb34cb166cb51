"""Token ids -> log-probs, on real engines, against float64."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from tests import tiny
from tests.instant_engine import InstantEngine
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl import VLLMScorer, errors
from vllm_kl.types import EngineInfo, ScoreResult

EOS, PAD = 258, 256


@pytest.fixture(scope="module")
def shared_scorer(policy_llm):
    return VLLMScorer(policy_llm)


def random_ids(seed, length, vocab=259):
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(length)]


def assert_close_to(oracle, log_probs, ids, start):
    want = torch.tensor(oracle.log_probs(ids)[start:], dtype=torch.float64)
    assert log_probs.shape == (len(ids) - start,)
    assert log_probs.dtype == torch.float32
    assert log_probs.device.type == "cpu"
    torch.testing.assert_close(log_probs.double(), want, rtol=0, atol=LOG_PROB_TOLERANCE)


SEQUENCES = {
    "two tokens": (random_ids(1, 2), 1),
    "all but the first": (random_ids(2, 70), 1),
    "from the middle": (random_ids(3, 90), 40),
    "the last only": (random_ids(4, 33), 32),
    "nothing": (random_ids(5, 20), 20),
    "a single token": (random_ids(6, 1), 1),
    "prompt of one block": (random_ids(7, 60), 32),
    "pad and EOS inside": ([5, PAD, EOS, 9, PAD, PAD, 11, EOS], 2),
    "the longest that a shared engine takes": (random_ids(8, tiny.MAX_MODEL_LEN - 1), 300),
}


class TestAgainstFloat64:
    def test_owned_engine_agrees(self, ref_scorer, ref_oracle):
        longest = (random_ids(9, tiny.MAX_MODEL_LEN), 310)  # a response that filled the policy's context
        ids, starts = zip(*SEQUENCES.values(), longest, strict=True)
        for got, sequence, start in zip(ref_scorer.score(ids, starts), ids, starts, strict=True):
            assert_close_to(ref_oracle, got, sequence, start)

    def test_shared_engine_agrees(self, shared_scorer, policy_oracle):
        ids, starts = zip(*SEQUENCES.values(), strict=True)
        for got, sequence, start in zip(shared_scorer.score(ids, starts), ids, starts, strict=True):
            assert_close_to(policy_oracle, got, sequence, start)

    def test_start_is_one_for_all_or_none_for_one(self, ref_scorer, ref_oracle):
        ids = [random_ids(s, 10 + s) for s in range(3)]
        for start in (None, 4):
            for got, sequence in zip(ref_scorer.score(ids, start), ids, strict=True):
                assert_close_to(ref_oracle, got, sequence, start or 1)

    @pytest.mark.parametrize(
        "kind", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)]
    )
    def test_lists_arrays_and_tensors_score_the_same(self, ref_scorer, ref_oracle, kind):
        assert_close_to(ref_oracle, ref_scorer.score([kind([3, 1, 4, 1, 5])])[0], [3, 1, 4, 1, 5], 1)

    def test_alone_equals_in_a_batch(self, ref_scorer):
        ids = [random_ids(s, 20 + 7 * s) for s in range(6)]
        together = ref_scorer.score(ids)
        for sequence, got in zip(ids, together, strict=True):
            torch.testing.assert_close(ref_scorer.score([sequence])[0], got, rtol=0, atol=LOG_PROB_TOLERANCE)

    def test_an_empty_batch_is_an_empty_list(self, ref_scorer):
        assert ref_scorer.score([]) == []
        assert ref_scorer.stats.num_requests == 0


class TestPrefixSharing:
    @pytest.fixture
    def group(self):
        """Responses to a prompt of two blocks; two share more than a block, and one comes twice."""
        prompt = random_ids(100, 64)
        responses = [random_ids(101 + i, 50) for i in range(3)]
        alike = responses[0][:40] + random_ids(110, 10)
        return [prompt + r for r in (*responses, alike, responses[1])], [64] * 5

    @pytest.mark.parametrize("kind", ["ref_scorer", "shared_scorer"])
    def test_cached_and_uncached_scores_agree(self, request, kind, group):
        scorer = request.getfixturevalue(kind)
        oracle = request.getfixturevalue("ref_oracle" if kind == "ref_scorer" else "policy_oracle")
        for start in (64, 70):  # at a block's edge row start - 1 is not cached: a block less is read
            for got, sequence in zip(scorer.score(group[0], start), group[0], strict=True):
                assert_close_to(oracle, got, sequence, start)
            assert scorer.stats.num_rescored == 0
        # One of five is a duplicate; the other three siblings read the prompt's two blocks.
        assert scorer.stats.num_cached_tokens >= 114 + 3 * 64

    def test_without_the_cap_a_hit_past_the_first_scored_row_is_sent_again(
        self, monkeypatch, shared_scorer, policy_oracle, group
    ):
        from vllm.v1.core.kv_cache_manager import KVCacheManager

        monkeypatch.setattr(
            KVCacheManager, "get_computed_blocks", KVCacheManager.get_computed_blocks.__wrapped__
        )
        for got, sequence in zip(shared_scorer.score(*group), group[0], strict=True):
            assert_close_to(policy_oracle, got, sequence, 64)
        # The prompt ends at a block's edge, so every sibling's hit covers row start - 1. The duplicate is
        # sent once.
        assert shared_scorer.stats.num_rescored == 3

    def test_share_prefix_false_reads_no_cache(self, policy_llm, policy_oracle, group):
        scorer = VLLMScorer(policy_llm, share_prefix=False)
        for got, sequence in zip(scorer.score(*group), group[0], strict=True):
            assert_close_to(policy_oracle, got, sequence, 64)
        # A duplicate is computed once.
        assert (scorer.stats.num_cached_tokens, scorer.stats.num_rescored) == (114, 0)

    def test_second_call_equals_first(self, shared_scorer, group):
        for a, b in zip(shared_scorer.score(*group), shared_scorer.score(*group), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=LOG_PROB_TOLERANCE)

    def test_kv_of_an_earlier_call_is_never_read(self, shared_scorer):
        # It may be of older weights: an engine that is shared is updated by others.
        ids = [random_ids(200, 100)]
        shared_scorer.score(ids, 90)
        shared_scorer.score(ids, 90)
        assert shared_scorer.stats.num_cached_tokens == 0

    def test_stats_count_what_was_done(self, shared_scorer):
        prompt = random_ids(300, 100)
        shared_scorer.score([[*prompt, 1, 2], [*prompt, 3, 4, 5], [7]], [100, 100, 1])
        stats = shared_scorer.stats
        assert (stats.num_requests, stats.num_scored_tokens, stats.num_prompt_tokens) == (2, 5, 205)
        assert (stats.num_cached_tokens, stats.num_rescored, stats.readout) == (96, 0, "flat")
        assert stats.wall_s > 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("ids", "start", "message"),
        [
            ([[1, 2], []], None, r"sequence 1 is empty"),
            ([[1, 2], [1, 2, 3]], [1, 0], r"sequence 1: start is 0, expected 1 <= start <= 3"),
            ([[1, 2]], 3, r"sequence 0: start is 3, expected 1 <= start <= 2"),
            ([[1, 2]], -1, r"sequence 0: start is -1"),
            ([[1, 2], [1, 259]], None, r"sequence 1, token 1: id 259 is outside the vocabulary \[0, 259\)"),
            ([[1, -100]], None, r"sequence 0, token 1: id -100 is outside"),
            (
                [[1, 2], [0] * (tiny.MAX_MODEL_LEN + 1)],
                None,
                r"sequence 1 has 321 tokens.*at most 320.*max_model_len",
            ),
            ([[1, 2], [3, 4]], [1], r"start has 1 entries for 2 sequences"),
            ([[1.0, 2.0]], None, r"sequence 0 must be a flat sequence of ints"),
            ([[[1, 2]]], None, r"sequence 0 must be a flat sequence of ints"),
        ],
    )
    def test_is_refused_by_name_before_the_engine_sees_it(self, ref_scorer, ids, start, message):
        with pytest.raises(errors.InputError, match=message):
            ref_scorer.score(ids, start)
        assert len(ref_scorer.score([[1, 2, 3]])[0]) == 2

    def test_unknown_readouts_and_models_are_refused(self, policy_llm):
        with pytest.raises(errors.ReadoutUnavailableError, match="does not exist; choose one of"):
            VLLMScorer(policy_llm, readout="fast")
        with pytest.raises(
            errors.ReadoutUnavailableError, match="'pooling' is not available on an engine that generates"
        ):
            VLLMScorer(policy_llm, readout="pooling")
        with pytest.raises(errors.OptionError, match="a live vllm.LLM or .* AsyncVLLM, got int"):
            VLLMScorer(3)

    def test_engine_options_of_a_running_engine_are_refused(self, policy_llm):
        with pytest.raises(errors.OptionError, match="no effect on an engine that already runs: dtype"):
            VLLMScorer(policy_llm, dtype="float32")


class Faulty:
    """An engine with faults that a real one cannot be made to have; values depend on the prefix."""

    info = EngineInfo(readout="flat", vocab_size=100, max_sequence_len=100)

    def __init__(self, fault):
        self._fault = fault

    def score(self, requests, *, share_prefix, on_done=None):
        results = []
        for r in requests:
            values = torch.tensor([-float(r.token_ids[:t].sum()) for t in range(r.start, len(r.token_ids))])
            results.append(ScoreResult(values=self._fault(values)[:, None].numpy()))
        return results

    def close(self):
        pass


class TestMissingLogProbs:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
    def test_nan_and_what_is_above_zero_are_errors_not_numbers(self, value):
        def fault(values):
            return values.index_fill(0, torch.tensor([1]), value)

        with pytest.raises(
            errors.MissingLogProbError, match=rf"sequence 0, token 3: the engine returned {value}"
        ):
            VLLMScorer(Faulty(fault)).score([[1, 2, 3, 4]], 2)

    def test_a_missing_row_is_an_error(self):
        message = r"sequence 0: expected \[3, 1\] log-probs, the engine returned \[2, 1\]"
        with pytest.raises(errors.MissingLogProbError, match=message):
            VLLMScorer(Faulty(lambda values: values[1:])).score([[1, 2, 3, 4]])

    def test_minus_inf_is_a_log_prob(self):
        scorer = VLLMScorer(Faulty(lambda values: values - torch.inf))
        assert scorer.score([[1, 2, 3]])[0].tolist() == [-torch.inf, -torch.inf]


class TestEngines:
    def test_a_shared_engine_survives_close(self, policy_llm, policy_oracle):
        with VLLMScorer(policy_llm) as scorer:
            assert scorer.readout == "flat"
        assert_close_to(policy_oracle, VLLMScorer(policy_llm).score([[1, 2, 3]])[0], [1, 2, 3], 1)

    @pytest.mark.parametrize("kind", ["owned", "shared"])
    def test_concurrent_callers_get_their_own_results(self, request, policy_llm, kind):
        owned = kind == "owned"
        oracle = request.getfixturevalue("ref_oracle" if owned else "policy_oracle")
        got = {}

        def call(i):
            # Scorers of one shared engine are made as they are needed.
            scorer = request.getfixturevalue("ref_scorer") if owned else VLLMScorer(policy_llm)
            for repeat in range(4):
                got[i, repeat] = scorer.score([random_ids(10 * i + repeat, 15 + i)])[0]

        threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 24
        for (i, repeat), log_probs in got.items():
            assert_close_to(oracle, log_probs, random_ids(10 * i + repeat, 15 + i), 1)

    def test_an_engine_that_returns_logits_for_log_probs_is_refused(self, policy_llm, monkeypatch):
        monkeypatch.setattr(policy_llm.llm_engine.model_config, "logprobs_mode", "raw_logits")
        with pytest.raises(
            errors.ReadoutUnavailableError, match="returns logits .*logprobs_mode='raw_logits'"
        ):
            VLLMScorer(policy_llm)

    @pytest.mark.nightly
    def test_an_owned_engine_keeps_to_itself_and_compiles_nothing_later(self, ref_path, tmp_path):
        """No log reaches the owner's streams, and vLLM's compilation is off, without any variable set."""
        script = f"""
from pathlib import Path
from vllm_kl import VLLMScorer
options = dict(dtype="float32", max_model_len=64, kv_cache_memory_bytes=8 << 20)
with VLLMScorer({str(ref_path)!r}, **options) as scorer:
    environment = Path(f"/proc/{{scorer._engine.pid}}/environ").read_text().split(chr(0))
    assert "TORCH_COMPILE_DISABLE=1" in environment and "VLLM_ENABLE_V1_MULTIPROCESSING=0" in environment
    print(scorer.readout, len(scorer.score([[1, 2, 3]])[0]))
"""
        hidden = ("VLLM_", "TORCH_", "RL_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("pooling 2\n", "")

    def test_a_fork_neither_uses_nor_ends_its_parents_engine(self, ref_scorer):
        pid = os.fork()
        if pid == 0:
            try:
                ref_scorer.score([[1, 2]])
                status = 1
            except errors.EngineError as error:
                status = 0 if "not to a fork" in str(error) else 2
            ref_scorer.close()
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(ref_scorer.score([[1, 2]])[0]) == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU an engine gives its memory back")
    def test_asleep_says_on_a_cpu_that_it_does_nothing(self, ref_scorer):
        with pytest.warns(UserWarning, match="does nothing on a CPU"), ref_scorer.asleep():
            pass
        ref_scorer.score([[1, 2]])

    def test_errors_survive_pickling(self):
        for name in errors.__all__:
            error = getattr(errors, name)("what, got, expected")
            assert repr(pickle.loads(pickle.dumps(error))) == repr(error)

    def test_carriers_are_frozen(self, ref_scorer):
        ref_scorer.score([[1, 2]])
        with pytest.raises(dataclasses.FrozenInstanceError):
            ref_scorer.stats.wall_s = 0.0


class SleepyEngine(InstantEngine):
    """Sleeps, as engines do on a GPU. ``interrupted``: the calls during which Ctrl-C comes, once each."""

    def __init__(self, *interrupted):
        self.weights, self.is_asleep, self._interrupted = self, False, set(interrupted)

    def sleep(self):
        self.is_asleep = True
        self._interrupt("sleep")
        return True

    def wake_up(self):
        self._interrupt("wake_up")
        self.is_asleep = False

    def _interrupt(self, call):
        if call in self._interrupted:
            self._interrupted.remove(call)
            raise KeyboardInterrupt

    def score(self, requests, **options):
        assert not self.is_asleep  # it would never answer
        return super().score(requests, **options)


class TestSleep:
    def test_a_scorer_refuses_inside_the_block_and_scores_after_it(self):
        scorer = VLLMScorer(SleepyEngine(), canary=False)
        with scorer.asleep(), pytest.raises(errors.WeightsError, match="the engine is asleep: score after"):
            scorer.score([[1, 2]])
        assert scorer.score([[1, 2]])[0].tolist() == [-1.5]

    def test_calls_of_other_threads_are_refused_until_the_engine_is_awake(self):
        engine = SleepyEngine()
        scorer = VLLMScorer(engine, canary=False)
        wake_up = engine.wake_up

        def wake_up_while_another_thread_scores():
            with pytest.raises(errors.WeightsError, match="the engine is asleep"):
                scorer.score([[1, 2]])
            wake_up()

        engine.wake_up = wake_up_while_another_thread_scores
        with scorer.asleep():
            pass
        assert scorer.score([[1, 2]])[0].tolist() == [-1.5]

    def test_an_engine_that_cannot_sleep_refuses_nothing(self):
        engine = SleepyEngine()
        scorer = VLLMScorer(engine, canary=False)
        engine.sleep = lambda: scorer.score([[1, 2]]) is None  # False, as on a CPU
        with pytest.warns(UserWarning, match="does nothing on a CPU"), scorer.asleep():
            assert scorer.score([[1, 2]])[0].tolist() == [-1.5]

    @pytest.mark.parametrize("interrupted", [("sleep",), ("wake_up",), ("sleep", "wake_up")])
    def test_a_scorer_whose_sleep_was_interrupted_scores_afterwards(self, interrupted):
        scorer = VLLMScorer(SleepyEngine(*interrupted), canary=False)
        with pytest.raises(KeyboardInterrupt), scorer.asleep():
            pass
        assert scorer.score([[1, 2]])[0].tolist() == [-1.5]

    def test_an_engine_that_refuses_to_sleep_is_awake(self):
        engine = SleepyEngine()
        engine.sleep = lambda: engine.no_such_name
        scorer = VLLMScorer(engine, canary=False)
        with pytest.raises(AttributeError), scorer.asleep():
            pass
        assert scorer.score([[1, 2]])[0].tolist() == [-1.5]
