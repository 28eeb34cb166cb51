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
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.data.llm import History
from torchrl.modules.llm import TransformersWrapper
from torchrl.modules.llm.policies import ChatHistory
from torchrl.objectives.llm import DAPO, CISPOLoss, DistillationLoss, GRPOLoss, SFTLoss

from tests.batches import CHATS, dense_batch, history_batch
from tests.collectors import collect
from tests.transforms.helpers import PAD, PROMPTS, SEQUENCES, in_pieces, recorded_batch
from vllm_kl import (
    FromCollector,
    RetrieveKL,
    RetrieveLogProb,
    VLLMReference,
    fill_deferred,
    mask_recorded,
)
from vllm_kl.demo.task import make_tokenizer

TOLERANCE = 2e-5  # a mean of KLs, each the difference of two log-probs; through a trainer's model in float32


@pytest.fixture
def trainer(policy_model):
    """The policy's model with parameters of its own."""
    return copy.deepcopy(policy_model).train()


LAYOUT = pytest.mark.parametrize("pad_output", [True, False], ids=["padded", "ragged"])
RECORDED, WRITTEN = ("log_probs", "full"), ("next", "log_probs", "full")


@pytest.fixture
def make_loss(trainer, tokenizer):
    """Make one of TorchRL's losses, with the trainer's model as its actor."""

    def make(kind=GRPOLoss, *, pad_output=False, sample_log_prob=RECORDED, **kwargs):
        actor = TransformersWrapper(
            trainer, tokenizer=tokenizer, generate=False, input_mode="tokens", pad_output=pad_output
        )
        loss = kind(actor, **{"kl_to_ref_coeff": 0.25, **kwargs})
        loss.set_keys(sample_log_prob=sample_log_prob)
        return loss

    return make


def with_advantages(data):
    for i, sample in enumerate(data.unbind(0)):
        sample["advantage"] = torch.full((len(sample["tokens", "full"]), 1), 1.0 if i % 2 else -1.0)
    return data


def num_columns(data):
    widths = [len(row) for row in data.get(("tokens", "full"), as_list=True)]
    return len(widths) * max(widths)


@pytest.fixture
def k3_sum(policy_oracle, ref_oracle):
    """Return the sum of k3 over the tokens after the prompts, or over all tokens but the first."""

    def k3_sum(data, *, after_prompts):
        keys = ("tokens", "full"), ("tokens", "prompt"), ("masks", "all_attention_mask")
        total = 0.0
        for row, prompt, real in zip(*(data.get(key, as_list=True) for key in keys), strict=True):
            start = int(real[: len(prompt)].sum()) if after_prompts else 1
            ids = row[real].tolist()
            sides = (torch.tensor(oracle.log_probs(ids)[start:]) for oracle in (ref_oracle, policy_oracle))
            log_ratio = next(sides) - next(sides)
            total += float((log_ratio.exp() - 1 - log_ratio).sum())
        return total

    return k3_sum


@LAYOUT
class TestGRPO:
    """The figures of a loss whose actor has the policy's weights: the ratio of each token is 1."""

    @pytest.fixture
    def collected(self, make_env, make_policy, make_reference, pad_output):
        def collected(**kwargs):
            transform = RetrieveKL(
                "from_collector", make_reference(pad_output=pad_output), add_to_reward=False, **kwargs
            )
            (data,) = collect(make_env().append_transform(transform), make_policy(pad_output=pad_output), 4)
            return with_advantages(data if pad_output else data.to_lazystack(0))

        return collected

    @pytest.mark.parametrize("assistant_only", [True, False])
    def test_every_masking_strategy_gives_the_kl_of_its_tokens(
        self, collected, make_loss, k3_sum, trainer, pad_output, assistant_only
    ):
        data = collected(assistant_only=assistant_only)
        columns = num_columns(data)
        for strategy in ("sft", "rlhf", "generic"):
            after_prompts = assistant_only or strategy != "generic"
            want = k3_sum(data, after_prompts=after_prompts) / columns  # TorchRL averages over all columns
            assert want > 0.02
            for kind in (GRPOLoss, DAPO, CISPOLoss):
                loss = make_loss(kind, pad_output=pad_output, masking_strategy=strategy)(data)
                assert loss.kl_to_ref.item() == pytest.approx(want, abs=TOLERANCE)
                assert loss.loss_kl_to_ref.item() == pytest.approx(0.25 * want, abs=TOLERANCE)
                # TorchRL 0.14.1 writes the recorded log-probs of padded prompts into wrong columns.
                if after_prompts or not pad_output:
                    assert loss.ESS.item() == pytest.approx(1.0, abs=TOLERANCE)
                    assert loss.kl_approx.item() == pytest.approx(0.0, abs=TOLERANCE)
        if pad_output and not assistant_only:
            return  # a ratio of log-probs in wrong columns may be infinite
        (loss.loss_objective + loss.loss_kl_to_ref).backward()
        grads = [p.grad for p in trainer.parameters() if p.grad is not None]
        assert sum(float(grad.abs().sum()) for grad in grads) > 0
        assert all(grad.isfinite().all() for grad in grads)

    def test_recorded_log_probs_outside_the_mask_would_be_compared(
        self, collected, make_loss, k3_sum, pad_output
    ):
        """The trap itself: TorchRL's loss takes 0.0 for a log-prob, and its own value of a first token."""
        data = collected(mask_recorded=False)
        assert all(row.isfinite().all() for row in data.get(RECORDED, as_list=True))
        generic = make_loss(pad_output=pad_output, masking_strategy="generic")
        want = k3_sum(data, after_prompts=True) / num_columns(data)
        assert generic(data).kl_to_ref.item() > 1000 * want
        mask_recorded(data)
        assert generic(data).kl_to_ref.item() == pytest.approx(want, abs=TOLERANCE)

    def test_log_probs_that_the_transform_wrote_need_the_mask_too(
        self, collected, make_loss, k3_sum, pad_output
    ):
        data = collected(gen_log_probs="rescore")
        want = k3_sum(data, after_prompts=True) / num_columns(data)
        losses = {
            strategy: make_loss(pad_output=pad_output, sample_log_prob=WRITTEN, masking_strategy=strategy)
            for strategy in ("sft", "rlhf", "generic")
        }
        assert losses["generic"](data).kl_to_ref.item() > 1000 * want
        for strategy in ("sft", "rlhf"):
            assert losses[strategy](data).kl_to_ref.item() == pytest.approx(want, abs=TOLERANCE)
        mask_recorded(data, log_probs_key=WRITTEN)
        assert losses["generic"](data).kl_to_ref.item() == pytest.approx(want, abs=TOLERANCE)

    def test_results_that_are_filled_in_later_are_masked_then(self, collected, pad_output):
        data = collected(deferred="buffer")
        assert all(row.isfinite().all() for row in data.get(RECORDED, as_list=True))
        data = fill_deferred(data)
        masks = data.get(("next", "kl_mask"), as_list=True)
        for row, mask in zip(data.get(RECORDED, as_list=True), masks, strict=True):
            assert torch.equal(row.isfinite(), mask)


