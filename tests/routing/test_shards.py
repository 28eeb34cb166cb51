"""A call's shards: every request once, groups whole, sizes by tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_kl.plan import plan
from vllm_kl.routing.affinity import order
from vllm_kl.routing.dialogs import Dialogs
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
        st.tuples(st.integers(16, 3000), st.lists(st.integers(1, 2000), min_size=1, max_size=5)), max_size=12
    )
)
def test_each_request_is_in_one_shard_and_each_group_too(groups):
    requests = requests_of(groups)
    found = cut(requests, REPLICAS, Dialogs())
    assert sorted(n for shard in found for n in shard.places) == list(range(len(requests)))
    of_prompts = [prompt for shard in found for prompt in groups_in(requests, shard)]
    assert len(of_prompts) == len(set(of_prompts))


def test_a_group_that_exceeds_a_shard_is_split_and_spread():
    requests = requests_of([(100, [2000 + k for k in range(64)])])
    found = cut(requests, REPLICAS, Dialogs())
    assert len(found) > 3
    assert all(shard.num_tokens <= Sizes().most_tokens for shard in found)
    assert len({shard.key for shard in found}) == len(found)


def test_a_shard_has_prompts_of_one_replica():
    requests = requests_of([(20, [5])] * 90)
    found = cut(requests, REPLICAS, Dialogs())
    assert len(found) < 90
    for shard in found:
        preferred = {order(cut([requests[n]], REPLICAS, Dialogs())[0].key, REPLICAS)[0] for n in shard.places}
        assert preferred == {order(shard.key, REPLICAS)[0]}


def test_a_prompt_has_one_key_in_all_calls():
    first, second = requests_of([(20, [5, 6])]), requests_of([(20, [7])])
    keys = [cut(*call, Dialogs())[0].key for call in ((first, REPLICAS), (second, REPLICAS), (second, []))]
    assert keys[0] == keys[1] == keys[2]


def test_a_dialog_keeps_its_key_while_it_grows():
    dialogs, ids = Dialogs(), np.arange(4096, dtype=np.int32)
    keys = [
        cut([ScoreRequest(token_ids=ids, start=start)], REPLICAS, dialogs)[0].key
        for start in (100, 101, 1024, 4095)
    ]
    assert len(set(keys)) == 1


def test_what_follows_a_few_tokens_is_no_group():
    requests = requests_of([(1, [700 + k for k in range(30)])])
    found = cut(requests, REPLICAS, Dialogs())
    assert len({order(shard.key, REPLICAS)[0] for shard in found}) == len(REPLICAS)


def test_a_large_call_has_several_shards_for_each_replica_and_a_small_one_few():
    assert len(cut(requests_of([(100, [500] * 4)] * 90), REPLICAS, Dialogs())) >= 8 * len(REPLICAS)
    assert len(cut(requests_of([(20, [10])] * 20), [], Dialogs())) == 1
