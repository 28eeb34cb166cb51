"""Tests that a training loop's model is pushed with the weights that it computes with, or is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, OFTConfig, PromptTuningConfig, get_peft_model
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss
from transformers import AutoModelForCausalLM, Qwen2ForSequenceClassification

from tests import tiny
from tests.oracle import LOG_PROB_TOLERANCE
from vllm_kl import VLLMScorer
from vllm_kl.errors import WeightsError
from vllm_kl.transforms.sync_scheme import VLLMSyncScheme
from vllm_kl.weights.checkpoint import Skeleton
from vllm_kl.weights.push import push_weights

IDS = list(range(5, 60))


@pytest.fixture
def model(tied_paths):
    return AutoModelForCausalLM.from_pretrained(tied_paths[1])


@pytest.fixture(scope="module")
def skeleton(tied_paths):
    return Skeleton(str(tied_paths[0]))


@pytest.fixture
def ranks(tmp_path):
    """A process group of this process alone."""
    import torch.distributed as dist

    # vLLM's engine in this process has made one already.
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    if ours:
        dist.destroy_process_group()


def log_probs(model):
    """Return the log-probs of IDS in float64, as the model itself computes them."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([IDS])).logits[0, :-1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(IDS)[1:, None])[:, 0]


class Around(torch.nn.Module):
    """A module that holds another, and more."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def checkpointed(model):
    is_layer = lambda module: type(module).__name__ == "Qwen2DecoderLayer"  # noqa: E731
    apply_activation_checkpointing(model, check_fn=is_layer)
    return model


def compiled_layers(model):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer)
    return model


def wrapper_of(model, tokenizer):
    return TransformersWrapper(model, tokenizer=tokenizer, generate=False, pad_output=True)


def peft_of(model, **config):
    """Return the model with an adapter that moves its log-probs, not so far that float32 itself is off."""
    torch.manual_seed(0)
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        **config,
    }
    wrapped = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return wrapped


def merged(model, **config):
    wrapped = peft_of(model, **config)
    wrapped.merge_adapter()
    return wrapped


def critic_of(model):
    return Qwen2ForSequenceClassification(model.config)


HELD = {
    "compiled": lambda m, t: torch.compile(m),
    "compiled, its state dict": lambda m, t: torch.compile(m).state_dict(),
    "compiled layers": lambda m, t: compiled_layers(m),
    "compiled layers, their state dict": lambda m, t: compiled_layers(m).state_dict(),
    "checkpointed": lambda m, t: checkpointed(m),
    "checkpointed and compiled, its state dict": lambda m, t: torch.compile(checkpointed(m)).state_dict(),
    "data parallel, its state dict": lambda m, t: torch.nn.DataParallel(m).state_dict(),
    "averaged": lambda m, t: torch.optim.swa_utils.AveragedModel(m),
    "averaged, its state dict": lambda m, t: torch.optim.swa_utils.AveragedModel(m).state_dict(),
    "a value head": lambda m, t: Around(pretrained_model=m, v_head=torch.nn.Linear(64, 1)),
    "a value head, its state dict": lambda m, t: Around(
        pretrained_model=m, v_head=torch.nn.Linear(64, 1)
    ).state_dict(),
    "trl's state dict of a value head": lambda m, t: {
        **m.state_dict(),
        "v_head.summary.weight": torch.zeros(1, 64),
    },
    "a policy and a critic": lambda m, t: Around(critic=critic_of(m), policy=torch.compile(m)),
    "one model, held twice": lambda m, t: Around(model=m, policy=m),
    "a TransformersWrapper": wrapper_of,
    "a TransformersWrapper's state dict": lambda m, t: wrapper_of(m, t).state_dict(),
    "a TensorDictModule": lambda m, t: TensorDictModule(m, in_keys=["ids"], out_keys=["logits"]),
    "a TransformersWrapper's tensordict": lambda m, t: TensorDict.from_module(wrapper_of(m, t)),
    "parameters of a loss": lambda m, t: TensorDictParams(TensorDict.from_module(wrapper_of(m, t))),
    "a loss": lambda m, t: GRPOLoss(wrapper_of(m, t)),
    "a loss's state dict": lambda m, t: GRPOLoss(wrapper_of(m, t)).state_dict(),
}


@pytest.mark.parametrize("held", HELD)
def test_whatever_is_around_a_model_its_own_weights_are_served(tied_llm, model, tied_paths, tokenizer, held):
    truth = log_probs(model)
    push_weights(tied_llm, AutoModelForCausalLM.from_pretrained(tied_paths[0]))
    push_weights(tied_llm, HELD[held](model, tokenizer))
    assert float((VLLMScorer(tied_llm).score([IDS])[0].double() - truth).abs().max()) < LOG_PROB_TOLERANCE


def test_a_model_in_ddp_is_served_by_both_its_forms(tied_llm, model, tied_paths, ranks):
    truth = log_probs(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=ranks)
    for source in (wrapped, wrapped.state_dict(), torch.compile(wrapped)):
        push_weights(tied_llm, AutoModelForCausalLM.from_pretrained(tied_paths[0]))
        push_weights(tied_llm, source)
        assert float((VLLMScorer(tied_llm).score([IDS])[0].double() - truth).abs().max()) < LOG_PROB_TOLERANCE


MERGED = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "an MLP too": {"target_modules": "all-linear"},
    "norms trained whole": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("config", MERGED)
def test_an_adapter_that_is_merged_is_served(tied_llm, model, config):
    base = log_probs(model)
    wrapped = merged(model, **MERGED[config])
    truth = log_probs(wrapped)
    assert (truth - base).abs().max() > 0.05
    push_weights(tied_llm, wrapped)
    assert float((VLLMScorer(tied_llm).score([IDS])[0].double() - truth).abs().max()) < LOG_PROB_TOLERANCE


def test_the_base_is_served_of_a_model_whose_adapter_is_switched_off(tied_llm, model):
    base = log_probs(model)
    wrapped = peft_of(model, modules_to_save=["norm"])
    sender = VLLMSyncScheme(tied_llm).create_sender()
    sender.register_model(wrapped)
    with wrapped.disable_adapter():
        sender.update_weights()
    assert float((VLLMScorer(tied_llm).score([IDS])[0].double() - base).abs().max()) < LOG_PROB_TOLERANCE
    sender.update_weights()
    truth = log_probs(wrapped)
    assert (truth - base).abs().max() > 0.05
    assert float((VLLMScorer(tied_llm).score([IDS])[0].double() - truth).abs().max()) < LOG_PROB_TOLERANCE


def with_two_adapters(model):
    wrapped = peft_of(model)
    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    wrapped.base_model.set_adapter(["default", "other"])
    return wrapped


def partly_merged(model):
    wrapped = peft_of(model)
    wrapped.base_model.model.model.layers[1].self_attn.v_proj.merge()
    return wrapped


UNMERGED = {
    "LoRA": (peft_of, lambda m: m),
    "norms trained whole": (lambda m: peft_of(m, modules_to_save=["norm"]), lambda m: m),
    "an MLP too, rank-stabilised": (
        lambda m: peft_of(m, target_modules="all-linear", use_rslora=True),
        lambda m: m,
    ),
    "two adapters": (with_two_adapters, lambda m: m),
    "partly merged": (partly_merged, lambda m: m),
    "compiled, in a value head": (peft_of, lambda m: Around(pretrained_model=torch.compile(m))),
}


@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.parametrize("kind", UNMERGED)
def test_lora_is_merged_for_the_push_and_the_trainer_keeps_its_own_weights(tied_llm, model, kind):
    make, around = UNMERGED[kind]
    base, wrapped = log_probs(model), make(model)
    before = copy.deepcopy(wrapped.state_dict())
    twin = copy.deepcopy(wrapped)
    twin.unmerge_adapter()
    truth = log_probs(twin.merge_and_unload())
    assert (truth - base).abs().max() > 0.05
    sender = VLLMSyncScheme(tied_llm).create_sender()
    sender.register_model(around(wrapped))
    sender.update_weights()
    assert float((VLLMScorer(tied_llm).score([IDS])[0].double() - truth).abs().max()) < LOG_PROB_TOLERANCE
    after = wrapped.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in wrapped.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_merged_into_the_bits_of_merge_and_unload(skeleton, model, dtype):
    wrapped = with_two_adapters(model.to(dtype))
    assert_same(skeleton.checked(wrapped), copy.deepcopy(wrapped).merge_and_unload())


def test_layers_without_lora_are_not_copied(skeleton, model):
    wrapped = peft_of(model, target_modules=["q_proj"])
    given = wrapped.base_model.model.model.layers[0].self_attn.k_proj.weight
    state = skeleton.checked(wrapped)
    assert state["model.layers.0.self_attn.k_proj.weight"].data_ptr() == given.data_ptr()


def test_merge_and_unload_is_a_plain_model(skeleton, model):
    plain = peft_of(model).merge_and_unload()
    assert_same(skeleton.checked(plain), plain)


def test_an_adapter_that_is_not_in_use_needs_no_merging(skeleton, model):
    wrapped = peft_of(model, target_modules=["q_proj"])
    wrapped.add_adapter("other", LoraConfig(target_modules=["v_proj"]))
    wrapped.merge_adapter()
    state, layer = skeleton.checked(wrapped), model.model.layers[0].self_attn
    assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], layer.q_proj.base_layer.weight)
    assert torch.equal(state["model.layers.0.self_attn.v_proj.weight"], layer.v_proj.base_layer.weight)


def assert_same(state, model):
    truth = model.state_dict()
    assert state.keys() == truth.keys() - {"lm_head.weight"}
    for name, tensor in state.items():
        assert torch.equal(tensor, truth[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trainer_in_16_bits_is_served_in_the_engines_float32_as_it_is(tied_llm, tied_paths, dtype):
    model = AutoModelForCausalLM.from_pretrained(tied_paths[1], dtype=dtype)
    push_weights(tied_llm, torch.compile(model))
    assert (
        float((VLLMScorer(tied_llm).score([IDS])[0].double() - log_probs(model)).abs().max())
        < LOG_PROB_TOLERANCE
    )


def test_a_trainer_in_float32_is_served_rounded_in_an_engine_of_16_bits(tied_paths, model):
    rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    with VLLMScorer(str(tied_paths[0]), **{**tiny.ENGINE_OPTIONS, "dtype": "bfloat16"}) as scorer:
        old = scorer.score([IDS])[0]
        push_weights(scorer, rounded)
        truth = scorer.score([IDS])[0]
        push_weights(scorer, AutoModelForCausalLM.from_pretrained(tied_paths[2]))
        push_weights(scorer, torch.compile(model))
        assert torch.equal(scorer.score([IDS])[0], truth)
    assert (truth.double() - log_probs(model)).abs().max() < 0.2 < (truth - old).abs().max()


def test_a_trainer_of_mixed_dtypes_is_served_as_it_is(tied_llm, model):
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else torch.bfloat16)
    push_weights(tied_llm, model)
    assert (
        float((VLLMScorer(tied_llm).score([IDS])[0].double() - log_probs(model)).abs().max())
        < LOG_PROB_TOLERANCE
    )


class _Marked(torch.Tensor):
    """A tensor whose numbers are elsewhere, as torchao's are."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("nothing may be computed with it")


