"""Pushed weights lie in shared memory: their folder goes with its engine, or with its killed process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from vllm_kl import lifetime
from vllm_kl.errors import WeightsError
from vllm_kl.weights import checkpoint
from vllm_kl.weights.push import push_weights, weights_of


def test_weights_that_do_not_fit_in_memory_say_how_much_they_need_and_leave_nothing(llm, states):
    version = weights_of(llm).version
    before = set(lifetime.SHARED_MEMORY.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a disk that is full
    try:
        with pytest.raises(WeightsError, match=r"[\d,]+ bytes of weights could not be written to .* TMPDIR"):
            push_weights(llm, states[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert weights_of(llm).version == version
    assert not [
        path for path in set(lifetime.SHARED_MEMORY.iterdir()) - before if str(os.getpid()) in path.name
    ]


def test_what_a_killed_process_left_in_shared_memory_is_removed(states, folders):
    code = (
        "import os; from vllm_kl import lifetime; folder = lifetime.new_folder(lifetime.SHARED_MEMORY);"
        "print(folder, flush=True); input(); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        theirs = checkpoint.Path(owner.stdout.readline().strip())
        first = checkpoint.Skeleton(str(folders[0])).write(states[0])
        assert theirs.exists()
        owner.communicate("\n")
    assert theirs.exists()
    second = checkpoint.Skeleton(str(folders[0])).write(states[0])
    assert not theirs.exists()
    assert first.folder.exists()
    assert second.folder.exists()


def test_a_folder_is_its_owners_whatever_process_ids_say(tmp_path, monkeypatch):
    """Containers that share /dev/shm have process ids of their own."""
    monkeypatch.setattr(lifetime, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # nobody's here
    mine = lifetime.new_folder(tmp_path)
    lifetime.remove_orphans()
    assert mine.exists()
    lifetime.remove(mine)
    assert list(tmp_path.iterdir()) == []


def test_a_fork_neither_keeps_nor_removes_its_parents_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(lifetime, "SHARED_MEMORY", tmp_path)
    mine = lifetime.new_folder(tmp_path)
    ours, theirs = os.pipe(), os.pipe()
    if not (child := os.fork()):
        lifetime.remove(mine)
        os.write(theirs[1], b"x")
        os.read(ours[0], 1)
        os._exit(0)
    os.read(theirs[0], 1)
    try:
        assert mine.exists()
        os.close(lifetime._HELD.pop(mine))  # as if this process had been killed, and not its fork
        lifetime.remove_orphans()
        assert not mine.exists()
    finally:
        os.write(ours[1], b"x")
        os.waitpid(child, 0)
        for end in (*ours, *theirs):
            os.close(end)


def test_in_a_shared_folder_only_what_this_machines_processes_left_is_removed(tmp_path, monkeypatch):
    """A disk of several machines may keep the locks of each machine for itself."""
    left = []
    for host in ("here", "there"):
        monkeypatch.setattr(lifetime.socket, "gethostname", lambda host=host: host)
        left.append(lifetime.new_folder(tmp_path))
        os.close(lifetime._HELD.pop(left[-1]))  # as if this process had been killed
    mine = lifetime.new_folder(tmp_path)
    lifetime.remove_orphans(tmp_path)
    assert [folder.exists() for folder in (*left, mine)] == [True, False, True]
    lifetime.remove(mine)
