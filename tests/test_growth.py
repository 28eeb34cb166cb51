"""The fits of ``benchmarks/growth.py`` find what made-up times were made of."""

from __future__ import annotations

import pytest

from tests import scripts


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


@pytest.mark.parametrize(("shared", "told"), [(True, "64 prompt tokens"), (False, "4,160 prompt tokens")])
def test_a_prompt_that_is_computed_again_for_each_response_is_told(growth, shared, told):
    rows = []
    for size in growth.AXES["G"]:
        scored = 4 * 16 * size.value
        computed = scored + 4 * 1024 * (1 if shared else size.value + 1)
        rows.append({"s_p50": 1e-5 * computed, "computed_tokens": scored + 4 * 1024, "scored_tokens": scored})
    table, line = growth.prompts_and_responses(rows)
    assert table.row_count == 4
    assert told in line
