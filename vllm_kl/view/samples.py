"""Reads and writes scored samples, as a file of JSON lines, and makes them of a scored batch.

The file holds one JSON object per line, in UTF-8. L is the length of the sequence, N the number of scored
tokens:

==================  ==========================================================================================
``token_ids``       ``[L]`` ids, prompt and response
``log_probs``       ``[N]`` under the policy, nats
``ref_log_probs``   ``[N]`` under the reference, nats
``mask``            ``[L]`` true at the N scored tokens; default: the last N tokens
``kl``              ``[N]`` nats; default: ``log_probs - ref_log_probs``
``tokens``          ``[L]`` the text of each token
``query``           text
``response``        text
``reward``          number
``policy_version``  integer or text: version of the weights that sampled
``ref_version``     integer or text: version of the reference's weights
==================  ==========================================================================================

The first three fields are required; a field of value null counts as missing. Further fields are allowed and
are not read. Token 0 is never scored, because nothing comes before it. Every number lies in float32's range,
so that sums are finite. A log-prob is at most 0, or 0.001 to allow for rounding.

Reading and writing the file needs no torch, TorchRL or vLLM.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from vllm_kl.errors import InputError, OptionError, shown

if TYPE_CHECKING:
    import torch
    from tensordict import TensorDictBase

    from vllm_kl.batch.alignment import PaddingSide


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence of L tokens, of which N are scored.

    A list may be given as anything that has ``tolist()``, such as a tensor or an array.

    Raises:
        InputError: a length, a type or a number is wrong; the message names the field, the found and the
            expected value.

    >>> sample = Sample(token_ids=[5, 6, 7, 8], log_probs=[-1.0, -2.0], ref_log_probs=[-1.5, -1.75])
    >>> sample.mask, sample.kl
    ([False, False, True, True], [0.5, -0.25])
    """

    token_ids: list[int]  # [L], prompt and response
    log_probs: list[float]  # [N] under the policy, nats
    ref_log_probs: list[float]  # [N] under the reference, nats
    mask: list[bool] | None = None  # [L], true at scored tokens; None: the last N
    kl: list[float] | None = None  # [N], nats; None: log_probs - ref_log_probs
    tokens: list[str] | None = None  # [L], the text of each token
    query: str | None = None
    response: str | None = None
    reward: float | None = None
    policy_version: int | str | None = None
    ref_version: int | str | None = None

    def __post_init__(self) -> None:
        def set_field(name: str, value: object) -> None:
            object.__setattr__(self, name, value)  # the class is frozen

        for name, one in _FIELDS.items():
            value = getattr(self, name)
            if value is None and name not in REQUIRED:
                continue
            if name in _LISTS:
                set_field(name, _checked_list(name, value, one))
            elif not one.fits(value):
                raise InputError(f"{name}: got {shown(value)}, expected {one.what}")
        num_tokens, num_scored = len(self.token_ids), len(self.log_probs)
        if num_scored > max(0, num_tokens - 1):
            raise InputError(
                f"log_probs: got {num_scored} values, expected at most {max(0, num_tokens - 1)}: one per "
                "token id, without the first, which has no log-prob"
            )
        mask = self.mask
        if mask is None:
            mask = [t >= num_tokens - num_scored for t in range(num_tokens)]
            set_field("mask", mask)
        per_token, per_value = (num_tokens, "token id"), (num_scored, "value of log_probs")
        lengths = {"mask": per_token, "tokens": per_token, "ref_log_probs": per_value, "kl": per_value}
        for name, (expected, per) in lengths.items():
            value = getattr(self, name)
            if value is not None and len(value) != expected:
                raise InputError(f"{name}: got {len(value)} values, expected {expected}, one per {per}")
        if mask and mask[0]:
            raise InputError(
                "mask: keeps token 0, which has no log-prob because nothing comes before it; set it to "
                "false there"
            )
        if sum(mask) != num_scored:
            raise InputError(
                f"mask: keeps {sum(mask)} tokens, expected {num_scored}, one per value of log_probs"
            )
        if self.kl is None:
            set_field("kl", [p - q for p, q in zip(self.log_probs, self.ref_log_probs, strict=True)])


class _One(NamedTuple):
    """The values that a field, or each entry of a list, may have."""

    types: type | tuple[type, ...]
    what: str
    lowest: float = -math.inf
    highest: float = math.inf

    def fits(self, value: Any) -> bool:
        is_one = isinstance(value, self.types) and (self.types is bool or not isinstance(value, bool))
        return is_one and (isinstance(value, str) or bool(self.lowest <= value <= self.highest))


