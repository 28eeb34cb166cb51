"""The figures of a transform in TorchRL's loggers: in a plain loop, and as the hook of a trainer."""

from __future__ import annotations

import statistics

import pytest
import torch
from torchrl.data import LazyStackStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage
from torchrl.record.loggers import CSVLogger, TensorboardLogger
from torchrl.trainers.algorithms.grpo import GRPOTrainer
from transformers import AutoModelForCausalLM

from tests.collectors import GROUP, NUM_ENVS
from tests.transforms.helpers import GEN, MASK, REF, compute, step
from vllm_kl import LogMetrics, RetrieveKL
from vllm_kl.errors import OptionError

NAME = "kl_k1_token_mean_nats"
KL = statistics.fmean([v for g, r, m in zip(GEN, REF, MASK, strict=True) for v in (g - r)[m].tolist()])


def logged(folder, name):
    """Return the steps and values in a file of a CSVLogger."""
    lines = (folder / "scalars" / f"{name}.csv").read_text().splitlines()
    return [(int(n), float(value)) for n, value in (line.split(",") for line in lines)]


def test_a_loop_logs_the_figures_of_each_batch(tmp_path):
    transform, logger = compute(), CSVLogger("run", log_dir=str(tmp_path))
    log = LogMetrics(transform, prefix="kl")
    for n in range(3):
        transform.coeff = 0.5 * n
        transform(step())
        told = log.log(logger, 10 * n)
    assert told == {f"kl/{name}": value for name, value in transform.metrics.items()}
    assert logged(tmp_path / "run", f"kl/{NAME}") == [(10 * n, pytest.approx(KL)) for n in range(3)]
    assert logged(tmp_path / "run", "kl/coeff") == [(0, 0.0), (10, 0.5), (20, 1.0)]


def test_tensorboard_gets_the_same_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    transform, logger = compute(), TensorboardLogger("run", log_dir=str(tmp_path))
    transform(step())
    LogMetrics(transform).log(logger, step=4)
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (event,) = events.Scalars(f"vllm_kl/{NAME}")
    assert (event.step, event.value) == (4, pytest.approx(KL))


def test_an_object_without_figures_is_refused():
    with pytest.raises(OptionError, match="a Linear has no metrics to log"):
        LogMetrics(torch.nn.Linear(1, 1))


@pytest.mark.filterwarnings("ignore:GRPOTrainer is an experimental:UserWarning")
def test_a_trainer_logs_the_figures_of_each_batch_it_collects(
    make_collector, make_reference, steps, tokenizer, tmp_path
):
    kl = RetrieveKL("from_collector", make_reference(), add_to_reward=False)
    collector = make_collector(kl, num_batches=2)
    model = AutoModelForCausalLM.from_pretrained(steps[0]).eval()
    actor = TransformersWrapper(
        model, tokenizer=tokenizer, input_mode="tokens", generate=False, pad_output=False
    )
    buffer = ReplayBuffer(
        storage=LazyStackStorage(NUM_ENVS), sampler=SamplerWithoutReplacement(), batch_size=NUM_ENVS
    )
    buffer.append_transform(MCAdvantage(grpo_size=GROUP))
    trainer = GRPOTrainer(
        collector=collector,
        total_frames=2 * NUM_ENVS,
        loss_module=GRPOLoss(actor, masking_strategy="sft", kl_to_ref_coeff=0.1, entropy_bonus=False),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4),
        replay_buffer=buffer,
        logger=CSVLogger("run", log_dir=str(tmp_path)),
        log_interval=0,
        progress_bar=False,
    )
    seen = []
    trainer.register_op("pre_steps_log", lambda batch: seen.append(batch["next"]))
    hook = LogMetrics(kl)
    hook.register(trainer)
    state = trainer.state_dict()
    assert state["log_vllm_kl"] == {}
    trainer.load_state_dict(state)
    trainer.train()
    want = []
    for batch in seen:
        masks, values = (batch.reshape(-1).get(key, as_list=True) for key in ("kl_mask", "kl_penalty"))
        want.append(torch.cat([v[m] for v, m in zip(values, masks, strict=True)]).double().mean().item())
    assert len(want) == 2
    got = logged(tmp_path / "run", f"vllm_kl/{NAME}")
    assert got == [(NUM_ENVS * (n + 1), pytest.approx(value, abs=1e-6)) for n, value in enumerate(want)]
