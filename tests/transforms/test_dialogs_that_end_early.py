"""Dialogs of one batch end at different turns: each is scored as long as it lasts, and no longer."""

from __future__ import annotations

import pytest
import torch
from torchrl.envs import Transform

from tests.collectors import NUM_ENVS, check_kl, collect
from vllm_kl import FromCollector, RetrieveKL

# The policy samples its pad id now and then, and a padded prompt of the next turn drops it.
pytestmark = pytest.mark.filterwarnings("ignore:sample .* the attention mask leaves out tokens:UserWarning")
TURNS = [1, 2, 3, 2]  # of the envs of a batch


class EndAt(Transform):
    """Ends each dialog after its number of turns, and rewards a step with the turn's number."""

    def __init__(self):
        super().__init__(out_keys=[])

    def _step(self, td, next_td):
        turn = td["step_count"] + 1
        for key in ("done", "terminated"):
            next_td[key] = next_td[key] | (turn >= torch.tensor(TURNS)[:, None])
        return next_td.set("reward", turn.float()[..., None])


def check(data, *oracles):
    """Compare KL, log-probs, masks and each step's share of the reward with float64."""
    check_kl(data, *oracles, coeff=None)
    keys = [("next", "reward"), ("next", "kl_penalty"), "step_count"]
    for reward, kl, count in zip(*(data.get(key, as_list=True) for key in keys), strict=True):
        torch.testing.assert_close(reward, count + 1 - 0.1 * kl[:, None])


@pytest.fixture(params=[True, False], ids=["padded", "ragged"])
def env_and_policy(request, make_env, make_policy, make_reference):
    """Make an env with a KL of the collector's policy or of recorded log-probs, and a policy's factory."""

    def make(gen):
        kl = RetrieveKL(gen, make_reference(pad_output=request.param), coeff=0.1)
        policy = make_policy(
            pad_output=request.param, generate_kwargs={"max_new_tokens": 6, "temperature": 1.0}
        )
        return make_env(max_steps=5).append_transform(EndAt()).append_transform(kl), kl, policy

    return make


@pytest.mark.parametrize("whole", [True, False], ids=["whole dialogs", "steps"])
def test_a_collector_starts_the_next_dialog_at_once(env_and_policy, policy_oracle, ref_oracle, whole):
    env, _, policy = env_and_policy("from_collector")
    lengths = []
    for data in collect(env, policy, turns=5 * NUM_ENVS, yield_completed_trajectories=whole):
        check(data, policy_oracle, ref_oracle)
        counts = data["step_count"].flatten().tolist()
        lengths += [count + 1 for count, is_done in zip(counts, data["next", "done"], strict=True) if is_done]
    assert set(lengths) == {1, 2, 3}


def test_a_rollout_scores_no_step_of_a_dialog_that_has_ended(
    env_and_policy, ref_scorer, policy_oracle, ref_oracle
):
    """TorchRL lets the policy answer ended dialogs, too, and then repeats their last step."""
    env, kl, policy = env_and_policy(FromCollector("reuse"))
    data = env.rollout(5, policy(), break_when_any_done=False, break_when_all_done=True)
    assert data.batch_size == (NUM_ENVS, max(TURNS))
    for i, num_turns in enumerate(TURNS):
        assert data["next", "done"][i, :, 0].tolist() == [False] * (num_turns - 1) + [True] * (4 - num_turns)
        check(data[i][:num_turns], policy_oracle, ref_oracle)
    num_tokens = data[2, 2]["next", "kl_mask"].sum()  # only the third dialog has a third turn
    assert kl.metrics["num_tokens"] == num_tokens > 0
    assert ref_scorer.stats.num_requests == 1