FLOAT32_MAX = (2 - 2**-23) * 2.0**127
_NUMBER = "a finite number of float32's range"
# 0.001 is the limit for engines too (checks.py). Rounding never makes a probability that large.
_LOG_PROB = _One((int, float), f"{_NUMBER}, at most 0 (0.001 for rounding)", -FLOAT32_MAX, 1e-3)
_ANY_NUMBER = _One((int, float), _NUMBER, -FLOAT32_MAX, FLOAT32_MAX)
_TEXT = _One(str, "a text")
_VERSION = _One((int, str), "an integer or a text")
_FIELDS = {
    "token_ids": _One(int, "an integer of at least 0 and below 2**31", 0, 2**31 - 1),
    "log_probs": _LOG_PROB,
    "ref_log_probs": _LOG_PROB,
    "mask": _One(bool, "true or false"),
    "kl": _ANY_NUMBER,
    "tokens": _TEXT,
    "query": _TEXT,
    "response": _TEXT,
    "reward": _ANY_NUMBER,
    "policy_version": _VERSION,
    "ref_version": _VERSION,
}
_LISTS = ("token_ids", "log_probs", "ref_log_probs", "mask", "kl", "tokens")
REQUIRED = ("token_ids", "log_probs", "ref_log_probs")


def _checked_list(name: str, value: Any, one: _One) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{name}: got {shown(value)}, expected a list")
    for t, item in enumerate(value):
        if not one.fits(item):
            raise InputError(f"{name}: value {t} is {shown(item)}, expected {one.what}")
    return list(value)


def read_samples(path: str | Path) -> list[Sample]:
    """Read the samples of a file.

    Args:
        path: a file in the format described at the top of this module. Empty lines are skipped.

    Raises:
        InputError: a line is wrong; the message names file, line and field, the found and the expected value.
        OSError: the file cannot be read.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "samples.jsonl")
    >>> write_samples(path, [Sample(token_ids=[5, 6], log_probs=[-1.0], ref_log_probs=[-2.0], reward=1.0)])
    >>> read_samples(path)[0].kl
    [1.0]
    """
    samples = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = _parsed(line)
                samples.append(Sample(**{name: value for name, value in entry.items() if name in _FIELDS}))
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
    if not samples:
        raise InputError(f"{path}: holds no samples, expected one JSON object per line")
    return samples


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise InputError(f"got {shown(entry)}, expected a JSON object")
    for name in REQUIRED:
        if entry.get(name) is None:
            raise InputError(f"{name} is missing; the line has {', '.join(sorted(entry)) or 'no fields'}")
    return entry


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write samples to a file, one JSON object per line. An existing file is replaced.

    Args:
        path: the file.
        samples: objects of :class:`Sample`, or of a subclass, whose further fields are written too.

    Raises:
        InputError: JSON cannot hold a further field; the message names the sample. The file stays as it was.
        OSError: the file cannot be written.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "samples.jsonl")
    >>> write_samples(path, [Sample(token_ids=[5, 6], log_probs=[-1.0], ref_log_probs=[-2.0])])
    >>> print(Path(path).read_text().strip())
    {"token_ids": [5, 6], "log_probs": [-1.0], "ref_log_probs": [-2.0], "mask": [false, true], "kl": [1.0]}
    """
    with replacing(path) as file:
        for i, sample in enumerate(samples):
            try:
                entry = {field.name: getattr(sample, field.name) for field in fields(sample)}
                line = json.dumps({k: v for k, v in entry.items() if v is not None}, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(
                    f"sample {i} cannot be written: {error}; expected a Sample whose fields are texts, "
                    "finite numbers, or lists or dicts of them"
                ) from None
            file.write(f"{line}\n".encode())


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a new file beside ``path`` that replaces it when the block ends without an error.

    A link stays: its target is replaced. A path that is no ordinary file (a pipe, ``/dev/stdout``) is written
    directly.

    Raises:
        OSError: the file cannot be written; the error names ``path``.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with Path(path).open("wb") as file:
            yield file
        return
    beside = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        file = beside.open("xb")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    try:
        with file:
            yield file
        if target.exists():
            shutil.copymode(target, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def decode_tokens(token_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Decode each token alone. Bytes that are not a whole character alone become U+FFFD.

    >>> from vllm_kl.demo.task import make_tokenizer
    >>> decode_tokens([22, 220, 79], make_tokenizer())
    ['7', ' ', 'p']
    """
    text_of = functools.cache(lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False))
    return [text_of(token_id) for token_id in token_ids]


