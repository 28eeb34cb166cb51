"""The stage that owns an engine, without Ray: what happens to rows that the engine cannot score."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.offline import helpers
from tests.offline.helpers import check_oracle
from tests.oracle import ENTROPY_TOLERANCE
from vllm_kl.errors import InputError
from vllm_kl.offline.columns import NUM_PROMPT, POLICY, Columns, layout_of
from vllm_kl.offline.rows import ReadRows, Texts
from vllm_kl.offline.score_rows import CompareRows, Model, ScoreRows

BROKEN = 201  # the id whose embedding is not finite


@pytest.fixture(scope="module")
def model(ref_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("broken") / "model"
    network = AutoModelForCausalLM.from_pretrained(ref_path)
    with torch.no_grad():
        network.get_input_embeddings().weight[BROKEN] = float("inf")
    network.save_pretrained(path)
    tiny.make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stage(model):
    columns = Columns()
    schema = pa.schema([("ids", pa.list_(pa.int64())), ("start", pa.int64())])
    layout = layout_of(schema, columns)
    made = ScoreRows(Model(path=str(model), engine_options=helpers.ENGINE), layout, columns)

    def score(rows):
        return made(ReadRows(layout, columns, Texts())(pa.Table.from_pylist(rows, schema)))

    score.made = made
    yield score
    made.close()


def test_only_the_row_that_has_no_number_is_rejected(stage, ref_oracle):
    # The bad row is the last: its KV stays in its block, and 0 times NaN is NaN (vLLM 0.32 on a CPU).
    rows = [{"ids": [5, 6, 7], "start": 2}, {"ids": [8, 9], "start": 1}, {"ids": [9, BROKEN, 7], "start": 2}]
    table = stage(rows)
    assert table.column_names.count("start") == 1
    values, errors = table["ref_log_probs"].to_pylist(), table["error"].to_pylist()
    assert (errors[0], errors[1], values[2]) == (None, None, None)
    assert errors[2].startswith("the sequence, token 2: the engine returned nan")
    check_oracle(values[0], [5, 6, 7], 2, ref_oracle)
    check_oracle(values[1], [8, 9], 1, ref_oracle)
    assert sum(table[NUM_PROMPT].to_pylist()) == 5


def test_a_block_of_bad_rows_has_errors_only(stage):
    table = stage([{"ids": [5, BROKEN, 7], "start": 2}])
    assert table["ref_log_probs"].to_pylist() == [None]
    assert sum(table[NUM_PROMPT].to_pylist()) == 0
    table = stage([{"ids": [], "start": 1}, {"ids": [1, 2], "start": 0}, {"ids": None, "start": 1}])
    told = table["error"].to_pylist()
    assert [bool(text) for text in told] == [True] * 3
    assert told[1].startswith("the sequence: start is 0")


def test_the_first_bad_row_can_stop_the_run(stage, monkeypatch):
    monkeypatch.setattr(stage.made, "_on_error", "stop")
    with pytest.raises(InputError, match="row 1 of its block: the sequence: start is 0"):
        stage([{"ids": [5, 6], "start": 1}, {"ids": [1, 2], "start": 0}])


class Shorter:
    """A scorer that says of its engine that it takes other lengths."""

    def __init__(self, scorer, most):
        self.info = replace(scorer.info, max_sequence_len=most)
        self._scorer = scorer

    def __getattr__(self, name):
        return getattr(self._scorer, name)


class TestASecondModel:
    @pytest.fixture
    def policy(self, stage, monkeypatch):
        """The stage again, as that of a policy: with the same engine, or one that takes other lengths."""

        made = stage.made._scorer

        def score(table, most=None):
            monkeypatch.setattr(stage.made, "_name", POLICY)
            if most is not None:
                monkeypatch.setattr(stage.made, "_scorer", Shorter(made, most))
            return stage.made(table)

        return score

    def test_both_models_score_the_same_tokens_of_a_row_that_is_cut(self, stage, policy, monkeypatch):
        monkeypatch.setattr(stage.made, "_max_len_policy", "left")
        rows = [{"ids": [n % 200 for n in range(330)], "start": 50}, {"ids": [5, 6, 7], "start": 1}]
        table = stage(rows)
        assert table["num_cut"].to_pylist() == [330 - tiny.MAX_MODEL_LEN, 0]
        found = policy(table, most=400)  # a policy that would take the whole row
        assert found["error"].to_pylist() == [None, None]
        assert found["log_probs"].to_pylist() == table["ref_log_probs"].to_pylist()
        assert found[NUM_PROMPT].to_pylist() == table[NUM_PROMPT].to_pylist()  # counted once
        told = policy(table, most=300)["error"].to_pylist()
        assert told[0].endswith(
            f"the model scored {tiny.MAX_MODEL_LEN} tokens, but the policy's engine takes 300. Give both "
            "engines the same max_model_len"
        )
        assert told[1] is None

    def test_a_row_that_only_the_second_model_refuses_has_no_numbers_of_the_first(self, stage, policy):
        table = stage([{"ids": [5, 6, 7], "start": 1}, {"ids": [9, BROKEN, 7], "start": 2}])
        for name, value in (("error", None), ("ref_log_probs", [-1.0]), ("num_tokens", 1), ("sum", -1.0)):
            column = [*table[name].to_pylist()[:1], value]
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(column, table[name].type))
        found = policy(table)
        for name in ("ref_log_probs", "num_tokens", "sum", "log_probs"):
            first, second = found[name].to_pylist()
            assert (first is None, second is None) == (False, True)
        assert found["start"].to_pylist() == [1, 2]  # a column of the input
        assert "returned nan" in found["error"].to_pylist()[1]

    @pytest.mark.parametrize("on_error", ["mark", "stop"])
    def test_a_token_that_the_policy_cannot_sample_is_an_error_of_its_row(self, on_error):
        columns = Columns()
        layout = layout_of(pa.schema([("ids", pa.list_(pa.int64()))]), columns)
        float32 = pa.list_(pa.float32())
        table = pa.table(
            {
                "ids": pa.array([[5, 6], [5, 7]]),
                "ref_log_probs": pa.array([[-1.0], [-1.0]], float32),
                "log_probs": pa.array([[-2.0], [float("-inf")]], float32),
                "error": pa.array([None, None], pa.string()),
            }
        )
        compare = CompareRows(layout, columns, "k1", on_error)
        if on_error == "stop":
            with pytest.raises(InputError, match="row 1 of its block"):
                compare(table)
            return
        found = compare(table)
        assert found["kl"].to_pylist() == [[-1.0], None]
        assert found["ref_log_probs"].to_pylist() == [[-1.0], None]
        assert [told is None for told in found["error"].to_pylist()] == [True, False]


@pytest.mark.parametrize("top_k", [0, 2])
def test_entropies_stand_beside_the_log_probs(stage, monkeypatch, ref_oracle, top_k):
    monkeypatch.setattr(stage.made, "_entropy", True)
    monkeypatch.setattr(stage.made, "_top_k", top_k)
    table = stage([{"ids": [5, 6, 7, 8], "start": 2}, {"ids": [1, 2], "start": 0}])
    assert table["entropy"].type == pa.list_(pa.float32())
    entropies, nothing = table["entropy"].to_pylist()
    assert entropies == pytest.approx(ref_oracle.entropies([5, 6, 7, 8])[2:], abs=ENTROPY_TOLERANCE)
    assert nothing is None
    check_oracle(table["ref_log_probs"].to_pylist()[0], [5, 6, 7, 8], 2, ref_oracle)
    assert ("topk_ids" in table.column_names) == bool(top_k)
