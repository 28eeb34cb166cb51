"""A real ``/dev/shm`` that is full: a small tmpfs in a namespace of its own, so nobody else's is filled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.small_shm import IDS, SMALL_BYTES
from tests.oracle import LOG_PROB_TOLERANCE

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


def same(found, oracle):
    truth = oracle.log_probs(IDS)[1:]
    return max(abs(a - b) for a, b in zip(found, truth, strict=True)) < LOG_PROB_TOLERANCE


@pytest.mark.skipif(
    not CAN_MOUNT, reason="`unshare -rm` fails: allow user namespaces (sysctl user.max_user_namespaces=1000)"
)
def test_weights_that_memory_has_no_room_for_leave_the_old_ones(
    ref_path, policy_path, ref_oracle, policy_oracle, tmp_path
):
    mount = f"mount -t tmpfs -o size={SMALL_BYTES} tmpfs"
    program = f"{mount} /dev/shm && {mount} {tmp_path} && exec {sys.executable} -m tests.faults.small_shm"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{program} {ref_path} {policy_path}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    for name in ("filled meanwhile", "both full"):
        assert "could not be written" in told[name]
        assert "No space left on device" in told[name]
        assert told[f"{name}, left"] == []
        assert same(told[f"{name}, log-probs"], ref_oracle)
    assert same(told["started, log-probs"], ref_oracle)
    assert told["parents"] == ["/dev/shm"]
    for name in ("shared memory full", "room again"):
        assert told[name] == 1  # a version more
        assert same(told[f"{name}, log-probs"], policy_oracle)
