"""Tests audits. With equal weights an audit finds no difference; with other weights it finds one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torchrl.envs import Transform

from tests.collectors import collect
from vllm_kl import FromCollector, RetrieveKL, mismatch
from vllm_kl.diagnostics import MismatchWarning
from vllm_kl.errors import CollectorError, DriftError, MissingLogProbError, OptionError
from vllm_kl.transforms.audit import Audit
from vllm_kl.types import Origin, Scored, TokenBatch


def batch_of(num_samples, length=6):
    keep = [torch.arange(length) > 1 for _ in range(num_samples)]
    keep[3] = torch.zeros(length, dtype=torch.bool)  # keeps nothing: never drawn
    return TokenBatch.of(
        token_ids=[torch.arange(length) + i for i in range(num_samples)],
        keep=keep,
        assistant=keep,
        columns=[torch.arange(length)] * num_samples,
        widths=[length] * num_samples,
        stored=True,
    )


THREE = Origin(3)


def check(audit, recorded, batch, score, sampled=None, scoring=THREE):
    """Audit lists of rows; all is of version 3 if nothing else is said."""
    origins = sampled or [THREE] * len(batch)
    scored = lambda part: Scored(values=torch.cat(score(part)), origin=scoring)  # noqa: E731
    audit.check(torch.cat(recorded), batch, origins, scored)


class TestAudit:
    def test_about_so_many_samples_are_drawn_and_the_same_in_every_run(self):
        batch, state = batch_of(2000), torch.get_rng_state()
        drawn = Audit(0.1).draw(batch)
        assert 150 < len(drawn) < 250
        assert drawn == Audit(0.1).draw(batch)
        assert torch.equal(state, torch.get_rng_state())
        assert Audit(1.0).draw(batch) == [i for i in range(2000) if i != 3]
        assert Audit(0.0).draw(batch) == []

    def test_only_the_drawn_samples_are_scored(self):
        batch, asked = batch_of(100), []
        recorded = [torch.full((6,), -1.0)] * 100
        audit = Audit(0.1)
        check(
            audit, recorded, batch, lambda part: asked.append(part) or [torch.full((6,), -1.01)] * len(part)
        )
        (part,) = asked
        assert [int(ids[0]) for ids in part.token_ids] == Audit(0.1).draw(batch)
        assert audit.found.metrics["num_tokens"] == 4 * len(part)
        assert audit.found.metrics["log_prob_diff_mean_nats"] == pytest.approx(0.01, rel=1e-4)

    def test_drift_names_the_sample_as_the_batch_counts_it(self):
        batch = batch_of(10)
        scored = [torch.full((6,), -1.0) for _ in range(10)]
        scored[7][4] = -9.0
        audit = Audit(1.0)
        pick = lambda part: [scored[int(ids[0])] for ids in part.token_ids]  # noqa: E731
        with pytest.raises(
            DriftError, match=r"36 tokens of 9 of 10 samples.*8 at most. Worst: sample 7, token 4 \(id 11\)"
        ):
            check(audit, [torch.full((6,), -1.0)] * 10, batch, pick)
        with pytest.warns(MismatchWarning, match="Worst: sample 7, token 4"):
            check(Audit(1.0, on_drift="warn"), [torch.full((6,), -1.0)] * 10, batch, pick)
        check(Audit(1.0, tolerance=0.3), [torch.full((6,), -1.0)] * 10, batch, pick)

    @pytest.mark.parametrize(
        ("of_sample_7", "scoring", "num_skipped"),
        [
            (Origin(2), Origin(3), 1),
            (Origin(3, 1), Origin(3), 1),
            (Origin(3, 1), Origin(3, None), 0),  # which adapter scores is not known
            (Origin(2, 0, 3), Origin(3), 1),  # it straddles an update
            (Origin(None), Origin(3), 0),
            (Origin(2), Origin(None), 0),
        ],
    )
    def test_samples_known_to_be_of_other_weights_are_skipped_and_counted(
        self, of_sample_7, scoring, num_skipped
    ):
        batch = batch_of(10)
        scored = [torch.full((6,), -1.0) for _ in range(10)]
        scored[7] = torch.full((6,), -9.0)
        sampled = [THREE] * 10
        sampled[7] = of_sample_7
        audit = Audit(1.0)
        pick = lambda part: [scored[int(ids[0])] for ids in part.token_ids]  # noqa: E731
        with contextlib.nullcontext() if num_skipped else pytest.raises(DriftError):
            check(audit, [torch.full((6,), -1.0)] * 10, batch, pick, sampled, scoring)
        assert audit.metrics["audit_skipped_samples"] == num_skipped

    def test_a_missing_log_prob_is_told_by_the_samples_that_were_drawn(self):
        batch = batch_of(10)
        scored = [torch.full((6,), -1.0) for _ in range(10)]
        scored[7][4] = float("nan")
        pick = lambda part: [scored[int(ids[0])] for ids in part.token_ids]  # noqa: E731
        with pytest.raises(
            MissingLogProbError, match=r"samples \[0, 1, 2, 4, 5, 6, 7, 8, 9\], counted.*sample 6, token 4"
        ):
            check(Audit(1.0), [torch.full((6,), -1.0)] * 10, batch, pick)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"fraction": 1.5}, "audit must be a fraction"),
            ({"fraction": float("nan")}, "audit must be a fraction"),
            ({"fraction": 0.1, "tolerance": 0}, "audit_tolerance must be a positive number"),
            (
                {"fraction": 0.1, "on_drift": "ignore"},
                "on_drift='ignore' does not exist; choose one of raise, warn",
            ),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, kwargs, message):
        with pytest.raises(OptionError, match=message):
            Audit(**kwargs)


class MoveWeights(Transform):
    """Changes the policy's weights between sampling and scoring, as an update that nobody waited for does."""

    def __init__(self, llm):
        super().__init__()
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        self._weight = [worker.get_model().model.norm.weight]

    def _step(self, tensordict, next_tensordict):
        with torch.no_grad():
            self._weight[0].mul_(1.5)
        return next_tensordict

    @contextlib.contextmanager
    def put_back(self):
        before = self._weight[0].clone()
        try:
            yield
        finally:
            with torch.no_grad():
                self._weight[0].copy_(before)


