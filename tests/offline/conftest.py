"""Provides a data set and the output of a run that nobody disturbed, made once."""

from __future__ import annotations

import pytest

from tests.offline.helpers import run, table_of, write_data


@pytest.fixture(scope="session")
def whole(cluster, ref_path, tmp_path_factory):
    """A folder with a data set, the good ones of its rows, the summary of its run, and the output."""
    home = tmp_path_factory.mktemp("whole")
    good = write_data(home / "data.jsonl")
    summary = run(home / "data.jsonl", home / "out", ref_path)
    return home, good, summary, table_of(home / "out")
