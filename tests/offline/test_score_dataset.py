"""From a Ray Dataset to a Ray Dataset: groups, texts, dialogs, two models."""

from __future__ import annotations

import functools

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests import local_ray
from tests.offline import helpers
from tests.offline.helpers import check_oracle
from tests.offline.test_rows import DIALOG
from tests.oracle import ENTROPY_TOLERANCE
from vllm_kl.errors import InputError, OptionError
from vllm_kl.offline import score_dataset
from vllm_kl.offline.columns import PART, Columns, layout_of
from vllm_kl.offline.parts import cut, file_schema, find_files, numbered, read_part
from vllm_kl.offline.pipeline import _in_arrow, map_blocks, whole_blocks
from vllm_kl.offline.rows import ReadRows, Texts
from vllm_kl.offline.source import read_parts

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = [pytest.mark.usefixtures("cluster"), *local_ray.MARKS]

GROUPS = [
    {"q": [5, 6, 7, 8] * 20, "a": [[9, 10], [11], [12, 13, 14]]},
    {"q": [5, 6], "a": [[9], [300]]},  # an id outside the vocabulary
    {"q": [7] * 300, "a": [[1] * 30, [2] * 3]},  # too long
]


def scored(rows, model, **options):
    ds = ray.data.from_items(rows)
    ds.context.execution_options.preserve_order = True
    return score_dataset(ds, str(model), num_gpus=0, **{**helpers.ENGINE, **options}).take_all()


def test_blocks_of_pandas_are_read_as_those_of_arrow():
    rows = pandas.DataFrame({"ids": [[5, 6, 7], [8, 9]], "start": [1, 1]})
    _, schema = _in_arrow(ray.data.from_pandas(rows))
    assert schema == pa.schema([("ids", pa.list_(pa.int64())), ("start", pa.int64())])
    with pytest.raises(InputError, match="no rows"):
        score_dataset(ray.data.from_items([]), "none")


def test_each_block_has_one_part_of_a_file_of_one_row_group(tmp_path):
    pq.write_table(pa.table({"ids": [[i] * 50 for i in range(200)]}), tmp_path / "x.parquet")
    parts, columns = numbered(cut(find_files(str(tmp_path)), 200)), Columns()
    assert len(parts) > 5
    schema = file_schema(parts[0])
    read = functools.partial(read_part, schema=schema, columns=columns)
    with whole_blocks():
        ds = map_blocks(read_parts(parts, read), ReadRows(layout_of(schema, columns), columns, Texts()))
        found = map_blocks(ds, _parts_in_block).take_all()
    assert sorted(row["parts"] for row in found) == [[part.index] for part in parts]


def _parts_in_block(table):
    return pa.table({"parts": [sorted(set(table[PART].to_pylist()))]})


@pytest.mark.nightly
def test_groups_with_the_most_likely_tokens_and_two_models(
    cluster, ref_path, policy_path, ref_oracle, policy_oracle, ref_scorer
):
    found = scored(
        GROUPS,
        ref_path,
        policy=str(policy_path),
        columns={"prompt_ids": "q", "response_ids": "a"},
        prefix="x_",
        topk=3,
        entropy=True,
        max_len_policy="left",
    )
    first, outside, long = found
    assert [row["q"] for row in found] == [row["q"] for row in GROUPS]
    assert outside["x_error"].startswith("response 1, token 2: id 300 is outside the vocabulary")
    assert outside["x_ref_log_probs"] is outside["x_kl"] is None
    prompt, responses = GROUPS[0]["q"], GROUPS[0]["a"]
    assert (first["x_error"], first["x_num_tokens"], first["x_num_cut"]) == (None, [2, 1, 3], [0, 0, 0])
    for i, response in enumerate(responses):
        check_oracle(first["x_ref_log_probs"][i], prompt + response, len(prompt), ref_oracle)
        check_oracle(first["x_log_probs"][i], prompt + response, len(prompt), policy_oracle)
        kl = torch.tensor(first["x_log_probs"][i]) - torch.tensor(first["x_ref_log_probs"][i])
        assert torch.equal(kl, torch.tensor(first["x_kl"][i]))
    best = ref_scorer.score_topk([prompt + response for response in responses], 3, len(prompt))
    assert first["x_topk_ids"] == [one.token_ids.tolist() for one in best]
    assert [len(row) for row in first["x_entropy"]] == [len(response) for response in responses]
    for i, response in enumerate(responses):
        want = ref_oracle.entropies(prompt + response)[len(prompt) :]
        assert first["x_entropy"][i] == pytest.approx(want, abs=ENTROPY_TOLERANCE)
    assert outside["x_entropy"] is None
    assert first["x_mismatch"]["num_tokens"] == 6
    # The longest sequences of a model of 320 tokens: the prompt loses 10 tokens at the left.
    assert (long["x_error"], long["x_num_cut"], long["x_start"]) == (None, [10, 0], [300, 300])
    cut = GROUPS[2]["q"][10:]
    check_oracle(long["x_ref_log_probs"][0], cut + [1] * 30, len(cut), ref_oracle)


@pytest.mark.nightly
def test_dialogs_and_equality_with_the_scorer(cluster, ref_path, ref_oracle, ref_scorer):
    found = scored([{"messages": DIALOG, "id": i} for i in range(3)], ref_path)
    row = found[0]
    kept = [t for t, is_kept in enumerate(row["mask"]) if is_kept]
    want = ref_oracle.log_probs(row["token_ids"])
    assert row["ref_log_probs"] == pytest.approx([want[t] for t in kept], abs=5e-6)
    assert (row["num_tokens"], row["start"]) == (len(kept), kept[0])
    scorer_says = ref_scorer.score([one["token_ids"] for one in found], [one["start"] for one in found])
    for one, values in zip(found, scorer_says, strict=True):
        values = values[torch.tensor(one["mask"])[one["start"] :]]
        torch.testing.assert_close(torch.tensor(one["ref_log_probs"]), values, rtol=0, atol=2e-6)


def test_what_cannot_be_scored_is_refused_before_the_pipeline_runs(cluster, ref_path):
    with pytest.raises(InputError, match="nothing that can be scored"):
        scored([{"a": 1}], ref_path)
    with pytest.raises(InputError, match="has a column 'sum' already"):
        scored([{"ids": [1, 2], "sum": 1.0}], ref_path)
    with pytest.raises(OptionError, match="cannot be renamed"):
        scored([{"ids": [1, 2]}], ref_path, columns={"id": "ids"})
