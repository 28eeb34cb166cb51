"""Turns shapes, or a file of lengths, into the sequences of one call.

A group is some responses to one prompt, as GRPO samples them. Its sequences share the prompt; only the
responses are scored. The ids are random: the speed of a dense model does not depend on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_kl.errors import InputError, OptionError

Sequences = list[np.ndarray]
_CHECKED_TOKENS = 256  # of each response, because the check in float64 holds their logits
_MOST_TOKENS = 100_000_000  # of a call, whose ids are held in memory several times


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The lengths of one call's sequences."""

    name: str  # "256,128,8", or the name of a file
    groups: tuple[tuple[int, tuple[int, ...]], ...]  # tokens of the prompt, and of each of its responses

    @property
    def num_sequences(self) -> int:
        return sum(len(responses) for _, responses in self.groups)

    @property
    def fed_tokens(self) -> int:
        """The tokens of all sequences, as a prefill without sharing computes them."""
        return sum(prompt * len(responses) + sum(responses) for prompt, responses in self.groups)

    @property
    def scored_tokens(self) -> int:
        return sum(sum(responses) for _, responses in self.groups)

    @property
    def computed_tokens(self) -> int:
        """The tokens that must be computed where prompts are shared.

        A sibling computes the last token of the prompt again: its row predicts the first scored token.
        """
        return self.fed_tokens - sum((len(responses) - 1) * (prompt - 1) for prompt, responses in self.groups)

    @property
    def longest(self) -> int:
        return max(prompt + max(responses) for prompt, responses in self.groups)

    @property
    def means(self) -> tuple[float, float, float]:
        """The mean tokens of a prompt, tokens of a response, and responses of a prompt."""
        prompts = sum(prompt for prompt, _ in self.groups) / len(self.groups)
        return prompts, self.scored_tokens / self.num_sequences, self.num_sequences / len(self.groups)

    def few(self) -> Traffic:
        """Return two sequences for a check, if there are two: of one group, if a group has two."""
        siblings = next((group for group in self.groups if len(group[1]) > 1), None)
        chosen = self.groups[:2] if siblings is None else (siblings,)
        groups = (
            (prompt, tuple(min(length, _CHECKED_TOKENS) for length in responses[:2]))
            for prompt, responses in chosen
        )
        return Traffic(name=self.name, groups=tuple(groups))

    def draw(self, usable_ids: np.ndarray, seed: int) -> tuple[Sequences, list[int]]:
        """Return sequences of random ids, each int64 ``[L]``, and the index of the first scored token.

        The name is a part of the seed. Else a shape would begin with the ids of an earlier shape, and an
        engine that shares prefixes would find them in its cache.
        """
        rng = np.random.default_rng([seed, *self.name.encode(errors="surrogateescape")])
        sequences, starts = [], []
        for length, responses in self.groups:
            prompt = rng.choice(usable_ids, length)
            for response in responses:
                sequences.append(np.concatenate([prompt, rng.choice(usable_ids, response)]).astype(np.int64))
                starts.append(length)
        return sequences, starts


def from_shape(text: str, num_sequences: int) -> Traffic:
    """Return whole groups of one shape, with at least ``num_sequences`` sequences.

    Raises:
        OptionError: the text is not P,R,G, or a call would have too many tokens.

    >>> from_shape("256,128,8", 12).num_sequences
    16
    """
    if re.fullmatch(r"[0-9]{1,9},[0-9]{1,9},[0-9]{1,9}", text) is None or not all(map(int, text.split(","))):
        raise OptionError(
            f"--shapes {_short(text)}: expected P,R,G such as 256,128,8: the tokens of a prompt, the tokens "
            "of a response, and the responses of a prompt"
        )
    prompt, response, group = map(int, text.split(","))
    num_groups = max(1, -(-num_sequences // group))
    _check_size(f"--shapes {text}", num_groups * group * (prompt + response))
    return Traffic(name=f"{prompt},{response},{group}", groups=((prompt, (response,) * group),) * num_groups)


def from_file(path: Path) -> Traffic:
    """Return the lengths that a file of JSON lines holds: one call, one line a group.

    Raises:
        OptionError: the file cannot be read, or is empty.
        InputError: a line is not as expected; the message names the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:  # ValueError: it is not UTF-8, or no path has this name
        raise OptionError(f"--lengths {path}: {error}") from error
    groups = [_group(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not groups:
        raise OptionError(f"--lengths {path}: the file is empty")
    traffic = Traffic(name=path.name, groups=tuple(groups))
    _check_size(f"--lengths {path}", traffic.fed_tokens)
    return traffic


def _check_size(what: str, num_tokens: int) -> None:
    if num_tokens > _MOST_TOKENS:
        raise OptionError(f"{what}: one call would have {num_tokens:,} tokens, at most {_MOST_TOKENS:,} work")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def _group(line: str, where: str) -> tuple[int, tuple[int, ...]]:
    try:
        content = json.loads(line)
        prompt, responses = content["prompt"], content["responses"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt, responses = None, None
    if not (
        _is_length(prompt) and isinstance(responses, list) and responses and all(map(_is_length, responses))
    ):
        raise InputError(
            f'{where}: got {_short(line)}, expected {{"prompt": 512, "responses": [120, 80]}}: the tokens of '
            "a prompt and of each of its responses, all at least 1"
        )
    return prompt, tuple(responses)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_TOKENS


def usable_ids(vocab_size: int, special: Sequence[int]) -> np.ndarray:
    """Return the ids to draw from: all but the special ones, which a provider may treat in its own way."""
    return np.setdiff1d(np.arange(vocab_size), np.asarray(list(special), dtype=np.int64))
