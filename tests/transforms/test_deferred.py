"""Deferred scores in a real ``LLMCollector`` are there when the batch leaves, and equal scores at once."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tensordict import lazy_stack
from torchrl.collectors.llm import LLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.envs import RewardSum
from torchrl.modules.llm import vLLMWrapper

from tests.batches import ids_batch
from tests.collectors import NUM_ENVS, check_kl
from tests.transforms.helpers import recorded
from vllm_kl import FromCollector, RetrieveKL, fill_deferred
from vllm_kl.batch.read_tokens import keys_of, read_batch
from vllm_kl.errors import CollectorError, InputError, OptionError, WeightsError
from vllm_kl.transforms.deferred import PENDING, _score_step
from vllm_kl.transforms.model_side import ModelSide

STEPS = 3
GREEDY = {"generate_kwargs": {"max_new_tokens": 10, "temperature": 0.0}}


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("vllm_kl-deferred")]


def assert_no_threads():
    """Refuse a thread that outlasts its work."""
    for thread in threads():
        thread.join(10)
    assert not threads()


def results(data):
    """Every tensor that a step wrote, sample by sample."""
    return [
        {key: value for key in sample.keys(True, True) if isinstance(value := sample.get(key), torch.Tensor)}
        for sample in data.reshape(-1)["next"].unbind(0)
    ]


@pytest.fixture
def collector(make_env, make_policy):
    """Make a collector of batches of three steps."""
    made = []

    def make(*transforms, batches=2, max_steps=1, pad_output=True, **kwargs):
        env = make_env(max_steps)
        for transform in transforms:
            env.append_transform(transform)
        made.append(
            LLMCollector(
                env,
                policy_factory=make_policy(pad_output=pad_output, **GREEDY),
                dialog_turns_per_batch=STEPS * NUM_ENVS,
                total_dialog_turns=batches * STEPS * NUM_ENVS,
                **kwargs,
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.shutdown()
    assert_no_threads()


@pytest.fixture
def kl(make_reference):
    def make(deferred=True, pad_output=True, **kwargs):
        return RetrieveKL(
            "from_collector",
            make_reference(pad_output=pad_output),
            deferred=deferred,
            **{"coeff": 0.1, **kwargs},
        )

    return make


@pytest.fixture
def rollout(make_env, make_policy):
    """Roll out with no collector."""
    envs = []

    def run(transform, steps=STEPS):
        if not envs or envs[-1].transform[-1] is not transform:
            envs.append(make_env(max_steps=STEPS).append_transform(transform))
        return envs[-1].rollout(steps, make_policy(pad_output=True, **GREEDY)(), return_contiguous=False)

    yield run
    assert_no_threads()


@pytest.fixture
def gate(ref_scorer, monkeypatch):
    """Scoring waits until the gate is set; ``calls`` counts who came through."""
    score, gate = ref_scorer.score_and_tell, threading.Event()
    gate.calls = 0

    def wait(*args, **kwargs):
        assert gate.wait(60), "nobody opened the gate"
        gate.calls += 1
        return score(*args, **kwargs)

    monkeypatch.setattr(ref_scorer, "score_and_tell", wait)
    yield gate
    gate.set()


class TestSameNumbers:
    @pytest.mark.parametrize(
        "how", [{}, {"max_steps": 2}, {"max_steps": 2, "yield_completed_trajectories": True}]
    )
    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    def test_deferred_equals_immediate_bit_for_bit(self, collector, kl, how, pad_output):
        def run(deferred):
            options = {"coeff": lambda step: 0.1 * (step + 1), "extra_estimators": ("k3",)}
            options["ref_entropy_key"] = ("ref_entropy", "full")
            transform = kl(deferred, pad_output, **options)
            return list(collector(transform, pad_output=pad_output, **how)), transform.metrics

        run(False)  # both of the others find the same prefix caches
        now, later = run(False), run(True)
        assert len(now[0]) == len(later[0]) == 2
        for a, b in zip(now[0], later[0], strict=True):
            assert (type(a), type(a["next"]), a.shape) == (type(b), type(b["next"]), b.shape)
            for x, y in zip(
                *(td.reshape(-1).get(("tokens", "full"), as_list=True) for td in (a, b)), strict=True
            ):
                assert torch.equal(x, y)  # the policy sampled the same, or nothing can be compared
            for was, is_ in zip(results(a), results(b), strict=True):
                written = {"kl_penalty", "kl_k3", "kl_mask", "reward", "ref_version"}
                assert was.keys() == is_.keys() >= {*written, ("ref_entropy", "full")}
                for key, value in was.items():
                    assert value.dtype == is_[key].dtype
                    assert torch.equal(value, is_[key]), key
        assert now[1].items() == later[1].items()

    @pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
    @pytest.mark.parametrize("mode", ["reuse", "rescore"])
    def test_they_agree_with_float64(self, collector, kl, policy_oracle, ref_oracle, mode, pad_output):
        transform = kl(True, pad_output, gen_log_probs=mode)
        for data in collector(transform, max_steps=2, pad_output=pad_output):
            check_kl(data.reshape(-1), policy_oracle, ref_oracle, coeff=0.1)

    def test_the_next_generation_begins_before_a_step_is_scored(
        self, collector, kl, policy_llm, gate, monkeypatch
    ):
        generate, generations = policy_llm.generate, []

        def tell(*args, **kwargs):
            generations.append(gate.calls)
            if len(generations) == 2:
                gate.set()
            return generate(*args, **kwargs)

        monkeypatch.setattr(policy_llm, "generate", tell)
        next(iter(collector(kl())))
        assert generations[:2] == [0, 0]
        assert gate.calls == STEPS


class TestWhereTheyAreFilledIn:
    def test_leaving_the_collector_before_its_postproc(self, collector, kl):
        seen = []
        for data in collector(kl(), postproc=lambda td: seen.append(results(td)) or td):
            assert PENDING not in data["next"].keys()
            assert all(row.isfinite().all() for row in data.reshape(-1).get(("next", "reward"), as_list=True))
        assert len(seen) == 2
        assert all("kl_penalty" in sample for batch in seen for sample in batch)

    def test_entering_the_collectors_replay_buffer(self, collector, kl, policy_oracle, ref_oracle):
        buffer = ReplayBuffer(storage=LazyStackStorage(100), batch_size=4)
        for _ in collector(kl(), replay_buffer=buffer):
            check_kl(buffer[:], policy_oracle, ref_oracle, coeff=0.1)
        assert len(buffer) == 2 * STEPS * NUM_ENVS

    def test_entering_a_replay_buffer_of_ones_own(self, collector, kl, policy_oracle, ref_oracle):
        buffer = ReplayBuffer(storage=LazyStackStorage(100), batch_size=4)
        buffer.append_transform(fill_deferred, invert=True)
        for data in collector(kl("buffer")):
            assert PENDING in data["next"].keys()
            buffer.extend(data.reshape(-1))
        check_kl(buffer[:], policy_oracle, ref_oracle, coeff=0.1)

    def test_by_hand_and_twice_changes_nothing(self, rollout, kl):
        data = fill_deferred(rollout(kl("buffer")))
        before = results(data)
        assert all("kl_penalty" in sample for sample in before)
        for was, is_ in zip(before, results(fill_deferred(data)), strict=True):
            assert all(torch.equal(value, is_[key]) for key, value in was.items())

    def test_the_coefficient_is_that_of_the_step_whatever_is_filled_in_first(self, rollout, kl):
        transform = kl("buffer", coeff=lambda step: float(step))
        batches = [rollout(transform, steps=1) for _ in range(3)]
        for step in (2, 0, 1):
            for sample in fill_deferred(batches[step]).reshape(-1)["next"].unbind(0):
                torch.testing.assert_close(sample["reward"][:, 0], 1 - step * sample["kl_penalty"])

    def test_threads_that_fill_in_the_same_steps_count_them_once(self, rollout, kl, gate):
        transform = kl("buffer", coeff=lambda step: float(step))
        data = rollout(transform)
        copies = [data.clone() for _ in range(4)]
        threading.Timer(0.2, gate.set).start()
        with ThreadPoolExecutor(4) as pool:
            filled = list(pool.map(fill_deferred, copies))
        for other in filled:
            for was, is_ in zip(results(filled[0]), results(other), strict=True):
                assert all(torch.equal(value, is_[key]) for key, value in was.items())
        assert gate.calls == STEPS
        assert transform.metrics["coeff"] == STEPS - 1

    def test_two_references_in_one_env(self, collector, kl, make_reference):
        second = RetrieveKL(
            "from_collector",
            make_reference(pad_output=True, log_probs_key="second"),
            ref_log_probs_full_key=("second", "full"),
            kl_key="second_kl",
            mask_key="second_mask",
            add_to_reward=False,
            deferred=True,
        )
        for data in collector(kl(), second):
            for sample in data.reshape(-1)["next"].unbind(0):
                torch.testing.assert_close(sample["second_kl"], sample["kl_penalty"], rtol=0, atol=2e-5)


class TestUnfilled:
    def test_an_unfilled_batch_cannot_be_mistaken_for_a_filled_one(self, rollout, kl):
        data = rollout(kl("buffer"))
        copied = data.clone()
        for td in (data, copied):
            assert not {"kl_penalty", "kl_mask", "ref_log_probs", "log_probs"} & set(td["next"].keys())
            assert td["next", "reward"].isnan().all()
            with pytest.raises(OptionError, match=r"cannot be pickled .*fill_deferred\(batch\) first"):
                pickle.dumps(td)
        for was, is_ in zip(results(fill_deferred(data)), results(fill_deferred(copied)), strict=True):
            assert all(torch.equal(value, is_[key]) for key, value in was.items())

    def test_without_a_collector_it_says_what_to_do(self, rollout, kl):
        with pytest.raises(
            CollectorError, match="(?s)there is no collector.*deferred='buffer' and call vllm_kl.fill_defer"
        ):
            rollout(kl())

    def test_a_reward_that_does_not_wait_is_left_alone(self, rollout, kl):
        data = rollout(kl("buffer", add_to_reward=False))
        assert (data["next", "reward"] == 1).all()
        assert (fill_deferred(data)["next", "reward"] == 1).all()


class TestErrors:
    @pytest.fixture
    def longest(self, ref_scorer, monkeypatch):
        """Let the reference take no sequence of more tokens."""

        def limit(num_tokens):
            info = dataclasses.replace(ref_scorer._engine.info, max_sequence_len=num_tokens)
            monkeypatch.setattr(ref_scorer._engine, "info", info)

        return limit

    def test_an_error_names_its_sample_and_leaves_the_batch_as_it_was(self, rollout, kl, longest):
        transform = kl("buffer", gen_log_probs="reuse")
        lengths = torch.tensor([[int(m.sum()) for m in row.get(("masks", "all_attention_mask"), as_list=True)]
                                for row in rollout(transform).unbind(0)])  # fmt: skip
        worst = [int(n) for n in torch.unravel_index(lengths.argmax(), lengths.shape)]
        longest(int(lengths.max()) - 1)
        data = rollout(transform)
        before = set(data["next"].keys(True))
        message = (
            rf"row {worst[0]} of env step {STEPS + worst[1]}: "
            rf"sample \[{worst[0]}, {worst[1]}\] of this batch: "
            rf"sample {worst[0]} has"
        )
        for _ in range(2):
            with pytest.raises(InputError, match=message):
                fill_deferred(data)
        assert set(data["next"].keys(True)) == before
        fine = fill_deferred(data[:, :1])  # steps of no such sample are not held up
        assert fine.shape == (NUM_ENVS, 1)
        assert all("kl_penalty" in sample for sample in results(fine))

    def test_in_a_collector_it_surfaces_with_the_batch_and_its_type(self, collector, kl, longest):
        longest(30)
        with pytest.raises(InputError, match=r"of env step \d: sample \[\d, \d\] of this batch: sample \d"):
            next(iter(collector(kl())))

    def test_an_error_that_is_not_ours_keeps_its_type_and_says_where(
        self, rollout, kl, ref_scorer, monkeypatch
    ):
        def broken(*args, **kwargs):
            raise ZeroDivisionError("not ours")

        monkeypatch.setattr(ref_scorer, "score_and_tell", broken)
        data = rollout(kl("buffer"), steps=1)
        with pytest.raises(ZeroDivisionError, match="not ours") as caught:
            fill_deferred(data)
        assert "env step 0, of which this batch has sample [0, 0]" in caught.value.__notes__[0]

    def test_a_temperature_that_moves_under_a_deferred_step_is_said(self, make_reference, ref_scorer):
        side = ModelSide(make_reference())
        batch = read_batch(recorded([0.0] * 5), keys_of(make_reference()), assistant_only=True)
        ref_scorer.temperature = 0.5
        try:
            message = r"changed from 1 to 0.5 after this step was submitted.*\(fill_deferred\) before"
            with pytest.raises(OptionError, match=message):
                _score_step(side, batch, 1.0, None)
        finally:
            ref_scorer.temperature = 1.0


class TestVersions:
    def test_a_step_is_never_scored_by_other_weights_than_it_asked_for(
        self, rollout, kl, gate, ref_scorer, ref_model
    ):
        data = rollout(kl("buffer"), steps=1)
        old = ref_scorer.weight_version
        new = ref_scorer.refresh(ref_model.state_dict())
        gate.set()
        with pytest.raises(
            WeightsError, match=f"submitted for version {old}: it was scored by version {new}"
        ):
            fill_deferred(data)

    def test_two_versions_never_meet_in_one_batch(self, rollout, kl, ref_scorer, ref_model):
        transform = kl("buffer")
        first = rollout(transform, steps=1)
        fill_deferred(first.clone())
        old, new = ref_scorer.weight_version, ref_scorer.refresh(ref_model.state_dict())
        second = rollout(transform, steps=1)
        both = lazy_stack([*first.unbind(1), *second.unbind(1)], 1)
        message = rf"sample \[0, 0\] was scored by version {old}, sample \[0, 1\] by version {new}"
        with pytest.raises(WeightsError, match=message):
            fill_deferred(both)
        for data, version in ((first, old), (second, new)):
            assert (fill_deferred(data)["next", "ref_version"] == version).all()


class TestTheThread:
    def test_shutdown_leaves_no_thread_and_what_is_held_can_still_be_filled_in(self, collector, kl, gate):
        one = collector(kl("buffer"))
        data = next(iter(one))
        one.shutdown()
        assert len(threads()) == 1
        gate.set()
        assert all("kl_penalty" in sample for sample in results(fill_deferred(data)))
        assert_no_threads()

    def test_half_a_batch_that_a_shutdown_leaves_behind_is_not_scored(
        self, collector, kl, gate, policy_llm, monkeypatch
    ):
        generate, generations = policy_llm.generate, []

        def fail(*args, **kwargs):
            generations.append(1)
            if len(generations) == STEPS:
                raise ZeroDivisionError("the policy's own")
            return generate(*args, **kwargs)

        monkeypatch.setattr(policy_llm, "generate", fail)
        one = collector(kl())
        with pytest.raises(ZeroDivisionError):
            next(iter(one))
        one.shutdown()
        gc.collect()  # the exception and its frames hold each other
        gate.set()
        assert_no_threads()
        assert gate.calls == 1  # that was already being scored

    def test_what_nobody_holds_any_more_is_not_scored(self, rollout, kl, gate):
        transform = kl("buffer")
        data = rollout(transform)
        del data
        last = rollout(transform, steps=1)
        gate.set()
        fill_deferred(last)
        assert gate.calls == 2  # the first was already being scored

    def test_copies_have_threads_of_their_own(self, rollout, kl, gate):
        transform = kl("buffer")
        held = [rollout(one, steps=1) for one in (transform, copy.deepcopy(kl("buffer")), transform.clone())]
        assert len(threads()) == 3
        gate.set()
        assert all("kl_penalty" in results(fill_deferred(data))[0] for data in held)


class TestRefusals:
    def test_a_reference_on_a_live_llm_of_this_process_is_refused(self, policy_llm, tokenizer):
        reference = vLLMWrapper(
            policy_llm, tokenizer=tokenizer, generate=False, log_probs_key="ref_log_probs"
        )
        with pytest.raises(
            OptionError, match=r"(?s)no effect with a reference on a vllm.LLM .*VLLMReference\(path\)"
        ):
            RetrieveKL("from_collector", reference, deferred=True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"deferred": "later"}, "deferred='later' does not exist; choose one of False, True, 'buffer'"),
         ({"deferred": 1}, "deferred=1 does not exist"),
         ({"detach": False}, "have no graph: pass detach=True")],
    )  # fmt: skip
    def test_choices_without_effect_are_refused(self, kl, options, message):
        with pytest.raises(OptionError, match=message):
            kl(**options)

    def test_a_batch_is_no_step(self, make_reference):
        td = ids_batch([[5, 6, 7, 8]], [2], extra={("log_probs", "full"): [torch.tensor([0, 0, -1.0, -2.0])]})
        with pytest.raises(OptionError, match=r"at an env's steps only: .*fill_deferred\(batch\)"):
            RetrieveKL(FromCollector("reuse"), make_reference(), deferred=True)(td)

    def test_a_later_transform_that_reads_the_reward_is_refused(self, collector, kl):
        with pytest.raises(
            OptionError,
            match="RewardSum uses the reward and comes after a deferred KL .* the reward without the KL",
        ):
            next(iter(collector(kl(), RewardSum())))
