"""Makes, tokenizes and grades arithmetic word problems. Needs no download."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    # A sampled response already ends with <|im_end|>; a written one does not.
    "{% generation %}{{ message['content'] }}"
    "{% if not message['content'].endswith('<|im_end|>') %}{{ '<|im_end|>' }}{% endif %}"
    "{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_NAMES = ("Ann", "Ben", "Mia", "Tom")
_THINGS = ("apples", "books", "coins", "pens")
_MORE = ("{name} has {a} {thing} and buys {b} more.", "{name} has {a} {thing} and finds {b} more.")
_LESS = ("{name} has {a} {thing} and loses {b}.", "{name} has {a} {thing} and gives away {b}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One word problem."""

    question: str
    solution: str  # a right response
    answer: int


def make_problem(rng: random.Random) -> Problem:
    """Return a random problem. Both numbers are 1 to 9, the answer is 1 to 18."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    add = a <= b or rng.random() < 0.5
    answer = a + b if add else a - b
    story = rng.choice(_MORE if add else _LESS).format(
        name=rng.choice(_NAMES), a=a, b=b, thing=rng.choice(_THINGS)
    )
    return Problem(
        question=f"{story} How many now?", solution=f"{a} {'+' if add else '-'} {b} = {answer}", answer=answer
    )


def grade(response: str, answer: int) -> float:
    """Return 1.0 if the number after the last ``=`` is the answer, else 0.0.

    >>> grade("3 + 4 = 7<|im_end|>", 7), grade("3 + 4 = 8<|im_end|>", 7), grade("seven", 7)
    (1.0, 0.0, 0.0)
    """
    found = re.findall(r"=\s*(\d+)", response)
    return float(bool(found) and int(found[-1]) == answer)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with three special tokens, whose chat template marks responses.

    >>> make_tokenizer()("7 pens").input_ids
    [22, 220, 79, 68, 77, 82]
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|pad|>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
