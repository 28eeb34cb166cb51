"""Files of other stores than the local disk: on a server of S3 on this machine, and where there is none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from tests import local_ray
from tests.offline.helpers import BAD, check_same, start, until
from vllm_kl.errors import InputError, OptionError
from vllm_kl.offline import storage
from vllm_kl.offline.parts import find_files
from vllm_kl.offline.storage import Folder, list_files, open_file

PUT_BUCKET_S = 30


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def s3():
    """A bucket on a server of S3; its environment variables are set."""
    program = os.environ.get("MOTO_SERVER") or shutil.which("moto_server")
    if program is None:
        pytest.skip(
            "pip install 'moto[server]>=5.2.5' into any environment, and set MOTO_SERVER to its moto_server"
        )
    url = f"http://127.0.0.1:{free_port()}"
    command = [program, "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "y",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        end = time.monotonic() + PUT_BUCKET_S
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
        try:
            _write_in_parts(url)
            yield "s3://bucket"
        finally:
            server.terminate()


def _write_in_parts(url):
    """Skip the test with a server whose answer to the end of an upload Arrow does not know: moto 5.2.1."""
    once = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1)
    try:
        with pyarrow.fs.S3FileSystem(endpoint_override=url, retry_strategy=once).open_output_stream(
            "bucket/probe"
        ) as stream:
            stream.write(b"x")
    except OSError as error:
        pytest.skip(f"this moto_server cannot end an upload ({error}): it needs moto[server]>=5.2.5")


@pytest.mark.parametrize(
    "told",
    [
        {"ETag": "x"},
        {"etag": "x"},
        {"blob_id": "x", "last_commit": None},
        {"mtime": 5.0},
        {"ETag": None, "mtime": 5},
    ],
)
def test_what_a_store_tells_of_a_files_content_is_kept(monkeypatch, told):
    """The names of fsspec's clients of S3, Google, the Hugging Face hub, and of Arrow's file systems."""

    class Store:
        def isdir(self, path):
            return False

        def exists(self, path):
            return True

        def info(self, path):
            return {"name": path, "size": 3, **told}

    monkeypatch.setattr(storage, "_open_store", lambda place: (Store(), place.partition("://")[2]))
    (file,) = list_files("xy://a/b.jsonl")
    assert file.mark == str(next(value for value in told.values() if value))


@pytest.mark.nightly
def test_files_of_s3_are_listed_read_written_and_removed(s3):
    folder = Folder(f"{s3}/files")
    assert folder.names() == set()
    folder.make("_counts")
    for name in ("b.jsonl", "a.jsonl", "_counts/x.json"):
        folder.write(name, b'{"ids": [1]}\n')
    assert folder.names() == {"a.jsonl", "b.jsonl", "_counts"}
    expected = [(f"{s3}/files/{name}.jsonl", 13) for name in "ab"]
    assert [file[:2] for file in list_files(folder.place)] == expected
    assert list_files(folder.place) == list_files(f"{s3}/files/*.jsonl")
    assert (folder.read_json("a.jsonl"), folder.read_json("c.jsonl")) == ({"ids": [1]}, None)
    with open_file(f"{s3}/files/a.jsonl") as stream:
        stream.seek(7)
        assert stream.readline() == b" [1]}\n"
    folder.remove("_counts")
    assert folder.names() == {"a.jsonl", "b.jsonl"}
    with pytest.raises(InputError, match="no such file"):
        find_files(f"{s3}/nothing/*.jsonl")


@pytest.mark.nightly
class TestRun:
    pytestmark = local_ray.MARKS

    def test_a_killed_run_on_s3_goes_on(self, whole, s3, ref_path, cluster_of_s3):
        home, *_, table = whole
        lines = (home / "data.jsonl").read_bytes().splitlines(keepends=True)
        data, out = Folder(f"{s3}/data"), Folder(f"{s3}/out")
        data.make()
        data.write("a.jsonl", b"".join(lines[:25]))
        data.write("b.jsonl", b"".join(lines[25:]))
        options = {"address": cluster_of_s3}
        killed = start(f"{s3}/data/*.jsonl", out.place, ref_path, **options)
        # Asked more often, the server of S3 has no time for the run.
        until(lambda: len([n for n in out.names() if n.startswith("part-")]) >= 2, killed, every_s=0.5)
        os.kill(killed.pid, signal.SIGKILL)
        killed.communicate()
        before = {name: modified(f"{out.place}/{name}") for name in out.names() if name.startswith("part-")}
        again = start(f"{s3}/data/*.jsonl", out.place, ref_path, "--json", **options)
        printed, told = again.communicate(timeout=300)
        assert again.returncode == 3, told
        figures = json.loads(printed.splitlines()[-1])
        assert (figures["rows"], figures["rejected"]) == (table.num_rows, len(BAD))
        assert {name: modified(f"{out.place}/{name}") for name in before} == before
        check_same(pa.concat_tables(map(read_parquet, figures["files"])), table)


def read_parquet(path):
    with open_file(path) as stream:
        return pq.read_table(pa.BufferReader(stream.read()))


def modified(path):
    """Return when a file of a store was written."""
    store, inside = storage._open_store(path)
    return store.info(inside)["mtime"]


@pytest.fixture
def cluster_of_s3(s3):
    """The address of a Ray whose processes have the environment of the server of S3."""
    with local_ray.second_cluster() as address:
        yield address


@pytest.mark.parametrize("place", ["https://127.0.0.1:1/x.jsonl", "hf://datasets/some/data/x.jsonl"])
def test_a_store_that_cannot_be_reached_is_a_clear_error(place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(InputError, match=f"{place} cannot be reached: .*[Cc]onnect"):
        find_files(place)
    assert time.monotonic() - began < 20


def test_an_unknown_scheme_is_refused():
    with pytest.raises(OptionError, match="nope://x: Protocol not known"):
        find_files("nope://x")
