"""The example for TRL's DPOTrainer: its sums and best tokens against float64, and against TRL itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import local_ray, scripts
from tests.offline import helpers
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl.demo.task import make_tokenizer

pytest.importorskip("ray", reason="pip install 'vllm-kl[ray]'")
pytestmark = local_ray.MARKS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    with scripts.imported("examples", "dpo_reference") as module:
        yield module


def said(role, content):
    return [{"role": role, "content": content}]


DIALOGS = [
    {
        "prompt": said("user", question),
        "chosen": said("assistant", chosen),
        "rejected": said("assistant", rejected),
    }
    for question, chosen, rejected in [
        ("Tom has 3 pens and buys 4. How many?", "3 + 4 = 7", "I do not know."),
        ("Name a colour of the sea.", "Blue.", "Green, or blue, or grey: it depends."),
    ]
]
TEXTS = [
    {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "22"},
    {"prompt": "The sea is", "chosen": " blue.<|im_end|>", "rejected": " dry."},
]
MAX_LENGTH = 64  # cuts the second rejected completion


def float64_sum(oracle, prompt, completion):
    """Sum the log-probs of a completion, cut as TRL cuts it."""
    return sum(oracle.log_probs((prompt + completion)[:MAX_LENGTH])[len(prompt) :])


def expected_ids(row, tokenizer):
    """Return prompt, chosen and rejected, written down for the demo's byte-level tokenizer and template."""
    if isinstance(row["prompt"], str):
        end = "<|im_end|>"
        parts = [row["prompt"], *(row[name].removesuffix(end) + end for name in ("chosen", "rejected"))]
    else:
        (question,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
        parts = [
            f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n",
            *(f"{message['content']}<|im_end|>\n" for message in (chosen, rejected)),
        ]
    return [tokenizer(part).input_ids for part in parts]


LONG = DIALOGS[0] | {"prompt": said("user", "long " * 30)}
ROWS = [*DIALOGS, LONG, *TEXTS]


@pytest.fixture(scope="module")
def scored(example, cluster, ref_path, tmp_path_factory):
    """The rows of ROWS with the columns of the reference."""
    home = tmp_path_factory.mktemp("dpo")
    ids = example.to_ids(ROWS, make_tokenizer(), max_length=MAX_LENGTH)
    example.write_jsonl(ids, home / "ids.jsonl")
    summary = helpers.run(home / "ids.jsonl", home / "out", ref_path, topk=3)
    assert summary.rejected == 0
    return list(example.with_columns(ROWS, example.read_scored(home / "out")))


def test_sums_and_best_tokens_are_those_of_float64(scored, ref_oracle, tokenizer):
    for row, source in zip(scored, ROWS, strict=True):
        assert {name: row[name] for name in source} == source
        if source is LONG:
            continue
        prompt, chosen, rejected = expected_ids(source, tokenizer)
        for name, completion in (("ref_chosen_logps", chosen), ("ref_rejected_logps", rejected)):
            allowed = LOG_PROB_TOLERANCE * len(completion)
            assert row[name] == pytest.approx(float64_sum(ref_oracle, prompt, completion), abs=allowed)
        ids = (prompt + chosen)[:MAX_LENGTH]
        best = ref_oracle.logits(ids)[len(prompt) - 1 : -1].log_softmax(-1).topk(3)
        assert row["chosen_topk_ids"] == best.indices.tolist()
        torch.testing.assert_close(
            torch.tensor(row["chosen_topk_log_probs"]),
            best.values.float(),
            atol=LOG_PROB_TOLERANCE,
            rtol=0,
        )


def test_a_prompt_that_fills_the_length_has_no_sums(scored):
    row = scored[ROWS.index(LONG)]
    added = ("ref_chosen_logps", "ref_rejected_logps", "chosen_topk_ids", "chosen_topk_log_probs")
    assert {row[name] for name in added} == {None}


def test_a_row_that_cannot_be_written_is_told_by_its_number(example, tokenizer):
    empty = DIALOGS[1] | {"rejected": []}
    with pytest.raises(ValueError, match="row 1: 'rejected' has no tokens"):
        list(example.to_ids([DIALOGS[0], empty], tokenizer))
    with pytest.raises(ValueError, match="row 0 was not scored: too long"):
        list(example.with_columns(DIALOGS, [{"error": "too long"}]))
    found = {"error": None, "num_tokens": [1, 1], "sum": [-1.0, -2.0]}
    with pytest.raises(ValueError, match="shorter"):
        list(example.with_columns(DIALOGS, [found]))


@pytest.mark.nightly
def test_the_three_commands_write_the_file(cluster, ref_path, tmp_path):
    source, out = tmp_path / "preferences.jsonl", tmp_path / "scored.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in DIALOGS))
    program = EXAMPLES / "dpo_reference.py"
    ids, folder = tmp_path / "ids.jsonl", tmp_path / "scored"
    ids_step = ["ids", source, "--tokenizer", ref_path, "--max-length", MAX_LENGTH, "--out", ids]
    subprocess.run([sys.executable, program, *map(str, ids_step)], check=True)
    process = helpers.start(ids, folder, ref_path)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    columns_step = ["columns", source, folder, "--out", out]
    subprocess.run([sys.executable, program, *map(str, columns_step)], check=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in DIALOGS]
    assert all(row["ref_chosen_logps"] < 0 for row in rows)


@pytest.fixture
def trainer_class():
    """The class of docs/dpo.md."""
    pytest.importorskip("trl", minversion="1.16", reason="pip install 'trl>=1.16'")
    page = (EXAMPLES.parent / "docs" / "dpo.md").read_text()
    names = {}
    exec(re.search(r"```python\n(# Not run here: .*?)# Train", page, re.DOTALL)[1], names)
    return names["ScoredDPOTrainer"]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # TRL's and those of the libraries that it brings
@pytest.mark.parametrize("rows", [DIALOGS, TEXTS], ids=["dialogs", "texts"])
def test_dpo_trainer_takes_the_columns_and_has_the_loss_of_its_own(
    scored, trainer_class, ref_path, policy_path, tokenizer, tmp_path, rows
):
    """The reference's sums, and the loss of a policy with other weights."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    def trained(trainer_class, rows, **config):
        args = DPOConfig(
            output_dir=str(tmp_path),
            max_length=MAX_LENGTH,
            per_device_train_batch_size=2,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            **config,
        )
        models = {} if args.precompute_ref_log_probs else {"ref_model": load(ref_path)}
        trainer = trainer_class(
            load(policy_path),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **models,
        )
        return trainer, trainer.train().training_loss

    def load(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    with_sums = [row for row, source in zip(scored, ROWS, strict=True) if source in rows]
    _, expected = trained(DPOTrainer, rows)
    trainer, loss = trained(trainer_class, with_sums, precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    assert loss == pytest.approx(expected, abs=1e-4)
    assert loss != pytest.approx(0.6931, abs=1e-3)  # that of equal models
    for row, source in zip(trainer.train_dataset, rows, strict=True):
        assert [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] == expected_ids(source, tokenizer)
