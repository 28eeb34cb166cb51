"""Writes the reference's log-probs that TRL's DPOTrainer would compute itself, and a teacher's best tokens.

    python examples/dpo_reference.py ids preferences.jsonl --tokenizer MODEL --out ids.jsonl
    vllm-kl score ids.jsonl --model MODEL --out scored --engine max_model_len=1024 [--topk K]
    python examples/dpo_reference.py columns preferences.jsonl scored --out scored.jsonl

Each line of preferences.jsonl is a pair as TRL reads it: ``prompt``, ``chosen`` and ``rejected``, all texts,
or all lists of messages. ``ids`` tokenizes each pair as TRL does. ``columns`` writes the same lines with more
columns:

- ``ref_chosen_logps``, ``ref_rejected_logps``: sums of log-probs over the tokens of a completion, in nats.
  They are null where TRL leaves the row out, because its prompt alone has ``--max-length`` tokens.
- ``chosen_topk_ids``, ``chosen_topk_log_probs`` (``--topk K``): for each token of the chosen completion the K
  best tokens of the model and their log-probs.

docs/dpo.md shows how a DPOTrainer takes the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import AutoTokenizer

ADDED = ("ref_chosen_logps", "ref_rejected_logps")


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


def to_ids(
    rows: Iterable[dict[str, Any]], tokenizer: Any, *, max_length: int = 1024
) -> Iterator[dict[str, Any]]:
    """Yield rows for ``vllm-kl score``: a pair is a group of two responses, which share their prompt.

    Args:
        rows: pairs of TRL's.
        tokenizer: of the model that is trained.
        max_length: of TRL's ``DPOConfig``; longer sequences are cut at their end. Where the prompt alone is
            as long, nothing is left of the responses.

    Raises:
        ValueError: a completion has no tokens; the number of the row is told.
    """
    for n, row in enumerate(rows):
        try:
            prompt, *completions = token_ids(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {n}: {error}") from error
        left = max(0, max_length - len(prompt))
        yield {"prompt_ids": prompt[:max_length], "response_ids": [ids[:left] for ids in completions]}


def with_columns(
    rows: Iterable[dict[str, Any]], scored: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the pairs with the columns of the reference.

    Args:
        rows: pairs of TRL's.
        scored: the rows that ``vllm-kl score`` has written for them.

    Raises:
        ValueError: a row was not scored, or there are fewer or more rows than pairs.
    """
    for n, (row, found) in enumerate(zip(rows, scored, strict=True)):
        if found["error"] is not None:
            raise ValueError(f"row {n} was not scored: {found['error']}")
        is_scored = all(found["num_tokens"])
        added = dict(zip(ADDED, found["sum"] if is_scored else [None, None], strict=True))
        for name in ("topk_ids", "topk_log_probs"):
            if name in found:
                added[f"chosen_{name}"] = found[name][0] if is_scored else None
        yield row | added


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file."""
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def read_scored(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what ``vllm-kl score`` has added, row by row."""
    names = {"error", "num_tokens", "sum", "topk_ids", "topk_log_probs"}
    for path in sorted(folder.glob("part-*.parquet")):
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(columns=[name for name in file.schema_arrow.names if name in names]):
            yield from batch.to_pylist()


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write the rows to a file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Run one of the two steps around ``vllm-kl score``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    ids = steps.add_parser("ids", help="tokenize the pairs")
    ids.add_argument("data", type=Path, help="JSONL")
    ids.add_argument("--tokenizer", required=True, help="of the model that is trained")
    ids.add_argument("--max-length", type=int, default=1024, help="that of DPOConfig")
    columns = steps.add_parser("columns", help="put the sums beside the pairs")
    columns.add_argument("data", type=Path, help="JSONL, the same as before")
    columns.add_argument("scored", type=Path, help="the folder that vllm-kl score has written")
    for step in (ids, columns):
        step.add_argument("--out", type=Path, required=True, help="JSONL")
    args = parser.parse_args()
    rows = read_jsonl(args.data)
    if args.step == "ids":
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        write_jsonl(to_ids(rows, tokenizer, max_length=args.max_length), args.out)
    else:
        write_jsonl(with_columns(rows, read_scored(args.scored)), args.out)


if __name__ == "__main__":
    main()
