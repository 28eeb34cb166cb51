"""A shared engine with a KV connector, whose hits know neither the request's salt nor the weights' version.

vLLM's ``ExampleConnector`` keeps KV in files that are named by token ids only. A connector belongs to the
whole process, so the engine gets a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE, Oracle

pytestmark = pytest.mark.compat

PROMPT, RESPONSE = list(range(5, 69)), list(range(70, 110))
CALLS = [
    ([PROMPT + RESPONSE], [64]),
    ([PROMPT + RESPONSE, PROMPT + RESPONSE[:20]], [64, 64]),  # the connector has all of both
    ([PROMPT + RESPONSE, PROMPT + RESPONSE], [100, 2]),
]

SCRIPT = """
import json, sys
from vllm import LLM
from vllm.config import KVTransferConfig
from transformers import AutoModelForCausalLM
from tests import tiny
from vllm_kl import VLLMScorer, push_weights
from vllm_kl.errors import WeightsError

home, model, other, calls = *sys.argv[1:4], json.loads(sys.argv[4])
connector = KVTransferConfig(
    kv_connector="ExampleConnector",
    kv_role="kv_both",
    kv_connector_extra_config={"shared_storage_path": home},
)
llm = LLM(model, enforce_eager=True, kv_transfer_config=connector, **tiny.ENGINE_OPTIONS)
scorer = VLLMScorer(llm)
scored = []
for weights in (None, other):
    if weights is not None:
        try:
            push_weights(llm, AutoModelForCausalLM.from_pretrained(other))
        except WeightsError as error:
            assert "ExampleConnector, cannot drop the KV of the old weights" in str(error), error
        else:
            raise AssertionError("pushed, although the engine goes on generating from old KV")
        llm.llm_engine.collective_rpc("reload_weights", kwargs={"weights_path": weights})
        llm.reset_prefix_cache()
    for ids, start in calls:
        scored.append([row.tolist() for row in scorer.score(ids, start)])
        assert scorer.stats.num_rescored == 0, scorer.stats
print(json.dumps(scored))
"""


@pytest.mark.nightly
def test_its_hits_are_never_used_for_scoring_and_no_weights_are_pushed_beside_it(tmp_path):
    paths = [tiny.build(tmp_path / str(seed), seed=seed) for seed in range(2)]
    home = tmp_path / "kv"
    command = [sys.executable, "-c", SCRIPT, str(home), *map(str, paths), json.dumps(CALLS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(home.iterdir()), "the connector has kept nothing, so this test shows nothing"
    scored = iter(json.loads(done.stdout.splitlines()[-1]))
    for oracle in map(Oracle, paths):
        for sequences, starts in CALLS:
            for ids, start, got in zip(sequences, starts, next(scored), strict=True):
                want = torch.tensor(oracle.log_probs(ids)[start:], dtype=torch.float64)
                got = torch.tensor(got, dtype=torch.float64)
                torch.testing.assert_close(got, want, rtol=0, atol=LOG_PROB_TOLERANCE)