def test_a_replay_buffer_stores_recorded_log_probs_masked(make_reference, policy_oracle):
    buffer = ReplayBuffer(storage=LazyStackStorage(8), batch_size=4)
    buffer.append_transform(RetrieveKL("from_collector", make_reference(), assistant_only=False), invert=True)
    batch = recorded_batch(policy_oracle)
    for sample, ids in zip(batch.unbind(0), SEQUENCES, strict=True):
        sample["log_probs", "full"] = torch.tensor(policy_oracle.log_probs(ids)).nan_to_num()
    buffer.extend(batch)
    data = buffer[:]
    masks = data.get(("next", "kl_mask"), as_list=True)
    for row, mask in zip(data.get(RECORDED, as_list=True), masks, strict=True):
        assert torch.equal(row.isfinite(), mask)
        assert mask.tolist() == [False] + [True] * (len(mask) - 1)  # token 0 has no log-prob


def test_the_coefficient_of_a_loss_depends_on_the_length_of_the_prompts(
    make_reference, make_loss, policy_oracle
):
    """TorchRL averages the KL over all columns, the objective over the tokens of the mask."""
    figures = []
    for num_padding in (0, 93):
        data = dense_batch(SEQUENCES[:3], PROMPTS[:3], PAD)
        pad = lambda rows, value, n=num_padding: torch.nn.functional.pad(rows, (n, 0), value=value)  # noqa: E731
        for key, value in (
            (("tokens", "prompt"), PAD),
            (("tokens", "full"), PAD),
            (("masks", "all_attention_mask"), False),
            (("masks", "all_assistant_mask"), False),
        ):
            data.set(key, pad(data[key], value))
        ids, real = data["tokens", "full"], data["masks", "all_attention_mask"]
        recorded = torch.zeros(ids.shape)
        for row, columns, sequence in zip(recorded, real, SEQUENCES, strict=False):
            row[columns] = torch.tensor(policy_oracle.log_probs(sequence)).float()
        data["log_probs"] = TensorDict(full=recorded, batch_size=3)
        data["next"] = TensorDict(reward=torch.zeros(3, 1, 1), batch_size=3)
        data["advantage"] = torch.tensor([1.0, -1.0, 2.0])[:, None, None].expand(3, ids.shape[1], 1)
        RetrieveKL(FromCollector("reuse"), make_reference(pad_output=True))(data)
        loss = make_loss(pad_output=True, masking_strategy="rlhf")(data)
        figures.append((ids.shape[1], loss.kl_to_ref.item(), loss.loss_objective.item()))
    (width, kl_to_ref, objective), (wide, diluted, same) = figures
    assert (width, wide) == (7, 100)
    assert kl_to_ref > 0.1
    assert diluted == pytest.approx(kl_to_ref * width / wide, rel=1e-4)
    assert same == pytest.approx(objective, rel=1e-4)


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


