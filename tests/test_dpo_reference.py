"""The example for TRL's DPOTrainer: its sums and best tokens against float64, and against TRL itself."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.oracle import LOG_PROB_TOLERANCE

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("dpo_reference")


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


@pytest.mark.parametrize("rows", [DIALOGS, TEXTS], ids=["dialogs", "texts"])
def test_sums_and_best_tokens_are_those_of_float64(example, ref_scorer, ref_oracle, tokenizer, rows):
    scored = example.score(rows, ref_scorer, tokenizer, max_length=MAX_LENGTH, top_k=3)
    for row, source in zip(scored, rows, strict=True):
        assert {name: row[name] for name in source} == source
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


def test_a_prompt_that_fills_the_length_has_no_sums(example, ref_scorer, tokenizer):
    long = DIALOGS[0] | {"prompt": said("user", "long " * 30)}
    scored = example.score([long, *DIALOGS], ref_scorer, tokenizer, max_length=MAX_LENGTH)
    alone = example.score(DIALOGS, ref_scorer, tokenizer, max_length=MAX_LENGTH)
    assert scored[0]["ref_chosen_logps"] is None
    assert scored[0]["ref_rejected_logps"] is None
    for row, same in zip(scored[1:], alone, strict=True):
        assert row["ref_rejected_logps"] == pytest.approx(same["ref_rejected_logps"], abs=1e-3)


def test_an_empty_completion_is_refused_by_row(example, ref_scorer, tokenizer):
    empty = DIALOGS[1] | {"rejected": []}
    with pytest.raises(ValueError, match="row 1: 'rejected' has no tokens"):
        example.score([DIALOGS[0], empty], ref_scorer, tokenizer)


@pytest.mark.nightly
def test_the_program_writes_the_file(example, ref_path, tmp_path, monkeypatch):
    source, out = tmp_path / "preferences.jsonl", tmp_path / "scored.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in DIALOGS))
    arguments = ["dpo_reference.py", str(source), "--model", str(ref_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--max-length", str(MAX_LENGTH), "--dtype", "float32"])
    example.main()
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
    example, trainer_class, ref_scorer, ref_path, policy_path, tokenizer, tmp_path, rows
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

    scored = example.score(rows, ref_scorer, tokenizer, max_length=MAX_LENGTH)
    _, expected = trained(DPOTrainer, rows)
    trainer, loss = trained(trainer_class, scored, precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    assert loss == pytest.approx(expected, abs=1e-4)
    assert loss != pytest.approx(0.6931, abs=1e-3)  # that of equal models
    for row, source in zip(trainer.train_dataset, rows, strict=True):
        assert [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] == expected_ids(source, tokenizer)