def with_texts(samples: Sequence[Sample], tokenizer: str) -> list[Sample]:
    """Add the texts of tokens to the samples that have none.

    Args:
        samples: samples, at least one of them without texts.
        tokenizer: path or name of a tokenizer for transformers.

    Raises:
        OptionError: all samples have texts.
        InputError: the tokenizer exists, but cannot be loaded.
        OSError: the tokenizer does not exist.
    """
    if all(sample.tokens is not None for sample in samples):
        raise OptionError(f"tokenizer {tokenizer!r} would have no effect: every sample has its tokens' texts")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except OSError:
        raise
    except Exception as error:  # any library that reads the files may raise its own error
        raise InputError(
            f"tokenizer {tokenizer!r} cannot be loaded: {type(error).__name__}: {error}; expected a folder "
            "or a name that transformers.AutoTokenizer loads"
        ) from None
    return [
        sample
        if sample.tokens is not None
        else replace(sample, tokens=decode_tokens(sample.token_ids, loaded))
        for sample in samples
    ]


def samples_from_batch(
    data: TensorDictBase,
    tokenizer: Any = None,
    *,
    padding_side: PaddingSide = "left",
    ref_version: int | str | None = None,
) -> list[Sample]:
    """Return the samples of a scored batch, in the order of the batch.

    Args:
        data: a batch with both log-probs, as :class:`~vllm_kl.RetrieveKL` or :class:`~vllm_kl.KLComputation`
            writes it, dense or ragged, of any batch size. Results are read under ``"next"``, where a
            collector puts them, or else at the root. The mask is ``"kl_mask"``, or else ``("masks",
            "all_assistant_mask")``, or else all tokens after ``("tokens", "prompt")``. KL, texts, reward and
            versions are optional. A reward per token becomes its mean over the mask; a KL that was subtracted
            from the reward lowers this mean.
        tokenizer: decodes the text of each token.
        padding_side: ``padding_side`` of the transform, needed if it padded the results of ragged ids.
        ref_version: weight version of the reference (``reference.scorer.weight_version``), instead of the
            ``"ref_version"`` of the batch.

    Raises:
        InputError: ids, mask or log-probs are missing, rows do not fit the ids, the mask keeps token 0, or
            the results were padded on the other side.
        MissingLogProbError: a value inside the mask is not finite.

    >>> from tensordict import lazy_stack
    >>> tokens = TensorDict(prompt=torch.tensor([5]), full=torch.tensor([5, 6, 7]))
    >>> policy, reference = (TensorDict(full=torch.tensor([0.0, -1.0, p])) for p in (-2.0, -3.0))
    >>> batch = lazy_stack([TensorDict(tokens=tokens, log_probs=policy, ref_log_probs=reference)])
    >>> samples_from_batch(batch)[0].kl
    [0.0, 1.0]
    """
    import torch

    from vllm_kl.batch.alignment import only_kept
    from vllm_kl.batch.read_tokens import InputKeys, read_batch
    from vllm_kl.batch.sample_rows import aligned, entry_of, read_mask, read_rewards, result_rows

    if data.ndim != 1:
        data = data.reshape(-1)
    stored_mask = result_rows(data, "kl_mask")
    keys = InputKeys(input_mode="tokens", key=("tokens", "full"))
    batch = read_batch(data, keys, assistant_only=stored_mask is None)
    keep = batch.keep
    if stored_mask is not None:
        keep = read_mask(stored_mask, batch, padding_side, "kl_mask")
    columns: dict[str, list[torch.Tensor]] = {}
    entries: dict[str, str | tuple[str, ...]] = {
        "log_probs": ("log_probs", "full"),
        "ref_log_probs": ("ref_log_probs", "full"),
        "kl": "kl_penalty",
    }
    for name, key in entries.items():
        rows = result_rows(data, key)
        if rows is not None:
            columns[name] = aligned(rows, batch, padding_side, str(key), keep=keep)
            only_kept(torch.cat(columns[name]), torch.cat(keep), batch.lengths, what=str(key))
        elif name in REQUIRED:
            raise InputError(f"no {key} under 'next' or at the root: score the batch with RetrieveKL first")
    rewards = read_rewards(data, batch, keep, padding_side)
    out = []
    for i, sample in enumerate(data.unbind(0)):
        ids = batch.token_ids[i].tolist()
        query = entry_of(sample, "query")
        out.append(
            Sample(
                token_ids=ids,
                mask=keep[i].tolist(),
                tokens=None if tokenizer is None else decode_tokens(ids, tokenizer),
                query=query if isinstance(query, str) else entry_of(sample, ("text", "prompt")),
                response=entry_of(sample, ("text", "response")),
                reward=rewards[i],
                policy_version=entry_of(sample, "policy_version"),
                ref_version=entry_of(sample, "ref_version") if ref_version is None else ref_version,
                **{name: rows[i][keep[i]].tolist() for name, rows in columns.items()},
            )
        )
    return out
