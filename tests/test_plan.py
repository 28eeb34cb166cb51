"""Order and de-duplication of a call's requests."""

from __future__ import annotations

import itertools
import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_kl.plan import plan
from vllm_kl.types import ScoreRequest, ScoreResult


def request(token_ids, start=1, **kwargs):
    return ScoreRequest(token_ids=np.array(token_ids, np.int32), start=start, **kwargs)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.integers(1, 2)), max_size=12)
)
def test_every_caller_gets_the_result_of_its_own_request(entries):
    requests = [request(ids, start) for ids, start in entries if start < len(ids)]
    planned = plan(requests)
    results = [ScoreResult(values=np.append(r.token_ids, r.start)) for r in planned.requests]
    for mine, result in zip(requests, planned.restore(results), strict=True):
        assert result.values.tolist() == [*mine.token_ids, mine.start]
    assert len({(r.token_ids.tobytes(), r.start) for r in planned.requests}) == len(planned.requests)


def test_members_of_a_group_are_neighbours():
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(20)] for _ in range(5)]
    groups = [[(g, [*prompt, rng.randrange(1000), 7]) for _ in range(4)] for g, prompt in enumerate(prompts)]
    shuffled = rng.sample([member for group in groups for member in group], 20)
    group_of = {tuple(ids): g for g, ids in shuffled}
    order = [group_of[tuple(r.token_ids)] for r in plan([request(ids, 20) for _, ids in shuffled]).requests]
    assert sum(a != b for a, b in itertools.pairwise(order)) == 4


def test_what_is_asked_of_a_sequence_makes_it_distinct():
    ids = [1, 2, 3]
    asked = [
        request(ids),
        request(ids, 2),
        request(ids, temperature=0.5),
        request(ids, top_k=3),
        request(ids, entropy=True),
        request(ids, hidden_size=8),
        request(ids, ids=np.array([[1], [2]], np.int32)),
        request(ids, ids=np.array([[1], [3]], np.int32)),
    ]
    assert len(plan([*asked, *asked]).requests) == len(asked)
