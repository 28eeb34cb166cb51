"""The fits of ``benchmarks/growth.py`` find what made-up times were made of."""

from __future__ import annotations

import pytest

from tests import scripts
from vllm_kl.bench.traffic import from_shape


@pytest.fixture(scope="module")
def growth():
    with scripts.imported("benchmarks", "growth") as module:
        yield module


def test_sizes_of_each_axis_span_a_decade_in_four_steps(growth):
    for sizes in growth.AXES.values():
        assert len(sizes) >= 4
        assert sizes[-1].value == 10 * sizes[0].value


def test_a_line_has_what_does_not_grow_apart_from_what_does(growth):
    sizes = [2, 5, 10, 20]
    seconds = [0.3 + 0.02 * size for size in sizes]
    assert growth.line(sizes, seconds) == pytest.approx((0.3, 0.02))
    assert growth.exponent(sizes, seconds) < 0.5  # of the whole call, which says neither


@pytest.mark.parametrize(
    ("shared", "told"),
    [
        (
            True,
            "The engine computed 192 for it: 64 of its own, with the LM head for each, and 128 of prompts.",
        ),
        (False, "The engine computed 4,160 for it: 64 of its own, with the LM head for each, and 4,096 of"),
    ],
)
def test_a_prompt_that_is_computed_again_for_each_response_is_told(growth, shared, told):
    """Siblings share whole blocks of 32 tokens, without the last: each computes 32 tokens of its prompt."""
    rows = []
    for size in growth.AXES["G"]:
        traffic = from_shape(size.shape, size.num_sequences)
        scored, fed = traffic.scored_tokens, traffic.fed_tokens
        computed = 4 * (1024 - 32) + 4 * size.value * (32 + 16) if shared else fed
        rows.append(
            {
                "s_p50": 0.041 + 1e-5 * (computed - 4 * (1024 - 32) * shared),
                "computed_tokens": scored + 4 * 1025,
                "scored_tokens": scored,
                "fed_tokens": fed,
                "engine_computed_tokens": computed,
            }
        )
    table, line = growth.prompts_and_responses(rows)
    assert table.row_count == 4
    assert told in line
    took = 192 if shared else 4160  # 4,100 prompt tokens take 0.041 s
    assert f"takes as long as {took:,} prompt tokens" in line
    assert line.endswith("would make it 4,160.")