class TestSFT:
    """``SFTLoss`` renders dialogs by a template of its own choice; the masks that we write settle it."""

    @pytest.fixture(params=["", "my-qwen"], ids=["own template", "a name that TorchRL knows"])
    def tokenizer(self, request):
        tokenizer = make_tokenizer()
        tokenizer.name_or_path = request.param
        return tokenizer

    @pytest.fixture
    def sft(self, trainer, ref_scorer, tokenizer):
        def sft(chats, pad_output=False, *, assistant_only=True, template=None, **kwargs):
            history = History.from_chats(chats)
            rows = TensorDict(history=ChatHistory(full=history), batch_size=len(chats)).unbind(0)
            data = lazy_stack([row.set("next", TensorDict(done=torch.tensor([True]))) for row in rows])
            reference = VLLMReference(ref_scorer, tokenizer, pad_output=pad_output)
            data = RetrieveLogProb(reference, assistant_only=assistant_only)(data)
            student = TransformersWrapper(
                trainer,
                tokenizer=tokenizer,
                generate=False,
                input_mode="history",
                pad_output=pad_output,
                chat_template=template,
            )
            return SFTLoss(student, **kwargs)(data)

        return sft

    @pytest.fixture
    def sides(self, tokenizer, policy_oracle, ref_oracle):
        """Both sides' log-probs of each chat, 0.0 outside the mask, and the mask."""
        pieces = [in_pieces(tokenizer, chat) for chat in CHATS]
        return [(policy_oracle.masked(*p), ref_oracle.masked(*p), torch.tensor(p[1])) for p in pieces]

    @LAYOUT
    def test_loss_and_kl_count_the_tokens_that_were_scored(self, sft, sides, trainer, pad_output):
        loss = sft(CHATS, pad_output, kl_to_ref_coeff=0.1)
        nll = torch.stack([-policy.sum() / mask.sum() for policy, _, mask in sides]).mean()
        log_ratio = torch.cat([ref - policy for policy, ref, _ in sides])
        width = max(len(mask) for *_, mask in sides)
        columns = len(CHATS) * width if pad_output else len(log_ratio)  # TorchRL averages over all columns
        k3 = float((log_ratio.exp() - 1 - log_ratio).sum()) / columns
        assert k3 > 0.1
        assert loss.loss_sft.item() == pytest.approx(float(nll), abs=TOLERANCE)
        assert loss.kl_to_ref.item() == pytest.approx(k3, abs=TOLERANCE)
        (loss.loss_sft + loss.loss_kl_to_ref).backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.parameters())

    @pytest.mark.parametrize("num_dims", [1, 2])
    def test_the_masks_are_written_beside_the_history(self, make_reference, num_dims):
        data = history_batch(with_next=True)
        data = data.reshape((1, 2)[-num_dims:])
        RetrieveLogProb(make_reference(pad_output=True))(data)
        masks, rows = data.get("masks").reshape(-1), data["next", "ref_log_probs", "full"].flatten(0, -2)
        assert torch.equal(masks.get("all_assistant_mask"), rows != 0)
        assert (masks.get("all_attention_mask").sum(-1) > masks.get("all_assistant_mask").sum(-1)).all()

    @LAYOUT
    def test_minor_sft_compares_the_same_tokens_of_both_sides(self, sft, sides, pad_output):
        loss = sft(CHATS, pad_output, loss_function="minor_sft", beta=0.1)
        log_ratios = torch.stack([(policy - ref).sum() / mask.sum() for policy, ref, mask in sides])
        want = -torch.nn.functional.logsigmoid(0.1 * log_ratios).mean()
        assert loss.loss_sft.item() == pytest.approx(float(want), abs=TOLERANCE)

    @pytest.mark.parametrize("loss_function", ["sft", "minor_sft"])
    def test_a_student_with_another_template_is_refused(self, sft, tokenizer, loss_function):
        chats = [[message for message in chat if message["role"] != "system"] for chat in CHATS]
        how = {"loss_function": loss_function} | ({"kl_to_ref_coeff": 0.1} if loss_function == "sft" else {})
        if "qwen" in tokenizer.name_or_path:  # TorchRL's template of that name adds a system message
            with pytest.raises(ValueError, match="Assistant masks and log_probs have different shapes"):
                sft(chats, **how)
        else:
            sft(chats, **how)
        assert sft(chats, template=tokenizer.chat_template, **how).loss_sft.isfinite()

    def test_log_probs_of_all_tokens_are_not_for_this_loss(self, sft, sides):
        """The trap itself: ``SFTLoss`` sets only its own log-probs to 0.0 outside the mask."""
        log_ratio = torch.cat([ref - policy for policy, ref, _ in sides])
        k3 = float((log_ratio.exp() - 1 - log_ratio).mean())
        assert sft(CHATS, assistant_only=False, kl_to_ref_coeff=0.1).kl_to_ref.item() > 10 * k3


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


@pytest.mark.nightly
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


@pytest.mark.nightly
def test_the_examples_figures_are_those_of_the_other_layout(printed):
    """One seed, one engine: the same tokens are sampled, and laid out in two ways."""
    (_, _, _, *ragged), ragged_distillation = printed["ragged"]
    (_, _, _, *padded), padded_distillation = printed["padded"]
    assert ragged == pytest.approx(padded, rel=1e-5)
    assert ragged_distillation == pytest.approx(padded_distillation, rel=1e-5)
