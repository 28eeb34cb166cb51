"""The same promises on an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests import tiny
from tests.oracle import Oracle
from vllm_kl import VLLMScorer, push_weights
from vllm_kl.errors import OptionError, WeightsError
from vllm_kl.plugin import kernel, receive_weights
from vllm_kl.weights.push import weights_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA GPU and pip install 'vllm-kl[gpu]'"
    ),
    pytest.mark.timeout(900),
]


PROMPT = list(range(40))
SEQUENCES = [[*PROMPT, 7, 8, 9], [*PROMPT, 7, 8, 10], [*PROMPT, 3]]
OPTIONS = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True}


def assert_close_to(oracle, got, ids, start):
    want = torch.tensor(oracle.log_probs(ids)[start:], dtype=torch.float64)
    # TF32 is off; other kernels than the CPU's.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("readout", ["pooling", "token_ids", "flat"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_every_readout_agrees_with_float64(ref_path, ref_oracle, readout, share_prefix):
    if readout == "token_ids" and not hasattr(SamplingParams, "prompt_logprob_token_ids"):
        pytest.skip("this vLLM has no prompt_logprob_token_ids: it needs 0.31")
    with VLLMScorer(str(ref_path), readout=readout, share_prefix=share_prefix, **OPTIONS) as scorer:
        assert scorer.readout == readout
        for got, ids in zip(scorer.score(SEQUENCES, 40), SEQUENCES, strict=True):
            assert_close_to(ref_oracle, got, ids, 40)


def test_temperature_and_best_tokens_agree_with_float64(ref_path, ref_oracle):
    with VLLMScorer(str(ref_path), **OPTIONS) as scorer:
        for best, ids in zip(scorer.score_topk(SEQUENCES, 4, 40, temperature=0.7), SEQUENCES, strict=True):
            want = (ref_oracle.logits(ids)[39:-1] / 0.7).log_softmax(-1).topk(4)
            assert torch.equal(best.token_ids, want.indices)
            torch.testing.assert_close(best.log_probs.double(), want.values, rtol=0, atol=1e-4)


def test_entropies_agree_with_float64(ref_path, ref_oracle):
    with VLLMScorer(str(ref_path), **OPTIONS) as scorer:
        _, entropies = scorer.score(SEQUENCES, 40, temperature=0.7, entropy=True)
        for got, ids in zip(entropies, SEQUENCES, strict=True):
            want = torch.tensor(ref_oracle.entropies(ids, 0.7)[40:], dtype=torch.float64)
            torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("hidden_size", "num_rows", "vocab_size"), [(256, 130, 20_001), (77, 3, 5), (64, 40, 1)]
)
def test_the_kernels_entropies_agree_with_float64(dtype, hidden_size, num_rows, vocab_size):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul(4 / hidden_size**0.5).to(dtype)
    left_out = torch.arange(num_rows) % vocab_size
    left_out[::3] = -1
    logits = hidden.double() @ weight.double().T
    logits[left_out >= 0] = logits[left_out >= 0].scatter(1, left_out[left_out >= 0, None], -torch.inf)
    # One number per row without a token in the sum: 0.
    want = torch.special.entr(logits.softmax(-1)).sum(-1).nan_to_num(0)
    got = torch.empty(num_rows, dtype=torch.float64, device="cuda")
    normalizer = kernel.log_normalizer(
        hidden.cuda(), weight.cuda(), left_out_N=left_out.cuda(), entropy_N=got
    )
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(normalizer.cpu().double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden_size", "num_rows"), [(256, 300), (256, 1), (77, 130), (8, 5), (1152, 129)])
def test_the_kernel_agrees_with_float64(dtype, hidden_size, num_rows):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(151_936, hidden_size, generator=generator).div(hidden_size**0.5).to(dtype)
    hidden[0] = weight[9].float().mul(20 * hidden_size**0.5).to(dtype)  # a row with one likely token
    logits = hidden.double() @ weight.double().T
    # Sums of products, in float32. Hopper's tensor cores add 16 products at a time and cut off what a float32
    # cannot hold, so the error grows with the hidden size if all products have the same sign (row 0).
    rtol = max(1e-6, hidden_size / 16 * 2**-23)
    within = {"rtol": rtol, "atol": 5e-6 * float(hidden.double().norm(dim=1).max())}
    got = kernel.log_normalizer(hidden.cuda(), weight.cuda(), scale=1 / 0.7).cpu()
    torch.testing.assert_close(got.double(), (logits / 0.7).logsumexp(-1), **within)
    ids = torch.randint(151_936, (num_rows, 3), generator=generator)
    got = kernel.token_logits(hidden.cuda(), weight.cuda(), ids.cuda()).cpu()
    torch.testing.assert_close(got.double(), logits.gather(1, ids), **within)
    best, _, normalizer = kernel.top_tokens(hidden.cuda(), weight.cuda(), 7, scale=1 / 0.7)
    torch.testing.assert_close(normalizer.cpu().double(), (logits / 0.7).logsumexp(-1), **within)
    torch.testing.assert_close(logits.gather(1, best.cpu()), logits.topk(7).values, **within)


def test_an_engine_that_slept_scores_the_same_and_gave_its_memory_back(ref_path):
    with VLLMScorer(
        str(ref_path), enable_sleep_mode=True, kv_cache_memory_bytes=20 << 30, **OPTIONS
    ) as scorer:
        before = scorer.score(SEQUENCES, 40)
        free_awake, _ = torch.cuda.mem_get_info()
        with scorer.asleep():
            free_asleep, _ = torch.cuda.mem_get_info()
            assert free_asleep - free_awake > 19 << 30
        for a, b in zip(before, scorer.score(SEQUENCES, 40), strict=True):
            assert torch.equal(a, b)
        scorer.check_frozen()


def assert_serves(scorer, path):
    oracle = Oracle(path)
    for share_prefix in (True, True, False):
        scorer.share_prefix = share_prefix
        for got, ids in zip(scorer.score(SEQUENCES, 40), SEQUENCES, strict=True):
            assert_close_to(oracle, got, ids, 40)


def test_after_a_push_and_a_refresh_the_new_weights_serve(tied_paths):
    states = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in tied_paths[:3]]
    with VLLMScorer(str(tied_paths[0]), **OPTIONS) as scorer:
        assert_serves(scorer, tied_paths[0])
        on_the_gpu = {name: tensor.cuda() for name, tensor in states[1].items()}  # where a trainer has them
        assert push_weights(scorer, on_the_gpu) == scorer.weight_version == 1
        assert_serves(scorer, tied_paths[1])
        assert scorer.refresh(states[2]) == 2
        assert_serves(scorer, tied_paths[2])
        scorer.check_frozen()


def test_a_push_reaches_an_engine_that_generates(tied_llm, tied_paths):
    for path in (tied_paths[1], tied_paths[0]):
        push_weights(tied_llm, AutoModelForCausalLM.from_pretrained(path))
        assert_serves(VLLMScorer(tied_llm), path)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL needs a GPU for the trainer and another one for the engine"
)
def test_a_push_by_nccl_reaches_an_engine_on_another_gpu(cluster, tied_paths):
    from torchrl.modules.llm import AsyncVLLM
    from vllm import AsyncEngineArgs

    args = AsyncEngineArgs(model=str(tied_paths[0]), enable_prefix_caching=True, **OPTIONS)
    llm = AsyncVLLM.launch(args, num_replicas=1)
    try:
        version = weights_of(llm).version
        ((used,),) = weights_of(llm)._on_workers(receive_weights.GPU, [[]])
        gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        free = next(gpu for gpu in gpus if receive_weights.uuid_of(gpu) != used)
        taken = next(gpu for gpu in gpus if receive_weights.uuid_of(gpu) == used)
        for path in (tied_paths[1], tied_paths[2]):
            model = AutoModelForCausalLM.from_pretrained(path).to(free)
            version += 1
            assert push_weights(llm, model, transport="nccl") == version
            assert_serves(VLLMScorer(llm), path)
        with pytest.raises(WeightsError, match="share a GPU"):
            push_weights(llm, model.to(taken), transport="nccl")
        with pytest.raises(WeightsError, match="are on cpu"):
            push_weights(llm, model.cpu(), transport="nccl")
        assert push_weights(llm, model) == version + 1  # by files
    finally:
        llm.shutdown()


def test_the_exact_kl_agrees_with_float64_on_both_devices(policy_path, ref_path, policy_oracle, ref_oracle):
    with VLLMScorer(str(policy_path), **OPTIONS) as policy, VLLMScorer(str(ref_path), **OPTIONS) as reference:
        for device in ("cpu", "cuda"):
            for kl, ids in zip(
                policy.exact_kl(reference, SEQUENCES, 40, device=device), SEQUENCES, strict=True
            ):
                a, b = (oracle.logits(ids)[39:-1].log_softmax(-1) for oracle in (policy_oracle, ref_oracle))
                torch.testing.assert_close(kl.double(), (a.exp() * (a - b)).sum(-1), rtol=1e-4, atol=2e-4)


def test_an_adapter_is_scored(policy_path, lora_paths, tmp_path):
    request = LoRARequest("adapter", 1, str(lora_paths[0]))
    with VLLMScorer(str(policy_path), lora_request=request, **{**OPTIONS, "dtype": "bfloat16"}) as scorer:
        oracle = Oracle(tiny.merge(tmp_path / "merged", policy_path, lora_paths[0]))
        without = Oracle(policy_path)
        for got, ids in zip(scorer.score(SEQUENCES, 40), SEQUENCES, strict=True):
            adapted, plain = (
                torch.tensor(each.log_probs(ids)[40:], dtype=torch.float64) for each in (oracle, without)
            )
            torch.testing.assert_close(got.double(), adapted, rtol=0, atol=0.1)  # bfloat16
            assert (got.double() - adapted).norm() < 0.5 * (got.double() - plain).norm()


def test_an_adapter_in_float32_is_refused(policy_path, lora_paths):
    request = LoRARequest("adapter", 1, str(lora_paths[0]))
    with pytest.raises(OptionError, match="no LoRA kernels in float32 on a GPU"):
        VLLMScorer(str(policy_path), lora_request=request, **OPTIONS)
