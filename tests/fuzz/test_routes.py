"""A call that is cut, ordered and sent: each request once, whole groups, the same order everywhere."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.strategies import fuzz
from vllm_kl.plan import plan
from vllm_kl.routing.affinity import choose, order
from vllm_kl.routing.dialogs import Dialogs
from vllm_kl.routing.shards import Sizes, cut
from vllm_kl.types import ScoreRequest

SEQUENCES = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=9), st.integers(1, 8)).filter(
        lambda s: s[1] < len(s[0])
    ),
    max_size=8,
)
NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), unique=True, max_size=4)
SIZES = st.builds(
    lambda per, fewest, more: Sizes(
        per_replica=per, fewest_tokens=fewest, most_tokens=fewest + more, fewest_shared=1
    ),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 30),
)


@fuzz(sequences=SEQUENCES, replicas=NAMES, sizes=SIZES, share=4.0, few=100)
def test_shards_have_each_request_once_and_whole_groups(sequences, replicas, sizes):
    asked = [ScoreRequest(token_ids=np.array(ids, np.int32), start=start) for ids, start in sequences]
    planned = plan(asked)
    for request, n in zip(asked, planned.result_of, strict=True):
        assert planned.requests[n].token_ids.tolist() == request.token_ids.tolist()
        assert planned.requests[n].start == request.start
    shards = cut(planned.requests, replicas, Dialogs(), sizes)
    assert Counter(n for shard in shards for n in shard.places) == Counter(range(len(planned.requests)))
    where: dict[bytes, set[int]] = {}
    size: Counter[bytes] = Counter()
    for s, shard in enumerate(shards):
        assert shard.places
        for n in shard.places:
            request = planned.requests[n]
            prompt = request.token_ids[: request.start].tobytes()
            where.setdefault(prompt, set()).add(s)
            size[prompt] += len(request.token_ids) - request.start
    in_order = [request.token_ids[: request.start].tobytes() for request in planned.requests]
    neighbours = Counter(prompt for prompt, _ in itertools.groupby(in_order))
    for prompt, of_prompt in where.items():
        # The prompt of another group may begin with this one, and stand between its requests.
        if neighbours[prompt] == 1 and size[prompt] + len(prompt) // 4 <= sizes.most_tokens:
            assert len(of_prompt) == 1, "a group that fits in a shard was split"


@fuzz(
    key=st.binary(max_size=8),
    loads=st.dictionaries(st.text("abc", max_size=2), st.integers(0, 9), min_size=1, max_size=5),
    spill=st.integers(0, 9),
    share=4.0,
)
def test_the_chosen_replica_is_the_first_whose_load_is_near_the_least(key, loads, spill):
    in_order = order(key, loads)
    assert sorted(in_order) == sorted(loads)
    assert in_order == order(key, reversed(in_order))
    assert choose(key, loads, spill=spill) == next(
        one for one in in_order if loads[one] <= min(loads.values()) + spill
    )
    for gone in loads:  # one that leaves changes the order of no other
        assert order(key, [one for one in in_order if one != gone]) == [
            one for one in in_order if one != gone
        ]
