"""Files into files on a real local Ray, with real engines."""

from __future__ import annotations

import json

import pytest

from tests import local_ray
from tests.offline import helpers
from tests.offline.dying import ActorDies, EngineDies
from tests.offline.helpers import BAD, check_oracle, check_same, run, start, table_of
from vllm_kl.errors import EngineError, InputError, OptionError
from vllm_kl.offline import cluster, pipeline
from vllm_kl.offline.dry_run import dry_run
from vllm_kl.offline.score_files import Files

ray = pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = [pytest.mark.usefixtures("cluster"), *local_ray.MARKS]


def test_every_row_is_scored_or_has_an_error_in_the_order_of_the_input(whole, ref_oracle):
    _, good, summary, table = whole
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [None if i == 20 else i for i in range(len(rows))]
    for i, row in enumerate(rows):
        if i in BAD:
            assert BAD[i][1] in row["error"]
            assert {row[name] for name in ("ref_log_probs", "start", "num_tokens", "sum")} == {None}
            continue
        prompt, response = good[i]["prompt_ids"], good[i]["response_ids"]
        assert (row["error"], row["start"], row["num_tokens"]) == (None, len(prompt), len(response))
        assert (row["prompt_ids"], row["response_ids"]) == (prompt, response)
        check_oracle(row["ref_log_probs"], prompt + response, len(prompt), ref_oracle)
        assert row["sum"] == pytest.approx(sum(row["ref_log_probs"]), abs=1e-9)
    assert len(summary.files) > 4
    assert (summary.rows, summary.rejected) == (len(rows), len(BAD))
    assert summary.tokens == sum(len(r["prompt_ids"] + r["response_ids"]) for r in good.values())
    assert summary.scored_tokens == sum(len(r["response_ids"]) for r in good.values())


def test_a_second_start_changes_nothing_and_starts_no_engine(whole, ref_path, monkeypatch):
    home, _, summary, table = whole
    monkeypatch.setattr(pipeline, "ScoreRows", None)  # a stage that cannot be made
    before = {path: path.stat().st_mtime_ns for path in (home / "out").glob("part-*")}
    again = run(home / "data.jsonl", home / "out", ref_path)
    assert (again.rows, again.rejected, again.tokens) == (summary.rows, summary.rejected, 0)
    assert {path: path.stat().st_mtime_ns for path in (home / "out").glob("part-*")} == before
    assert table_of(home / "out").equals(table)


@pytest.mark.parametrize(
    ("files", "options", "told"),
    [
        ({}, {"temperature": 0.7}, "model.temperature was 1.0, is 0.7"),
        ({}, {"entropy": True}, "entropy was false, is true"),
        ({}, {"columns": {"response_ids": "chosen"}}, 'column.response_ids was "response_ids", is "chosen"'),
        ({}, {"engine_options": {"dtype": "bfloat16"}}, 'model.engine.dtype was "float32", is "bfloat16"'),
        ({"limit": 5}, {}, "limit was null, is 5"),
    ],
)
def test_other_settings_are_refused_by_name(whole, ref_path, files, options, told):
    home, *_ = whole
    with pytest.raises(OptionError, match=told):
        run(home / "data.jsonl", home / "out", ref_path, files=files, **options)


def test_files_without_a_manifest_are_refused_and_never_removed(whole, ref_path, tmp_path):
    home, *_ = whole
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-00000000.parquet").write_bytes(b"somebody's")
    with pytest.raises(OptionError, match=r"no _manifest\.json that tells what made them"):
        run(home / "data.jsonl", tmp_path / "out", ref_path)
    with pytest.raises(OptionError, match="--overwrite removes nothing there"):
        run(home / "data.jsonl", tmp_path / "out", ref_path, files={"overwrite": True})
    assert (tmp_path / "out" / "part-00000000.parquet").read_bytes() == b"somebody's"


