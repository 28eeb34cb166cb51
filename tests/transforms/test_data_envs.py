"""TorchRL's envs for data sets, with ``RetrieveKL`` appended, on a few rows that are written here."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader
from torchrl.envs import Transform
from torchrl.envs.llm import CountdownEnv, GSM8KEnv, IFEvalEnv, MATHEnv

from tests.collectors import NUM_ENVS, check_kl, collect
from vllm_kl import RetrieveKL

NUMBERS = (4, 25, 117)  # so that questions have different lengths
ROWS = {
    GSM8KEnv: [
        {"question": f"Tom has {n} apples and buys 3. How many now?", "answer": f"{n} + 3\n#### {n + 3}"}
        for n in NUMBERS
    ],
    MATHEnv: [
        {"problem": f"What is ${n}^2$?", "solution": rf"It is $\boxed{{{n * n}}}$.", "level": "Level 1"}
        for n in NUMBERS
    ],
    IFEvalEnv: [
        {
            "key": n,
            "prompt": f"Write {n} words, no commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{"num_highlights": None}],
        }
        for n in NUMBERS
    ],
}
SHORT = "Answer in <answer></answer>."  # TorchRL's system prompts are longer than the context of a tiny model


class KeepReward(Transform):
    """Keeps the env's own reward beside the one that the KL changes."""

    def __init__(self):
        super().__init__(in_keys=["reward"], out_keys=["own_reward"])

    def _step(self, td, next_td):
        return next_td.set("own_reward", next_td["reward"].clone())

    def transform_observation_spec(self, spec):
        spec["own_reward"] = self.parent.output_spec["full_reward_spec", "reward"].clone()
        return spec


def make(kind, **kwargs):
    """Make an env on the rows above: ``GSM8KEnv(dataset=...)`` would download them with ``datasets``."""
    if kind is CountdownEnv:
        return type("Short", (CountdownEnv,), {"SYSTEM_PROMPT": SHORT})(seed=0, **kwargs)
    if kind is IFEvalEnv:
        for package in ("langdetect", "nltk", "immutabledict"):
            pytest.importorskip(package, reason="TorchRL's IfEvalScorer: pip install 'vllm-kl[test]'")

    class Local(kind):
        SYSTEM_PROMPT = SHORT

        @staticmethod
        def _dataloader_factory(batch_size_dl, collate_fn, **_):
            return DataLoader(ROWS[kind], batch_size=batch_size_dl, collate_fn=collate_fn)

    return Local(**kwargs)


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
@pytest.mark.parametrize("kind", [GSM8KEnv, MATHEnv, IFEvalEnv, CountdownEnv])
def test_kl_and_its_share_of_the_reward_are_right(
    make_policy, make_reference, tokenizer, policy_oracle, ref_oracle, kind, pad_output
):
    env = make(kind, num_envs=NUM_ENVS, repeats=2, tokenizer=tokenizer)
    kl = RetrieveKL("from_collector", make_reference(pad_output=pad_output), coeff=0.1)
    env = env.append_transform(KeepReward()).append_transform(kl)
    (data,) = collect(env, make_policy(pad_output=pad_output), turns=NUM_ENVS)
    check_kl(data, policy_oracle, ref_oracle, coeff=None)
    keys = [("next", key) for key in ("own_reward", "reward", "kl_penalty")]
    for own, reward, kl in zip(*(data.get(key, as_list=True) for key in keys), strict=True):
        assert own.numel() == 1
        torch.testing.assert_close(reward[:, 0], own.flatten() - 0.1 * kl)
    queries = [sample["query"] for sample in data.unbind(0)]
    assert queries[0] == queries[1] != queries[2] == queries[3]
