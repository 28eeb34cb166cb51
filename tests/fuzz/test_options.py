"""Arguments of the command and files of options: what was given, or exit code 2 or 1 and a text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import yaml
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.fuzz.strategies import CHANGES, JSON_VALUES, NASTY, SCALARS, TEXTS, fuzz, mutated, some_of, told
from vllm_kl import Sample, write_samples
from vllm_kl.cli import app
from vllm_kl.engines.arguments import parse_engine_options
from vllm_kl.engines.replicas.fleet import wish_of
from vllm_kl.offline.columns import Columns
from vllm_kl.serving.application import Arguments, _key

HOME = tempfile.TemporaryDirectory(prefix="vllm_kl_fuzz_")  # removed when Python ends
GIVEN: list[tuple] = []  # what the last command would have worked on


def ask(*args):
    """Run ``vllm-kl`` without its work; return what it would have done, or None if it refused."""
    GIVEN.clear()

    def work(*given):
        GIVEN.append(given)
        return {}, 0

    with mock.patch("vllm_kl.offline.command._work", work):
        result = run(*args)
    return GIVEN[0] if result.exit_code == 0 and GIVEN else None


def run(*args):
    """Run ``vllm-kl``; see that a refusal has a text, and an exit code of its own."""
    result = CliRunner().invoke(app, [*args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2)
    assert result.exit_code == 0 or result.output.strip(), "a refusal without a text"
    return result


def words_of(options):
    """Return the words of some options; LATIN1 is a file that is no UTF-8."""
    latin1 = Path(HOME.name, "latin1.jinja")
    latin1.write_bytes("é".encode("latin-1"))
    return [word.replace("LATIN1", str(latin1)) for option in options for word in option]


@fuzz(given=st.lists(st.one_of(TEXTS, st.builds("{}={}".format, TEXTS, TEXTS)), max_size=3), share=3.0)
def test_engine_options_are_read_or_refused(given):
    found = told(lambda: parse_engine_options(given))
    assert found is None or len(found) == len(given)


OPTIONS = {
    "--temperature": st.one_of(st.sampled_from(["1", "0.5", "nan", "-1", "x"]), TEXTS),
    "--topk": st.one_of(st.sampled_from(["0", "3", "-1", "2.5"]), TEXTS),
    "--engine": st.one_of(st.sampled_from(["dtype=float32", "a=1"]), TEXTS),
    "--column": st.one_of(st.just("response=chosen"), TEXTS),
    "--shard": st.one_of(st.sampled_from(["0/1", "1/4", "4/4", "9" * 5000 + "/1", "٣/٤"]), TEXTS),
    "--format": st.one_of(st.sampled_from(["parquet", "jsonl"]), TEXTS),
    "--limit": st.one_of(st.sampled_from(["1", "0", "1e3"]), TEXTS),
    "--chat-template": st.sampled_from(["/", "/dev/null", "/nothing", "LATIN1"]),
    "--replicas": TEXTS,
    "--prefix": TEXTS,
}


@fuzz(
    options=some_of(OPTIONS),
    data=st.lists(st.one_of(st.just("data.jsonl"), NASTY), min_size=1, max_size=2),
    few=60,
    share=0.1,
)
def test_any_arguments_are_taken_or_refused(options, data):
    found = ask("score", *words_of(options), "--model", "m", "--out", "o", "--", *data)
    if found is not None:
        model, job, files, _, _ = found
        assert (model, files["out"]) == ("m", "o")
        first, step = files["shard"]
        assert 0 <= first < step
        assert all(isinstance(name, str) for name in job["engine_options"])


OF_SERVE = {
    "--replicas": st.one_of(st.sampled_from(["1", "auto", "0", "-1", "9" * 5000, "٣"]), TEXTS),
    "--num-gpus": st.one_of(st.sampled_from(["0", "0.5", "-1", "nan", "inf"]), TEXTS),
    "--num-cpus": st.one_of(st.sampled_from(["1", "0", "nan", "inf"]), TEXTS),
    "--drain-s": st.one_of(st.sampled_from(["0", "-1", "nan", "inf"]), TEXTS),
    "--engine": st.one_of(st.sampled_from(["dtype=float32", "a=1"]), TEXTS),
    "--limit": st.one_of(st.sampled_from(["max_tokens=8", "max_tokens=-1", "max_tokens=x", "a=1"]), TEXTS),
    "--api-key-file": st.sampled_from(["/", "/dev/null", "/nothing", "", "LATIN1"]),
    "--ssl-keyfile": st.one_of(st.just("/dev/null"), TEXTS),
    "--host": TEXTS,
    "--port": st.one_of(st.sampled_from(["1", "0", "70000"]), TEXTS),
}


@fuzz(
    options=some_of(OF_SERVE),
    few=60,
    share=0.1,
)
def test_any_arguments_of_a_server_are_taken_or_refused(options):
    given = []

    def start(arguments, http, drain_s):
        arguments = Arguments.model_validate(arguments)
        given.extend([wish_of(arguments.replicas), _key(arguments.api_key_file), drain_s])

    with mock.patch("vllm_kl.serving.command._serve", start):
        result = run("serve", "model", *words_of(options))
    if result.exit_code == 0:
        wish, _, drain_s = given
        numbers = [wish.fewest, wish.most, wish.gpus, wish.cpus, drain_s]
        assert all(number is None or 0 <= number < float("inf") for number in numbers)


@fuzz(
    html=st.sampled_from(["page.html", "none/page.html", "samples.jsonl", "."]),
    words=st.lists(
        st.one_of(st.sampled_from(["--limit", "--title", "--json", "--help", "1"]), NASTY), max_size=4
    ),
    changes=CHANGES,
    few=60,
    share=0.1,
)
def test_any_page_is_written_or_refused(html, words, changes):
    samples, page = Path(HOME.name, "samples.jsonl"), Path(HOME.name, html)
    Path(HOME.name, "page.html").unlink(missing_ok=True)
    write_samples(samples, [Sample(token_ids=[5, 6, 7], log_probs=[-1.0], ref_log_probs=[-2.0])])
    samples.write_bytes(mutated(samples.read_bytes(), changes))
    if run("view", str(samples), "--html", str(page), *words).exit_code == 0 and "--help" not in words:
        assert page.read_text().startswith("<!")


NAMES = [
    "data",
    "model",
    "out",
    "format",
    "column",
    "prefix",
    "add-eos",
    "temperature",
    "topk",
    "entropy",
    "policy",
    "engine",
    "policy-engine",
    "replicas",
    "num-gpus",
    "shard",
    "limit",
    "part-bytes",
    "dry_run",
    "config",
]
YAML_VALUES = st.one_of(
    JSON_VALUES,
    st.sampled_from([2.5, 1, True, "x", ["a"], {"a": 1}, {"a": [1]}]),
    st.dates(),
    st.dictionaries(st.one_of(st.sampled_from("ab"), st.integers(0, 1)), st.one_of(st.dates(), SCALARS)),
)
RIGHT = {"data": ["d.jsonl"], "model": "m", "out": "o"}


@fuzz(
    options=st.dictionaries(st.one_of(st.sampled_from(NAMES), SCALARS), YAML_VALUES, max_size=2),
    changes=st.one_of(st.just([]), CHANGES),
    few=60,
    share=0.1,
)
def test_any_file_of_options_is_taken_or_refused(options, changes):
    text = yaml.safe_dump(RIGHT | options, allow_unicode=True).encode(errors="surrogatepass")
    path = Path(HOME.name, "options.yaml")
    path.write_bytes(mutated(text, changes))
    found = ask("score", "--config", str(path))
    if found is None or changes:
        return
    _, job, files, _, is_dry = found
    given = {name.replace("-", "_"): value for name, value in options.items() if value is not None}
    for name in ("temperature", "topk", "replicas", "num_gpus", "entropy", "add_eos"):
        if name in given:
            assert number(job[name]) == number(given[name]), name
    for name in ("limit", "part_bytes"):
        if name in given:
            assert number(files[name]) == number(given[name]), name
    if "dry_run" in given:
        assert number(is_dry) == number(given["dry_run"])
    for name, key in (("prefix", job), ("policy", job), ("out", files)):
        if name in given:
            assert not isinstance(given[name], (dict, list)), "a list where one text is wanted"
            assert key[name] == str(given[name])


def number(value):
    """What a value says as a number; YAML's true is no number."""
    if isinstance(value, str):
        words = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
        words |= {"t": True, "f": False, "y": True, "n": False}
        lowered = value.strip().lower()
        return words[lowered] if lowered in words else float(value)
    return value if isinstance(value, bool) else float(value)


@fuzz(names=st.dictionaries(TEXTS, TEXTS, max_size=2), prefix=TEXTS)
def test_columns_are_renamed_or_refused(names, prefix):
    found = told(lambda: Columns.renamed(names, prefix))
    assert found is None or Columns.from_settings(found.settings) == found