def test_overwrite_keeps_the_old_files_until_nothing_is_wrong_with_the_new_run(whole, ref_path, tmp_path):
    home, *_, table = whole
    (tmp_path / "data.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="nothing that can be scored"):
        run(tmp_path / "data.jsonl", home / "out", ref_path, files={"overwrite": True})
    with pytest.raises(OptionError, match="would remove the files of the other shards"):
        run(home / "data.jsonl", home / "out", ref_path, files={"overwrite": True, "shard": (0, 2)})
    assert table_of(home / "out").equals(table)


def test_an_output_inside_the_input_is_never_read_as_input(whole, ref_path):
    home, *_, table = whole
    with pytest.raises(InputError, match="is in the folder of the output"):
        run(home / "out", home / "out", ref_path, files={"overwrite": True})
    assert table_of(home / "out").equals(table)


@pytest.mark.nightly
def test_overwrite_begins_anew(whole, ref_path, tmp_path):
    home, *_, table = whole
    run(home / "data.jsonl", tmp_path / "out", ref_path, files={"limit": 20})
    (tmp_path / "out" / "._manifest.json.0123abcd").write_bytes(b"{")  # of a killed writer
    again = run(home / "data.jsonl", tmp_path / "out", ref_path, files={"overwrite": True})
    assert again.rows == table.num_rows
    check_same(table_of(tmp_path / "out"), table)
    assert not list((tmp_path / "out").glob("._*"))


@pytest.mark.nightly
def test_shards_that_run_at_once_make_the_output_of_one_run(whole, ref_path, tmp_path):
    home, *_, table = whole
    data, out = home / "data.jsonl", tmp_path / "out"
    shards = [start(data, out, ref_path, "--shard", f"{i}/2", "--json") for i in range(2)]
    told = [shard.communicate(timeout=500) for shard in shards]
    assert [shard.returncode for shard in shards] == [3, 3], told
    figures = [json.loads(printed) for printed, _ in told]
    assert sum(one["rows"] for one in figures) == table.num_rows
    assert sum(one["rejected"] for one in figures) == len(BAD)
    assert not set(figures[0]["files"]) & set(figures[1]["files"])
    check_same(table_of(out), table)
    assert run(data, out, ref_path).tokens == 0  # nothing is left to do


@pytest.mark.nightly
def test_two_replicas_write_the_rows_of_one_in_their_order(whole, ref_path, tmp_path):
    home, *_, table = whole
    actors = set()

    def count(_):
        actors.update(actor.pid for actor, _ in helpers.scoring_actors())

    summary = run(home / "data.jsonl", tmp_path / "out", ref_path, replicas=2, on_part=count)
    assert len(actors) == 2
    assert (summary.rows, summary.rejected) == (table.num_rows, len(BAD))
    check_same(table_of(tmp_path / "out"), table)


def test_another_model_is_refused(whole, policy_path):
    home, *_ = whole
    with pytest.raises(OptionError, match=r"model\.checksum was"):
        run(home / "data.jsonl", home / "out", policy_path)


@pytest.mark.nightly
def test_an_actor_and_an_engine_that_are_killed_are_started_again(whole, ref_path, tmp_path):
    home, _, _, table = whole
    killed = []

    def kill(_):
        if len(killed) < 2:  # first an engine, then an actor
            ((actor, engine),) = helpers.scoring_actors()
            process = actor if killed else engine[-1]
            killed.append(process.pid)
            process.kill()

    run(home / "data.jsonl", tmp_path / "out", ref_path, on_part=kill)
    assert len(set(killed)) == 2
    check_same(table_of(tmp_path / "out"), table)


MANY = {"part_bytes": 400}  # parts of a few rows


@pytest.mark.nightly
def test_an_engine_that_dies_again_and_again_ends_the_run_with_its_log(
    whole, ref_path, tmp_path, monkeypatch
):
    home, _, _, table = whole
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "ScoreRows", EngineDies)
        with pytest.raises(EngineError, match=r"(?s)the engine died 4 times: .*what the engine wrote last"):
            run(home / "data.jsonl", tmp_path / "out", ref_path, files=MANY)
    run(home / "data.jsonl", tmp_path / "out", ref_path, files=MANY)
    check_same(table_of(tmp_path / "out"), table)


@pytest.mark.nightly
def test_an_actor_that_dies_again_and_again_ends_the_run(whole, ref_path, tmp_path, monkeypatch):
    home, _, _, table = whole
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "ScoreRows", ActorDies)
        with pytest.raises(EngineError, match="died too often|actor died"):
            run(home / "data.jsonl", tmp_path / "out", ref_path, files=MANY)
    num_parts = len(list((tmp_path / "out").glob("part-*")))
    run(home / "data.jsonl", tmp_path / "out", ref_path, files=MANY)
    assert num_parts < len(list((tmp_path / "out").glob("part-*")))
    check_same(table_of(tmp_path / "out"), table)