def lora_of_tied_embeddings(model):
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        return peft_of(model, target_modules=["embed_tokens"])


def lora_with_bias(model):
    model.model.layers[0].self_attn.q_proj.bias.data += 0.1
    return peft_of(model, target_modules=["q_proj"], lora_bias=True)


def switched_off_while_merged(model):
    wrapped = merged(model)
    wrapped.base_model.disable_adapter_layers()
    return wrapped


def prompted(model):
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def in_zero3(model):
    parameter = model.model.layers[0].mlp.up_proj.weight
    parameter.ds_id, parameter.data = 7, torch.empty(0)
    return model


def quantised(model):
    model.hf_quantizer = torch.nn.Identity()
    return model


NORM = "model.norm.weight"
OFFERED = {
    "DoRA": (
        lambda m: peft_of(m, use_dora=True),
        r"layers\.0\.self_attn\.q_proj: its adapter \(PEFT's Linear\) is not merged.*merge_adapter\(\)",
    ),
    "DoRA, compiled": (lambda m: torch.compile(peft_of(m, use_dora=True)), "not merged.*merge_and_unload"),
    "LoRA with a bias": (lora_with_bias, r"q_proj: its adapter .* is not merged"),
    "LoRA of tied embeddings": (lora_of_tied_embeddings, "are tied in the engine's model but differ here"),
    "new rows of the embeddings": (lambda m: peft_of(m, trainable_token_indices=[1]), "not merged"),
    "OFT": (
        lambda m: get_peft_model(m, OFTConfig(target_modules=["q_proj"], oft_block_size=4)),
        "not merged",
    ),
    "switched off while merged": (switched_off_while_merged, "switched off while merged"),
    "a state dict of LoRA": (
        lambda m: peft_of(m).state_dict(),
        "does not show whether its adapters are merged",
    ),
    "a merged state dict": (
        lambda m: merged(m).get_base_model().state_dict(),
        "PEFT model: pass merge_and_unload",
    ),
    "prompt tuning": (prompted, "puts learned prompts"),
    "ZeRO-3": (in_zero3, r"up_proj\.weight is empty here: DeepSpeed's ZeRO-3 .*GatheredParameters"),
    "ZeRO-3, a state dict": (
        lambda m: in_zero3(m).state_dict(),
        r"up_proj\.weight is empty (?s:.*)GatheredParameters",
    ),
    "an empty state dict": (
        lambda m: {},
        "this dict has no weights(?s:.*)called on every rank.*rank 0 the whole weights: push there",
    ),
    "two policies": (
        lambda m: Around(policy=m, reference=copy.deepcopy(m)),
        r"holds 2 models, of which 2 .*policy \(Qwen2ForCausalLM\), reference \(Qwen2ForCausalLM\)",
    ),
    "two policies' state dict": (
        lambda m: Around(policy=m, reference=m).state_dict(),
        r"weights of 2 models.*'policy\.', 'reference\.'",
    ),
    "two critics": (lambda m: Around(a=critic_of(m), b=critic_of(m)), "holds 2 models, of which 0"),
    "names with and without": (
        lambda m: {**m.state_dict(), **torch.compile(m).state_dict()},
        "the same weights twice",
    ),
    "a quantised model": (quantised, r"Qwen2ForCausalLM is quantised \(Identity\).*dequantize"),
    "a tensor in 8 bits": (
        lambda m: {**m.state_dict(), NORM: torch.zeros(64, dtype=torch.int8)},
        rf"{NORM} is quantised \(torch\.Tensor, torch\.int8\)",
    ),
    "a tensor in float8": (
        lambda m: {**m.state_dict(), NORM: torch.zeros(64).to(torch.float8_e4m3fn)},
        "quantised .*float8_e4m3fn",
    ),
    "a tensor of another class": (
        lambda m: {**m.state_dict(), NORM: _Marked(torch.zeros(64))},
        rf"{NORM} is a .*\._Marked: no plain tensor",
    ),
    "offloaded": (lambda m: m.to("meta"), "on the meta device.*accelerate.*without offload"),
    "a file of torch.save": (
        lambda m: {"model": m.state_dict(), "step": 3},
        "model: expected a tensor, got OrderedDict. Pass the part under 'model'",
    ),
    "sparse": (
        lambda m: {**m.state_dict(), NORM: torch.zeros(64).to_sparse()},
        "sparse_coo: pass a dense one",
    ),
    "DDP, one missing": (
        lambda m: {f"module.{name}": t for name, t in m.state_dict().items() if name != NORM},
        rf"missing {NORM}\. Expected",
    ),
    "another value head": (
        lambda m: {**m.state_dict(), "value_head.weight": torch.zeros(1, 64)},
        r"unknown value_head\.weight",
    ),
}


