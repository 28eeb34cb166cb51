"""TorchRL's losses read what the transforms write: the numbers that they then log are those of float64."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm import TransformersWrapper
from torchrl.modules.llm.policies import ChatHistory
from torchrl.objectives.llm import DistillationLoss, GRPOLoss

from tests.batches import CHATS
from tests.collectors import collect
from tests.transforms.helpers import in_pieces
from vllm_kl import RetrieveKL, RetrieveLogProb

TOLERANCE = 2e-5  # a mean of KLs, each the difference of two log-probs; through a trainer's model in float32


@pytest.fixture
def trainer(policy_model):
    """The policy's model with parameters of its own."""
    return copy.deepcopy(policy_model).train()


@pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
def test_grpo_loss_reads_the_reference_log_probs(
    make_env,
    make_policy,
    make_reference,
    trainer,
    tokenizer,
    policy_oracle,
    ref_oracle,
    pad_output,
):
    transform = RetrieveKL("from_collector", make_reference(pad_output=pad_output), add_to_reward=False)
    (data,) = collect(make_env().append_transform(transform), make_policy(pad_output=pad_output), turns=4)
    data = data.to_lazystack(0) if not pad_output else data
    masks = data.get(("next", "kl_mask"), as_list=True)
    ids, attention = (
        data.get(("tokens", "full"), as_list=True),
        data.get(("masks", "all_attention_mask"), as_list=True),
    )
    for i, sample in enumerate(data.unbind(0)):
        advantage = 1.0 if i % 2 else -1.0
        sample["advantage"] = torch.full((len(ids[i]), 1), advantage)
        sample["masks", "all_assistant_mask"] = masks[i]  # the loss masks by it; log-probs outside it are 0
    actor = TransformersWrapper(
        trainer,
        tokenizer=tokenizer,
        generate=False,
        input_mode="tokens",
        pad_output=pad_output,
        return_log_probs=True,
    )
    loss_module = GRPOLoss(actor, kl_to_ref_coeff=0.25, masking_strategy="rlhf")
    loss = loss_module(data)

    k3 = 0.0
    for row, real, mask in zip(ids, attention, masks, strict=True):
        keep = mask[real]
        log_ratio = (
            ref_oracle.masked(row[real], keep.tolist()) - policy_oracle.masked(row[real], keep.tolist())
        )[keep]
        k3 += float((log_ratio.exp() - 1 - log_ratio).sum())
    kl_to_ref = loss.kl_to_ref.item()
    width = max(len(row) for row in ids)
    num_columns = len(ids) * width  # TorchRL averages over padding, too
    assert k3 / num_columns > 1e-3
    assert kl_to_ref == pytest.approx(k3 / num_columns, abs=TOLERANCE)
    assert loss.loss_kl_to_ref.item() == pytest.approx(0.25 * kl_to_ref)
    (loss.loss_objective + loss.loss_kl_to_ref).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.parameters())


def test_distillation_loss_reads_a_vllm_teacher(
    make_reference, trainer, tokenizer, policy_oracle, ref_oracle
):
    history = History.from_chats(CHATS)
    td = TensorDict(
        history=ChatHistory(full=history, prompt=history[..., :-1], response=history[..., -1:]),
        next=TensorDict(
            done=torch.zeros(2, dtype=torch.bool), history=ChatHistory(prompt=history), batch_size=2
        ),
        batch_size=2,
    )
    data = lazy_stack(list(td.unbind(0)))
    data = RetrieveLogProb(make_reference(), log_probs_full_key=("teacher_log_probs", "full"))(data)
    student = TransformersWrapper(
        trainer, tokenizer=tokenizer, generate=False, input_mode="history", pad_output=False
    )
    loss = DistillationLoss(actor_network=student, tokenizer=tokenizer, kl_direction="reverse")(data)

    kl = []
    for chat in CHATS:
        ids, mask = in_pieces(tokenizer, chat)
        log_ratio = (ref_oracle.masked(ids, mask) - policy_oracle.masked(ids, mask))[torch.tensor(mask)]
        kl.append((log_ratio.exp() - 1 - log_ratio).mean())
    assert loss.kl_to_teacher.item() == pytest.approx(float(torch.stack(kl).mean()), abs=TOLERANCE)
    loss.loss_distill.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.parameters())


EXAMPLE = Path(__file__).parents[2] / "examples" / "losses.py"
LAYOUTS = {"ragged": [], "padded": ["--pad-output"]}


@pytest.fixture(scope="module")
def printed(policy_path, ref_path):
    """What the example prints in either layout, as numbers; both run at the same time, mostly importing."""
    models = ["--policy", policy_path, "--reference", ref_path]
    runs = {
        name: subprocess.Popen(
            [sys.executable, EXAMPLE, *models, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, flags in LAYOUTS.items()
    }
    figures = {}
    for name, run in runs.items():
        out, err = run.communicate(timeout=280)
        assert run.returncode == 0, err
        grpo = re.search(
            r"^GRPOLoss: objective (\S+), kl_to_ref (\S+) over (\d+) columns\n"
            r"  kl_estimate, k3: sum (\S+) nats, (\S+) per token of (\d+)$",
            out,
            re.M,
        )
        distillation = re.search(
            r"^DistillationLoss: loss (\S+), kl_to_teacher (\S+)\n  kl_estimate, k3: ([\d.]+)", out, re.M
        )
        figures[name] = [float(x) for x in grpo.groups()], [float(x) for x in distillation.groups()]
    return figures


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_examples_figures_agree_with_each_other(printed, layout):
    (objective, kl_to_ref, num_columns, k3, k3_per_token, num_tokens), (loss, kl_to_teacher, ours) = printed[
        layout
    ]
    assert objective != 0
    assert k3_per_token > 0.1
    # The trainer's log-probs against the sampler's.
    assert kl_to_ref * num_columns == pytest.approx(k3, rel=1e-4)
    assert k3_per_token == pytest.approx(k3 / num_tokens, abs=1e-6)
    assert num_tokens < num_columns
    assert kl_to_teacher == loss
    assert ours > 0.1
    assert kl_to_teacher == pytest.approx(ours, rel=1e-5)


def test_the_examples_figures_are_those_of_the_other_layout(printed):
    """One seed, one engine: the same tokens are sampled, and laid out in two ways."""
    (_, _, _, *ragged), ragged_distillation = printed["ragged"]
    (_, _, _, *padded), padded_distillation = printed["padded"]
    assert ragged == pytest.approx(padded, rel=1e-5)
    assert ragged_distillation == pytest.approx(padded_distillation, rel=1e-5)
