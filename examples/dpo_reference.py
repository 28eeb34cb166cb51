"""Writes the reference's log-probs that TRL's DPOTrainer would compute itself, and a teacher's best tokens.

    python examples/dpo_reference.py preferences.jsonl --model PATH_OR_NAME --out scored.jsonl

Each line of the input is a pair as TRL reads it: ``prompt``, ``chosen`` and ``rejected``, all texts, or all
lists of messages. The output has the same lines with more columns:

- ``ref_chosen_logps``, ``ref_rejected_logps``: sums of log-probs over the tokens of a completion, in nats.
  They are null where TRL leaves the row out, because its prompt alone has ``--max-length`` tokens.
- ``chosen_topk_ids``, ``chosen_topk_log_probs`` (``--topk K``): for each token of the chosen completion the K
  best tokens of the model and their log-probs.

docs/dpo.md shows how a DPOTrainer takes the file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# For a short run on a CPU: nothing is compiled at the first request.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

from transformers import AutoTokenizer

from vllm_kl import VLLMScorer


def token_ids(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Return the ids of prompt, chosen and rejected completion, as TRL 1.16 cuts them.

    A completion begins at the first token that differs from the tokens of the prompt alone: a template or a
    tokenizer may end the prompt otherwise where nothing follows. Texts end with EOS, dialogs as their
    template ends them.

    Raises:
        ValueError: a completion has no tokens.
    """
    prompt, completions = row["prompt"], [row["chosen"], row["rejected"]]
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        texts = [text if text.endswith(eos) else text + eos for text in completions]
        alone, *whole = (tokenizer(text)["input_ids"] for text in (prompt, *(prompt + t for t in texts)))
    else:
        alone = _rendered(tokenizer, prompt, add_generation_prompt=True)
        whole = [_rendered(tokenizer, prompt + messages) for messages in completions]
    start = min(_num_equal(alone, ids) for ids in whole)
    for name, ids in zip(("chosen", "rejected"), whole, strict=True):
        if len(ids) == start:
            raise ValueError(f"{name!r} has no tokens: {row[name]!r}")
    return alone[:start], whole[0][start:], whole[1][start:]


def _num_equal(ids: list[int], others: list[int]) -> int:
    pairs = zip(ids, others, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others)))


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def score(
    rows: Sequence[dict[str, Any]],
    scorer: VLLMScorer,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    top_k: int = 0,
) -> list[dict[str, Any]]:
    """Return the rows with the columns of the reference; the prompt of a pair is computed once.

    Args:
        rows: pairs of TRL's.
        scorer: the reference, or the teacher.
        tokenizer: of the model that is trained.
        max_length: of TRL's ``DPOConfig``; longer sequences are cut at their end.
        top_k: how many best tokens are written for each token of the chosen completion.

    Raises:
        ValueError: a completion has no tokens; the number of the row is told.
    """
    sequences, starts, scored = [], [], []
    for n, row in enumerate(rows):
        try:
            prompt, *completions = token_ids(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {n}: {error}") from error
        scored.append(len(prompt) < max_length)
        if scored[-1]:
            sequences += [(prompt + completion)[:max_length] for completion in completions]
            starts += [len(prompt)] * 2
    # Log-probs are added as float64: a sum over thousands of float32 numbers loses digits.
    sums = iter([float(values.double().sum()) for values in scorer.score(sequences, starts, progress=True)])
    best = iter(scorer.score_topk(sequences[::2], top_k, starts[::2]) if top_k else [])
    result = []
    for row, is_scored in zip(rows, scored, strict=True):
        added: dict[str, Any] = dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"))
        if is_scored:
            added = {name: next(sums) for name in added}
        if top_k:
            top = next(best) if is_scored else None
            added["chosen_topk_ids"] = None if top is None else top.token_ids.tolist()
            added["chosen_topk_log_probs"] = None if top is None else top.log_probs.tolist()
        result.append(row | added)
    return result


def main() -> None:
    """Score a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="JSONL")
    parser.add_argument("--model", required=True, help="the reference, or the teacher")
    parser.add_argument("--tokenizer", help="of the model that is trained; the reference's unless told")
    parser.add_argument("--out", type=Path, required=True, help="JSONL")
    parser.add_argument("--max-length", type=int, default=1024, help="that of DPOConfig")
    parser.add_argument("--topk", type=int, default=0, metavar="K")
    parser.add_argument("--dtype", default="auto", help="of the engine: float32, bfloat16, ...")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_text().splitlines() if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    with VLLMScorer(args.model, dtype=args.dtype, max_model_len=args.max_length) as scorer:
        scored = score(rows, scorer, tokenizer, max_length=args.max_length, top_k=args.topk)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in scored))
    print(f"{len(scored)} rows in {args.out}")


if __name__ == "__main__":
    main()
