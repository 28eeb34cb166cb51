"""MKL chooses the code of its functions before several threads call them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CALLS = """
import json
import torch
from torch.utils._python_dispatch import TorchDispatchMode

calls = []

class Calls(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            calls.append((func.__name__.partition(".")[0], str(args[0].dtype), args[0].numel()))
        return func(*args, **(kwargs or {}))

with Calls():
    WORK
print(json.dumps(calls))
"""


@pytest.mark.parametrize(
    "work", ["import vllm_kl.kl", "from vllm_kl import plugin; plugin.register(); plugin.register()"]
)
def test_one_number_is_the_first_that_each_function_is_called_for(work):
    done = subprocess.run(
        [sys.executable, "-c", CALLS.replace("WORK", work)], stdout=subprocess.PIPE, check=True
    )
    calls = [tuple(call) for call in json.loads(done.stdout.splitlines()[-1])]
    for name in ("cos", "sin", "exp", "log", "sqrt", "tanh", "erf"):
        for dtype in ("torch.float32", "torch.float64"):
            assert next(call for call in calls if call[:2] == (name, dtype)) == (name, dtype, 1)