@pytest.mark.nightly
def test_files_that_are_gone_are_made_again_and_no_others(whole, ref_path, tmp_path):
    """As after a kill: the output lacks files, and has what a writer that was killed has left."""
    home, _, _, table = whole
    done = sorted((home / "out").glob("part-*"))
    gone = done[1], done[-1]
    moved = [path.rename(tmp_path / path.name) for path in gone]
    left = home / "out" / f".{gone[0].name}.0123abcd"
    left.write_bytes(moved[0].read_bytes()[:100])
    kept = {path: path.stat().st_mtime_ns for path in (home / "out").glob("part-*")}
    summary = run(home / "data.jsonl", home / "out", ref_path)
    assert not left.exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert summary.rows == table.num_rows
    check_same(table_of(home / "out"), table)


@pytest.mark.nightly
def test_an_engine_that_cannot_start_is_an_error_with_its_reason(whole, ref_path, tmp_path):
    home, *_ = whole
    with pytest.raises((EngineError, OptionError), match="max_model_len"):
        run(home / "data.jsonl", tmp_path / "out", ref_path, engine_options={"max_model_len": 10**9})


class Holder:
    def hold(self):
        """Return when this actor has its CPUs."""


def test_a_cluster_that_is_too_small_is_refused_with_numbers(whole, ref_path, tmp_path, monkeypatch):
    home, *_ = whole
    with pytest.raises(OptionError, match="has 6 logical CPUs, the plan takes 52"):
        run(home / "data.jsonl", tmp_path / "out", ref_path, replicas=50)
    with pytest.raises(OptionError, match="has 3 logical GPUs, the plan takes 4"):
        helpers.job(ref_path, num_gpus=4).resources.check()
    holder = ray.remote(num_cpus=2)(Holder).remote()
    ray.get(holder.hold.remote())
    monkeypatch.setattr(cluster, "_FREE_WITHIN_S", 0.5)
    with pytest.raises(
        OptionError, match=r"of the 6 logical CPUs of the Ray cluster \d are free, the plan takes 5"
    ):
        helpers.job(ref_path, replicas=3).resources.check()
    ray.kill(holder)


@pytest.mark.parametrize(("gpus", "expected"), [(0, (0, 0)), (8, (1, 2))])
def test_each_model_takes_the_gpus_of_its_workers_where_the_cluster_has_some(monkeypatch, gpus, expected):
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 9.0, "GPU": float(gpus)})
    options = {"engine_options": {}, "policy_options": {"tensor_parallel_size": 2}, "num_gpus": None}
    resources = helpers.job("m", policy="p", **options).resources
    assert (resources.gpus_of(0), resources.gpus_of(1)) == expected


def test_an_input_that_vanishes_is_an_error_and_finished_files_stay(whole, ref_path, tmp_path):
    home, *_ = whole
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_bytes((home / "data.jsonl").read_bytes())
    with pytest.raises(InputError, match=r"data\.jsonl was there at the start, and is gone now"):
        run(data, out, ref_path, on_plan=lambda *_: data.unlink())
    with pytest.raises(InputError, match="was there when this output was begun, and is gone now"):
        run(data, out, ref_path)
    data.write_bytes((home / "data.jsonl").read_bytes() + b"{}\n")
    with pytest.raises(InputError, match=r"had \d+ bytes when this output was begun, and has \d+ now"):
        run(data, out, ref_path)


@pytest.mark.nightly
def test_a_dry_run_counts_what_a_run_scores(whole, ref_path):
    home, good, summary, table = whole
    files = Files(data=(str(home / "data.jsonl"),), out="", part_bytes=helpers.PART_BYTES)
    counts = dry_run(files, helpers.job(ref_path))
    # Three of the bad rows are bad for an engine only: an id, a length, a start.
    assert (counts.rows, counts.unreadable, counts.sequences) == (table.num_rows, 3, len(good) + 3)
    assert counts.tokens == summary.tokens + 3 + 1 + 330


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"question": "1+1", "answer": "2"}, "nothing that can be scored"),
        (
            {"prompt_ids": [1.5], "response_ids": [2]},
            "'prompt_ids' holds list<.*double>, expected a list of ints",
        ),
        ({"prompt_ids": [1], "response_ids": [2], "error": "x"}, "has a column 'error' already"),
        ({"ids": [1, 2], "__part": 0}, "has a column '__part', a name that is used here"),
    ],
)
def test_columns_that_do_not_fit_are_refused_before_an_engine_starts(ref_path, tmp_path, line, told):
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=told):
        run(tmp_path / "data.jsonl", tmp_path / "out", ref_path)
    assert not (tmp_path / "out").exists()