class TestInACollector:
    def test_the_same_weights_agree(self, make_env, make_policy, make_reference):
        transform = RetrieveKL("from_collector", make_reference(), audit=1.0)
        batches = collect(make_env().append_transform(transform), make_policy(), turns=4)
        metrics = transform.metrics
        assert metrics["audit_log_prob_diff_max_nats"] < 2e-5
        assert metrics["audit_num_tokens"] == metrics["num_tokens"] > 10
        assert metrics["kl_k1_token_mean_nats"] != 0
        assert len(batches) == 1

    def test_moved_weights_are_found(self, make_env, make_policy, make_reference, policy_llm):
        move = MoveWeights(policy_llm)
        with move.put_back():
            env = make_env().append_transform(move)
            env.append_transform(RetrieveKL("from_collector", make_reference(), audit=1.0))
            with pytest.raises(
                DriftError, match=r"differ by .* nats on average \(tolerance 0.05\).*Worst: sample \d"
            ):
                collect(env, make_policy(), turns=4)
        move = MoveWeights(policy_llm)
        with move.put_back():
            env = make_env().append_transform(move)
            env.append_transform(RetrieveKL(FromCollector(audit=1.0, on_drift="warn"), make_reference()))
            with pytest.warns(
                MismatchWarning, match="Were the engine's weights updated since the policy sampled"
            ):
                collect(env, make_policy(), turns=4)

    def test_without_the_policys_engine_it_says_so(self, make_reference):
        from tests.batches import ids_batch

        batch = ids_batch([[5, 6, 7]], [2], extra={"log_probs": [{"full": torch.tensor([0.0, 0.0, -1.0])}]})
        with pytest.raises(CollectorError, match="audit=0.5 scores reused log-probs again .* no collector"):
            RetrieveKL("from_collector", make_reference(), audit=0.5)(batch)

    def test_an_audit_without_effect_is_refused(self, make_reference, make_gen):
        with pytest.raises(OptionError, match="audit has no effect with a gen_model"):
            RetrieveKL(make_gen("vllm"), make_reference(), audit=0.1)
        with pytest.raises(OptionError, match="audit has no effect with gen_log_probs='rescore'"):
            RetrieveKL("from_collector", make_reference(), gen_log_probs="rescore", audit=0.1)
        with pytest.raises(OptionError, match=r"give on_drift to FromCollector\('auto'\) only"):
            RetrieveKL(FromCollector(audit=0.1), make_reference(), on_drift="warn")

    def test_each_transform_audits_for_itself(self, make_reference):
        side = FromCollector(audit=0.5)
        one, two = (RetrieveKL(side, make_reference()) for _ in range(2))
        assert one._gen.audit is not two._gen.audit
        assert one._gen.audit.fraction == 0.5


def test_what_an_audit_finds_is_what_mismatch_finds():
    batch = batch_of(9)
    sides = [[torch.randn(6) - 3 for _ in range(9)] for _ in range(2)]
    audit = Audit(1.0, tolerance=100)
    check(audit, sides[0], batch, lambda part: [sides[1][int(ids[0])] for ids in part.token_ids])
    assert audit.found.metrics == pytest.approx(mismatch(*sides, batch.keep, limits={}).metrics)
