"""Runs a property on inputs that atheris chooses: those that reach new branches are changed again.

    pip install atheris
    python -m tests.fuzz.run --guided --cases 1000000

``tests/fuzz/run.py`` starts this file once for each property and round, because libFuzzer ends its process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

os.environ.setdefault("OMP_NUM_THREADS", "1")

import atheris

with atheris.instrument_imports(include=["vllm_kl"]):
    from hypothesis import given, settings

    from tests.fuzz.run import properties
    from tests.fuzz.strategies import OPTIONS, OUTCOMES


def main(name: str, most: int, corpus: str, number: int) -> None:
    """Run cases of a property, print what was counted as a line of JSON, and end the process."""
    (one,) = [one for one in properties(name) if one.name == name]

    def end(fault: str | None) -> None:
        print(json.dumps({"cases": one.cases, "outcomes": OUTCOMES, "fault": fault}), flush=True)
        os._exit(0)

    def counted(**arguments: object) -> None:
        one.cases += 1
        try:
            one.body(**arguments)
        except Exception:
            end(f"{traceback.format_exc()}\nof {arguments!r}")
        if one.cases >= most:
            end(None)

    test = settings(database=None, **OPTIONS)(given(**one.strategies)(counted))
    # Inputs that are too short for the property are no cases, so libFuzzer may try more of them.
    atheris.Setup(
        [sys.argv[0], f"-seed={number}", f"-runs={100 * most}", "-verbosity=0", corpus],
        test.hypothesis.fuzz_one_input,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
