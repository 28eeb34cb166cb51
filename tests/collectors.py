"""Runs TorchRL's collectors on chats, and checks the KL of their batches."""

from __future__ import annotations

import torch
from tensordict import TensorDict, lazy_stack
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.data import Unbounded
from torchrl.envs import StepCounter, Transform
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import TransformersWrapper
from transformers import AutoModelForCausalLM

from tests.oracle import KL_TOLERANCE, LOG_PROB_TOLERANCE
from vllm_kl.demo.task import make_tokenizer

NUM_ENVS, GROUP = 4, 2


class OneReward(Transform):
    """A reward of 1 per sequence."""

    def __init__(self):
        super().__init__(out_keys=["reward"])

    def _step(self, tensordict, next_tensordict):
        return next_tensordict.set("reward", torch.ones(*tensordict.batch_size, 1, 1))

    def transform_reward_spec(self, reward_spec):
        reward_spec["reward"] = Unbounded(shape=(*reward_spec.shape, 1, 1))
        return reward_spec


class EndFirst(Transform):
    """The first dialog of a batch is one turn long, the others two: it leaves first."""

    def __init__(self):
        super().__init__(out_keys=[])
        self._turn = 0

    def _step(self, td, next_td):
        self._turn += 1
        if self._turn % 2:
            for key in ("done", "terminated"):
                next_td[key] = next_td[key].index_fill(0, torch.tensor(0), True)
        return next_td


def chat_env(tokenizer, size, *, repeats=1, max_steps=1):
    """Return an env of chats, with a reward of 1 per sequence."""
    queries = [
        {"query": "What is one and one?"},
        {"query": "Why?"},
        {"query": "Name a colour of the sea."},
    ]
    loader = DataLoader(
        queries, batch_size=1, collate_fn=lambda items: lazy_stack([TensorDict(i) for i in items])
    )
    env = ChatEnv.from_dataloader(
        loader, batch_size=(size,), repeats=repeats, input_mode="history", tokenizer=tokenizer
    )
    return env.append_transform(StepCounter(max_steps=max_steps)).append_transform(OneReward())


def transformers_wrapper(model, **options):
    """Return TorchRL's wrapper of a model, or of the checkpoint in a folder. It scores histories."""
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model).eval()
    scoring = {"input_mode": "history", "generate": False, "pad_output": False}
    return TransformersWrapper(model, tokenizer=make_tokenizer(), **{**scoring, **options})


def collect(env, policy_factory, turns=2 * NUM_ENVS, **kwargs):
    collector = LLMCollector(
        env,
        policy_factory=policy_factory,
        dialog_turns_per_batch=NUM_ENVS,
        total_dialog_turns=turns,
        **kwargs,
    )
    try:
        return [data.reshape(-1) for data in collector]
    finally:
        collector.shutdown()


def check_kl(data, policy_oracle, ref_oracle, coeff=1.0, tolerance=KL_TOLERANCE):
    """Compare every KL and log-prob of a batch with float64, on the ids that were generated.

    Rewards are compared too, unless ``coeff`` is None.
    """
    keys = {
        "ids": ("tokens", "full"),
        "real": ("masks", "all_attention_mask"),
        "prompt": ("tokens", "prompt"),
        "kl": ("next", "kl_penalty"),
        "gen": ("next", "log_probs", "full"),
        "ref": ("next", "ref_log_probs", "full"),
    }
    if coeff is not None:
        keys["reward"] = ("next", "reward")
    columns = {name: data.get(key, as_list=True) for name, key in keys.items()}
    for i in range(len(data)):
        row = {name: column[i] for name, column in columns.items()}
        row["mask"] = row["real"] & (torch.arange(len(row["ids"])) >= len(row["prompt"]))
        assert row["kl"].shape == row["ids"].shape  # lines up with the ids and the masks beside it
        assert row["mask"].any()
        for name in ("kl", "gen", "ref"):
            assert (row[name][~row["mask"]] == 0).all()
        ids, keep = row["ids"][row["real"]], row["mask"][row["real"]].tolist()
        ref = ref_oracle.masked(ids, keep)
        want = policy_oracle.masked(ids, keep) - ref
        assert want.abs().max() > 0.1
        torch.testing.assert_close(row["kl"][row["real"]].double(), want, rtol=0, atol=tolerance)
        torch.testing.assert_close(row["ref"][row["real"]].double(), ref, rtol=0, atol=LOG_PROB_TOLERANCE)
        if coeff is not None:
            torch.testing.assert_close(row["reward"], 1 - coeff * row["kl"][:, None])