@pytest.mark.parametrize("offered", OFFERED)
def test_what_cannot_be_made_plain_is_refused_by_what_it_is(skeleton, model, offered):
    make, message = OFFERED[offered]
    with pytest.raises(WeightsError, match=message):
        skeleton.checked(make(model))


def test_what_a_trainer_shares_by_hand_or_keeps_interleaved_is_written_under_all_its_names(policy_path):
    model = AutoModelForCausalLM.from_pretrained(policy_path)
    model.lm_head.weight = model.model.embed_tokens.weight  # the config says that they are two
    model.model.layers[1].mlp = model.model.layers[0].mlp
    skeleton = Skeleton(str(policy_path))
    fused = torch.randn(128, 2, 64)
    interleaved = {
        f"model.layers.0.mlp.{name}_proj.weight": fused[:, n] for n, name in enumerate(("gate", "up"))
    }
    state = skeleton.checked(model) | interleaved
    written = skeleton.write(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in skeleton.read(written.folder).items())


def test_what_a_module_remembers_beside_its_weights_is_left_out(skeleton, model):
    state = {**model.state_dict(), "model.layers.0.self_attn._extra_state": {"scale": 1.0}}
    assert skeleton.checked(state).keys() == skeleton.checked(model).keys()


def test_nothing_is_copied_of_weights_that_are_whole(skeleton, model):
    wrapped = torch.compile(checkpointed(model))
    where = {parameter.data_ptr() for parameter in model.parameters()}
    assert {tensor.data_ptr() for tensor in skeleton.checked(wrapped).values()} == where


def test_a_model_in_fsdp_is_gathered_on_every_rank_and_torchs_own_state_dict_comes_out_on_the_first(tmp_path):
    folder = tiny.build(tmp_path / "model", seed=3)
    command = [sys.executable, "-m", "tests.sharded"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        for rank in range(2)
    ]
    first, second = (json.loads(rank.communicate(timeout=200)[0].splitlines()[-1]) for rank in ranks)
    assert "called on every rank, gives rank 0 the whole weights" in second.pop(
        "FSDP2, torch's whole state dict"
    )
    assert first.pop("FSDP2, torch's whole state dict") == "the same"
    for results in (first, second):
        assert "the shards of one rank only" in results.pop("FSDP1, its sharded state dict")
        assert set(results.values()) == {"the same"}, results
