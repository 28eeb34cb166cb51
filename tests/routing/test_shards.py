"""A call's shards: every request once, groups whole, sizes by tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_kl.plan import plan
from vllm_kl.routing.affinity import order
from vllm_kl.routing.shards import Sizes, cut
from vllm_kl.types import ScoreRequest

REPLICAS = ["a", "b", "c"]


def requests_of(groups):
    """Return the requests of groups: for each its prompt's length, and the lengths of its responses."""
    found = []
    for n, (start, lengths) in enumerate(groups):
        prompt = [n + 1] * start
        found += [[*prompt, *([90 + k] * length)] for k, length in enumerate(lengths)]
    starts = [start for start, lengths in groups for _ in lengths]
    return plan(
        [ScoreRequest(token_ids=np.array(i, np.int32), start=s) for i, s in zip(found, starts, strict=True)]
    ).requests


def groups_in(requests, shard):
    return {requests[n].token_ids[: requests[n].start].tobytes() for n in shard.places}


@given(
    st.lists(
        st.tuples(st.integers(1, 3000), st.lists(st.integers(1, 2000), min_size=1, max_size=5)), max_size=12
    )
)
def test_each_request_is_in_one_shard_and_each_group_too(groups):
    requests = requests_of(groups)
    found = cut(requests, REPLICAS)
    assert sorted(n for shard in found for n in shard.places) == list(range(len(requests)))
    of_prompts = [prompt for shard in found for prompt in groups_in(requests, shard)]
    assert len(of_prompts) == len(set(of_prompts))


def test_a_group_that_exceeds_a_shard_is_split_and_spread():
    requests = requests_of([(100, [2000 + k for k in range(64)])])
    found = cut(requests, REPLICAS)
    assert len(found) > 3
    assert all(shard.num_tokens <= Sizes().most_tokens for shard in found)
    assert len({shard.key for shard in found}) == len(found)


def test_a_shard_has_prompts_of_one_replica():
    requests = requests_of([(20, [5])] * 90)
    found = cut(requests, REPLICAS)
    assert len(found) < 90
    for shard in found:
        preferred = {order(cut([requests[n]], REPLICAS)[0].key, REPLICAS)[0] for n in shard.places}
        assert preferred == {order(shard.key, REPLICAS)[0]}


def test_a_prompt_has_one_key_in_all_calls():
    first, second = requests_of([(20, [5, 6])]), requests_of([(20, [7])])
    assert cut(first, REPLICAS)[0].key == cut(second, REPLICAS)[0].key == cut(second, [])[0].key


def test_a_dialog_keeps_its_key_until_it_is_twice_as_long():
    dialog = list(range(1, 4097))
    keys = {}
    for start in (1024, 1025, 1500, 2047, 2048, 4095):
        request = ScoreRequest(token_ids=np.array(dialog, np.int32), start=start)
        keys[start] = cut([request], REPLICAS)[0].key
    assert keys[1024] == keys[1025] == keys[1500] == keys[2047]
    assert keys[2048] == keys[4095] != keys[1024]


def test_a_large_call_has_several_shards_for_each_replica_and_a_small_one_few():
    assert len(cut(requests_of([(100, [500] * 4)] * 90), REPLICAS)) >= 8 * len(REPLICAS)
    assert len(cut(requests_of([(10, [10])] * 20), [])) == 1
