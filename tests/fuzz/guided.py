"""Runs a property on inputs that atheris chooses: those that reach new branches are changed again.

    python -m tests.fuzz.run --guided --cases 1000000

``tests/fuzz/run.py`` starts this file once for each property and round, because libFuzzer ends its process.
libFuzzer tells its progress on standard error; ``cov`` is the number of branches that were reached.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import atheris
from hypothesis import given, settings

# Only what is imported inside this block has its branches counted, so all properties are.
with atheris.instrument_imports(include=["vllm_kl"]):
    from tests.fuzz.run import CASE_AT_MOST_S, properties
    from tests.fuzz.strategies import OPTIONS, OUTCOMES

    PROPERTIES = properties(None)

TRIES = 100  # inputs for each case: one that is too short for the property is no case
NUM_SEEDS, LONGEST = 200, 1024  # bytes


def fill(corpus: Path, number: int) -> None:
    """Write random inputs into an empty corpus: libFuzzer alone begins with a few bytes, and small cases."""
    draw = random.Random(number)
    if not any(corpus.iterdir()):
        for n in range(NUM_SEEDS):
            (corpus / f"seed_{n}").write_bytes(draw.randbytes(draw.randrange(16, LONGEST)))


def main(name: str, most: int, corpus: str, number: int) -> None:
    """Run cases of a property, print what was counted as a line of JSON, and end the process."""
    (one,) = [one for one in PROPERTIES if one.name == name]
    num_tries = 0

    def end(fault: str | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(json.dumps({"cases": one.cases, "outcomes": OUTCOMES, "fault": fault}), flush=True)
        os._exit(0)

    def counted(**arguments: object) -> None:
        one.cases += 1
        try:
            one.body(**arguments)
        except Exception:
            end(f"{traceback.format_exc()}\nof {arguments!r}")

    test = settings(database=None, **OPTIONS)(given(**one.strategies)(counted))

    def tried(data: bytes) -> None:
        nonlocal num_tries
        test.hypothesis.fuzz_one_input(data)
        num_tries += 1
        if one.cases >= most or num_tries >= TRIES * most:
            end(None)

    fill(Path(corpus), number)
    lengths = (f"-max_len={LONGEST}", "-len_control=0", "-reduce_inputs=0", f"-timeout={CASE_AT_MOST_S}")
    atheris.Setup([sys.argv[0], f"-seed={number}", *lengths, "-handle_int=0", corpus], tried)
    signal.signal(signal.SIGINT, lambda *_: end(None))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
