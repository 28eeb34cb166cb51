"""Makes hostile inputs, and the decorator of the properties that are given them.

A property calls :func:`told` where the package may refuse. What is neither a result nor an error of
:mod:`vllm_kl.errors` fails the property.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_kl.errors import VLLMKLError

T = TypeVar("T")
FEW = 40  # cases of a property in the tests
OPTIONS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
OUTCOMES: Counter[str] = Counter()  # "answered" and "refused": shows that neither never happens


def fuzz(*, few: int = FEW, share: float = 1.0, **strategies: st.SearchStrategy) -> Callable:
    """Make a test of a few cases of a property, which ``tests/fuzz/run.py`` runs with many.

    Args:
        few: how many cases the test has.
        share: of the many cases, relative to the other properties: less for slow ones.
        **strategies: one for each argument of the property.
    """

    def decorate(body: Callable) -> Callable:
        test = settings(max_examples=few, **OPTIONS)(given(**strategies)(body))
        test.of_fuzz = (body, strategies, share)
        return test

    return decorate


def told(
    call: Callable[[], T], *, names: str | None = None, also: tuple[type[Exception], ...] = ()
) -> T | None:
    """Return what a call returns, or ``None`` if it refuses.

    Args:
        call: what may refuse.
        names: a word that the message must have, such as ``"sequence"``.
        also: errors beside those of the package that the call documents.
    """
    try:
        found = call()
    except (VLLMKLError, *also) as error:
        message = str(error)
    else:
        OUTCOMES["answered"] += 1
        return found
    OUTCOMES["refused"] += 1
    assert len(message) > 10, f"the error says nothing: {message!r}"
    assert names is None or names in message, f"{names!r} is not in: {message}"
    return None


INTS = st.one_of(
    st.integers(0, 9),
    st.sampled_from(
        [-1, -100, 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, 2**63, 2**64 + 3, -(2**63), 10**400]
    ),
)
FLOATS = st.one_of(
    st.floats(-30, 0),
    st.sampled_from([0.0, -0.0, 1.0, 0.5, math.nan, math.inf, -math.inf, 1e-320, -1e30, 3e38, -1e300, 2.5]),
)
# Texts that break what reads them: half of a surrogate pair, NUL, Jinja, YAML, JSON, special tokens.
NASTY = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\x00",
        "\ufeff",
        "\ud800",
        "a\udfffb",
        "é",
        "👍🏽",
        "e\u0301",
        "\u2028",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "</s>",
        "<s>",
        "{{ 1 / 0 }}",
        "{% generation %}",
        "null",
        "[" * 3000,
        '{"a": ' * 400,
        "=",
        "a=b",
        "--",
        "-",
        "1e999",
        "NaN",
        "<think>a</think>b",
        "../../etc",
        "2001-13-45",
    ]
)
TEXTS = st.one_of(NASTY, st.text(max_size=8), st.lists(NASTY, max_size=3).map("".join))
SCALARS = st.one_of(st.none(), st.booleans(), INTS, FLOATS, TEXTS)
# What JSON can hold, nested.
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from("abc"), TEXTS), inner, max_size=3),
    ),
    max_leaves=6,
)


class Odd:
    """An object that is nothing that the package knows."""

    def __repr__(self) -> str:
        return "Odd()"


def _tensors(ids: list[int]) -> list[Any]:
    return [
        torch.tensor(ids, dtype=torch.bfloat16),
        torch.tensor(ids, dtype=torch.float16),
        torch.tensor(ids, dtype=torch.float32, requires_grad=True),
        torch.tensor(ids, dtype=torch.bool),
        torch.tensor([ids]),
        torch.tensor(len(ids)),
        torch.tensor(ids, device="meta"),
        torch.tensor(ids).to_sparse(),
        np.array(ids, np.float64),
        np.array(ids, np.uint64) + np.uint64(2**63),
        np.array(ids, object),
        np.array([str(i) for i in ids]),
    ]


# What is given in place of a sequence of ids.
NO_IDS = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=2),
    st.sampled_from([Odd(), {"a": 1}, {1, 2}, b"abc", bytearray(b"ab"), range(3), 3 + 4j, object, int]),
    st.sampled_from(_tensors([1, 2, 3])),
)


def some_of(options: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """Make at most three options of a command, each with a value: tuples of two words."""
    one = st.sampled_from(sorted(options)).flatmap(lambda name: st.tuples(st.just(name), options[name]))
    return st.lists(one, max_size=3)


def mutated(data: bytes, changes: list[tuple[int, bytes]], keep: int | None = None) -> bytes:
    """Return data with bytes overwritten, and cut off after ``keep`` bytes."""
    out = bytearray(data)
    for place, new in changes:
        at = place % (len(out) + 1)
        out[at : at + len(new)] = new
    return bytes(out if keep is None else out[: keep % (len(out) + 1)])


CHANGES = st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=4)), max_size=3)
KEEPS = st.one_of(st.none(), st.none(), st.integers(0, 4000))
